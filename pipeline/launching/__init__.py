"""Stage two on a Ray cluster: the ranks of one training run, and commands that run as tasks."""
