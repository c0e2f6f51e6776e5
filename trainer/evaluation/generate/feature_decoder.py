"""Pictures of an encoder's tokens, by the decoder of diffusers' AutoencoderRAE (arXiv 2510.11690).

Of that autoencoder only the decoder is built and loaded: its encoder, with its need for `transformers`, is half of its
weights and not wanted here. It takes tokens after the final norm without its affine part; the statistics by which the
autoencoder normalises latents cancel out. Weights are read as data. diffusers is imported inside functions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from storage import GroupReader
from storage.base.boundary import parse_json, read_regular
from storage.base.errors import UserError
from storage.identity import FeaturesIdentity
from storage.weights.file import open_weights
from storage.weights.names import bare
from storage.weights.tensors import Stored
from trainer.evaluation.generate.built_in import ENCODER_LAYER, ENCODER_SHA256, folder_of

RAE = "AutoencoderRAE"
CONFIG_FILE = "config.json"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
DECODER = "decoder."
MEAN, STD = "encoder_mean", "encoder_std"  # of pixels
COMPUTED = ("decoder_pos_embed",)
# What a name of ours has in it, by the encoder that an autoencoder says it has: timm's, or that of an AutoencoderRAE.
ENCODERS = {"dinov2": r"(?=.*dinov2)(?=.*reg)", "siglip2": r".*siglip.*v2|.*siglip2", "mae": r".*mae"}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)+")
FIX = "name a folder or hub id of diffusers' AutoencoderRAE"  # with --data.decoder, or --vae of generate


class FeatureDecoder(nn.Module):
    """Pixels (B, 3, H, W) in [−1, 1] of tokens (B, D, h, w)."""

    def __init__(self, decoder: Any, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.decoder = decoder
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def decode(self, tokens: Tensor) -> Tensor:
        """Row-major tokens, whose pixels are normalised as the encoder's input is."""
        logits = self.decoder(tokens.flatten(2).transpose(1, 2)).logits
        pixels: Tensor = self.decoder.unpatchify(logits) * self.std + self.mean
        return 2 * pixels - 1


def load_feature_decoder(
    where: str, features: GroupReader[FeaturesIdentity], device: torch.device, *, fetch: bool = True
) -> FeatureDecoder:
    """The decoder at a folder, or at a hub id ORG/NAME[/FOLDER]; without `fetch` only what lies on this machine.

    Raises UserError where there is none, or one of another encoder than made the features.
    """
    config_file, weight_file = _files(where, fetch)
    return _loaded(_settings(config_file, where), weight_file, features, where).to(device).eval()


def require_decoder(where: str, features: GroupReader[FeaturesIdentity], *, may_be_elsewhere: bool = False) -> None:
    """Raise UserError for a decoder in a folder here that is not of these features, and for what is neither a folder
    here nor spelled as a hub id, unless it `may_be_elsewhere`; no weight is read, and a hub is not asked.
    """
    if Path(folder_of(where)).is_dir():
        config_file, _ = _files(where, fetch=False)
        with _one_line(where):
            _require_fitting(_settings(config_file, where), features, where)
    elif not may_be_elsewhere and (Path(where).exists() or not HUB_ID.fullmatch(where)):
        raise UserError(
            f"the decoder {where} is no folder on this machine, and no hub id ORG/NAME[/FOLDER]; {FIX}, or leave "
            "--data.decoder out and name it to generate"
        )


def _settings(config_file: Path, where: str) -> dict[str, Any]:
    """An AutoencoderRAE's configuration; UserError for another class's."""
    settings = parse_json(dict[str, Any], read_regular(config_file), str(config_file), FIX)
    kind = settings.get("_class_name")
    if kind != RAE:
        raise UserError(f"{where} holds {kind}, and features are decoded by {RAE}; {FIX}")
    return settings


