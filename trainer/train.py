"""The training loop: open the data, build the model, resume, step, log, save.

A run is a folder; running it again resumes from its newest checkpoint. SIGTERM (preemption) and Ctrl-C finish the step,
save, and end: with status 0 after SIGTERM, 130 after Ctrl-C. On the CPU a resumed run's losses equal an unbroken one's
bit for bit.
"""

from __future__ import annotations

import fcntl
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from storage.console import progress_bar, stop_on_signals
from storage.errors import UserError
from storage.files import write_atomic
from trainer.checkpoint import RunState, latest_checkpoint, read_state, restore, save_checkpoint
from trainer.config import TrainConfig, checked, field_type, flatten, free_fields, override, to_yaml
from trainer.data import TrainingData, model_config, open_data
from trainer.distributed import World, world_of_ranks
from trainer.ema import EMA
from trainer.loader import Loader
from trainer.metrics import MetricsLog, read_metrics
from trainer.models.transformer import DiffusionTransformer, Geometry, forward_flops_per_image
from trainer.optim import make_optimizer
from trainer.step import LatentScale, train_step

SUMMARY_FILE = "summary.json"


@dataclass
class _Interval:
    """Sums since the last log line of what `train_step` returns; and where the time went."""

    sums: Tensor
    count: int = 0
    stall_s: float = 0.0
    start_s: float = field(default_factory=time.perf_counter)


def train(config: TrainConfig, *, accept_changes: bool = False) -> dict[str, Any]:
    """Train until `config.steps` and return the run's summary (also RUN/summary.json on the main rank).

    Raises UserError for what the user can mend, KeyboardInterrupt after Ctrl-C with the state saved.
    """
    with world_of_ranks(config.device) as world:
        if config.batch % world.size:
            raise UserError(f"--batch {config.batch} must be a multiple of the {world.size} ranks")
        config = _remember_groups(config)
        data = open_data(config)
        try:
            geometry = model_config(config, data)
            with _only_writer(config.run) if world.is_main else nullcontext():
                return _train(_resolve(config, data, world), data, geometry, world, accept_changes)
        finally:
            data.close()


def _remember_groups(config: TrainConfig) -> TrainConfig:
    """A run that chose the only group there was keeps to it when a store has gained others."""
    checkpoint = latest_checkpoint(config.run)
    if checkpoint is None:
        return config
    before = read_state(checkpoint).config
    chosen = {
        name: checked(before[name], field_type(config, name), name)
        for name in ("data.latents", "data.features")
        if not flatten(config)[name]
    }
    return override(config, chosen)


def _resolve(config: TrainConfig, data: TrainingData, world: World) -> TrainConfig:
    """The configuration with what was chosen automatically written out, so that a resume chooses the same."""
    resolved: dict[str, Any] = {"data.latents": data.latents.path.removeprefix("latents/")}
    if not config.data.features:  # all targets share the only features there are
        resolved["data.features"] = tuple({group.path.removeprefix("features/") for group in data.features})
    if config.precision == "auto":
        resolved["precision"] = "bf16" if world.device.type == "cuda" else "fp32"
    return override(config, resolved)


