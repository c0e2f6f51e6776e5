"""Vision transformers through timm: those of the catalogue, and any other by its name, `timm:NAME`.

Weights are timm's file from the hub, or a file that is given, in timm's layout or as the original authors released it:
timm's own converters know DINOv2 (SwiGLU and register names), DINOv3 (the bias of keys is zero by design), OpenAI's and
OpenCLIP's CLIP, I-JEPA, MAE and DINO, and resample position embeddings. Loading is strict: a tensor that is missing,
left over or of another shape is an error, the classifier excepted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.encoders.catalogue import CLIP, HALF, IMAGENET, Normalisation, Preprocessing, VisionModel
from pipeline.encoders.registry import TIMM, EncoderSpec
from pipeline.encoders.vision import VisionTransformerEncoder, preprocess
from pipeline.encoders.weights import file_sha256, find_weights, read_weights
from storage.base.errors import UserError
from storage.final_norm import AFFINE, PLAIN, FinalNorm
from storage.identity import FeaturesIdentity

State = dict[str, Tensor]
NORM = ("norm.weight", "norm.bias")
NOT_OF_THE_ENCODER = ("head.", "head_dist.", "decoder", "mask_token")  # classifiers; MAE's other half


def describe(spec: EncoderSpec, *, resolution: int) -> FeaturesIdentity:
    """Identity of the features."""
    known = outline(spec, resolution=resolution)  # what cannot be asked for is said before weights are looked for
    return replace(known, weights_sha256=file_sha256(_weights(spec, spec.vision or look_up(spec.model))))


def outline(spec: EncoderSpec, *, resolution: int) -> FeaturesIdentity:
    """What is known of the features without the weights: all but their digest."""
    known = spec.vision or look_up(spec.model)
    side = token_side(known, spec.store_name, resolution)
    if spec.tokens != "patch" and not known.has_cls:
        raise UserError(f"{spec.store_name} has no class token; name it with tokens=patch")
    if spec.layer is not None and not 1 <= spec.layer <= known.depth:
        raise UserError(f"{spec.store_name} has blocks 1 to {known.depth}, got layer={spec.layer}")
    return FeaturesIdentity(
        encoder=f"timm.{known.model}",
        preprocessing=known.preprocessing.describe(resolution),
        layer=layer_name(spec, known.depth),
        tokens=spec.tokens,
        token_grid=(side, side),
        width=known.width,
    )


def load(
    spec: EncoderSpec, *, resolution: int, device: torch.device, convert: Callable[[State], State] | None = None
) -> VisionTransformerEncoder:
    """Load the encoder at a crop's resolution; `convert` renames what timm's converters do not know."""
    known = spec.vision or look_up(spec.model)
    path = _weights(spec, known)
    state = read_weights(path)
    model = build(known, resolution)
    load_state(model, convert(state) if convert else state, path)
    return VisionTransformerEncoder(
        cut(model, spec),
        lambda x: preprocess(x, known.preprocessing),
        device,
        tokens=spec.tokens,
        precision=spec.precision,
        compiled=spec.compiled,
    )


def token_side(known: VisionModel, name: str, resolution: int) -> int:
    """Patch tokens a side. Raises UserError when the crop does not divide into patches."""
    multiple = 16 if known.preprocessing.resizes else known.preprocessing.patch
    if resolution % multiple:
        raise UserError(f"--resolution must be a multiple of {multiple} for {name}, got {resolution}")
    return known.preprocessing.input_size(resolution) // known.preprocessing.patch


def build(known: VisionModel, resolution: int, **settings: Any) -> Any:
    """The architecture, with random weights. `settings` are timm's and override the catalogue's."""
    import timm

    size = known.preprocessing.input_size(resolution)
    return timm.create_model(
        known.model, pretrained=False, num_classes=0, img_size=size, **{**known.settings, **settings}
    )


def load_state(
    model: Any, state: Mapping[str, Tensor], path: Path, without: tuple[str, ...] = NOT_OF_THE_ENCODER
) -> None:
    """Load timm's or an original layout into a timm model of any input size, but names that begin as `without` says.

    Raises UserError.
    """
    converted = _converted(model, state, path)
    try:
        model.load_state_dict({k: v for k, v in converted.items() if not k.startswith(without)})
    except RuntimeError as error:
        raise _not_of_this_model(path, error) from error


def _converted(model: Any, state: Mapping[str, Tensor], path: Path) -> State:
    """The state under timm's names. Raises UserError."""
    try:
        converted: State = sys.modules[type(model).__module__].checkpoint_filter_fn(dict(state), model)
    except (RuntimeError, KeyError, AttributeError, AssertionError) as error:
        raise _not_of_this_model(path, error) from error
    return converted


