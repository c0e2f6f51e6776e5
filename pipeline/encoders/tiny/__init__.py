"""Built-in encoders for the tests, and the demo's VAE: real classes, trained by `train.py` on the built-in photographs.

`tiny-vae` is a diffusers AutoencoderKL (8× downsampling, 4 latent channels), `tiny-vit` a timm VisionTransformer (patch
16 at 128 px, so its 8×8 tokens lie on the grid of a patch-2 transformer over the VAE's 16×16 latents). They know 16
photographs and nothing else: never compare a model trained on them with anything.
"""

from pathlib import Path

TINY_VAE = Path(__file__).parent / "tiny-vae"
TINY_VIT = Path(__file__).parent / "tiny-vit"
RESOLUTION = 128
