"""Public checkpoints of DiT, SiT and REPA: their weights under this project's conventions, and a run made from them.

    {"model", "ema", "opt", "args", …}    what their training scripts save: weights and averaged weights
    {name: tensor}                        one set of weights, as DiT's and SiT's are handed out; or a safetensors file

Names and shapes are ours as they are, and so is what DiT's and REPA's weights mean. SiT's release differs: its time
runs from noise (s = 0) to image, its velocity along it, and its last layer has C more channels that nothing reads. With
s = 1 − t, v(x, t) = −u(x, 1 − t), and the embedding cos ω(1 − t), sin ω(1 − t) is a rotation of cos ωt, sin ωt. So the
first layer that reads it takes the rotation, the last one the sign, and the weights are SiT's function exactly.

A file is read with `weights_only=True`: nothing in it is run. A run made from it is at step 0, with a fresh optimiser:
it can be sampled from, and trained on.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from storage.errors import UserError
from storage.files import write_atomic
from trainer.checkpoint import RunState, latest_checkpoint, save_checkpoint
from trainer.config import TrainConfig
from trainer.config_tree import flatten, override, to_yaml
from trainer.data import model_config, open_data
from trainer.distributed import world_of_ranks
from trainer.interval import Interval
from trainer.models.blocks import LONGEST_PERIOD, TIME_FREQUENCIES
from trainer.models.transformer import DiffusionTransformer, Geometry
from trainer.resume import only_writer, resolve
from trainer.step import LatentScale
from trainer.update import build

Release = Literal["repa", "sit", "dit"]
Weights = dict[str, Tensor]
NAMED_AT_MOST = 4


def import_checkpoint(file: Path, release: Release, config: TrainConfig) -> list[str]:
    """Make the run `config.run`, at step 0, from a public checkpoint; returns what to tell the user.

    The number of classes is the checkpoint's. Projectors are kept where the run aligns, as many as it has targets;
    where the file has none they are new. Raises UserError when the file or the run does not fit.
    """
    if (config.model.kind == "dit") != (release == "dit"):
        raise UserError(f"--release {release} is not of --model.kind {config.model.kind}; choose another --preset")
    if latest_checkpoint(config.run) is not None:
        raise UserError(f"run {config.run} has a checkpoint already; name another --run")
    weights, averaged = (converted(part, release) for part in read_release(file))
    with world_of_ranks(config.device) as world:
        n_classes = len(_entry(averaged, "y_embedder.embedding_table.weight", file)) - 1
        config = override(config, {"model.classes": config.model.classes or n_classes})
        data = open_data(config)
        try:
            geometry = model_config(config, data)
            # The machine that trains the run decides on its arithmetic, not the one that makes it.
            config = override(resolve(config, data, world), {"precision": config.precision})
            parts = build(config, geometry, LatentScale.of(data.latents.identity), world)
            notes = [_load(parts.model, weights, geometry, file)]
            _load(parts.ema.model, averaged, geometry, file)
            sums = Interval.empty(config).sums.tolist()
            state = RunState(
                step=0,
                config=flatten(config),
                identities=data.identities,
                log_sums=sums,
                log_count=0,
                skipped=0,
                scaler={},
            )
            with only_writer(config.run, world):
                write_atomic(config.run / "config.yaml", to_yaml(config).encode(), "config")
                save_checkpoint(config.run, state, parts.model, parts.ema, parts.optimizer, config.checkpoint.keep)
        finally:
            data.close()
    return [f"{config.run} holds {file} at step 0", *(note for note in notes if note)]


def read_release(file: Path) -> tuple[Weights, Weights]:
    """(weights, averaged weights) float32 of a file; the same ones twice where it holds one set. Raises UserError."""
    try:
        if file.suffix == ".safetensors":
            found: Any = load_file(file)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the scripts save their options as one
                # Mapped where the format allows it, since an optimiser's state of twice the size may lie beside.
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except FileNotFoundError:
        raise UserError(f"checkpoint {file} does not exist") from None
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"checkpoint {file} holds more than tensors and plain values; none of it was run ({reason})"
        ) from error
    except Exception as error:  # bytes that are no pickle end in whatever they happen to spell
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(f"checkpoint {file} is damaged, or is none ({reason}); fetch it again") from error
    if not isinstance(found, Mapping):
        raise UserError(f"checkpoint {file} holds a {type(found).__name__}, not weights by name")
    averaged = found.get("ema", found)
    weights = found.get("model", averaged)
    if not all(_is_weights(part) for part in (weights, averaged)):
        raise UserError(
            f"checkpoint {file} has neither weights by name nor 'ema' and 'model'; it has {list(found)[:6]}"
        )
    return _float32(weights), _float32(averaged)


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
        if kind == "decoder_blocks":
            number, _, rest = rest.partition(".")
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
    return "it has no projectors; the run's are new" if fresh else ""


def _entry(weights: Weights, name: str, file: Path) -> Tensor:
    if name not in weights:
        raise UserError(f"{file} has no {name}, so it is none of DiT's, SiT's or REPA's checkpoints")
    return weights[name]


def _is_weights(found: Any) -> bool:
    return isinstance(found, Mapping) and all(isinstance(value, Tensor) for value in found.values())


def _float32(weights: Mapping[str, Tensor]) -> Weights:
    return {name: value.float() for name, value in weights.items()}
