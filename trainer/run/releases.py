"""Public checkpoints of DiT, SiT and REPA: their weights under this project's conventions, and a run made from them.

    {"model", "ema", "opt", "args", …}    what their training scripts save: weights and averaged weights
    {name: tensor}                        one set of weights, as DiT's and SiT's are handed out; or a safetensors file

Names and shapes are ours as they are, and so is what DiT's and REPA's weights mean. SiT's release differs: its time
runs from noise (s = 0) to image, its velocity along it, and its last layer has C more channels that nothing reads. With
s = 1 − t, v(x, t) = −u(x, 1 − t), and the embedding cos ω(1 − t), sin ω(1 − t) is a rotation of cos ωt, sin ωt. So the
first layer that reads it takes the rotation, the last one the sign, and the weights are SiT's function exactly.

Names that DistributedDataParallel, torch.compile or FSDP made longer are cut, and sets below other names are found. A
file is read as data (`storage/weights/`): nothing in it is run. A run made from it is at step 0, with a fresh
optimiser: it can be sampled from, and trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from storage.base.errors import UserError
from storage.base.shown import shown
from storage.weights.file import open_weights
from storage.weights.names import bare, not_a_tensor
from storage.weights.tensors import Stored
from trainer.config.saved import to_save
from trainer.config.schema import TrainConfig
from trainer.config.tree import override
from trainer.data.groups import geometry_of, open_data
from trainer.loop.log_window import LogWindow
from trainer.loop.losses import LatentScale
from trainer.loop.step import build
from trainer.models.blocks import LONGEST_PERIOD, TIME_FREQUENCIES
from trainer.models.transformer import DiffusionTransformer, Geometry
from trainer.ranks.world import world_of_ranks
from trainer.run.checkpoint import RunState, latest_checkpoint, save_checkpoint
from trainer.run.folder import RunFolder
from trainer.run.lock import only_writer
from trainer.run.settings import resolve

Release = Literal["repa", "sit", "dit"]
Weights = dict[str, Tensor]
NAMED_AT_MOST = 4
ANCHOR = "x_embedder.proj.weight"  # a name that every set of weights has
OURS = frozenset("x_embedder t_embedder y_embedder pos_embed blocks decoder_blocks projectors final_layer".split())
AVERAGED = re.compile(r"(^|[._])(ema|averag|avg|shadow)", re.IGNORECASE)


def import_checkpoint(file: Path, release: Release, config: TrainConfig) -> list[str]:
    """Make the run `config.run`, at step 0, from a public checkpoint; returns what to tell the user.

    The number of classes is the checkpoint's. Projectors are kept where the run aligns, as many as it has targets;
    where the file has none they are new. Raises UserError when the file or the run does not fit.
    """
    if (config.model.kind == "dit") != (release == "dit"):
        raise UserError(f"--release {release} is not of --model.kind {config.model.kind}; choose another --preset")
    if latest_checkpoint(config.run) is not None:
        raise UserError(f"run {config.run} has a checkpoint already; name another --run")
    found = read_release(file)
    try:
        weights, averaged = (converted(part, release) for part in (found.weights, found.averaged))
    except (ValueError, IndexError, RuntimeError) as error:  # shapes that no release has
        raise UserError(
            f"{file} has not the shapes of --release {release} ({' '.join(str(error).split())[:120]})"
        ) from error
    with world_of_ranks(config.device) as world:
        n_classes = len(_entry(averaged, "y_embedder.embedding_table.weight", file)) - 1
        config = override(config, {"model.classes": config.model.classes or n_classes})
        data = open_data(config)
        try:
            geometry = geometry_of(config, data)
            # The machine that trains the run decides on its arithmetic, not the one that makes it.
            config = override(resolve(config, data, world), {"precision": config.precision})
            training = build(config, geometry, LatentScale.of(data.latents.identity), world)
            notes = [_load(training.model, weights, geometry, file)]
            _load(training.ema.model, averaged, geometry, file)
            sums = LogWindow.empty(geometry).sums.tolist()
            state = RunState(
                step=0,
                config=to_save(config),
                identities=data.identities,
                log_sums=sums,
                log_count=0,
                skipped=0,
                scaler={},
            )
            with only_writer(config.run, world):
                RunFolder(config.run).write_config(config)
                save_checkpoint(
                    config.run, state, training.model, training.ema, training.optimizer, config.checkpoint.keep
                )
        finally:
            data.close()
    return [f"{config.run} holds {file} at step 0", *found.notes, *(note for note in notes if note)]


@dataclass(frozen=True)
class Found:
    """What a file holds of a model, float32, and what to say of it."""

    weights: Weights
    averaged: Weights  # the same ones where the file holds one set
    notes: tuple[str, ...]


def read_release(file: Path) -> Found:
    """The weights and averaged weights of a file, wherever they lie in it. Raises UserError.

    A set of weights is what stands beside an entry that ends with ANCHOR, under its bare names (`bare_name`): below
    `model` and `ema` as the scripts write them, below Lightning's `state_dict` and `model.`, or by itself.
    """
    with open_weights(file) as found:
        entries = bare(found.entries(), file)
        sets = [name.removesuffix(ANCHOR) for name in entries if f".{name}".endswith(f".{ANCHOR}")]
        if not sets:
            there = listed(dict.fromkeys(name.partition(".")[0] for name in entries)) or "nothing by name"
            raise UserError(
                f"{file} has no {ANCHOR}, so it is none of DiT's, SiT's or REPA's checkpoints; it has {there}"
            )
        averaged = [name for name in sets if AVERAGED.search(name)]
        trained = [name for name in sets if name not in averaged]
        for several in (averaged, trained):
            if len(several) > 1:
                raise UserError(
                    f"{file} holds several sets of weights, {listed(map(_called, several))}; save those that are meant "
                    "with torch.save, as {'model': …, 'ema': …}"
                )
        of_trained, of_averaged = (trained or averaged)[0], (averaged or trained)[0]
        parts = {name: _entries_of(entries, name, sets, file) for name in dict.fromkeys((of_trained, of_averaged))}
        read = {name: _float32(found.tensors(part), file) for name, part in parts.items()}
    used = {prefix + name for prefix, part in parts.items() for name in part}
    notes = []
    if of_trained == of_averaged:
        notes.append(f"it has one set of weights, {_called(of_trained)}, which stands for the averaged ones too")
    elif (of_trained, of_averaged) != ("model.", "ema."):
        notes.append(f"its weights are {_called(of_trained)}, its averaged weights {_called(of_averaged)}")
    own = tuple(filter(None, parts))  # of what lies within a set the whole name is said
    left = dict.fromkeys(n if n.startswith(own) else n.partition(".")[0] for n in entries if n not in used)
    if left:
        notes.append(f"left out: {listed(left)}")
    return Found(weights=read[of_trained], averaged=read[of_averaged], notes=tuple(notes))


def _entries_of(entries: Mapping[str, Any], prefix: str, sets: list[str], file: Path) -> dict[str, Stored]:
    """The tensors of the set below `prefix`; counters that averaging keeps beside them are not weights."""
    others = tuple(name for name in sets if name != prefix and name.startswith(prefix))
    found = {}
    for name, value in entries.items():
        if not name.startswith(prefix) or (others and name.startswith(others)):
            continue
        short = name.removeprefix(prefix)
        first, _, below = short.partition(".")
        if first in OURS and (reason := not_a_tensor(value)):
            raise UserError(f"{file} cannot be imported: {shown(name[:80])} is {reason}")
        if isinstance(value, Stored) and value.shape and (prefix or not below or first in OURS):
            found[short] = value  # below other names of a bare set lies an optimiser's state, say
    return found


def _called(prefix: str) -> str:
    return prefix.removesuffix(".") or "those by bare names"


def listed(names: Iterable[str]) -> str:
    """The first few names, as they may reach a terminal, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(shown(name[:80]) for name in names[:NAMED_AT_MOST]) + more


