"""Autoencoders of diffusers: an image's posterior mean and standard deviation, or its latent without a posterior.

Input is x / 127.5 − 1, in [−1, 1]. What is stored is concat(mean, std) on the channel axis, unscaled: the trainer draws
z = (mean + std · ε − shift) · scale afresh at each visit. The standard deviation, not the log-variance, as REPA stores
it. A deterministic autoencoder (DC-AE) stores its latent, C channels, and its identity says `posterior: false`.

Any class of diffusers whose `encode` takes images, or clips of which an image is one frame (Wan), and gives
`latent_dist`, `latent` or `latents` will do. Channels and factor are found by running the architecture on the meta
device; an AutoencoderKL's follow from its configuration, which spares the driver four seconds of importing diffusers.

Where an autoencoder brings statistics by which its latents are normalised channel by channel, the identity has them,
and z = (x − mean) / std · scaling_factor, as diffusers' pipelines do it:

    latents_mean, latents_std       of the configuration (VA-VAE's, REPA-E's, Wan, Qwen-Image), or of the weights
    bn.running_mean, .running_var   of the weights, over patches of 2 × 2 pixels; std = √(var + ε) (Flux.2)

One that names neither statistics nor a scaling_factor is refused: nothing says what its latents would have to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.encoders.catalogue import VAES
from pipeline.encoders.precision import arithmetic
from pipeline.encoders.registry import EncoderSpec
from pipeline.encoders.settings import CONFIG_FILE, RAE, read_settings
from pipeline.encoders.weights import MissingWeightsError, absent, file_sha256, hub_file
from storage.base.boundary import checked
from storage.base.errors import UserError
from storage.identity import LatentsIdentity
from storage.normalisation import Normalisation, made
from storage.weights.file import open_weights
from storage.weights.names import bare, plain_folder
from storage.weights.tensors import Stored

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
PROBE_PIXELS = 256
IN_WEIGHTS = (("bn.running_mean", "bn.running_var"), ("latents_mean", "latents_std"))


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What an autoencoder's latents are."""

    class_name: str
    channels: int
    factor: int
    posterior: bool
    scale: float | None  # None: the configuration names none
    shift: float
    in_weights: tuple[str, str, float] | None = None  # names of mean and deviation or variance, and its ε
    normalisation: Normalisation | None = None


def find_directory(model: str, weights: Path | None, *, fetch: bool = True) -> Path:
    """The directory of an autoencoder's files: a path, or `org/name[/subfolder]` on the hub.

    Raises UserError for a folder that will not do, MissingWeightsError where the hub's files are not at hand.
    """
    if weights is not None or Path(model).is_dir():
        directory = weights or Path(model)
        if not (directory / CONFIG_FILE).is_file() or not any((directory / name).is_file() for name in WEIGHT_FILES):
            raise UserError(
                f"VAE directory {directory} must hold {CONFIG_FILE} and {WEIGHT_FILES[0]} (as save_pretrained writes)"
            )
        return directory
    if "/" not in model:
        raise UserError(
            f"VAE {model!r} is neither a directory nor ORG/NAME on the hub; name one of these, or a VAE that "
            "`python -m pipeline encoders` lists"
        )
    parts = model.split("/")
    repository, prefix = "/".join(parts[:2]), "".join(f"{folder}/" for folder in parts[2:])
    try:
        config = hub_file(repository, prefix + CONFIG_FILE, fetch=fetch)
        hub_file(repository, prefix + WEIGHT_FILES[0], fetch=fetch)
    except LookupError as error:
        include = f" --include '{prefix}*'" if prefix else ""
        raise MissingWeightsError(
            f"weights of VAE {model} are {absent(error, fetch)} "
            f"`hf download {repository}{include}` and copy the folder here, then pass "
            "--latents-weights FOLDER"
        ) from None
    return config.parent


def describe(spec: EncoderSpec, *, resolution: int) -> LatentsIdentity:
    """Identity of the latents."""
    directory = find_directory(spec.model, spec.weights, fetch=spec.fetch)
    geometry = read_geometry(directory)
    if resolution % geometry.factor:
        raise UserError(f"--resolution must be a multiple of {geometry.factor} for {spec.store_name}, got {resolution}")
    side = resolution // geometry.factor
    return LatentsIdentity(
        encoder=f"diffusers.{geometry.class_name}",
        weights_sha256=file_sha256(weight_file(directory)),
        preprocessing="x/127.5-1",
        stored="concat(posterior mean, posterior std), unscaled" if geometry.posterior else "latent, unscaled",
        posterior=None if geometry.posterior else False,
        latent_channels=geometry.channels,
        latent_size=(side, side),
        latent_scale_factor=1.0 if geometry.scale is None else geometry.scale,
        latent_shift_factor=geometry.shift,
        latent_normalisation=geometry.normalisation.plain() if geometry.normalisation else None,
    )


