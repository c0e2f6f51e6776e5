"""Public checkpoints (`published.py`): their weights under this project's conventions, and a run made from them.

    {"model", "ema", "opt", "args", …}    what their training scripts save: weights and averaged weights
    {name: tensor}                        one set of weights, as DiT's and SiT's are handed out; or a safetensors file

Names and shapes are ours as they are, and so is what the weights mean, with these exceptions.

SiT's time runs from noise (s = 0) to image, its velocity along it, and its last layer has C more channels that nothing
reads. With s = 1 − t, v(x, t) = −u(x, 1 − t), and the embedding cos ω(1 − t), sin ω(1 − t) is a rotation of cos ωt,
sin ωt. So the first layer that reads it takes the rotation, the last one the sign, and the weights are SiT's function
exactly.

LightningDiT's, RAE's and RiT's files hold the tables of rotary positions, and those of REPA on an end-to-end tuned
autoencoder (REPA-E, arXiv 2504.10483) the statistics by which latents are standardised. Both are compared with the
run's, and left out. Statistics that lie in a file beside the weights, under the name that the method gives it, are the
run's.

Names that DistributedDataParallel, torch.compile or FSDP made longer are cut, and sets below other names are found. A
file is read as data (`storage/weights/`): nothing in it is run. A run made from it is at step 0, with a fresh
optimiser: it can be sampled from, and trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from storage.base.errors import UserError
from storage.base.shown import shown
from storage.weights.file import open_weights
from storage.weights.latent_statistics import read_statistics
from storage.weights.names import bare, not_a_tensor
from storage.weights.tensors import Stored
from trainer.config.saved import to_save
from trainer.config.schema import TrainConfig
from trainer.config.tree import override
from trainer.data.groups import TrainingData, geometry_of, open_data, require_guided_channels
from trainer.data.latent_scale import LatentScale
from trainer.loop.log_window import LogWindow
from trainer.loop.step import build
from trainer.models.blocks import LONGEST_PERIOD, TIME_FREQUENCIES
from trainer.models.lightningdit import LightningDiT
from trainer.models.transformer import DiffusionTransformer, Geometry
from trainer.ranks.world import world_of_ranks
from trainer.run.checkpoint import RunState, latest_checkpoint, save_checkpoint
from trainer.run.folder import RunFolder
from trainer.run.latent_map import keep_statistics, map_of
from trainer.run.lock import only_writer
from trainer.run.published import ANCHOR, PUBLISHED, Release, Shapes, check_model, check_release
from trainer.run.settings import resolve

V = TypeVar("V")
Weights = dict[str, Tensor]
NAMED_AT_MOST = 4
ROTARY = re.compile(r"^[a-z_]*feat_rope[a-z_]*\.freqs_(cos|sin)$")  # tables that stand beside weights
STATISTICS = "bn."  # the statistics of latents, which do so too
STATISTICS_EPSILON, STATISTICS_APART = 1e-4, 0.02  # REPA-E's, added to a variance; the most that is taken for the same
OURS = frozenset(
    "x_embedder s_embedder s_projector t_embedder y_embedder pos_embed blocks decoder_blocks projectors final_layer "
    "cls_projectors cls_projectors2 in_context_posemb wg_norm feat_rope bn".split()
)
AVERAGED = re.compile(r"(^|[._])(ema|averag|avg|shadow)", re.IGNORECASE)


def import_checkpoint(file: Path, release: Release, config: TrainConfig) -> list[str]:
    """Make the run `config.run`, at step 0, from a public checkpoint; returns what to tell the user.

    The number of classes is the checkpoint's. Projectors are kept where the run aligns, as many as it has targets;
    where the file has none they are new. Raises UserError when the file or the run does not fit.
    """
    check_model(release, config)
    if latest_checkpoint(config.run) is not None:
        raise UserError(f"run {config.run} has a checkpoint already; name another --run")
    stored = read_release(file)
    check_release(release, stored.averaged, file)
    try:
        weights, averaged = (converted(part, release) for part in (stored.weights, stored.averaged))
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
            require_guided_channels(config, geometry)
            config, of_latents = _with_statistics(config, release, file, data)
            # The machine that trains the run decides on its arithmetic, not the one that makes it.
            config = override(resolve(config, data, world), {"precision": config.precision})
            scale = map_of(config, data, config.run)
            training = build(config, geometry, scale, world)
            notes = [_load(training.model, weights, geometry, scale, file)]
            _load(training.ema.model, averaged, geometry, scale, file)
            if of_latents:
                notes.append(of_latents)
            elif standardised := PUBLISHED[release].statistics:
                by = "by channel and place" if data.of_features else "channel by channel"
                ours = f"(x − {_numbers(scale.shift)}) · {_numbers(scale.scale)}"
                notes.append(
                    f"it was trained on latents standardised {by} with {standardised} of that release; the run's "
                    f"are {ours}, and what is drawn is right only where these agree"
                )
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
                keep_statistics(config, data)
                RunFolder(config.run).write_config(config)
                save_checkpoint(
                    config.run, state, training.model, training.ema, training.optimizer, config.checkpoint.keep
                )
        finally:
            data.close()
    return [f"{config.run} holds {file} at step 0", *stored.notes, *(note for note in notes if note)]


def _with_statistics(config: TrainConfig, release: Release, file: Path, data: TrainingData) -> tuple[TrainConfig, str]:
    """The configuration with the statistics that lie beside a release's weights, and what to say of it, "" without.

    What the user chose goes before. Raises UserError where the file is not of the store's channels.
    """
    name = PUBLISHED[release].statistics
    beside = file.absolute().parent / name
    if not name or config.data.latent_normalisation != "auto" or not beside.is_file():
        return config, ""
    if data.of_features:
        if config.data.latent_statistics != Path():
            return config, ""
        changes: dict[str, Any] = {"data.latent_statistics": beside}
        return override(config, changes), f"its latents are normalised by channel and place with {beside}"
    statistics = read_statistics(beside, data.latent_identity.latent_channels)
    changes = {
        "data.latent_normalisation": "channel",
        "data.latent_mean": statistics.mean,
        "data.latent_std": statistics.std,
    }
    return override(config, changes), f"its latents are normalised channel by channel with {beside}"


@dataclass(frozen=True)
class ReleaseWeights:
    """What a file holds of a model, float32, and what to say of it."""

    weights: Weights
    averaged: Weights  # the same ones where the file holds one set
    notes: tuple[str, ...]


def read_release(file: Path) -> ReleaseWeights:
    """The weights and averaged weights of a file, wherever they lie in it. Raises UserError.

    A set of weights is what stands beside an entry that ends with ANCHOR, under its bare names (`bare_name`): below
    `model` and `ema` as the scripts write them, below Lightning's `state_dict` and `model.`, or by itself.
    """
    with open_weights(file) as file_weights:
        entries = bare(file_weights.entries(), file)
        of_trained, of_averaged, sets = _sets_of(entries, file)
        parts = {name: _entries_of(entries, name, sets, file) for name in dict.fromkeys((of_trained, of_averaged))}
        read = {name: _float32(file_weights.tensors(part), file) for name, part in parts.items()}
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
    return ReleaseWeights(weights=read[of_trained], averaged=read[of_averaged], notes=tuple(notes))


def shapes_of(file: Path, release: Release) -> Shapes:
    """Shapes of the averaged weights of a file, under this project's names; no tensor is read. Raises UserError."""
    with open_weights(file) as file_weights:
        entries = bare(file_weights.entries(), file)
        _, averaged, sets = _sets_of(entries, file)
        stored = _entries_of(entries, averaged, sets, file)
    return {name: item.shape for name, item in _renamed(stored, release).items()}


