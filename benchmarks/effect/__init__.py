"""The study of what REPA does to training (`python -m benchmarks.repa_effect`): its arms, measures and report."""
