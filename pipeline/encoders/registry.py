"""Every encoder by name, what it writes, and how it is loaded. Importing this file imports no encoder library.

A name may carry options, `NAME:layer=8:tokens=patch:precision=fp16`:

    layer=N         the output of block N, counted from 1, without the final norm; layer=norm: after the final norm
    norm=plain      the final norm without its affine part, as RAE's latents are
    tokens=         patch, cls or both
    precision=      fp32, tf32, bf16 or fp16 for this encoder (`precision.py`)

`catalogue.py` lists the names; `timm:NAME` is any vision transformer of timm. A family is a module with two functions
of the same signature as its siblings':

    describe(spec, resolution) -> Identity     everything that determines the numbers, weights' SHA-256 too
    load(spec, resolution, device) -> Encoder

A family may have a third, `final_norm(spec)`: weight and bias of its final norm, which are recorded beside features.
One whose weights may be missing has a fourth, `outline(spec, resolution)`: what `describe` says that needs no weights,
for a dry run.

`describe` builds no model on a device, but finds the weights and hashes them, so that missing weights end a run before
it starts.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.encoders.catalogue import VAES, VISION, VisionModel
from pipeline.encoders.precision import ARITHMETIC
from pipeline.encoders.settings import CONFIG_FILE, holds_rae
from storage import codecs
from storage.base.errors import UserError
from storage.codecs import PLAIN, Codec, codec_named
from storage.final_norm import ATTRIBUTE
from storage.identity import Identity

if TYPE_CHECKING:
    from torch import Tensor

TIMM = "timm:"
OPTION = r":(?=[a-z]+=)"  # what parts a name from its options
TOKENS = ("patch", "cls", "both")
NORMS = ("affine", "plain")


class Encoder(Protocol):
    """A loaded encoder."""

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Arrays (B, *row_shape) by name, on its device, of images uint8 (B, H, W, 3) on any.

        All are float16 but `patches` (B, T, D), which is float32: the group's codec makes of it what is stored.
        Numbers that are not finite are found by whoever takes the arrays to the host; to look here would be to wait.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """An encoder as asked for. `weights` overrides where its weights are looked for."""

    kind: str  # "latents" or "features"
    store_name: str  # its group's name in a store
    family: str  # the module below pipeline.encoders that runs it
    model: str  # what that module loads: a hub id, a directory, a timm name
    weights: Path | None = None
    decoder: str = ""  # what decodes them, a hub id or directory: of latents, and of an AutoencoderRAE's tokens
    codec: Codec = PLAIN  # features: how patch tokens are stored
    vision: VisionModel | None = None  # features: what the catalogue knows; None: timm is asked
    layer: int | None = None  # features: of this block, counted from 1; None: of the final norm
    plain_norm: bool = False  # features: of the final norm without its affine part
    tokens: str = "both"  # features: "patch", "cls" or "both"
    precision: str = "fp32"
    compiled: bool = False
    fetch: bool = True  # whether weights that are not at hand may be taken from the hub


@dataclass(frozen=True, kw_only=True)
class Request:
    """A name with its options taken apart."""

    name: str
    options: Mapping[str, str]

    @classmethod
    def parse(cls, text: str, allowed: Sequence[str]) -> Request:
        """From NAME[:key=value…]. Raises UserError for an option that is not `allowed`."""
        name, *parts = re.split(OPTION, text)
        options = dict(part.split("=", 1) for part in parts)
        unknown = sorted(options.keys() - set(allowed))
        if unknown or len(options) < len(parts):
            raise UserError(f"{text}: options are {', '.join(f'{key}=' for key in allowed)}, each once; got {parts}")
        if options.get("precision", "fp32") not in ARITHMETIC:
            raise UserError(f"{text}: precision= is one of {', '.join(ARITHMETIC)}")
        return cls(name=name, options=options)


def resolve_latents(
    text: str,
    weights: Path | None = None,
    dtype: str = "float16",
    *,
    precision: str = "fp32",
    compiled: bool = False,
    fetch: bool = False,
) -> EncoderSpec:
    """The VAE `text`: a known name, a diffusers directory, or a hub id. Raises UserError for anything else.

    Of an AutoencoderRAE, whose latents are tokens, a features group is made, in the codec `dtype` (`rae.py`). What a
    hub id is says its configuration, which is taken from the hub's cache or, with `fetch`, from the hub.
    """
    request = Request.parse(text, ("precision",))
    name, precision = request.name, request.options.get("precision", precision)
    weights = vae_folder(weights) if weights else None
    folder = weights
    if name in VAES:
        known = VAES[name]
        if precision == "fp16" and not known.float16:
            raise UserError(f"{name} overflows in float16; pass --latents {name}:precision=tf32, bf16 or fp32")
        decoder = known.decoder or (str(weights) if weights else known.model)
        store_name, family, model = name, known.family, known.model
    elif Path(name).is_dir():
        store_name, family, model = Path(name).absolute().name, "vae", str(vae_folder(Path(name)))
        decoder, folder = model, weights or Path(model)
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*){1,2}", name):
        store_name, family, model, decoder = name.replace("/", "--"), "vae", name, str(weights) if weights else name
        folder = weights or hub_folder(name, fetch=fetch)
    else:
        raise UserError(
            f"unknown VAE {name!r}; name one of {', '.join(VAES)}, an existing diffusers directory, or a hub id "
            "(org/name, org/name/folder)"
        )
    if folder is not None and holds_rae(folder):
        return EncoderSpec(
            kind="features",
            store_name=store_name,
            family="rae",
            model=model,
            weights=weights,
            decoder=decoder,
            codec=codec_named(dtype),
            plain_norm=True,
            tokens="patch",
            precision=precision,
            compiled=compiled,
        )
    return EncoderSpec(
        kind="latents",
        store_name=store_name,
        family=family,
        model=model,
        weights=weights,
        decoder=decoder,
        precision=precision,
        compiled=compiled,
    )


def hub_folder(model: str, *, fetch: bool) -> Path | None:
    """Where the configuration of ORG/NAME[/FOLDER] lies on this machine; None where it is not to be had."""
    from pipeline.encoders.weights import hub_file

    organisation, name, *folders = model.split("/")
    try:
        return hub_file(f"{organisation}/{name}", "/".join([*folders, CONFIG_FILE]), fetch=fetch).parent
    except LookupError:
        return None  # whoever asks for the weights says so


def vae_folder(directory: Path) -> Path:
    """The absolute path of a VAE's own folder, of which a whole diffusers pipeline has one."""
    inner = directory / "vae"
    return (inner if (inner / "config.json").is_file() else directory).absolute()