def _sets_of(entries: Mapping[str, Any], file: Path) -> tuple[str, str, list[str]]:
    """What stands before the names of the weights, before those of the averaged ones, and before those of every set."""
    sets = [name.removesuffix(ANCHOR) for name in entries if f".{name}".endswith(f".{ANCHOR}")]
    if not sets:
        names = listed(dict.fromkeys(name.partition(".")[0] for name in entries)) or "nothing by name"
        raise UserError(f"{file} has no {ANCHOR}, so it is none of {_methods()} checkpoints; it has {names}")
    averaged = [name for name in sets if AVERAGED.search(name)]
    trained = [name for name in sets if name not in averaged]
    for several in (averaged, trained):
        if len(several) > 1:
            raise UserError(
                f"{file} holds several sets of weights, {listed(map(_called, several))}; save those that are meant "
                "with torch.save, as {'model': …, 'ema': …}"
            )
    return (trained or averaged)[0], (averaged or trained)[0], sets


def _methods() -> str:
    *others, last = (f"{published.name}'s" for published in PUBLISHED.values())
    return f"{', '.join(others)} or {last}"


def _entries_of(entries: Mapping[str, Any], prefix: str, sets: list[str], file: Path) -> dict[str, Stored]:
    """The tensors of the set below `prefix`; counters that averaging keeps beside them are not weights."""
    others = tuple(name for name in sets if name != prefix and name.startswith(prefix))
    tensors = {}
    for name, value in entries.items():
        if not name.startswith(prefix) or (others and name.startswith(others)):
            continue
        short = name.removeprefix(prefix)
        first, _, below = short.partition(".")
        if first in OURS and (reason := not_a_tensor(value)):
            raise UserError(f"{file} cannot be imported: {shown(name[:80])} is {reason}")
        if isinstance(value, Stored) and value.shape and (prefix or not below or first in OURS):
            tensors[short] = value  # below other names of a bare set lies an optimiser's state, say
    return tensors


