"""The encoding actors of a run: which are up, what each has in hand, and which to hand the next unit to.

Ray restarts an actor's process for ever (`max_restarts=-1`) and never repeats a call (`max_task_retries=0`). An actor
gets units only when it is up, that is once it has answered `ready`; after an error that may mean the process is gone it
is asked again until it answers. One that fails to get up too often is left out, and the run ends when none is left.
One whose GPU has failed it gets a new process: in the old one every later call would fail at once, so that it would be
idle always, be handed every unit, and use up their attempts.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from pipeline.encode import CALLS_IN_HAND, Block
from storage.base.errors import UserError

ASK_AGAIN_S = 0.5
MAX_LOADS = 3  # models that cannot be loaded will not get better
MAX_RESTARTS = 30  # in a row without an answer; a lost node costs less than ten
GPU_FAILED = re.compile("CUDA (driver )?error|cuDNN error")  # the context is lost; memory that lacks reads otherwise


@dataclass
class Decoded:
    """A decoded unit: its images lie in the object store, and never reach the driver."""

    block: Block
    images: Any
    suspect: bool  # it has failed before: whoever encodes it has nothing else in hand


@dataclass(eq=False)
class _Encoder:
    actor: Any
    up: bool = False
    in_hand: dict[Any, Decoded] = field(default_factory=dict)
    shares: Mapping[int, float] = field(default_factory=dict)  # of units in hand, when it was last asked
    failed_loads: int = 0
    restarts: int = 0


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What became of a call: seconds of encoding, or the error that ended the attempt."""

    decoded: Decoded
    encode_s: float = 0.0
    error: RayError | None = None


