"""Alignment of hidden states with features: one file a kind, and the projector between them."""
