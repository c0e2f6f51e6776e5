"""Ray: joining a cluster or starting one of our own, its environment and folder, and what each task asks of it."""