def _files(where: str, fetch: bool) -> tuple[Path, Path]:
    """Configuration and weights."""
    where = folder_of(where)
    if Path(where).is_dir():
        weights = next((Path(where) / name for name in WEIGHT_FILES if (Path(where) / name).is_file()), None)
        if weights is None or not (Path(where) / CONFIG_FILE).is_file():
            raise UserError(f"{where} must hold {CONFIG_FILE} and {WEIGHT_FILES[0]}; {FIX}")
        return Path(where) / CONFIG_FILE, weights
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    organisation, _, rest = where.partition("/")
    name, _, folder = rest.partition("/")
    try:
        config, weights = (
            Path(hf_hub_download(f"{organisation}/{name}", file, subfolder=folder or None, local_files_only=not fetch))
            for file in (CONFIG_FILE, WEIGHT_FILES[0])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"the decoder {where} cannot be had ({type(error).__name__}); {FIX}") from None
    return config, weights


def _loaded(
    settings: dict[str, Any], file: Path, features: GroupReader[FeaturesIdentity], where: str
) -> FeatureDecoder:
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

    with _one_line(where):
        width, side = _require_fitting(settings, features, where)
        decoder = RAEDecoder(
            hidden_size=width,
            num_patches=side**2,
            image_size=side * int(settings["patch_size"]),
            **{name: settings[name] for name in ("patch_size", "num_channels")},
            **{name: value for name, value in settings.items() if name.startswith("decoder_")},
        )
        with open_weights(file) as weights:
            entries = bare(weights.entries(), file)
            wanted = {n: e for n, e in entries.items() if n.startswith(DECODER) or n in (MEAN, STD)}
            tensors = weights.tensors({n: e for n, e in wanted.items() if isinstance(e, Stored)})
        state = {n.removeprefix(DECODER): t.float() for n, t in tensors.items() if n.startswith(DECODER)}
        decoder.load_state_dict({n: t for n, t in state.items() if n not in COMPUTED})
        mean, std = (tensors[name].float().reshape(1, 3, 1, 1) for name in (MEAN, STD))
    return FeatureDecoder(decoder, mean, std)


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """What a damaged configuration or weight file makes of the code that reads it, as UserError."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        first = " ".join(str(error).split())[:160]
        raise UserError(f"the decoder {where} cannot be loaded ({type(error).__name__}: {first}); {FIX}") from error


def _require_fitting(settings: dict[str, Any], features: GroupReader[FeaturesIdentity], where: str) -> tuple[int, int]:
    """Width and tokens a side of what a decoder takes. Raises UserError where the features are of something else."""
    encoder, width = str(settings["encoder_type"]), int(settings["encoder_hidden_size"])
    side = int(settings["encoder_input_size"]) // int(settings["encoder_patch_size"])
    _require_encoder(encoder, width, side, features, where)
    _require_tokens(settings, features, where)
    return width, side


def _require_encoder(encoder: str, width: int, side: int, features: GroupReader[FeaturesIdentity], where: str) -> None:
    identity = features.identity
    mine, ours = str(identity.encoder), (identity.width, math.prod(identity.token_grid))
    if re.match(ENCODERS.get(encoder, f".*{re.escape(encoder)}"), mine) and ours == (width, side**2):
        return
    raise UserError(
        f"{where} decodes {encoder} of width {width} on {side}×{side} tokens, and {features.path} is {mine}, "
        f"{identity.width} on {'×'.join(map(str, identity.token_grid))}; name a decoder of this encoder"
    )


def _require_tokens(settings: dict[str, Any], features: GroupReader[FeaturesIdentity], where: str) -> None:
    """Of the encoder whose weights the decoder names, if it names any, and of its final norm unless it says a block."""
    identity = features.identity
    sha256, layer = settings.get(ENCODER_SHA256), settings.get(ENCODER_LAYER)
    if sha256 is not None and sha256 != identity.weights_sha256:
        raise UserError(
            f"{where} decodes tokens of weights {str(sha256)[:12]}, and {features.path} is of weights "
            f"{str(identity.weights_sha256)[:12]}; name a decoder of this encoder"
        )
    if layer is not None and layer != identity.layer:
        raise UserError(
            f"{where} decodes tokens of {layer}, and {features.path} is of {identity.layer}; name a decoder of these"
        )
    if layer is None and str(identity.layer).startswith("block "):
        raise UserError(
            f"{where} decodes tokens after the final norm, and {features.path} is of {identity.layer}; precompute with "
            "--features ENCODER:layer=norm"
        )
