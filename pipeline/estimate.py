"""What a run would take, for `precompute --dry-run`: a time with what it is based on, or that it is unknown, and why.

Units that this store's groups had encoded before tell how fast that went: a run's images after its first unit, over the
time since it, as its receipts have it. Groups that one run encoded were encoded together, those of several runs one
after another. Where a group has no such units nothing measured here says how fast its encoder is, and the time is
unknown; what is at hand then is a lower bound (`least_time.py`), the rate of decoding, measured on a few images by one
process, and the operations that the catalogue counts.

Cost: a small file a unit; PROBE_S of decoding, and what reading as few images takes where they lie; the bound's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.decode import decode_unit
from pipeline.least_time import bound, gflop
from pipeline.plan import GroupPlan, Plan
from pipeline.sources import Source
from pipeline.status import rate
from storage.base.errors import UserError
from storage.base.least_time import WORTH_SAYING_S
from storage.receipts import scan

MIN_UNITS = 3  # of one run: the first one loads models and warms caches
PROBE_S = 2.0
PROBE_BLOCKS, PROBE_ROWS = 4, 8  # evenly spread over what is missing, rows of a block one after another
LEFT_OUT = "starting Ray and loading models"
HOW_TO_KNOW = (
    f"run the same command without --dry-run until {MIN_UNITS} units are done, end it with Ctrl-C (they stay), and ask "
    "again"
)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a run got on with a group's units."""

    run: str
    images_per_s: float
    n_units: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """A few images read, decoded and cropped by one process."""

    n_images: int
    n_failed: int
    seconds: float

    @property
    def images_per_s(self) -> float:
        """Of one process."""
        return self.n_images / self.seconds


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """`seconds` for the images that are missing, None where unknown; `lines` for a person say what that is based on.

    `at_least_s` is what encoding them takes at least, where that is known and `seconds` is not.
    """

    n_images: int
    seconds: float | None
    at_least_s: float | None = None
    lines: tuple[str, ...]


def estimate(plan: Plan, source: Source, address: str = "") -> Estimate:
    """How long the missing units of a plan would take on the Ray cluster at an address, or on one started here.

    Decodes a few images where no earlier units tell, and measures how fast this machine computes.
    """
    n_images = plan.n_images_missing
    if not plan.missing:
        return Estimate(n_images=0, seconds=0.0, lines=("time       none: every unit is there",))
    wanted, known = _known(plan)
    if len(known) == len(wanted):
        return _by_paces(plan, known)
    slow = [group for group in wanted if group.layout.path not in known]
    names = ", ".join(group.layout.path for group in slow)
    why = f"this store has no {MIN_UNITS} units that one run made of {names}"
    at_least_s, words = bound(plan, address)
    lines = [
        *([f"time       {words}"] if words else []),
        f"{'unknown    how much longer' if words else 'time       unknown'}: {why}",
        _of_decoding(plan, source),
        *_of_encoding(plan, slow),
        *([f"to know    {HOW_TO_KNOW}"] if len(plan.missing) > MIN_UNITS else []),
    ]
    return Estimate(n_images=n_images, seconds=None, at_least_s=at_least_s, lines=tuple(lines))


def said_before(plan: Plan, address: str) -> tuple[str, ...]:
    """What a run that is about to start says of its time: that of earlier units, else what it takes at least.

    Nothing where that is below a minute.
    """
    wanted, known = _known(plan) if plan.n_images_missing < len(plan.index) else (plan.groups, {})
    if len(known) == len(wanted):
        found = _by_paces(plan, known)
        return found.lines if (found.seconds or 0.0) >= WORTH_SAYING_S else ()
    _, words = bound(plan, address)
    return (f"time       {words}",) if words else ()


def _known(plan: Plan) -> tuple[list[GroupPlan], dict[str, Pace]]:
    """(the groups that lack units, path → how fast earlier units of them were, where there are enough)."""
    wanted = [group for group in plan.groups if any(group.layout.path in paths for paths in plan.missing.values())]
    paces = {group.layout.path: pace(plan, group) for group in wanted}
    return wanted, {path: each for path, each in paces.items() if each is not None}


def _by_paces(plan: Plan, known: Mapping[str, Pace]) -> Estimate:
    n_images, seconds = plan.n_images_missing, _seconds(plan, known)
    return Estimate(n_images=n_images, seconds=seconds, lines=_of_paces(n_images, seconds, known))


