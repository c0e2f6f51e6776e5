"""Stage one's job: what runs where, and the driver that hands out units.

    driver ── unit ──▶ decode task (1 CPU, anywhere) ── block in the object store ──▶ encoding actor (a GPU) ──▶ shard

Scheduling, placement, the object store and restarts of processes are Ray's. Attempts are ours (`dispatch.Ledger`):
actors restart for ever and their calls are never retried by Ray, so that a unit which kills its worker is tried three
times and given up, and a node that is lost costs its units one attempt. Blocks never reach the driver.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.cluster import ray_cluster
from pipeline.config import PrecomputeConfig
from pipeline.decode import decode_unit
from pipeline.dispatch import Ledger, window
from pipeline.encode import CALLS_IN_HAND, UnitEncoder
from pipeline.plan import Plan
from pipeline.sources import Source
from storage.console import progress_bar, stop_on_signals
from storage.errors import UserError

POLL_S = 0.5
PATIENCE_S = 120.0  # after this long without an encoder the user is told what is missing
UNKNOWN = "?"
MAX_READY_FAILURES = 3  # an encoder that cannot even load its models will not get better
MIN_FAILURES_ALLOWED = 10


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did. `given_up` maps units to what happened at each attempt."""

    n_images: int
    n_failed: int
    seconds: float
    given_up: dict[int, list[str]]
    device: str


@dataclass
class _Block:
    """A decoded unit: its images lie in the object store."""

    unit: int
    images: Any
    failures: list[Any]
    decode_s: float


@dataclass
class _Encoder:
    """An actor and what it has in hand. `up` is false from a failure until it answers `ready` again."""

    actor: Any
    up: bool = False
    in_hand: dict[Any, _Block] = field(default_factory=dict)


def run(config: PrecomputeConfig, plan: Plan, source: Source, run_id: str) -> Outcome:
    """Encode and publish every missing unit of the plan.

    Raises UserError when too many samples fail, the disk is full or the encoders cannot be loaded; units that fail
    three times are in the outcome. On Ctrl-C the cluster is left or stopped, and what was published stays.
    """
    with ray_cluster(config.ray_address, verbose=config.verbose):
        return _Driver(config, plan, source, run_id).run()


