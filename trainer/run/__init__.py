"""A run's folder: its checkpoints, metrics and resume; and runs made from public checkpoints."""
