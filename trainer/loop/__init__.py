"""The training loop: what one step does, and what is logged and saved around it. Start at `train.py`."""
