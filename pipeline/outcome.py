"""What a run of stage one did, wherever it ran: on Ray (`job`), or in one process where there is none (benchmarks)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pipeline.config import PrecomputeConfig
from pipeline.plan import Plan
from pipeline.sources import Source
from storage.base.console import Stop


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did. `given_up` maps units to what happened at each attempt."""

    n_images: int
    n_failed: int
    seconds: float
    given_up: dict[int, list[str]]
    device: str
    encoder_busy: float
    bound: str
    store_peak_bytes: int


class Run(Protocol):
    """Encodes and publishes every missing unit of a plan: `job.run_on_cluster` says how it ends."""

    def __call__(
        self,
        config: PrecomputeConfig,
        plan: Plan,
        source: Source,
        run_id: str,
        *,
        make_store: Callable[[], None],
        stop: Stop,
    ) -> Outcome:
        """`make_store` is called once, when an encoder is up; `stop` is looked at between two pieces of work."""