def outline(spec: EncoderSpec, *, resolution: int) -> LatentsIdentity | None:
    """The latents' shape, which the catalogue knows without the weights; None for a VAE that is not in it."""
    known = VAES.get(spec.store_name)
    if known is None:
        return None
    if resolution % known.factor:
        raise UserError(f"--resolution must be a multiple of {known.factor} for {spec.store_name}, got {resolution}")
    side = resolution // known.factor
    return LatentsIdentity(
        posterior=None if known.posterior else False, latent_channels=known.channels, latent_size=(side, side)
    )


def read_geometry(directory: Path) -> Geometry:
    """What the latents of the autoencoder in `directory` are. Raises UserError when it cannot be used."""
    settings = read_settings(directory)
    name = settings.get("_class_name", "AutoencoderKL")
    geometry = geometry_of_kl(settings) if name == "AutoencoderKL" else probe(settings, name, directory)
    normalisation = statistics_of(settings, geometry, directory)
    if normalisation is not None and geometry.shift:
        raise UserError(
            f"{directory} names latents_mean and a shift_factor of {geometry.shift}, of which only one can be meant; "
            f"remove one from its {CONFIG_FILE}"
        )
    if normalisation is None and geometry.scale is None:
        raise UserError(
            f"{directory} holds a {name} that names neither a scaling_factor nor latents_mean and latents_std, so how "
            "its latents are normalised is not known; name another VAE"
        )
    return replace(geometry, normalisation=normalisation)


def statistics_of(settings: Mapping[str, Any], geometry: Geometry, directory: Path) -> Normalisation | None:
    """The statistics that an autoencoder brings, None where it brings none. Raises UserError where they do not fit."""
    mean, std = settings.get("latents_mean"), settings.get("latents_std")
    if mean is not None or std is not None:
        where, fix = f"{directory / CONFIG_FILE}: latents_mean and latents_std", "copy the folder again"
        mean, std = (checked(list[float], _flat(values), where, fix) for values in (mean, std))
        source = f"latents_mean and latents_std of the {geometry.class_name}"
        return made(mean, std, channels=geometry.channels, source=source, where=where)
    if geometry.in_weights is None:
        return None
    *names, epsilon = geometry.in_weights
    file = weight_file(directory)
    with open_weights(file) as weights:
        entries = bare(weights.entries(), file)
        stored = {name: entries[name] for name in names if isinstance(entries.get(name), Stored)}
        if len(stored) < len(names):
            raise UserError(
                f"{file} has no {names[0]} and {names[1]}, by which its latents are normalised; copy it again"
            )
        first, second = (weights.tensors(stored)[name].double().flatten() for name in names)
    std = (second + epsilon).sqrt() if names[1].endswith("var") else second
    source = f"{names[0]} and {names[1]} of the {geometry.class_name}"
    return made(
        first.tolist(),
        std.tolist(),
        channels=geometry.channels,
        source=source,
        where=str(file),
        of_patches=names[1].endswith("var"),
    )


def _flat(values: Any) -> Any:
    """Numbers that lie in lists, (1, C, 1, 1) say, in one."""
    while isinstance(values, list) and len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if isinstance(values, list) and values and all(isinstance(value, list) for value in values):
        return [inner for value in values for inner in (_flat([value]) if isinstance(value, list) else [value])]
    return values


def geometry_of_kl(settings: Mapping[str, Any]) -> Geometry:
    """An AutoencoderKL's geometry, with its constructor's defaults."""
    return Geometry(
        class_name="AutoencoderKL",
        channels=settings.get("latent_channels", 4),
        factor=2 ** (len(settings.get("block_out_channels", (64,))) - 1),
        posterior=True,
        scale=settings.get("scaling_factor", 0.18215),
        shift=settings.get("shift_factor") or 0.0,
    )