def pace(plan: Plan, group: GroupPlan) -> Pace | None:
    """How fast the newest run that made enough of a group's units got on; None where there is none."""
    runs: dict[str, list[tuple[float, int]]] = {}  # (when, images) of its units
    devices: dict[str, str] = {}
    for unit, receipt, reason in scan(plan.root, group.layout, plan.digests[group.layout.path]):
        if receipt is None or reason is not None:
            continue
        run, at_s = receipt.made.get("run"), receipt.made.get("finished_unix_s")
        if run is not None and at_s is not None:
            runs.setdefault(run, []).append((at_s, len(plan.layout.unit_rows(unit))))
            devices[run] = str(receipt.made.get("device", "a device that is not recorded"))
    enough = {run: units for run, units in runs.items() if len(units) >= MIN_UNITS and rate(units)}
    if not enough:
        return None
    newest = max(enough, key=lambda run: max(enough[run]))
    return Pace(run=newest, images_per_s=rate(enough[newest]), n_units=len(enough[newest]), device=devices[newest])


def probe(plan: Plan, source: Source) -> Decoding:
    """Read, decode and crop a few images of what is missing. Raises OSError or UserError where they cannot be read."""
    rows = [row for unit in plan.missing for row in plan.layout.unit_rows(unit)]
    last = max(0, len(rows) - PROBE_ROWS)
    starts = sorted({last * i // max(1, PROBE_BLOCKS - 1) for i in range(PROBE_BLOCKS)})
    _decoded(plan, source, rows[:1])  # opens files and loads the decoder
    n_images = n_failed = 0
    seconds = 0.0
    for start in starts:
        n, failed, took_s = _decoded(plan, source, rows[start : start + PROBE_ROWS])
        n_images, n_failed, seconds = n_images + n, n_failed + failed, seconds + took_s
        if seconds > PROBE_S:
            break
    return Decoding(n_images=n_images, n_failed=n_failed, seconds=max(seconds, 1e-9))


def _decoded(plan: Plan, source: Source, rows: Sequence[int]) -> tuple[int, int, float]:
    keys, locations = ([of[row] for row in rows] for of in (plan.index.keys, plan.index.locations))
    _, (failures, timings_s, _) = decode_unit(source, rows[0], keys, locations, plan.layout.resolution)
    return len(rows), len(failures), sum(timings_s.values())


def _seconds(plan: Plan, paces: Mapping[str, Pace]) -> float:
    """What each run's groups take together, summed over runs."""
    of_runs: dict[str, float] = {}
    for path, each in paces.items():
        n_images = sum(len(plan.layout.unit_rows(unit)) for unit, paths in plan.missing.items() if path in paths)
        of_runs[each.run] = max(of_runs.get(each.run, 0.0), n_images / each.images_per_s)
    return sum(of_runs.values())


def _of_paces(n_images: int, seconds: float, paces: Mapping[str, Pace]) -> tuple[str, ...]:
    based = "; ".join(
        f"{path} {each.images_per_s:.3g} images/s ({each.n_units} units of run {each.run}, on {each.device})"
        for path, each in paces.items()
    )
    return (
        f"time       {in_words(seconds)} or so for {n_images:,} images",
        f"based on   earlier units of this store: {based}; as many encoders and decoders as then are supposed",
        f"left out   {LEFT_OUT}",
    )


def _of_decoding(plan: Plan, source: Source) -> str:
    try:
        found = probe(plan, source)
    except (OSError, UserError) as error:
        return f"decoding   not measured: {' '.join(str(error).split())}"
    failed = f", of which {found.n_failed} failed" if found.n_failed else ""
    whole = in_words(plan.n_images_missing / found.images_per_s)
    return (
        f"decoding   {found.images_per_s:.3g} images/s by one process here, measured on {found.n_images} images{failed}"
        f" in {found.seconds:.2g} s: {whole} of one core for {plan.n_images_missing:,}"
    )


def _of_encoding(plan: Plan, groups: Sequence[GroupPlan]) -> list[str]:
    counts = {group.layout.path: gflop(group, plan.layout.resolution) for group in groups}
    told = ", ".join(f"{path} {n * plan.layout.n_views:.3g}" for path, n in counts.items() if n)
    return [f"encoding   GFLOP an image as the catalogue counts them: {told}; not measured here"] if told else []


def in_words(seconds: float) -> str:
    """A time span, to two digits: 40 s, 12 minutes, 3.1 hours, 2.5 days."""
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 1.5 * size:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "less than a second"