def converted(weights: Weights, release: Release) -> Weights:
    """Weights of a release under this project's names and conventions."""
    if release == "sit":
        return _sit_to_repa(weights)
    return _count_on(weights) if release == "repa" else weights


def _sit_to_repa(weights: Weights) -> Weights:
    """SiT's function with time and velocity reversed, without the channels that nothing reads."""
    half = TIME_FREQUENCIES // 2
    omega = LONGEST_PERIOD ** (-torch.arange(half, dtype=torch.float64) / half)
    changed = dict(weights)
    if "t_embedder.mlp.0.weight" in weights:
        by_cos, by_sin = weights["t_embedder.mlp.0.weight"].double().split(half, dim=1)
        rotated = [by_cos * omega.cos() + by_sin * omega.sin(), by_cos * omega.sin() - by_sin * omega.cos()]
        changed["t_embedder.mlp.0.weight"] = torch.cat(rotated, dim=1).float()
    if "x_embedder.proj.weight" in weights:
        _, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        for name in {"final_layer.linear.weight", "final_layer.linear.bias"} & weights.keys():
            by_channel = weights[name].unflatten(0, (patch * patch, -1))  # channels are innermost
            changed[name] = -by_channel[:, :channels].flatten(0, 1)
    return changed


def _count_on(weights: Weights) -> Weights:
    """REPA's first release numbers the blocks after the aligned one from 0 again, as `decoder_blocks`."""
    n_before = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    renamed = {}
    for name, value in weights.items():
        kind, _, rest = name.partition(".")
        number, _, rest = rest.partition(".")
        if kind == "decoder_blocks" and number.isdecimal():
            name = f"blocks.{int(number) + n_before}.{rest}"
        renamed[name] = value
    return renamed