@contextmanager
def _only_writer(run: Path) -> Iterator[None]:
    """Hold the run's lock; a second process on the same run would delete what the first is writing."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {run}; name another --run, or wait for it") from None
        yield


def _train(
    config: TrainConfig, data: TrainingData, geometry: Geometry, world: World, accept_changes: bool
) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    model = DiffusionTransformer(geometry).to(world.device)
    ema = EMA(model, config.ema_decay)
    optimizer = make_optimizer(model, config.optim)
    interval = _Interval(torch.zeros(2 + len(config.targets), dtype=torch.float64, device=world.device))
    first_step = _resume(config, data, model, ema, optimizer, interval, accept_changes)
    wrapped: nn.Module = DistributedDataParallel(model) if world.size > 1 else model
    if world.is_main:
        config.run.mkdir(parents=True, exist_ok=True)
        write_atomic(config.run / "config.yaml", to_yaml(config).encode(), "config")
        print(_opening(config, data, geometry, model, first_step, world), flush=True)
    log = MetricsLog(config.run, from_step=first_step, tensorboard=config.log.tensorboard) if world.is_main else None
    scale = LatentScale.of(data.latents.identity)

    def save(step: int) -> None:
        if world.is_main:
            state = RunState(
                step=step,
                config=flatten(config),
                identities=data.identities,
                log_sums=interval.sums.tolist(),
                log_count=interval.count,
            )
            save_checkpoint(config.run, state, model, ema, optimizer, config.checkpoint.keep)
        world.barrier()

    loader = Loader(
        data,
        seed=config.seed,
        batch=config.batch,
        start=first_step,
        stop=config.steps,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        prefetch=config.data.prefetch,
    )
    step = saved = first_step
    start_s = time.perf_counter()
    bar = progress_bar(config.steps, unit="step", done=first_step, description="train", hidden=not world.is_main)
    model.train()
    with stop_on_signals(signal.SIGINT, signal.SIGTERM) as stop, loader, bar:
        for batch in loader:
            values = train_step(wrapped, ema, model, optimizer, batch, scale, config, geometry.n_classes)
            step = batch.step + 1
            interval.sums += world.mean(values)
            interval.count += 1
            interval.stall_s += batch.stall_s
            bar.update()
            if step % config.log.every == 0 or step == config.steps:
                line = _close_interval(interval, step, config)
                bar.set_postfix_str(
                    f"denoising {line['denoising_loss']:.4f}  align {line['alignment_loss']:.4f}  "
                    f"{line['images_per_s']:.0f} img/s  stall {line['stall_share']:.0%}"
                )
                if log is not None:
                    log.write(line)
            stopping = world.any(stop.signal is not None)
            if step % config.checkpoint.every == 0 or step == config.steps or stopping:
                save(step)
                saved = step
            if stopping:
                break
    if log is not None:
        log.close()
    assert saved == step, (saved, step)
    summary = _summary(config, data, model, step, step - first_step, time.perf_counter() - start_s)
    if world.is_main:
        write_atomic(config.run / SUMMARY_FILE, json.dumps(summary, indent=1).encode(), "summary")
    if stop.signal is not None and world.is_main:
        print(
            f"stopped by {signal.Signals(stop.signal).name}; step {step} is saved in {config.run}; "
            "the same command goes on from there"
        )
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    return summary


def _resume(
    config: TrainConfig,
    data: TrainingData,
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    interval: _Interval,
    accept_changes: bool,
) -> int:
    """Restore the newest checkpoint, if there is one; returns how many steps are done."""
    checkpoint = latest_checkpoint(config.run)
    if checkpoint is None:
        return 0
    state = read_state(checkpoint)
    free = free_fields(config)
    now = {**flatten(config), **{f"store {path}": digest for path, digest in data.identities.items()}}
    then = {**state.config, **{f"store {path}": digest for path, digest in state.identities.items()}}
    changed = [
        f"{name}: was {then.get(name)}, is {now.get(name)}"
        for name in sorted({*now, *then})
        if name not in free and now.get(name) != then.get(name)
    ]
    if changed and not accept_changes:
        raise UserError(
            f"run {config.run} was made otherwise ({'; '.join(changed)}); name another --run, undo the change, or pass "
            "--resume-with-changes"
        )
    if state.step > config.steps:
        raise UserError(f"run {config.run} is at step {state.step}, beyond --steps {config.steps}; raise --steps")
    restore(checkpoint, model, ema, optimizer)
    interval.sums.copy_(torch.tensor(state.log_sums, dtype=torch.float64))
    interval.count = state.log_count
    return state.step


def _close_interval(interval: _Interval, step: int, config: TrainConfig) -> dict[str, Any]:
    """The log line of the interval, which begins anew."""
    seconds = time.perf_counter() - interval.start_s
    denoising, norm, *alignments = (interval.sums / interval.count).tolist()
    targets = config.targets
    line = {
        "step": step,
        "loss": denoising + sum(target.weight * a for target, a in zip(targets, alignments, strict=True)),
        "denoising_loss": denoising,
        "alignment_loss": sum(alignments) / max(1, len(alignments)),
        "gradient_norm": norm,
        "images_per_s": interval.count * config.batch / seconds,
        "stall_share": interval.stall_s / seconds,
    }
    if len(targets) > 1:
        line |= {f"alignment_loss/{t.features}@{t.block}": a for t, a in zip(targets, alignments, strict=True)}
    interval.sums.zero_()
    interval.count, interval.stall_s, interval.start_s = 0, 0.0, time.perf_counter()
    return line


def _summary(
    config: TrainConfig, data: TrainingData, model: nn.Module, step: int, n_new: int, seconds: float
) -> dict[str, Any]:
    lines = read_metrics(config.run)
    return {
        "run": str(config.run),
        "checkpoint": str(config.run / "checkpoints" / f"step-{step:07d}"),
        "store": str(data.store.root),
        "steps": step,
        "steps_now": n_new,
        "seconds": round(seconds, 2),
        "steps_per_s": round(n_new / seconds, 3) if n_new else 0.0,
        "images_per_s": round(n_new * config.batch / seconds, 1) if n_new else 0.0,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "first": lines[0] if lines else {},
        "last": lines[-1] if lines else {},
    }


def _opening(
    config: TrainConfig, data: TrainingData, geometry: Geometry, model: nn.Module, first_step: int, world: World
) -> str:
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    groups = ", ".join(f"{path} ({digest[:12]})" for path, digest in data.identities.items())
    lines = [
        to_yaml(config).rstrip(),
        f"model      {n_parameters / 1e6:.1f} M parameters, {3 * forward_flops_per_image(geometry) / 1e9:.1f} GFLOP an "
        f"image (forward + backward), {geometry.grid**2} tokens",
        f"data       {data.n_samples} of {data.store.n_rows} samples, {len(data.class_names)} classes, {groups}",
        f"device     {world.device}, {world.size} rank(s) of {config.batch // world.size} images",
        f"start      step {first_step} of {config.steps}",
    ]
    return "\n".join(lines)
