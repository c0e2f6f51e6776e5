"""What a run is told about itself while it works: rate, how busy the encoders are, which stage holds it back.

An encoder is *busy* while it encodes and *starved* while it is up with nothing in hand. A run whose encoders are
starved for more than STARVED of the time is decode-bound; the decoders that would keep them busy follow from the
seconds that a unit takes in either stage: decoders = encoders · decode / encode.
"""

from __future__ import annotations

import math
import sys
from collections import deque

from storage.base.console import progress_bar

STARVED = 0.1
STILL_S = 2.0  # without a unit
WORTH_SAYING_S = 60.0  # what is over sooner needs neither estimate nor advice
RECENT_S = 120.0  # what "now" means for busy and starved
MIN_UNITS_AN_ENCODER = 3  # before anything is concluded: the first ones load models and warm caches


class Meter:
    """Counts; no clock of its own, so that it is tested by itself. Times are seconds of one monotonic clock.

    What was lately is a sum over a window, kept up as entries come and go: neither a unit nor a question costs more
    after a hundred thousand units. The sums are of whole nanoseconds, so that what leaves them leaves nothing behind.
    """

    def __init__(self, n_encoders: int, n_decoders: int) -> None:
        self.n_encoders, self.n_decoders = n_encoders, n_decoders
        self.n_units = self.n_images = 0
        self.decode_s = self.encode_s = 0.0
        self._steps = _Recent()  # nanoseconds that encoders were up, of which idle
        self._encoded = _Recent()  # nanoseconds of encoding, images
        self._at_s: float | None = None

    def step(self, now_s: float, n_up: int, n_idle: int) -> None:
        """Since the last step, `n_up` encoders were up and `n_idle` of them had nothing in hand."""
        if self._at_s is not None:
            took_ns = _ns(now_s - self._at_s)
            self._steps.add(now_s, took_ns * n_up, took_ns * n_idle)
        self._at_s = now_s
        self._steps.forget(now_s - RECENT_S)
        self._encoded.forget(now_s - RECENT_S)

    def unit_done(self, now_s: float, n_images: int, decode_s: float, encode_s: float) -> None:
        """A unit was published."""
        self.n_units += 1
        self.n_images += n_images
        self.decode_s += decode_s
        self.encode_s += encode_s
        self._encoded.add(now_s, _ns(encode_s), n_images)

    @property
    def busy(self) -> float:
        """Share of the time that encoders were up and encoding, lately."""
        up_ns, _ = self._steps.sums
        return min(1.0, self._encoded.sums[0] / up_ns) if up_ns else 0.0

    @property
    def starved(self) -> float:
        """Share of the time that encoders were up with nothing in hand, lately."""
        up_ns, idle_ns = self._steps.sums
        return idle_ns / up_ns if up_ns else 0.0

    @property
    def settled(self) -> bool:
        """Whether enough was seen to conclude from."""
        return self.n_units >= MIN_UNITS_AN_ENCODER * self.n_encoders

    @property
    def bound(self) -> str:
        """The stage that holds the run back."""
        return "decode-bound" if self.starved > STARVED else "encode-bound"

    @property
    def images_per_s(self) -> float:
        """The rate lately: images after the first unit, over the time since it."""
        entries = self._encoded.entries
        span_s = entries[-1][0] - entries[0][0] if entries else 0.0
        return (self._encoded.sums[1] - entries[0][2]) / span_s if span_s else 0.0

    @property
    def decoders_wanted(self) -> int:
        """Decoders that would keep every encoder busy."""
        return math.ceil(self.n_encoders * self.decode_s / self.encode_s) if self.encode_s else self.n_decoders


class _Recent:
    """Entries (when, a number, another), oldest first, and the sums of their numbers."""

    def __init__(self) -> None:
        self.entries: deque[tuple[float, int, int]] = deque()
        self.sums = (0, 0)

    def add(self, at_s: float, first: int, second: int) -> None:
        self.entries.append((at_s, first, second))
        self.sums = (self.sums[0] + first, self.sums[1] + second)

    def forget(self, before_s: float) -> None:
        while self.entries and self.entries[0][0] < before_s:
            _, first, second = self.entries.popleft()
            self.sums = (self.sums[0] - first, self.sums[1] - second)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


class Display:
    """The progress bar, and what is said once: the estimate after the first units, and that encoders starve.

    The bar is of all `n_images` of the store and begins where earlier runs ended, at `done`; its rate is of this run.
    """

    def __init__(self, n_images: int, meter: Meter, decode_cpus: int, unit: str, *, done: int = 0) -> None:
        self.meter, self._left, self._decode_cpus, self._unit = meter, n_images - done, decode_cpus, unit
        self._estimated = self._warned = False
        self._moved_s, self._n_published = -math.inf, done
        self.bar = progress_bar(n_images, unit="img", done=done, description="precompute")
        self.bar.set_postfix_str("starting encoders, which load their weights", refresh=False)

    def encoders_up(self) -> None:
        """What the bar waits for now is the first images."""
        self.bar.set_postfix_str("", refresh=False)

    def is_still(self, now_s: float) -> bool:
        """Whether no unit was published lately, so that the encoders are worth asking how far they are."""
        return now_s - self._moved_s > STILL_S

    def in_hand(self, n_images: int) -> None:
        """Show images that are encoded and not published; the bar never goes back."""
        self.bar.update(max(0, self._n_published + n_images - self.bar.n))

    def unit_done(self, n_images: int, n_failed: int, now_s: float = -math.inf) -> None:
        """Move the bar on."""
        meter = self.meter
        self._left -= n_images
        self._moved_s = now_s
        self._n_published += n_images
        self.bar.set_postfix_str(f"{n_failed} failed, {self._unit} busy {meter.busy:.0%}, {meter.bound}", refresh=False)
        self.in_hand(0)
        if not meter.settled:
            return
        left_s = self._left / meter.images_per_s if meter.images_per_s else 0.0
        if left_s < WORTH_SAYING_S:
            return
        if not self._estimated:
            self._estimated = True
            self.say(f"{meter.images_per_s:.0f} images/s: {left_s / 3600:.2g} hours for the {self._left} images left")
        if not self._warned and meter.bound == "decode-bound" and meter.decoders_wanted > meter.n_decoders:
            self._warned = True
            self.say(
                f"decoding starves the encoders: they are busy {meter.busy:.0%} of the time; "
                f"{meter.decoders_wanted * self._decode_cpus} CPUs for decoding would keep them busy, "
                f"there are {meter.n_decoders * self._decode_cpus}"
            )

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.bar.write(text, file=sys.stderr)
