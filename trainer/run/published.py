"""The public checkpoints that become runs: whose they are, which model they hold, which preset their shapes fit.

A file says nothing of its method but by names and shapes. From these come the preset (kind, blocks, width, patch,
tokens, whether there are projectors), query and key norms, and iREPA's projector; what they cannot say, the number of
heads and the block aligned, is the preset's. No tensor is read for it, and no torch loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from storage.base.errors import UserError
from trainer.config.presets import PRESETS, preset
from trainer.config.schema import Kind, TrainConfig
from trainer.config.tree import override

Release = Literal["repa", "irepa", "reg", "lightningdit", "rae", "rit", "sit", "dit"]
Shapes = Mapping[str, tuple[int, ...]]  # of weights, under this project's names

ANCHOR = "x_embedder.proj.weight"  # a name that every set of weights has
PLAIN_DIT = "t_embedder.W"  # of RAE's time embedding, which its DiT without a head has too
PIXELS_A_LATENT = {1: 16}  # by the patch of models for such latents; 8 for other patches


@dataclass(frozen=True, kw_only=True)
class Published:
    """What is common to the checkpoints of a method."""

    name: str
    kind: Kind
    class_token: bool = False
    mark: str = ""  # what names begin with that are in its files and in no other's
    optional: bool = False  # whether some of its files are without the mark
    statistics: str = ""  # the file beside the weights by which latents were standardised


PUBLISHED: dict[Release, Published] = {
    "repa": Published(name="REPA", kind="sit"),
    "irepa": Published(
        name="iREPA", kind="sit", mark="projectors.0.projection_layer.", optional=True,
        statistics="sdvae-ft-mse-f8d4-latents-stats.pt",
    ),
    "reg": Published(name="REG", kind="sit", class_token=True, mark="cls_projectors2."),
    "lightningdit": Published(
        name="LightningDiT", kind="lightningdit", mark="blocks.0.mlp.w12.", statistics="latents_stats.pt"
    ),
    "rae": Published(name="RAE", kind="ditdh", mark="s_embedder.proj.", statistics="stat.pt"),
    "rit": Published(name="RiT", kind="rit", class_token=True, mark="cls_projectors.", statistics="stat.pt"),
    "sit": Published(name="SiT", kind="sit"),
    "dit": Published(name="DiT", kind="dit"),
}  # fmt: skip


def check_release(release: Release, names: Iterable[str], file: Path) -> None:
    """Raise UserError where the names of a file's weights are those of another method than it is said to be of."""
    names = list(names)
    marked = {other for other, of in PUBLISHED.items() if of.mark and any(name.startswith(of.mark) for name in names)}
    mine = PUBLISHED[release]
    if "rae" not in marked and PLAIN_DIT in names:
        raise UserError(
            f"{file} has {PLAIN_DIT} and no {PUBLISHED['rae'].mark}weight, so it is RAE's plain DiT, which cannot be "
            "imported; RAE's DiT^DH can"
        )
    if mine.mark and not mine.optional and release not in marked:
        raise UserError(f"{file} has no {mine.mark}weight, so it is not {mine.name}'s; pass another --release")
    if marked and release not in marked:
        other = sorted(marked, key=lambda of: (of == "lightningdit", of))[0]  # whose mark others' files have too
        raise UserError(
            f"{file} has {PUBLISHED[other].mark}…, which is {PUBLISHED[other].name}'s; pass --release {other}"
        )


def check_model(release: Release, config: TrainConfig) -> None:
    """Raise UserError where a configuration is of another model than the release's."""
    published, model = PUBLISHED[release], config.model
    if model.kind != published.kind:
        raise UserError(f"--release {release} is not of --model.kind {model.kind}; choose another --preset")
    if model.class_token != published.class_token:
        has = "has a" if published.class_token else "has no"
        raise UserError(
            f"--release {release} {has} class token, and --model.class-token is {str(model.class_token).lower()}; "
            "choose another --preset"
        )


def starting_point(release: Release, shapes: Shapes, file: Path, named: str = "") -> TrainConfig:
    """The preset `named`, or the one that fits the shapes, with what these say besides. Raises UserError."""
    check_release(release, shapes, file)
    config = preset(named or fitting_preset(release, shapes, file))
    return override(config, settings_of(release, shapes, aligned=config.aligns))


def fitting_preset(release: Release, shapes: Shapes, file: Path) -> str:
    """The preset of a file's shapes, aligned where it has projectors. Raises UserError where none fits, or several."""
    if len(shapes.get(ANCHOR, ())) != 4:
        raise UserError(f"{file} has not the shapes of --release {release}; its {ANCHOR} is {shapes.get(ANCHOR)}")
    width, _, patch, _ = shapes.get("s_embedder.proj.weight", shapes[ANCHOR])  # the head's is of another width
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    resolution = _resolution(shapes, patch, PUBLISHED[release].class_token)
    fitting = {
        name: config
        for name, make in PRESETS.items()
        if (config := make()).model.kind == PUBLISHED[release].kind
        and config.model.class_token == PUBLISHED[release].class_token
        and (config.model.depth + config.model.head_depth, config.model.width, config.model.patch)
        == (depth, width, patch)
        and (not resolution or config.data.resolution in (0, resolution))
    }
    aligned = n_projectors(shapes) > 0
    names = [name for name, config in fitting.items() if config.aligns == aligned] or list(fitting)
    if len(names) == 1:
        return names[0]
    size = f"{depth} blocks of width {width} and patch {patch}" + (f", for {resolution} px" if resolution else "")
    if names:
        raise UserError(f"{file} has {size}, which fits several presets; pass --preset {' or '.join(names)}")
    raise UserError(
        f"{file} has {size}, which no preset of {PUBLISHED[release].name} has; pass --preset with one of its kind, and "
        "--model.depth, --model.width, --model.heads, --model.patch and --data.resolution as the file needs them"
    )


def settings_of(release: Release, shapes: Shapes, *, aligned: bool) -> dict[str, Any]:
    """Settings, by dotted name, that the shapes say and a preset does not; of an alignment where the preset has one."""
    settings: dict[str, Any] = {}
    if "blocks.0.attn.q_norm.weight" in shapes:
        settings["model.qk_norm"] = True
    if "in_context_posemb" in shapes:
        settings["model.context"] = shapes["in_context_posemb"][1]
    if release == "irepa" and aligned:
        settings["loss.projection_weight"] = (1.0,)
        kinds = [_irepa(shapes, number) for number in range(n_projectors(shapes))] or ["irepa"]
        settings["loss.alignment"] = tuple(kinds if len(set(kinds)) > 1 else kinds[:1])
    return settings


def n_projectors(shapes: Iterable[str]) -> int:
    """How many projectors there are."""
    return len({name.split(".")[1] for name in shapes if name.startswith("projectors.")})


def _irepa(shapes: Shapes, number: int) -> str:
    """The alignment whose projector has these shapes; γ is the published one, which no weight depends on."""
    layer = shapes.get(f"projectors.{number}.projection_layer.weight", ())
    if len(layer) == 4:
        return f"irepa:kernel={layer[2]}"
    return f"irepa:projector_kind={'linear' if len(layer) == 2 else 'mlp'}"


def _resolution(shapes: Shapes, patch: int, class_token: bool) -> int:
    """Pixels a side of the images, by the number of positions; 0 where these are not saved."""
    positions = shapes.get("pos_embed", ())
    if len(positions) != 3:
        return 0
    return math.isqrt(max(0, positions[1] - class_token)) * patch * PIXELS_A_LATENT.get(patch, 8)
