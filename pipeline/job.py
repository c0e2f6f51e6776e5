"""Stage one's job: what runs where, and the driver that hands out units.

    driver ── unit ──▶ decode task (1 CPU, anywhere) ── block in the object store ──▶ encoding actor (a GPU) ──▶ shard

Scheduling, placement, the object store and restarts of processes are Ray's. Attempts are ours (`dispatch.Ledger`):
actors restart for ever and their calls are never retried by Ray, so that a unit which kills its worker is tried three
times and given up, and a node that is lost costs its units one attempt. Blocks never reach the driver.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.cluster.resources import Node, Resources, share_out
from pipeline.config import PrecomputeConfig
from pipeline.decode import decode_unit
from pipeline.dispatch import Ledger
from pipeline.encode import CALLS_IN_HAND, Block, UnitEncoder
from pipeline.encoder_pool import Decoded, EncoderPool, first_line
from pipeline.failures import refuse_too_many
from pipeline.outcome import Outcome
from pipeline.plan import Plan
from pipeline.progress import Display, Meter
from pipeline.sources import Source
from storage.base.console import Stop
from storage.base.errors import UserError

POLL_S = 0.5
PATIENCE_S = 120.0  # after this long without an encoder the user is told what is missing
NO_DEVICE = "none came up"


def run_on_cluster(
    config: PrecomputeConfig,
    plan: Plan,
    source: Source,
    run_id: str,
    *,
    make_store: Callable[[], None] | None = None,
    stop: Stop | None = None,
    encoder: type[UnitEncoder] = UnitEncoder,
) -> Outcome:
    """Encode and publish every missing unit of the plan on the cluster that Ray is connected to.

    `make_store` is called once, when the first encoder is up and before it is handed anything: weights that no encoder
    can load leave no store, and no group that claims its name for them. None: the store and its groups are there.

    Raises UserError when too many samples fail, the disk is full or the encoders cannot be loaded, KeyboardInterrupt
    when `stop` says so; units that fail three times are in the outcome. What was published stays, however it ends.
    """
    nodes = [
        Node(cpus=int(node["Resources"].get("CPU", 0)), gpus=int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]
    resources = share_out(
        [node for node in nodes if node.cpus],
        store_bytes=int(ray.cluster_resources().get("object_store_memory", 2**30)),
        unit_bytes=config.shard_rows * config.resolution**2 * 3,
        n_units=len(plan.missing),
        encoders=config.encoders,
        encoder_cpus=config.encoder_cpus,
        decode_cpus=config.decode_cpus,
    )
    print(f"resources  {resources}", flush=True)
    with _encoders(config, plan, resources, run_id, encoder) as pool:
        return _Driver(config, plan, source, resources, pool, stop or Stop()).run(make_store)


@contextlib.contextmanager
def _encoders(
    config: PrecomputeConfig, plan: Plan, resources: Resources, run_id: str, encoder: type[UnitEncoder]
) -> Iterator[EncoderPool]:
    remote: Any = ray.remote  # its stubs do not know max_concurrency
    actor_class = remote(
        num_cpus=resources.encoder_cpus,
        num_gpus=resources.encoder_gpus,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=CALLS_IN_HAND + 1,  # and `ready`, later `shares`
    )(encoder)

    def make() -> Any:
        return actor_class.remote(
            plan.root,
            plan.groups,
            dict(plan.digests),
            config.batch,
            resources.encoder_cpus,
            run_id,
            needs_gpu=resources.encoder_gpus > 0,
        )

    pool = EncoderPool(make, resources.encoders, config.unit_timeout_s)
    try:
        yield pool
    finally:
        pool.close()


class _Driver:
    def __init__(
        self, config: PrecomputeConfig, plan: Plan, source: Source, resources: Resources, pool: EncoderPool, stop: Stop
    ) -> None:
        self.config, self.plan, self.source, self.pool, self.stop = config, plan, source, pool, stop
        self.resources = resources
        self.ledger = Ledger(plan.missing)
        self.n_failed = plan.failed_before
        remote: Any = ray.remote  # its stubs do not know two results
        self.decode_task = remote(
            num_cpus=resources.decode_cpus, max_retries=0, num_returns=2, scheduling_strategy="SPREAD"
        )(decode_unit)
        self.decoding: dict[Any, tuple[int, Any, float]] = {}  # meta ref → unit, images ref, deadline
        self.decoded: deque[Decoded] = deque()
        self.suspects: deque[Decoded] = deque()  # decoded, too: they need an encoder that has nothing in hand
        self.meter = Meter(resources.encoders, resources.decoders)
        self.store_peak_bytes = 0
        self.looked_s = 0.0

    def run(self, make_store: Callable[[], None] | None = None) -> Outcome:
        start_s = time.perf_counter()
        n_images = len(self.plan.index)
        display = Display(
            n_images,
            self.meter,
            self.resources.decode_cpus,
            "GPU" if self.resources.encoder_gpus else "encoder",
            done=n_images - self.plan.n_images_missing,
        )
        up_s, warned = start_s, False
        with display.bar:
            while self.ledger.open:
                if self.stop.signal is not None:
                    raise KeyboardInterrupt
                now_s = time.perf_counter()
                if self.pool.n_up:
                    up_s, warned = now_s, False
                    if not self.meter.n_units:
                        display.encoders_up()
                    if make_store is not None:
                        make_store()
                        make_store = None
                elif not warned and now_s - up_s > PATIENCE_S:
                    warned = True
                    display.say(f"no encoder is up for {PATIENCE_S:.0f} s: {self._why_waiting()}")
                self._hand_out_decodes()
                self._offer()
                self.meter.step(now_s, self.pool.n_up, self.pool.n_idle)
                for ref in self._wait():
                    if ref in self.decoding:
                        self._settle_decode(ref)
                    else:
                        self._settle_encode(ref, display)
                if now_s - self.looked_s > POLL_S:  # what goes by the clock costs something for all that is out
                    self.looked_s = now_s
                    self._end_overdue()
                    self._look_at_cluster()
                    if display.is_still(now_s):
                        display.in_hand(self._images_in_hand())
        return Outcome(
            n_images=self.meter.n_images,
            n_failed=self.n_failed,
            seconds=time.perf_counter() - start_s,
            given_up=self.ledger.given_up,
            device=self.pool.device or NO_DEVICE,
            encoder_busy=self.meter.busy,
            bound=self.meter.bound,
            store_peak_bytes=self.store_peak_bytes,
        )

    def _images_in_hand(self) -> int:
        """Images that are encoded and not published, of units in hand."""
        shares = self.pool.ask_shares()
        return int(sum(share * len(self.plan.layout.unit_rows(unit)) for unit, share in shares.items()))

    def _why_waiting(self) -> str:
        free = {name: n for name, n in ray.available_resources().items() if name in ("CPU", "GPU")}
        needs = {"CPU": self.resources.encoder_cpus, "GPU": self.resources.encoder_gpus}
        return f"the cluster has {free or 'nothing'} free and an encoder needs {needs}, or loads its weights; waiting"

    def _hand_out_decodes(self) -> None:
        while self.ledger.n_out < self.resources.window:
            unit = self.ledger.take()
            if unit is None:
                return
            rows = self.plan.layout.unit_rows(unit)
            samples = self.plan.index.slice(rows)
            images, meta = self.decode_task.remote(
                self.source, rows.start, samples.keys, samples.locations, self.config.resolution
            )
            self.decoding[meta] = (unit, images, time.monotonic() + self.config.unit_timeout_s)

    def _offer(self) -> None:
        """Hand decoded units to encoders until none has room; suspects first, which few can take."""
        for queue in (self.suspects, self.decoded):
            while queue and self.pool.offer(queue[0]):
                queue.popleft()

    def _wait(self) -> list[Any]:
        """What is back, waiting for the first. All of it: asking costs as much for one as for all that is out."""
        refs = [*self.decoding, *self.pool.refs]
        if not refs:
            time.sleep(POLL_S)
            return []
        done, rest = ray.wait(refs, num_returns=1, timeout=POLL_S, fetch_local=False)
        if done and rest:
            done += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        return done

    def _settle_decode(self, ref: Any) -> None:
        unit, images, _ = self.decoding.pop(ref)
        try:
            failures, timings_s, crcs = ray.get(ref)
        except RayError as error:
            self._attempt_failed(unit, "decode", error)
            return
        block = Block(
            unit=unit,
            failures=failures,
            timings_s=timings_s,
            paths=self.plan.missing[unit],
            crcs=crcs,
            redo=self.plan.redo.get(unit, ()),
        )
        suspect = self.ledger.is_suspect(unit)
        (self.suspects if suspect else self.decoded).append(Decoded(block, images, suspect))

    def _settle_encode(self, ref: Any, display: Display) -> None:
        settled = self.pool.settle(ref)
        if settled is None:
            return
        block = settled.decoded.block
        if settled.error is not None:
            self._attempt_failed(block.unit, "encode", settled.error)
            return
        self.ledger.finish(block.unit)
        self.n_failed += len(block.failures)
        n_images = len(self.plan.layout.unit_rows(block.unit))
        now_s = time.perf_counter()
        self.meter.unit_done(now_s, n_images, sum(block.timings_s.values()), settled.encode_s)
        display.unit_done(n_images, self.n_failed, now_s)
        self._check_budget()

    def _attempt_failed(self, unit: int, stage: str, error: RayError) -> None:
        if isinstance(error, UserError):  # the disk is full, say: the other units would meet the same
            raise UserError(str(getattr(error, "cause", error))) from error
        self.ledger.fail(unit, f"{stage}: {first_line(error)}")

    def _end_overdue(self) -> None:
        """Kill what exceeds the unit's time limit, counted from when it was handed out; it comes back as failed."""
        self.pool.tick()
        now_s = time.monotonic()
        for ref, (unit, images, deadline_s) in list(self.decoding.items()):
            if deadline_s < now_s:
                self.decoding[ref] = (unit, images, float("inf"))
                ray.cancel(ref, force=True)

    def _look_at_cluster(self) -> None:
        if not self.resources.encoder_gpus:
            # Encoders of a lost node, started again beside the others, would take the CPUs that decode.
            n_cpus = int(ray.cluster_resources().get("CPU", 0))
            self.pool.fit((n_cpus - self.resources.decode_cpus) // self.resources.encoder_cpus)
        free = ray.available_resources().get("object_store_memory", self.resources.store_bytes)
        self.store_peak_bytes = max(self.store_peak_bytes, int(self.resources.store_bytes - free))

    def _check_budget(self) -> None:
        refuse_too_many(self.n_failed, len(self.plan.index), self.config.max_failures, self.plan.root)