def resolve_features(
    text: str,
    weights: Path | None = None,
    dtype: str = "float16",
    *,
    precision: str = "fp32",
    compiled: bool = False,
) -> EncoderSpec:
    """The vision encoder `text`, its patch tokens in the codec `dtype`. Raises UserError naming the known ones.

    The group is named after the encoder, and after layer and tokens where they are not its default.
    """
    codec = codec_named(dtype)
    request = Request.parse(text, ("layer", "norm", "tokens", "precision"))
    known = VISION.get(request.name)
    if known is None and not re.fullmatch(rf"{TIMM}[\w.-]+", request.name):
        raise UserError(
            f"unknown vision encoder {request.name!r}; there are {', '.join(VISION)}, and {TIMM}NAME for any vision "
            "transformer of timm (`python -m pipeline encoders` tells more)"
        )
    default_tokens = "both" if known and known.has_cls else "patch"
    layer, tokens = _layer(request, known), request.options.get("tokens", default_tokens)
    norm = request.options.get("norm", "affine")
    if norm not in NORMS or (norm == "plain" and layer is not None):
        raise UserError(f"{text}: norm= is one of {', '.join(NORMS)}, and of layer=norm")
    if tokens not in TOKENS:
        raise UserError(f"{text}: tokens= is one of {', '.join(TOKENS)}")
    if codec != PLAIN and tokens == "cls":
        raise UserError(
            f"{text}: --features-dtype {dtype} quantises patch tokens, and only the class token is asked for"
        )
    name = request.name.removeprefix(TIMM)
    if layer != (known.layer if known else None):
        name += "-norm" if layer is None else f"-layer{layer}"
    if norm == "plain":
        name += "-plain"
    if tokens != default_tokens:
        name += f"-{tokens}"
    return EncoderSpec(
        kind="features",
        store_name=name,
        family=known.family if known else "timm_vit",
        model=known.model if known else request.name.removeprefix(TIMM),
        weights=weights.absolute() if weights else None,
        codec=codec,
        vision=known,
        layer=layer,
        plain_norm=norm == "plain",
        tokens=tokens,
        precision=request.options.get("precision", precision),
        compiled=compiled,
    )


