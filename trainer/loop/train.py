"""The training loop: open the data, build the model, resume, step, log, save.

A run is a folder; the same command resumes from its newest checkpoint. SIGTERM (preemption) and Ctrl-C finish the step,
save, and end: with status 0 after SIGTERM, 130 after Ctrl-C. A resumed run's losses equal an unbroken one's bit for bit
on the same number of ranks, on a GPU with `--deterministic true`; on another number, the same batches follow in the
same order. One step, on every rank:

    batch = next(Loader)                              data/loader.py   rows of step b, which a thread gathered ahead:
     │                                                                 moments, and tokens of each alignment target
     ▼
    train_step(training, batch)                       step.py
     │  for each of --accumulate micro-batches:
     │   ├ losses(model, micro_batch)                 losses.py
     │   │   ├ draw      z = normalised(μ + σ ε')                     every number keyed by (seed, purpose, step,
     │   │   │           t, ε, dropped labels        random_keys.py    row), none by rank or by time
     │   │   │           x_t from z, ε, t            objectives/
     │   │   ├ model     output, projections = model(x_t, t, labels)   models/, under autocast (ranks/arithmetic.py)
     │   │   └ compare   denoising loss              objectives/       sit: velocity; dit: noise and variance
     │   │               alignment loss a target     alignment/        projection of block k against its tokens
     │   └ backward      L = L_denoising + Σ λ_k L_alignment,k         mean over micro-batches, then over ranks
     ├  clip the gradient's norm                      optimiser.py
     ├  means over ranks: one small collective        ranks/world.py
     ├  AdamW, left out where a number is not finite  optimiser.py     decided on the device, the same on every rank
     └  averaged weights  θ̄ ← d θ̄ + (1 − d) θ         ema.py
     ▼
    Readback(numbers)                                 readback.py      copied behind the step's kernels, read later
     ▼
    numbers of the step before → log_window.py, or non_finite.py where the step was left out
     ├  every --log.every            a line of metrics.jsonl           run/metrics.py
     ├  every --checkpoint.every     everything, whole or absent       run/checkpoint.py
     ├  every --log.samples-every    a grid of samples                 evaluation/generate/preview.py
     └  every --log.distance-every   a distance of samples             evaluation/distance_curve.py

The host runs one step ahead of the numbers that it reads, so the device never waits for the host.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import deque
from collections.abc import Collection
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from storage.base.console import INTERRUPTS, Stop, progress_bar, stop_on_signals
from storage.base.errors import UserError
from storage.base.files import write_atomic
from storage.base.waiting import waiting
from trainer.config.saved import to_save
from trainer.config.schema import TrainConfig
from trainer.data.groups import TrainingData, geometry_of, open_data, require_guided_channels
from trainer.data.loader import Loader
from trainer.data.resident import open_rows
from trainer.data.rows import Rows, Streamed
from trainer.evaluation.distance_curve import DistanceCurve
from trainer.evaluation.generate.feature_decoder import require_decoder
from trainer.evaluation.generate.preview import write_preview
from trainer.loop.log_window import LogWindow, progress_text
from trainer.loop.losses import Losses
from trainer.loop.non_finite import NonFiniteSteps
from trainer.loop.opening import STOPPED, opening_lines
from trainer.loop.readback import Readback
from trainer.loop.step import StepNumbers, TrainingState, build, train_step, without_alignment
from trainer.ranks.arithmetic import set_arithmetic
from trainer.ranks.world import world_of_ranks
from trainer.run.checkpoint import RunState, latest_checkpoint, save_checkpoint
from trainer.run.folder import RunFolder
from trainer.run.latent_map import keep_statistics, map_of, require_normalised
from trainer.run.lock import only_writer
from trainer.run.metrics import MetricsLog, read_metrics
from trainer.run.provenance import provenance
from trainer.run.resume import resume
from trainer.run.settings import remember, resolve

STOPPING = "stopping after this step, with the state saved; Ctrl-C again stops at once, without"


def train(config: TrainConfig, *, given: Collection[str] = (), accept_changes: bool = False) -> dict[str, Any]:
    """Train until `config.steps` and return the run's summary (also RUN/summary.json on the main rank).

    `given` are the settings that were chosen explicitly: a younger setting than the run applies to it only then. Raises
    UserError for what the user can mend, KeyboardInterrupt after Ctrl-C with the state saved.
    """
    with world_of_ranks(config.device) as world, ExitStack() as opening:
        opening.enter_context(waiting("opening the store, building the model", hidden=not world.is_main))
        if config.batch % (world.size * config.accumulate):
            raise UserError(
                f"--batch {config.batch} must be a multiple of the {world.size} ranks times --accumulate "
                f"{config.accumulate}"
            )
        config = remember(config, given)
        data = open_data(config)
        try:
            geometry = geometry_of(config, data)
            require_guided_channels(config, geometry)
            config = resolve(config, data, world)
            scale = map_of(config, data, config.run)
            require_normalised(config, data, scale)
            if data.of_features and config.data.decoder:
                resumed = latest_checkpoint(config.run) is not None
                require_decoder(config.data.decoder, data.latents, may_be_elsewhere=resumed)
            set_arithmetic(config)
            curve = DistanceCurve(config, data, geometry, scale, world) if config.log.distance_every else None
            with only_writer(config.run, world):
                new = build(config, geometry, scale, world)
                run = _Run(*resume(new, data.identities, accept_changes), data, curve)
                del new  # which the run may replace, and a replica that is kept would take part in its gradients
                opening.close()
                return run.run()
        finally:
            data.close()


@dataclass(frozen=True, kw_only=True)
class _InFlight:
    """A step that the device may still be at."""

    step: int
    rows: Tensor
    losses: Losses
    numbers: Readback


class _Run:
    """A run from the first step that is missing to the last, or to a signal."""

    def __init__(
        self, training: TrainingState, resumed: RunState | None, data: TrainingData, curve: DistanceCurve | None
    ) -> None:
        self.curve = curve
        self.training, self.data, self.config, self.world = training, data, training.config, training.world
        self.saved_before = resumed.config if resumed is not None else None
        self.first_step = resumed.step if resumed is not None else 0
        self.non_finite = NonFiniteSteps(
            budget=self.config.max_skipped, skipped=resumed.skipped if resumed is not None else 0
        )
        self.alignment_stopped = resumed is not None and resumed.alignment_stopped
        self.window = LogWindow.empty(self.training.geometry)
        if resumed is not None and len(resumed.log_sums) == len(self.window.sums):  # as many alignment targets
            self.window.sums += self.window.sums.new_tensor(resumed.log_sums)
            self.window.count = resumed.log_count
            self.window.n_aligned = resumed.log_count if resumed.log_aligned is None else resumed.log_aligned
        self.in_flight: deque[_InFlight] = deque()
        self.log: MetricsLog | None = None
        self.measuring_s = 0.0

    def run(self) -> dict[str, Any]:
        """Train; returns the summary."""
        config, start_s = self.config, time.perf_counter()
        if self.world.is_main:
            keep_statistics(config, self.data)
            RunFolder(config.run).write_config(config, self.saved_before)
            measured = self.curve.in_words() if self.curve is not None else ""
            print(opening_lines(self.training, self.data, self.first_step, measured), flush=True)
            self.log = MetricsLog(config, from_step=self.first_step)
        self.training.model.train()
        step = self.first_step
        with (
            closing(self.log) if self.log is not None else nullcontext(),
            closing(self._rows()) as rows,
            stop_on_signals(*INTERRUPTS, answer=STOPPING if self.world.is_main else "") as stop,
            progress_bar(
                config.steps, unit="step", done=step, description="train", hidden=not self.world.is_main
            ) as self.bar,
        ):
            stopping = self._catch_up(step, stop)
            for end in self._phases() if not stopping else ():
                if config.aligns and not config.aligns_at(step) and not self.alignment_stopped:
                    self.training, self.alignment_stopped = without_alignment(self.training), True
                    if step > self.first_step and self.world.is_main:  # else the opening lines say so
                        self.bar.write(f"alignment stops after step {step}: {STOPPED}")
                        sys.stdout.flush()
                rows.keep(self.data.readers(with_targets=config.aligns_at(step)))
                with self._loader(rows, step, end) as loader:
                    step, stopping = self._steps(loader, step, stop)
                if stopping:
                    break
        summary = self._summary(step, time.perf_counter() - start_s)
        if self.world.is_main:
            write_atomic(RunFolder(config.run).summary, json.dumps(summary, indent=1).encode(), "summary")
        if stop.signal is not None and self.world.is_main:
            print(
                f"stopped by {signal.Signals(stop.signal).name}; step {step} is saved in {config.run}; "
                "the same command goes on from there"
            )
        if stop.signal == signal.SIGINT:
            raise KeyboardInterrupt
        return summary

    def _phases(self) -> list[int]:
        """The steps at which a part of what is left ends: where the alignment stops, and the last one."""
        config = self.config
        ends = {config.loss.stop_alignment_at, config.steps} if config.aligns else {config.steps}
        return sorted(end for end in ends if self.first_step < end <= config.steps)

    def _rows(self) -> Rows:
        """Where rows come from; a run that is over reads none. A signal that comes meanwhile ends the process."""
        if not self._phases():
            return Streamed({})
        config = self.config
        return open_rows(self.data, config.data, self.world, with_targets=config.aligns_at(self.first_step))

    def _loader(self, rows: Rows, start: int, stop: int) -> Loader:
        config = self.config
        return Loader(
            self.data,
            seed=config.seed,
            batch=config.batch,
            start=start,
            stop=stop,
            rank=self.world.rank,
            world_size=self.world.size,
            device=self.world.device,
            prefetch=config.data.prefetch,
            rows=rows,
            with_targets=config.aligns_at(start),
            compiled=config.compile,
            on_wait=self._show_wait,
        )

    def _steps(self, loader: Loader, done: int, stop: Stop) -> tuple[int, bool]:
        """Take every step of the loader's; returns how many are done in all, and whether a rank was asked to stop."""
        config, stopping = self.config, False
        for batch in loader:
            numbers, losses = train_step(self.training, batch, stop=stop.signal is not None)
            readback = Readback(numbers.packed())
            self.in_flight.append(_InFlight(step=batch.step, rows=batch.rows, losses=losses, numbers=readback))
            self.window.time(batch.stall_s, aligned=config.aligns_at(batch.step))
            done = batch.step + 1
            is_last = done == config.steps
            logs = is_last or done % config.log.every == 0
            saves = is_last or done % config.checkpoint.every == 0
            samples = config.log.samples_every > 0 and done % config.log.samples_every == 0
            measures = self.curve is not None and self.curve.is_due(done)
            is_first = batch.step == self.first_step
            stopping = self._settle(keep=0 if logs or saves or samples or measures or is_first else 1)
            self.bar.set_description_str("train", refresh=False)  # which a wait may have changed
            self.bar.update()
            if logs:
                self._log(done)
            elif is_first:
                self.bar.set_postfix_str(progress_text(self._line(done)))
            if saves or stopping:
                self._settle(keep=0)
                self._save(done)
            if stopping:
                break
            if samples:
                self._sample(done)
            if measures and self._measure(done, stop):
                if not saves:
                    self._save(done)
                return done, True
        return done, stopping

    def _settle(self, keep: int) -> bool:
        """Take in the numbers of all but the last `keep` steps; returns whether a rank was asked to stop."""
        stopping = False
        while len(self.in_flight) > keep:
            step = self.in_flight.popleft()
            numbers = StepNumbers.unpack(step.numbers.wait(), self.training.geometry)
            if numbers.are_finite():
                self.window.add(numbers, aligned=self.config.aligns_at(step.step))
            else:
                loss_scale = self.training.scaler.get_scale()
                message = self.non_finite.leave_out(step.step, numbers, step.losses, step.rows, self.world, loss_scale)
                if self.world.is_main:
                    self.bar.write(message, file=sys.stderr)
            stopping |= numbers.wants_to_stop.item() > 0
        return stopping

    def _log(self, step: int) -> None:
        line = self._line(step)
        self.window = LogWindow.empty(self.training.geometry)
        self.bar.set_postfix_str(progress_text(line))
        if self.log is not None:
            self.log.write(line)

    def _line(self, step: int) -> dict[str, Any]:
        return self.window.line(step, self.config, self.training.geometry, self.world, self.non_finite.skipped)

    def _save(self, step: int) -> None:
        state = RunState(
            step=step,
            config=to_save(self.config, self.saved_before),
            identities=self.data.identities,
            log_sums=self.window.sums.tolist(),
            log_count=self.window.count,
            skipped=self.non_finite.skipped,
            scaler=self.training.scaler.state_dict(),
            log_aligned=self.window.n_aligned,
            alignment_stopped=self.alignment_stopped,
        )
        training, checkpoint = self.training, self.config.checkpoint
        failure: UserError | None = None
        try:
            save_checkpoint(
                self.config.run,
                state,
                training.model,
                training.ema,
                training.optimizer,
                checkpoint.keep,
                milestone_every=checkpoint.milestone_every,
                writes=self.world.is_main,
            )
        except UserError as error:
            failure = error
        self.world.end_together(failure, f"the main rank could not save step {step}, and says why")

    def _sample(self, step: int) -> None:
        drawn = write_preview(self.training, self.data, step, self._show_drawing)
        if self.log is not None and drawn is not None:
            self.log.picture(*drawn, step)

    def _catch_up(self, step: int, stop: Stop) -> bool:
        """Take the point of the step that the run goes on from, which it ended before; returns as `_measure`."""
        if self.curve is None or not self.world.any(self.log is not None and self.curve.lacks(step)):
            return False
        return self._measure(step, stop)

    def _measure(self, step: int, stop: Stop) -> bool:
        """Take a point of the curve; returns whether a rank was asked to stop meanwhile, so that it is missing."""
        assert self.curve is not None
        point = self.curve.measure(self.training, step, stop, self._show)
        self.measuring_s += point.seconds
        self.window.leave_out(point.seconds)
        if self.log is not None and point.line is not None:
            self.log.write(point.line)
        if point.said:
            self.bar.write(point.said, file=sys.stderr)
        return point.stopped

    def _show(self, what: str) -> None:
        self.bar.set_description_str(f"train, {what}", refresh=False)
        self.bar.update(0)  # shows it, if it is time to

    def _show_wait(self, seconds: float) -> None:
        self.bar.set_description_str(f"train, waiting for data for {seconds:.0f} s")

    def _show_drawing(self, n_calls: int) -> None:
        self._show(f"drawing samples, {n_calls} calls of the model")

    def _summary(self, step: int, seconds: float) -> dict[str, Any]:
        lines = [line for line in read_metrics(self.config.run) if "frechet_distance" not in line]
        n_new, training_s = step - self.first_step, max(1e-9, seconds - self.measuring_s)
        return {
            "run": str(self.config.run),
            "checkpoint": str(RunFolder(self.config.run).checkpoint(step)),
            "store": str(self.data.store.root),
            "steps": step,
            "steps_now": n_new,
            "steps_skipped": self.non_finite.skipped,
            "seconds": round(seconds, 2),
            "steps_per_s": round(n_new / training_s, 3) if n_new else 0.0,
            "images_per_s": round(n_new * self.config.batch / training_s, 1) if n_new else 0.0,
            "device": _device_name(self.world.device),
            "parameters": sum(parameter.numel() for parameter in self.training.model.parameters()),
            "classes": self.training.geometry.n_classes,
            "samples": self.data.n_samples,
            **provenance(),
            "first": lines[0] if lines else {},
            "last": lines[-1] if lines else {},
        }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
