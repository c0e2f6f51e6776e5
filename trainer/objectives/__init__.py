"""What is minimised: the interpolant's velocity loss and the alignment loss."""