def _load(model: DiffusionTransformer, weights: Weights, geometry: Geometry, file: Path) -> str:
    """Load weights into a model and return a remark on projectors, if any is due. Raises UserError."""
    projectors = {name for name in weights if name.startswith("projectors.")}
    own = model.state_dict()
    unused = {name for name in projectors if name not in own}
    kept = {name: value for name, value in weights.items() if name not in unused}
    fresh = {name for name in own if name.startswith("projectors.") and not projectors}
    fresh |= {"pos_embed"} - kept.keys()  # which is computed, and a buffer that some do not save
    wrong = [f"{name} is missing" for name in own if name not in kept and name not in fresh]
    wrong += [f"{name} is unknown" for name in kept if name not in own]
    wrong += [
        f"{name} is {list(value.shape)}, the model's {list(own[name].shape)}"
        for name, value in kept.items()
        if name in own and value.shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - NAMED_AT_MOST} more" if len(wrong) > NAMED_AT_MOST else ""
        raise UserError(
            f"{file} is not of this model: {'; '.join(wrong[:NAMED_AT_MOST])}{more}; choose the --preset, --model.… "
            "and store that fit it"
        )
    model.load_state_dict(own | kept)
    if unused:
        return f"its projectors beyond the run's {len(geometry.targets)} alignment targets were left out"
    return "it has no projectors; the run's are new" if fresh - {"pos_embed"} else ""


def _entry(weights: Weights, name: str, file: Path) -> Tensor:
    if name not in weights:
        raise UserError(f"{file} has no {name}, so it is none of DiT's, SiT's or REPA's checkpoints")
    return weights[name]


def _float32(weights: Mapping[str, Tensor], file: Path) -> Weights:
    for name, value in weights.items():
        if not value.is_floating_point():
            raise UserError(
                f"{file} holds {shown(name[:80])} as {value.dtype}, which are no weights; save it as float32"
            )
    return {name: value.float() for name, value in weights.items()}
