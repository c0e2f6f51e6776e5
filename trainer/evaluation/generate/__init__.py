"""Images drawn from a run: noise and labels, sampling, decoding, files; and the grids drawn while it trains."""