def probe(settings: dict[str, Any], name: str, directory: Path) -> Geometry:
    """Any autoencoder's geometry, by running it without memory."""
    if name == RAE:
        raise UserError(
            f"{directory} holds an {RAE}, whose latents are its encoder's tokens: --latents {directory} stores these, "
            "as features"
        )
    import diffusers

    kind: Any = getattr(diffusers, name, None)
    is_model = isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)
    if not is_model:
        raise UserError(f"{directory} holds a {name}, which diffusers {diffusers.__version__} does not know as a model")
    try:
        with torch.device("meta"), torch.inference_mode():
            model = kind.from_config(settings).eval()
            images = torch.empty(1, 3, PROBE_PIXELS, PROBE_PIXELS)
            latent = latents_of(model.encode(as_clips(images) if takes_clips(model) else images))
        channels, height, width = latent[0].shape[1:]
    except Exception as error:  # classes for sound and proteins each fail in a way of their own
        first = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise UserError(f"{directory} holds a {name}, which does not encode images to latents ({first})") from error
    assert height == width
    buffers = dict(model.named_buffers())
    in_weights = next(
        (
            (a, b, float(getattr(getattr(model, "bn", None), "eps", 0.0)))
            for a, b in IN_WEIGHTS
            if {a, b} <= buffers.keys()
        ),
        None,
    )
    scale = model.config.get("scaling_factor")
    return Geometry(
        class_name=name,
        channels=channels,
        factor=PROBE_PIXELS // height,
        posterior=len(latent) == 2,
        scale=None if scale is None else float(scale),
        shift=float(model.config.get("shift_factor") or 0.0),
        in_weights=in_weights,
    )


def takes_clips(model: nn.Module) -> bool:
    """Whether an autoencoder's convolutions are of clips (B, C, T, H, W), of which an image is one of one frame."""
    return any(isinstance(layer, nn.Conv3d) for layer in model.modules())


def as_clips(images: Tensor) -> Tensor:
    """Clips of one frame (B, C, 1, H, W) of images (B, C, H, W)."""
    return images.unsqueeze(2)


def load(spec: EncoderSpec, *, resolution: int, device: torch.device) -> VAE:
    """Load the VAE; `resolution` is taken as it comes, the network being convolutional."""
    directory = find_directory(spec.model, spec.weights)
    return VAE(directory, device, precision=spec.precision, compiled=spec.compiled)


def load_whole(directory: Path) -> Any:
    """The autoencoder in a directory, float32 on the CPU. Raises UserError where its file lacks weights."""
    import diffusers

    name = read_settings(directory).get("_class_name", "AutoencoderKL")
    with plain_folder(directory, WEIGHT_FILES) as folder:
        model, loading = getattr(diffusers, name).from_pretrained(
            folder,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := loading["missing_keys"]:  # which the library would draw at random
        raise UserError(
            f"{weight_file(directory)} lacks {len(missing)} weights of its {name}, such as {sorted(missing)[0]}; "
            "pass the right file"
        )
    return model


class VAE:
    """An autoencoder on a device. On a GPU in channels-last order, which its convolutions want; same numbers."""

    def __init__(
        self, directory: Path, device: torch.device, *, precision: str = "fp32", compiled: bool = False
    ) -> None:
        model = load_whole(directory)
        self.of_clips = takes_clips(model)
        of_images = device.type == "cuda" and not self.of_clips
        self.memory_format = torch.channels_last if of_images else torch.contiguous_format
        self.model = model.to(device, memory_format=self.memory_format).eval().requires_grad_(False)
        self.device, self.precision = device, precision
        if compiled:
            self.model.encoder.compile(dynamic=False)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """`moments` float16 (B, 2C, h, w), or (B, C, h, w) without a posterior, of images uint8 (B, H, W, 3)."""
        x = images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = as_clips(x) if self.of_clips else x
        with arithmetic(self.precision, self.device):
            encoded = self.model.encode(x.contiguous(memory_format=self.memory_format))
        moments = torch.cat(latents_of(encoded), dim=1)
        return {"moments": moments.contiguous().half()}

    @torch.inference_mode()
    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images uint8 (B, H, W, 3) of unscaled latents (B, C, h, w)."""
        z = torch.from_numpy(np.ascontiguousarray(latents)).to(self.device, torch.float32)
        with arithmetic("fp32", self.device):
            decoded = self.model.decode(as_clips(z)).sample.squeeze(2) if self.of_clips else self.model.decode(z).sample
            pixels = (decoded.float().clamp(-1, 1) + 1) * 127.5
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def latents_of(encoded: Any) -> tuple[Tensor, ...]:
    """Posterior mean and standard deviation, or the latent alone, float32 (B, C, h, w), of what `encode` returned.

    The standard deviation is exp(log-variance / 2), taken in float32 whatever the arithmetic. A clip's one frame is its
    image's.
    """
    if hasattr(encoded, "latent_dist"):
        posterior = encoded.latent_dist
        arrays: tuple[Tensor, ...] = (posterior.mean.float(), (0.5 * posterior.logvar.float()).exp())
    else:
        arrays = ((encoded.latent if hasattr(encoded, "latent") else encoded.latents).float(),)
    return tuple(each.squeeze(2) if each.ndim == 5 else each for each in arrays)


def weight_file(directory: Path) -> Path:
    """The weights in a diffusers directory."""
    return next(directory / name for name in WEIGHT_FILES if (directory / name).is_file())