class _Driver:
    def __init__(self, config: PrecomputeConfig, plan: Plan, source: Source, run_id: str) -> None:
        resources = ray.cluster_resources()
        n_gpus, n_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        n_encoders = min(config.encoders or max(1, n_gpus), len(plan.missing))
        encoder_cpus = config.encoder_cpus or (1 if n_gpus else max(1, n_cpus // (2 * n_encoders)))
        if n_encoders * encoder_cpus >= n_cpus:
            raise UserError(
                f"{n_encoders} encoders of {encoder_cpus} CPUs leave none of the cluster's {n_cpus} CPUs for decoding; "
                "lower --encoders or --encoder-cpus"
            )
        self.config, self.plan, self.source = config, plan, source
        self.ledger = Ledger(plan.missing)
        block_bytes = config.shard_rows * config.resolution**2 * 3
        self.window = window(
            n_cpus - n_encoders * encoder_cpus,
            n_encoders,
            CALLS_IN_HAND,
            int(resources.get("object_store_memory", 2**30)),
            block_bytes,
        )
        self.allowed_failures = max(MIN_FAILURES_ALLOWED, int(config.max_failures * len(plan.index)))
        self.n_failed = plan.failed_before
        self.device = UNKNOWN
        self.decode_task: Any = ray.remote(num_cpus=1, max_retries=0, num_returns=2, scheduling_strategy="SPREAD")(
            decode_unit
        )
        remote: Any = ray.remote  # its stubs know neither max_concurrency nor two results
        self.encoder_needs = {"CPU": encoder_cpus, "GPU": 1 if n_gpus else 0}
        actor_class = remote(
            num_cpus=encoder_cpus,
            num_gpus=1 if n_gpus else 0,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=CALLS_IN_HAND + 1,  # and `ready`
        )(UnitEncoder)
        self.encoders = [
            _Encoder(actor_class.remote(plan.root, plan.groups, dict(plan.digests), config.batch, encoder_cpus, run_id))
            for _ in range(n_encoders)
        ]
        self.decoding: dict[Any, tuple[int, Any]] = {}  # meta ref → unit, images ref
        self.blocks: deque[_Block] = deque()
        self.asking: dict[Any, _Encoder] = {}
        self.ready_failures = 0
        self.deadline_s: dict[Any, float] = {}

    def run(self) -> Outcome:
        start_s = time.perf_counter()
        n_images, said = 0, False
        for encoder in self.encoders:
            self._ask(encoder)
        with (
            stop_on_signals(signal.SIGINT) as stop,
            progress_bar(self.plan.n_images_missing, unit="img", description="precompute") as bar,
        ):
            while self.ledger.open:
                if stop.signal is not None:
                    raise KeyboardInterrupt
                if not said and self.device == UNKNOWN and time.perf_counter() - start_s > PATIENCE_S:
                    said = True
                    bar.write(f"no encoder is up after {PATIENCE_S:.0f} s: {self._why_waiting()}", file=sys.stderr)
                self._hand_out_decodes()
                self._hand_out_blocks()
                for ref in self._wait():
                    unit = self._settle(ref)
                    if unit is not None:
                        n_images += len(self.plan.layout.unit_rows(unit))
                        bar.update(len(self.plan.layout.unit_rows(unit)))
                        bar.set_postfix(failed=self.n_failed, refresh=False)
                self._end_overdue()
                self._check_budget()
        return Outcome(
            n_images=n_images,
            n_failed=self.n_failed,
            seconds=time.perf_counter() - start_s,
            given_up=self.ledger.given_up,
            device=self.device,
        )

    def _why_waiting(self) -> str:
        free = {name: n for name, n in ray.available_resources().items() if name in ("CPU", "GPU")}
        return f"the cluster has {free or 'nothing'} free and an encoder needs {self.encoder_needs}; waiting"

    def _hand_out_decodes(self) -> None:
        while self.ledger.n_out < self.window:
            unit = self.ledger.take()
            if unit is None:
                return
            rows = self.plan.layout.unit_rows(unit)
            samples = self.plan.index.slice(rows)
            images, meta = self.decode_task.remote(
                self.source, rows.start, samples.keys, samples.locations, self.config.resolution
            )
            self.decoding[meta] = (unit, images)
            self.deadline_s[meta] = time.monotonic() + self.config.unit_timeout_s

    def _hand_out_blocks(self) -> None:
        """Give blocks to encoders that are up; a suspect goes to one that has nothing in hand, and stays alone."""
        for _ in range(len(self.blocks)):
            block = self.blocks.popleft()
            encoder = self._encoder_for(block.unit)
            if encoder is None:
                self.blocks.append(block)
                continue
            ref = encoder.actor.encode_and_publish.remote(
                block.unit, block.images, block.failures, block.decode_s, self.plan.missing[block.unit]
            )
            encoder.in_hand[ref] = block
            self.deadline_s[ref] = time.monotonic() + self.config.unit_timeout_s

    def _encoder_for(self, unit: int) -> _Encoder | None:
        limit = 1 if self.ledger.is_suspect(unit) else CALLS_IN_HAND
        candidates = [
            encoder
            for encoder in self.encoders
            if encoder.up
            and len(encoder.in_hand) < limit
            and not any(self.ledger.is_suspect(block.unit) for block in encoder.in_hand.values())
        ]
        return min(candidates, key=lambda encoder: len(encoder.in_hand), default=None)

    def _wait(self) -> list[Any]:
        refs = [*self.decoding, *self.asking, *(ref for encoder in self.encoders for ref in encoder.in_hand)]
        if not refs:
            time.sleep(POLL_S)
            return []
        done, _ = ray.wait(refs, num_returns=1, timeout=POLL_S, fetch_local=False)
        return done

    def _settle(self, ref: Any) -> int | None:
        """Book what came back; returns the unit when one was finished. Raises UserError where trying again is vain."""
        self.deadline_s.pop(ref, None)
        if ref in self.asking:
            self._settle_ready(ref)
        elif ref in self.decoding:
            unit, images = self.decoding.pop(ref)
            try:
                failures, decode_s = ray.get(ref)
            except RayError as error:
                self._attempt_failed(unit, "decode", error)
            else:
                self.blocks.append(_Block(unit, images, failures, decode_s))
        else:
            encoder = next(encoder for encoder in self.encoders if ref in encoder.in_hand)
            block = encoder.in_hand.pop(ref)
            try:
                ray.get(ref)
            except RayError as error:
                self._attempt_failed(block.unit, "encode", error)
                if encoder.up:
                    self._ask(encoder)  # it may be gone; it gets nothing until it has answered
            else:
                self.ledger.finish(block.unit)
                self.n_failed += len(block.failures)
                return block.unit
        return None

    def _ask(self, encoder: _Encoder) -> None:
        encoder.up = False
        self.asking[encoder.actor.ready.remote()] = encoder

    def _settle_ready(self, ref: Any) -> None:
        encoder = self.asking.pop(ref)
        try:
            self.device = ray.get(ref)
            encoder.up = True
        except RayError as error:
            if isinstance(error, UserError):
                raise UserError(str(getattr(error, "cause", error))) from error
            loading_failed = hasattr(error, "cause")
            self.ready_failures += loading_failed
            if self.ready_failures >= MAX_READY_FAILURES:
                raise UserError(f"the encoders cannot be loaded on a worker: {_first_line(error)}") from error
            time.sleep(POLL_S)  # the actor is being restarted, or its node is lost
            self._ask(encoder)

    def _attempt_failed(self, unit: int, stage: str, error: RayError) -> None:
        if isinstance(error, UserError):  # the disk is full, say: the other units would meet the same
            raise UserError(str(getattr(error, "cause", error))) from error
        self.ledger.fail(unit, f"{stage}: {_first_line(error)}")

    def _end_overdue(self) -> None:
        """Kill what exceeds the unit's time limit; it comes back as a failed attempt."""
        now_s = time.monotonic()
        for ref in [ref for ref, deadline_s in self.deadline_s.items() if deadline_s < now_s]:
            del self.deadline_s[ref]
            if ref in self.decoding:
                ray.cancel(ref, force=True)
            else:
                encoder = next(encoder for encoder in self.encoders if ref in encoder.in_hand)
                ray.kill(encoder.actor, no_restart=False)

    def _check_budget(self) -> None:
        if self.n_failed > self.allowed_failures:
            group = self.plan.root.at(self.plan.groups[0].layout.path)
            raise UserError(
                f"{self.n_failed} of {len(self.plan.index)} images cannot be decoded, {self.allowed_failures} are "
                f"allowed; see `python -m storage info {group}` for which and why, mend them, or raise --max-failures"
            )


def _first_line(error: RayError) -> str:
    """What happened, on one line: the cause's own words where a task raised, else Ray's."""
    cause = getattr(error, "cause", None)
    text = f"{type(cause).__name__}: {cause}" if isinstance(cause, BaseException) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
