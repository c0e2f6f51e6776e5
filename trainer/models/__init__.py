"""Diffusion transformers, with the public checkpoints' parameter names and shapes."""
