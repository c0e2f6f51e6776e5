"""Stage two: train a diffusion transformer from feature stores, with no encoder in memory.

Imports `storage`, never `pipeline`, ray, diffusers, timm, torchvision or PIL.
"""
