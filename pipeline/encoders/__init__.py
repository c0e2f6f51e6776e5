"""Frozen encoders: images in, arrays for the store out. `registry` names them; one file a family runs them."""