def resolve_all(names: str, weights: str, kind: str, resolve: Callable[..., EncoderSpec]) -> list[EncoderSpec]:
    """The encoders of a comma list, each with its weights; none for "none".

    `weights` is one path when one encoder is asked for, else NAME=PATH,NAME=PATH for those that need one; the layers of
    one encoder share theirs. Raises UserError for what names nothing, and for a group asked for twice.
    """
    if names == "none":
        return []
    asked = [name.strip() for name in names.split(",")]
    bare = [re.split(OPTION, name)[0] for name in asked]
    paths: dict[str, str] = {}
    if weights and not any(weights.startswith(f"{name}=") for name in bare):
        if len(set(bare)) > 1:
            raise UserError(f"--{kind}-weights of several encoders are NAME=PATH,NAME=PATH, got {weights!r}")
        paths = {bare[0]: weights}
    elif weights:
        for part in weights.split(","):
            name, _, path = part.partition("=")
            if name not in bare or not path or name in paths:
                raise UserError(f"--{kind}-weights: {part!r} is no NAME=PATH of one of {', '.join(bare)}, each once")
            paths[name] = path
    specs = [
        resolve(text, weights=Path(paths[name]) if name in paths else None)
        for text, name in zip(asked, bare, strict=True)
    ]
    groups = [spec.store_name for spec in specs]
    twice = next((name for name in groups if groups.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--{kind} {names} asks for {kind}/{twice} twice; name each encoder once")
    return specs


def _layer(request: Request, known: VisionModel | None) -> int | None:
    asked = request.options.get("layer")
    if asked is None:
        return known.layer if known else None
    if asked == "norm":
        return None
    if not asked.isdecimal() or int(asked) < 1 or (known and int(asked) > known.depth):
        blocks = f"1 to {known.depth}" if known else "counted from 1"
        raise UserError(f"{request.name}: layer= is a block, {blocks}, or norm, got {asked!r}")
    return int(asked)


def describe(spec: EncoderSpec, *, resolution: int) -> Identity:
    """The encoder's part of a group's identity. Raises UserError when its weights are missing, with the remedy."""
    return _completed(spec, _family(spec).describe(spec, resolution=resolution), resolution)


def outline(spec: EncoderSpec, *, resolution: int) -> Identity | None:
    """As `describe`, without the weights: what only they could tell is None in it. None where they tell the shapes."""
    of_family = getattr(_family(spec), "outline", None)
    identity = of_family(spec, resolution=resolution) if of_family is not None else None
    return None if identity is None else _completed(spec, identity, resolution)


def _family(spec: EncoderSpec) -> Any:
    return importlib.import_module(f"pipeline.encoders.{spec.family}")


def _completed(spec: EncoderSpec, identity: Identity, resolution: int) -> Identity:
    return replace(
        identity,
        kind=spec.kind,
        name=spec.store_name,
        crop="adm-center-crop",
        resolution=resolution,
        dtype=spec.codec.dtype if spec.kind == "features" else "float16",
        arithmetic=ARITHMETIC[spec.precision] + (", torch.compile" if spec.compiled else ""),
        codec=spec.codec.identity,
    )


def load(spec: EncoderSpec, *, resolution: int, device: Any) -> Encoder:
    """Load the encoder onto a torch device."""
    return _family(spec).load(spec, resolution=resolution, device=device)


def provenance(spec: EncoderSpec) -> dict[str, str]:
    """What is recorded beside the identity: where the weights were asked for and what decodes the latents."""
    where = str(spec.weights) if spec.weights else spec.model
    return {"weights": where, **({"decoder": spec.decoder} if spec.decoder else {})}


def attributes(spec: EncoderSpec) -> dict[str, Any]:
    """What a group says of its numbers beside the identity: the affine part of features' final norm, where it is known.

    It is read from the weight file, under the name that timm and most originals give it.
    """
    if spec.kind != "features" or spec.layer is not None or spec.plain_norm:
        return {}
    final_norm = getattr(_family(spec), "final_norm", None)
    weights = final_norm(spec) if final_norm is not None else None
    return {ATTRIBUTE: weights.packed()} if weights is not None else {}


def encode_images(encoder: Encoder, images: np.ndarray) -> dict[str, np.ndarray]:
    """What the encoder makes of images uint8 (B, H, W, 3), all in the host's memory; patch tokens as float16.

    Raises UserError for NaN, infinity, and what float16 cannot hold.
    """
    import torch

    arrays = to_host(encoder.encode(torch.from_numpy(images)))
    if codecs.TOKENS in arrays:
        arrays |= PLAIN.encode(arrays[codecs.TOKENS], np.arange(len(images)), 0)
    refuse_infinite(arrays, lambda i: f"image {i} of a batch")
    return arrays


def refuse_infinite(arrays: Mapping[str, np.ndarray], named: Callable[[int], str]) -> None:
    """Raise UserError when an array (n, …) has numbers that are not finite; `named` says whose the i-th are."""
    for name, values in arrays.items():
        finite = np.isfinite(values).reshape(len(values), -1).all(1)
        if not finite.all():
            beyond, fix = "infinite", "look at the image and the encoder's weights"
            if values.dtype == np.float16:
                beyond, fix = (
                    "beyond float16 (65,504)",
                    "encode in fp32, or bf16, if the arithmetic overflows",
                )
            raise UserError(f"{name} of {named(int(finite.argmin()))} are NaN or {beyond}; {fix}")


def to_host(arrays: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays in the host's memory; what lies there is not copied."""
    return {name: array if isinstance(array, np.ndarray) else array.cpu().numpy() for name, array in arrays.items()}
