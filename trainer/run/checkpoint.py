"""Checkpoints: a directory of safetensors and JSON, whole or absent, and a file `latest` that names the newest.

    checkpoints/step-0000100/model.safetensors       weights, under the public checkpoints' names
                             ema.safetensors         averaged weights, the same names
                             optimizer.safetensors   NAME.exp_avg, NAME.exp_avg_sq, NAME.step
                             state.json              version, step, configuration, store identities, running means
    latest                   "step-0000100", written last

Tensors are whole, however many ranks trained and whatever each held, so a run goes on on any number of them. Nothing is
pickled. A checkpoint is written under another name, synced, and renamed; a crash leaves the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from storage.base.boundary import Count, Number, parse_json, read_regular
from storage.base.errors import UserError
from storage.base.files import follow_umask, fsync_directory, partial_name, publish, write_atomic
from storage.base.shown import LONGEST, shown
from trainer.loop.ema import EMA
from trainer.loop.optimiser import load_optimizer_tensors, optimizer_tensors
from trainer.ranks.parallel import gather_state, load_state
from trainer.run.folder import STEP, RunFolder

VERSION = 2
MAX_NAME_BYTES = 4096
OTHER_CHECKPOINT = "write the name of another one into RUN/latest"
WEIGHTS, EMA_WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class _Version:
    version: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a run is besides tensors: steps done, what determined its numbers, the sums of the current log interval."""

    step: Count
    config: dict[str, Any]  # as `config/saved.py` has it, for a reader to parse
    identities: dict[str, str]
    log_sums: list[Number]
    log_count: Count
    skipped: Count  # steps left out so far
    scaler: dict[str, Any]  # the loss scale of fp16, empty otherwise
    log_aligned: Count | None = None  # of `log_count` steps, those with an alignment; None: every one
    alignment_stopped: bool = False  # whether projectors rest, so that the optimiser's state has none of theirs


def save_checkpoint(
    run: Path,
    state: RunState,
    model: nn.Module,
    ema: EMA[Any],
    optimizer: torch.optim.Optimizer,
    keep: int,
    *,
    milestone_every: int = 0,
    writes: bool = True,
) -> Path:
    """Publish the checkpoint of `state.step`, then `latest`, then remove all but the newest `keep` and the milestones.

    Of several ranks, every one must call, and one writes. Raises UserError, with the checkpoint before still in place,
    when it cannot be written. Cost: while it is written, the rank that writes holds all of it in host memory.
    """
    of_run = RunFolder(run)
    folder, final = of_run.checkpoints, of_run.checkpoint(state.step)
    named = {
        WEIGHTS: model.state_dict(),
        EMA_WEIGHTS: ema.state_dict(),
        OPTIMIZER: optimizer_tensors(model, optimizer),
    }
    whole = {name: gather_state(tensors, keep=writes) for name, tensors in named.items()}
    if not writes:
        return final
    aside = partial_name(final, "save")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stray in folder.glob(".*.partial"):  # of a run that was killed as it saved; one run writes here at a time
            shutil.rmtree(stray)
        _write(aside, whole, state)
        if final.exists():  # the same step again, after a resume with changes
            shutil.rmtree(final)
        publish(aside, final)
        write_atomic(of_run.latest, final.name.encode(), "save")
        _remove_older(of_run, state.step, keep, milestone_every)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)  # which gives back the room it took
        raise UserError(
            f"step {state.step} could not be saved in {folder} ({error}); mend that (free some space?), and the same "
            "command goes on from the checkpoint before"
        ) from error
    return final


def _write(folder: Path, files: dict[str, dict[str, Tensor]], state: RunState) -> None:
    """Every file of a checkpoint, synced."""
    folder.mkdir()
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    (folder / STATE).write_text(json.dumps({"version": VERSION, **vars(state)}, indent=1))
    follow_umask(folder)  # safetensors' own are private
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    fsync_directory(folder)


def _remove_older(run: RunFolder, newest: int, keep: int, milestone_every: int) -> None:
    """Remove all checkpoints before step `newest` but for the newest of them, `keep` in all, and the milestones."""
    older = [(step, path) for step, path in run.checkpoint_folders().items() if step < newest]
    for step, old in older[: max(0, len(older) - keep + 1)]:
        if milestone_every and step % milestone_every == 0:
            continue
        gone = partial_name(old, "old")  # renamed first, so that a kill leaves no half under a checkpoint's name
        old.rename(gone)
        shutil.rmtree(gone)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint, or None. Raises UserError when `latest` names one that is not there."""
    latest = RunFolder(run).latest
    try:
        name = read_regular(latest, MAX_NAME_BYTES).decode("utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    path = RunFolder(run).checkpoints / name
    if not STEP.fullmatch(name):
        raise UserError(f"{latest} names {shown(name[:LONGEST])!r}, which is no checkpoint; write step-… into it")
    if not (path / STATE).exists():
        raise UserError(f"{latest} names {name}, which is not in {path.parent}; name another in it, or remove it")
    return path


def read_state(checkpoint: Path) -> RunState:
    """The run's state. Raises UserError for another version's, and when it is damaged."""
    where = str(checkpoint / STATE)
    raw = read_regular(checkpoint / STATE)
    version = parse_json(_Version, raw, where, OTHER_CHECKPOINT).version
    if version != VERSION:
        raise UserError(
            f"checkpoint {checkpoint} has version {version}, this code reads {VERSION}; use the code it is from"
        )
    return parse_json(RunState, raw, where, OTHER_CHECKPOINT)


def restore(checkpoint: Path, model: nn.Module, ema: EMA[Any], optimizer: torch.optim.Optimizer) -> None:
    """Load weights, averaged weights and optimiser state; of several ranks, each reads its own part.

    Raises UserError when they are of another model.
    """
    try:
        load_state(model, load_file(checkpoint / WEIGHTS))
        ema.load_state_dict(load_file(checkpoint / EMA_WEIGHTS))
        load_optimizer_tensors(model, optimizer, load_file(checkpoint / OPTIMIZER))
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(
            f"a file of checkpoint {checkpoint} is damaged or missing ({error}); {OTHER_CHECKPOINT}"
        ) from error
    except (RuntimeError, KeyError) as error:
        raise UserError(f"checkpoint {checkpoint} is of another model: {' '.join(str(error).split())[:200]}") from error


def load_ema_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The averaged weights, for sampling. Raises UserError."""
    try:
        return load_file(checkpoint / EMA_WEIGHTS)
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(
            f"{checkpoint / EMA_WEIGHTS} is damaged or missing ({error}); choose another --checkpoint"
        ) from error
