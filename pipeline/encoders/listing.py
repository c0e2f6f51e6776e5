"""`python -m pipeline encoders`: every encoder that has a name, without importing torch or building one."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.encoders.catalogue import VAES, VISION, VisionModel

RESOLUTION = 256
NOTES = """
Preprocessing starts from the ADM centre crop / 255 and goes from left to right; 256→224 is bicubic without
antialiasing. GFLOP count 2 a multiply-add, one image of 256 px; 512 px has four times the tokens and latents.

Any other diffusers autoencoder: --latents DIRECTORY, or ORG/NAME[/FOLDER] on the hub.
Any other vision transformer of timm: --features timm:NAME, say timm:vit_base_patch16_224.augreg_in21k:layer=8
Options behind a name: layer=N, the output of block N without norm, or layer=norm; norm=plain, the final norm without
its affine part; tokens=patch|cls|both; precision=fp32|tf32|fp16|bf16 (a VAE's too). Several in one pass:
--features dinov2-vitb14,clip-vitl14
Weights come from the hub's cache, the hub, or files: --features-weights FILE or NAME=FILE,NAME=FILE, in timm's layout
or as their authors released them."""


def list_encoders() -> str:
    """The tables and what else can be named."""
    latents = [("VAE", "latent", "GFLOP", "preprocessing", "weights")]
    for name, vae in VAES.items():
        side = RESOLUTION // vae.factor
        shape = f"{vae.channels}×{side}×{side} {'mean, std' if vae.posterior else 'no posterior'}"
        latents.append((name, shape, f"{vae.gflop_256:.0f}", "2x − 1", _built_in(vae.model) or vae.model))
    features = [("vision encoder", "tokens×width", "GFLOP", "features", "preprocessing", "weights")]
    for name, model in VISION.items():
        resolution = model.resolution or RESOLUTION
        features.append(
            (
                name,
                f"{model.n_tokens(resolution)}×{model.width}{f' ({resolution} px)' if model.resolution else ''}",
                f"{model.gflop(resolution):.0f}",
                _features(model),
                _preprocessing(model, resolution),
                _built_in(model.model) or model.repository or model.original,
            )
        )
    return f"{_table(latents)}\n\n{_table(features)}\n{NOTES}"


def _features(model: VisionModel) -> str:
    where = "final norm" if model.layer is None else f"block {model.layer}"
    return f"{where}{', cls' if model.has_cls else ''}"


def _preprocessing(model: VisionModel, resolution: int) -> str:
    words = model.preprocessing.describe(resolution).removeprefix("x/255, ")
    for longer, shorter in ((" mean/std", ""), ("bicubic ", ""), ("->", "→"), (" without antialias", "")):
        words = words.replace(longer, shorter)
    return words


def _built_in(model: str) -> str:
    return "built in" if model.startswith("/") else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
