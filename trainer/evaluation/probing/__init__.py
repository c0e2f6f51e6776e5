"""What a model's hidden states know: linear probes and CKNNA over blocks, times and checkpoints; their figures."""