def _not_of_this_model(path: Path, error: Exception) -> UserError:
    first = " ".join(str(error).split())[:200]
    return UserError(f"{path} does not hold the weights of this model ({first}…); pass the right file")


def layer_name(spec: EncoderSpec, depth: int) -> str:
    """Which tokens are features, as an identity says it."""
    if spec.layer is not None:
        return f"block {spec.layer} of {depth}, no norm"
    return PLAIN if spec.plain_norm else AFFINE


def cut(model: Any, spec: EncoderSpec) -> Any:
    """Leave out what lies behind the encoder's layer, the final norm too, or the affine part of that; or nothing.

    Raises UserError for a final norm that is no layer norm.
    """
    if spec.layer is not None:
        model.prune_intermediate_layers([spec.layer - 1], prune_norm=True, prune_head=True)
    elif spec.plain_norm:
        if not isinstance(model.norm, nn.LayerNorm):
            raise UserError(f"{spec.store_name} ends in a {type(model.norm).__name__}, which norm=plain does not know")
        model.norm = nn.LayerNorm(model.norm.normalized_shape, eps=model.norm.eps, elementwise_affine=False)
    return model


def final_norm(spec: EncoderSpec, convert: Callable[[State], State] | None = None) -> FinalNorm | None:
    """Weight and bias of the final norm in the weight file; None where it has none. `convert` as of `load`.

    The whole file is read, and converted, only where these have other names in it than timm's.
    """
    known = spec.vision or look_up(spec.model)
    path = _weights(spec, known)
    of_these_names = norm_in(path)
    if of_these_names is not None:
        return of_these_names
    state = read_weights(path)
    with torch.device("meta"):
        model = build(known, 16 * known.preprocessing.patch)
    return _norm_of(_converted(model, convert(state) if convert else state, path))


def norm_in(path: Path) -> FinalNorm | None:
    """Weight and bias of the final norm in a weight file, if it is of that name."""
    return _norm_of(read_weights(path, NORM))


def _norm_of(state: Mapping[str, Tensor]) -> FinalNorm | None:
    if not set(NORM) <= state.keys():
        return None
    weight, bias = (state[name].float().numpy() for name in NORM)
    return FinalNorm(weight=weight, bias=bias)


def look_up(name: str) -> VisionModel:
    """What timm knows of one of its own names. Raises UserError unless it is a plain vision transformer."""
    import timm

    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}; `timm.list_models('vit*', pretrained=True)` lists its own")
    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False)
    plain = all(hasattr(model, a) for a in ("blocks", "num_prefix_tokens", "prune_intermediate_layers", "patch_embed"))
    if not plain or not hasattr(sys.modules[type(model).__module__], "checkpoint_filter_fn"):
        raise UserError(f"{TIMM}{name} is a {type(model).__name__}, not a vision transformer whose blocks give tokens")
    cfg = model.pretrained_cfg
    patch, other = model.patch_embed.patch_size
    if patch != other or isinstance(model.norm, nn.Identity):
        raise UserError(f"{TIMM}{name} has oblong patches or no final norm of its tokens; name another model")
    return VisionModel(
        model=name,
        width=model.embed_dim,
        depth=len(model.blocks),
        preprocessing=Preprocessing(normalisation=_normalisation(cfg["mean"], cfg["std"]), patch=patch),
        has_cls=getattr(model, "cls_token", None) is not None,
        repository=cfg.get("hf_hub_id") or "",
        original="",
    )


def _normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> Normalisation:
    for known in (IMAGENET, CLIP, HALF):
        if (known.mean, known.std) == (tuple(mean), tuple(std)):
            return known
    return Normalisation(f"mean {list(mean)} std {list(std)}", tuple(mean), tuple(std))  # type: ignore[arg-type]


def _weights(spec: EncoderSpec, known: VisionModel) -> Path:
    return find_weights(
        spec.weights,
        name=spec.store_name,
        repository=known.repository,
        original=known.original,
        fetch=spec.fetch,
    )