def _called(prefix: str) -> str:
    return prefix.removesuffix(".") or "those by bare names"


def listed(names: Iterable[str]) -> str:
    """The first few names, as they may reach a terminal, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(shown(name[:80]) for name in names[:NAMED_AT_MOST]) + more


def converted(weights: Weights, release: Release) -> Weights:
    """Weights of a release under this project's names and conventions."""
    return _sit_to_repa(weights) if release == "sit" else _renamed(weights, release)


def _renamed(weights: Mapping[str, V], release: Release) -> dict[str, V]:
    """What a release calls by other names; REPA's code, and so its first names, are in those that follow it."""
    renamed = dict(weights)
    if release in ("repa", "irepa", "reg"):
        renamed = _count_on(renamed)
    if release == "irepa":  # which wraps REPA's projector as well
        renamed = {
            re.sub(r"^(projectors\.\d+)\.projection_layer(\.\d)", r"\1\2", name): value
            for name, value in renamed.items()
        }
    return renamed


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


def _count_on(weights: Mapping[str, V]) -> dict[str, V]:
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


def _load(model: DiffusionTransformer, weights: Weights, geometry: Geometry, scale: LatentScale, file: Path) -> str:
    """Load weights into a model and return a remark on projectors, if any is due. Raises UserError."""
    weights = _without_rotary(_without_statistics(weights, scale, file), model, file)
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


def _without_rotary(weights: Weights, model: DiffusionTransformer, file: Path) -> Weights:
    """Weights without the tables of rotary positions, if these are the model's; they also say how many heads it has."""
    tables = {name: value for name, value in weights.items() if ROTARY.match(name)}
    if not isinstance(model, LightningDiT):
        return weights  # of which they are unknown names
    for name, theirs in tables.items():
        own = [of[name.rpartition(".")[2]] for of in model.rotary_tables()]
        if not any(theirs.shape == table.shape and torch.allclose(theirs, table, atol=1e-3) for table in own):
            raise UserError(
                f"{file} is not of this model: {name} is {list(theirs.shape)}, the model's {list(own[0].shape)}, "
                "or its positions rotate otherwise; choose the --preset, --model.heads and store that fit it"
            )
    return {name: value for name, value in weights.items() if name not in tables}


def _without_statistics(weights: Weights, scale: LatentScale, file: Path) -> Weights:
    """Weights without the statistics by which latents were standardised, if the run standardises by the same."""
    left = {name: value for name, value in weights.items() if not name.startswith(STATISTICS)}
    mean, variance = (weights.get(f"{STATISTICS}running_{of}") for of in ("mean", "var"))
    if mean is None or variance is None:
        return left
    theirs = (variance.double() + STATISTICS_EPSILON).rsqrt()
    ours, shift = (torch.as_tensor(of).double().flatten() for of in (scale.scale, scale.shift))
    of_same = len(ours) in (1, len(theirs)) and len(mean) == len(theirs)
    if not of_same or torch.cat([ours / theirs - 1, (shift - mean) * theirs]).abs().max() > STATISTICS_APART:
        raise UserError(
            f"{file} standardises latents with the statistics in its {STATISTICS}*, (x − {_numbers(mean)}) · "
            f"{_numbers(theirs)}, and the store's are (x − {_numbers(shift)}) · {_numbers(ours)}; name a --store whose "
            "latents are of its own autoencoder, and standardised by these, or pass --data.latent-normalisation channel"
        )
    return left


def _numbers(values: Any) -> str:
    """A number, or the smallest and the largest of several."""
    flat = torch.as_tensor(values).flatten()
    return f"{flat[0]:.4g}" if len(flat) == 1 else f"[{flat.min():.4g} … {flat.max():.4g}]"


def _entry(weights: Weights, name: str, file: Path) -> Tensor:
    if name not in weights:
        raise UserError(f"{file} has no {name}, so it is none of {_methods()} checkpoints")
    return weights[name]


def _float32(weights: Mapping[str, Tensor], file: Path) -> Weights:
    for name, value in weights.items():
        if not value.is_floating_point():
            raise UserError(
                f"{file} holds {shown(name[:80])} as {value.dtype}, which are no weights; save it as float32"
            )
    return {name: value.float() for name, value in weights.items()}
