"""What a step reads: the groups of a store, batches of them in the order of training, codes back to numbers."""
