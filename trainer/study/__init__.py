"""Ablations: the file that names the runs, and what trains them."""
