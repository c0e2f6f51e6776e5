"""Stage one: images and frozen encoders in, feature stores out, on a Ray cluster.

Imports `storage`, never `trainer`. Encoder libraries are imported where the encoders run, not here.
"""
