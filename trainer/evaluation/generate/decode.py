"""Latents to pictures.

diffusers and PIL are imported inside functions, below `trainer/evaluation/` alone. (`export/diffusers_pipeline.py` is
a text that an export copies; no module of the trainer imports it.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from storage.base.errors import UserError
from storage.weights.names import plain_folder
from trainer.config.schema import TrainConfig
from trainer.data.feature_latents import without_affine
from trainer.data.groups import TrainingData
from trainer.data.latent_scale import LatentScale
from trainer.evaluation.generate.built_in import decoder_for, folder_of
from trainer.evaluation.generate.feature_decoder import FeatureDecoder, load_feature_decoder

DECODE_BATCH = 16
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
Rounding = Literal["round", "truncate"]
PIPELINE_FOLDER = "vae"  # where a whole pipeline's folder keeps it


def decoder_of(data: TrainingData, config: TrainConfig) -> str:
    """What makes pictures of a run's latents, as the run or its latents say, else the built-in one; "" for none."""
    said = config.data.decoder or str(data.latents.attributes["provenance"].get("decoder", ""))
    return said or (decoder_for(data.latents.identity) if data.of_features else "")


def to_decode(latents: Tensor, scale: LatentScale, data: TrainingData) -> Tensor:
    """What a decoder takes, of latents as the model has them: as they are stored, and features without the affine part
    of the final norm.
    """
    stored = scale.stored(latents)
    return without_affine(stored, data.latents) if data.of_features else stored


def load_decoder(vae: str, device: torch.device, *, fetch: bool = True, of: TrainingData | None = None) -> nn.Module:
    """The autoencoder at a diffusers directory, or at a hub id ORG/NAME[/FOLDER], of whichever class it says it is.

    Without `fetch`, only what lies on this machine will do. Of features as latents it is one that decodes those.
    Raises UserError when there is none to be had.
    """
    if of is not None and of.of_features:
        return load_feature_decoder(vae, of.latents, device, fetch=fetch)
    import diffusers

    repository, folder = location(vae)
    where = {"subfolder": folder, "local_files_only": not fetch}
    try:
        settings = diffusers.AutoencoderKL.load_config(repository, **where)
        kind: Any = getattr(diffusers, str(settings.get("_class_name", "AutoencoderKL")))
        is_model = isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)
        if not is_model:  # a pipeline could bring code
            raise OSError(f"{kind} is no model")
        if Path(repository).is_dir():
            where = {"local_files_only": True}
        with plain_folder(Path(repository) / folder, WEIGHT_FILES) as plain:
            model, loading = kind.from_pretrained(
                plain if Path(repository).is_dir() else repository,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,
                output_loading_info=True,
                **where,
            )
        if loading["missing_keys"]:  # which the library would draw at random
            raise OSError(f"{len(loading['missing_keys'])} of its weights are missing")
    except UserError:
        raise
    except (OSError, AttributeError, RuntimeError, ValueError, TypeError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the VAE {vae} cannot be loaded ({first}); pass --vae with a diffusers directory") from error
    return model.to(device).eval()


def location(vae: str) -> tuple[str, str]:
    """What diffusers calls the repository (a directory will do), and the folder in it."""
    vae = folder_of(vae)
    if Path(vae).is_dir():
        return vae, "" if (Path(vae) / "config.json").is_file() else PIPELINE_FOLDER
    organisation, _, rest = vae.partition("/")
    name, _, folder = rest.partition("/")
    return f"{organisation}/{name}", folder


@torch.inference_mode()
def decode_latents(
    latents: Tensor, decoder: nn.Module, rounding: Rounding = "round", on_decoded: Callable[[int], None] | None = None
) -> np.ndarray:
    """Images uint8 (N, H, W, 3) of latents as a decoder takes them (N, C, h, w), DECODE_BATCH at a time.

    `on_decoded(n)` hears of how many are decoded, from 0 on.
    """
    device = next(decoder.parameters()).device
    parts: list[Tensor] = []
    for i, part in enumerate(latents.split(DECODE_BATCH)):
        if on_decoded is not None:
            on_decoded(i * DECODE_BATCH)
        parts.append(_decoded(part.float().to(device), decoder).cpu())
    return to_uint8(torch.cat(parts), rounding).permute(0, 2, 3, 1).numpy()


def to_uint8(pixels: Tensor, rounding: Rounding) -> Tensor:
    """Numbers in [−1, 1] as uint8: the nearest, or, as most public scripts do it, the one below (`truncate`).

    Truncation makes images 0.5 of 255 darker on average.
    """
    scaled = (pixels.clamp(-1, 1) + 1) * 127.5
    return (scaled.round() if rounding == "round" else scaled).to(torch.uint8)


def decoder_sha256(vae: str) -> str | None:
    """SHA-256 of a decoder's weight file, in its folder or in the hub's cache; None where there is no such file."""
    repository, folder = location(vae)
    for name in WEIGHT_FILES:
        inside = f"{folder}/{name}" if folder else name
        file = Path(repository) / inside if Path(repository).is_dir() else _in_cache(repository, inside)
        if file is not None and file.is_file():
            with open(file, "rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
    return None


def _in_cache(repository: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _decoded(latents: Tensor, decoder: Any) -> Tensor:
    """Pixels (B, 3, H, W); an autoencoder of clips (Wan) is given clips of one frame."""
    if isinstance(decoder, FeatureDecoder):
        return decoder.decode(latents)
    if any(isinstance(layer, nn.Conv3d) for layer in decoder.modules()):
        frames: Tensor = decoder.decode(latents.unsqueeze(2)).sample
        return frames.squeeze(2)
    pixels: Tensor = decoder.decode(latents).sample
    return pixels


def _columns(n: int) -> int:
    """Columns of a full rectangle that is not much wider than high, else of the squarest grid with a gap at its end."""
    squarest = math.ceil(math.sqrt(n))
    return next((c for c in range(squarest, 2 * squarest + 1) if n % c == 0), squarest)


def grid(images: np.ndarray, columns: int = 0, gap: int = 2) -> np.ndarray:
    """One picture uint8 (H, W, 3) of images (N, h, w, 3) in rows, as square as it gets unless `columns` is given."""
    n, height, width, _ = images.shape
    columns = columns or _columns(n)
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def write_grid(images: np.ndarray, path: Path, columns: int = 0) -> np.ndarray:
    """A PNG of `grid(images, columns)`, which is returned too."""
    from PIL import Image

    canvas = grid(images, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas).save(path)
    return canvas