class EncoderPool:
    """`n` actors from `make`. `device` is the devices' name once one is up, else empty."""

    def __init__(self, make: Callable[[], Any], n: int, timeout_s: float) -> None:
        self.device = ""
        self._make, self._wanted, self._timeout_s = make, n, timeout_s
        self._encoders = [_Encoder(make()) for _ in range(n)]
        self._asked: dict[Any, _Encoder] = {}
        self._ask_at: list[tuple[float, _Encoder]] = []
        self._asked_shares: dict[Any, _Encoder] = {}
        self._deadline_s: dict[Any, float] = {}
        self._holder: dict[Any, _Encoder] = {}  # of each call
        # Kept up to date by `_book`, so that a question costs the same for one encoder and for a hundred.
        self._up: set[_Encoder] = set()
        self._free: list[dict[_Encoder, None]] = [{} for _ in range(CALLS_IN_HAND)]  # position = calls in hand
        for encoder in self._encoders:
            self._ask(encoder)

    @property
    def n_up(self) -> int:
        """Encoders that have answered."""
        return len(self._up)

    @property
    def n_idle(self) -> int:
        """Encoders that are up and have nothing in hand."""
        return len(self._free[0])

    @property
    def refs(self) -> list[Any]:
        """What to wait for."""
        return [*self._asked, *self._holder]

    def offer(self, decoded: Decoded) -> bool:
        """Hand a unit to the encoder with the least in hand; false when none has room."""
        encoder = next(chain.from_iterable(self._free[: 1 if decoded.suspect else CALLS_IN_HAND]), None)
        if encoder is None:
            return False
        ref = encoder.actor.encode_and_publish.remote(decoded.images, decoded.block, time.time())
        encoder.in_hand[ref] = decoded
        self._holder[ref] = encoder
        self._deadline_s[ref] = time.monotonic() + self._timeout_s
        self._book(encoder)
        return True

    def settle(self, ref: Any) -> Settled | None:
        """Book a ref of `refs` that is there. Raises UserError when no encoder can be got up."""
        if ref in self._asked:
            self._settle_ready(self._asked.pop(ref), ref)
            return None
        encoder = self._holder.pop(ref)
        decoded = encoder.in_hand.pop(ref)
        self._deadline_s.pop(ref, None)
        self._book(encoder)
        try:
            return Settled(decoded=decoded, encode_s=ray.get(ref))
        except RayTaskError as error:  # raised inside the actor, which lives
            if encoder.up and GPU_FAILED.search(str(error)):
                ray.kill(encoder.actor, no_restart=False)
                self._book(encoder, up=False)
                self._ask_at.append((time.monotonic() + ASK_AGAIN_S, encoder))  # not at once: it may live to answer
            return Settled(decoded=decoded, error=error)
        except RayError as error:
            if encoder.up:
                self._ask(encoder)  # it may be gone; it gets nothing until it has answered
            return Settled(decoded=decoded, error=error)

    def tick(self) -> None:
        """Ask again whom it is time to ask, and kill what exceeds the time limit: it comes back as a failed attempt."""
        now_s = time.monotonic()
        due = [encoder for at_s, encoder in self._ask_at if at_s <= now_s and encoder in self._encoders]
        self._ask_at = [(at_s, encoder) for at_s, encoder in self._ask_at if at_s > now_s]
        for encoder in due:
            self._ask(encoder)
        for ref in [ref for ref, deadline_s in self._deadline_s.items() if deadline_s < now_s]:
            encoder = self._holder[ref]
            for other in encoder.in_hand:
                self._deadline_s.pop(other, None)
            ray.kill(encoder.actor, no_restart=False)

    def ask_shares(self) -> dict[int, float]:
        """Unit → share of its encoding that is done, of units in hand, as the encoders last said; asks them again."""
        done = (
            ray.wait([*self._asked_shares], num_returns=len(self._asked_shares), timeout=0)[0]
            if self._asked_shares
            else []
        )
        for ref in done:
            with contextlib.suppress(RayError):  # whoever is gone has no units in hand either
                self._asked_shares[ref].shares = ray.get(ref)
            del self._asked_shares[ref]
        pending = set(self._asked_shares.values())
        for encoder in self._up - pending:
            if encoder.in_hand:
                self._asked_shares[encoder.actor.shares.remote()] = encoder
        return {
            decoded.block.unit: encoder.shares.get(decoded.block.unit, 0.0)
            for encoder in self._encoders
            for decoded in encoder.in_hand.values()
        }

    def fit(self, room: int) -> None:
        """Keep as many encoders as there is room for, up to those wanted; one with units in hand is never let go."""
        spare = sorted((encoder for encoder in self._encoders if not encoder.in_hand), key=lambda encoder: encoder.up)
        for encoder in spare[: max(0, len(self._encoders) - max(1, room))]:
            self._encoders.remove(encoder)
            self._book(encoder, up=False)
            ray.kill(encoder.actor)
        for _ in range(min(room, self._wanted) - len(self._encoders)):
            encoder = _Encoder(self._make())
            self._encoders.append(encoder)
            self._ask(encoder)

    def close(self) -> None:
        """End the actors."""
        for encoder in self._encoders:
            ray.kill(encoder.actor)

    def _book(self, encoder: _Encoder, *, up: bool | None = None) -> None:
        """Note whether the encoder is up, where that is news, and what room it has."""
        if up is not None:
            encoder.up = up
            (self._up.add if up else self._up.discard)(encoder)
        for free in self._free:
            free.pop(encoder, None)
        n_in_hand = len(encoder.in_hand)
        has_suspect = any(decoded.suspect for decoded in encoder.in_hand.values())
        if encoder.up and n_in_hand < CALLS_IN_HAND and not has_suspect:
            self._free[n_in_hand][encoder] = None

    def _ask(self, encoder: _Encoder) -> None:
        self._book(encoder, up=False)
        self._asked[encoder.actor.ready.remote()] = encoder

    def _settle_ready(self, encoder: _Encoder, ref: Any) -> None:
        if encoder not in self._encoders:
            return  # let go since it was asked
        try:
            self.device = ray.get(ref)
        except RayError as error:
            if isinstance(error, UserError):
                raise UserError(str(getattr(error, "cause", error))) from error
            # An actor that Ray restarts for ever is dead for good only when its constructor or its environment failed.
            if isinstance(error, RayActorError) and not _is_dead(error):
                encoder.restarts += 1
            else:
                encoder.failed_loads += 1
            if encoder.failed_loads < MAX_LOADS and encoder.restarts < MAX_RESTARTS:
                self._ask_at.append((time.monotonic() + ASK_AGAIN_S, encoder))
                return
            self._encoders.remove(encoder)
            self._wanted -= 1
            what = f"an encoder cannot be started on a worker: {first_line(error)}"
            if not self._encoders:
                raise UserError(f"{what}; no other is left") from error
            print(f"{what}; {len(self._encoders)} are left", file=sys.stderr)
            return
        encoder.failed_loads = encoder.restarts = 0
        self._book(encoder, up=True)


def _is_dead(error: RayActorError) -> bool:
    return "creation task" in str(error)


def first_line(error: RayError) -> str:
    """What happened, on one line: the cause's own words and its node where a task raised, else Ray's."""
    cause = getattr(error, "cause", None)
    text = f"{type(cause).__name__}: {cause}" if isinstance(cause, BaseException) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    node = re.search(r"\bip=([\w.:]+)", str(error)) if isinstance(error, RayTaskError) else None
    return (lines[0][:300] if lines else type(error).__name__) + (f" (on {node[1]})" if node else "")
