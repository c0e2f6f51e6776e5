"""What may stand in one chart or one column: only what was measured alike.

CKNNA falls as samples are added (one checkpoint gave 0.617 on 100 and 0.309 on 1,000), a Fréchet distance with the
images, a probe rises: so values compare only between runs that were measured on the same samples, with the same numbers
of samples and neighbours, features, weights and times. Runs are grouped by all of these, and results of images by
every setting of their cards' protocols too. What a file does not say is not known, and what is not known is alike to
nothing; but what the cards of two results leave out alike does not part them, and is named (`Evaluated.doubt`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from storage.base.ending import command as command_line
from trainer.evaluation.probing.measured import Measured, Point
from trainer.evaluation.quality.card import OF_SPACES, PROTOCOL, SPACES, Card, as_of_any_method, names_of
from trainer.evaluation.quality.record import Evaluation
from trainer.evaluation.report.cards import apart_in_words, in_doubt
from trainer.evaluation.report.run_record import RunRecord

NOT_KNOWN = "not known"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a probe or CKNNA was measured. None is not known; `k` and `features` say nothing of a probe, `c` of CKNNA.

    `rows` names the samples: a digest, or where a file is too old for one, the store and its features' identity, of
    which number and seed choose. `blocks` is () where every block was measured.
    """

    measure: str
    t: float
    blocks: tuple[int, ...]
    n: int | None
    seed: int | None
    weights: str | None
    rows: str | None
    k: int | None = None
    c: float | None = None
    features: str | None = None
    features_digest: str | None = None

    @property
    def not_known(self) -> list[str]:
        """Names of what the file does not say."""
        of_one = ("k", "features", "features_digest") if self.measure == "probe" else ("c",)
        names = [item.name for item in dataclasses.fields(self) if getattr(self, item.name) is None]
        return [WORDS[name] for name in names if name not in of_one]

    def __str__(self) -> str:
        parts = ["samples not known" if self.n is None else f"{self.n:,} samples"]
        if self.k is not None:
            parts.append(f"k = {self.k}")
        if self.c is not None and self.c != 1:
            parts.append(f"C = {self.c:g}")
        if self.weights is not None and self.weights != "ema":
            parts.append(f"{self.weights} weights")
        if self.seed:
            parts.append(f"seed {self.seed}")
        parts.append(f"t = {self.t:g}")
        if self.blocks:
            parts.append(f"blocks {', '.join(map(str, self.blocks))}")
        return ", ".join(parts) + (f", with {self.features}" if self.features else "")

    def apart(self, other: Protocol) -> str:
        """What makes it another than `other`, in words."""
        if self.not_known:
            return f"{' and '.join(dict.fromkeys(self.not_known))} {NOT_KNOWN}"
        differing = []
        for item in dataclasses.fields(self):
            mine, its = getattr(self, item.name), getattr(other, item.name)
            if mine != its:
                differing.append(f"{WORDS[item.name]}{_values(item.name, mine, its)}")
        return ", ".join(differing)


WORDS = {
    "measure": "measure",
    "t": "t",
    "blocks": "blocks",
    "n": "number of samples",
    "seed": "seed",
    "weights": "weights",
    "rows": "samples",
    "k": "k",
    "c": "C",
    "features": "features",
    "features_digest": "identity of the features",
}


def _values(name: str, mine: object, its: object) -> str:
    if name in ("rows", "features_digest"):
        return " are others"
    return f" {mine or 'all'}, not {its or 'all'}"


def protocols(measured: Measured, measure: str) -> dict[Protocol, list[Point]]:
    """The newest points of a file by how they were measured, one entry a time t."""
    newest = measured.newest(measure)
    named = {point.block for point in newest}
    everywhere = measured.depth is not None and named == set(range(1, measured.depth + 1))
    rows = measured.rows
    if rows is None and measured.store and measured.features.identity_digest:
        rows = f"{measured.store} {measured.features.identity_digest}"
    cknna = measure == "cknna"
    return {
        Protocol(
            measure=measure,
            t=t,
            blocks=() if everywhere else tuple(sorted(named)),
            n=measured.n,
            seed=measured.seed,
            weights=measured.weights,
            rows=rows,
            k=measured.k if cknna else None,
            c=None if cknna else measured.c,
            features=(measured.features.path.removeprefix("features/") or None) if cknna else None,
            features_digest=measured.features.identity_digest if cknna else None,
        ): sorted((point for point in newest if point.t == t), key=lambda point: point.block)
        for t in sorted({point.t for point in newest})
    }


P = TypeVar("P")
V = TypeVar("V")


@dataclass(frozen=True, kw_only=True)
class Group(Generic[P, V]):
    """Runs, by their place among all, that were measured alike, and what was found of each."""

    protocol: P
    values: dict[int, V]


def measured_alike(records: Sequence[RunRecord], measure: str) -> list[Group[Protocol, list[Point]]]:
    """Every run that was measured once, in groups, the largest first; a run is in the largest group that it can be in.

    Of several times that would do, a group is at the one with the largest values.
    """
    measured = {i: record.measured[measure] for i, record in enumerate(records)}
    of_runs = {i: ways for i, each in measured.items() if each is not None and (ways := protocols(each, measure))}
    groups = []
    while of_runs:
        candidates: dict[tuple[Protocol, int], dict[int, list[Point]]] = {}
        for i, ways in of_runs.items():
            for protocol, points in ways.items():
                alone = i if protocol.not_known else -1
                candidates.setdefault((protocol, alone), {})[i] = points
        (protocol, _), values = max(
            candidates.items(), key=lambda item: (len(item[1]), _best(item[1].values(), measure))
        )
        groups.append(Group(protocol=protocol, values=values))
        of_runs = {i: ways for i, ways in of_runs.items() if i not in values}
    return groups


def _best(of_runs: Iterable[list[Point]], measure: str) -> float:
    return sum(max(point.value(measure) or 0.0 for point in points) for points in of_runs)


def command(run: RunRecord, protocol: Protocol) -> str:
    """The command line that measures a run by a protocol, as far as that is known."""
    line = [protocol.measure, str(run.path)]
    options: dict[str, object] = {
        "--n": protocol.n,
        "--seed": protocol.seed or None,
        "--weights": protocol.weights,
        "--k": protocol.k,
    }
    options |= {"--c": protocol.c, "--features": protocol.features, "--times": f"{protocol.t:g}"}
    if protocol.blocks:
        options["--blocks"] = ",".join(map(str, protocol.blocks))
    for name, value in options.items():
        if value is not None:
            line += [name, str(value)]
    return command_line("trainer", *line)


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """How a metric of images was measured; None is not known, or nothing where a metric has no reference or no k.

    `card` has the settings of the evaluation card's protocol but for what is a method's own (`as_of_any_method`), and
    nothing else: results whose cards differ in one are measured otherwise. A setting that neither of two cards knows
    does not part them; `doubt` names it.
    """

    name: str
    metric: str
    encoder: str | None
    n_generated: int | None
    resolution: int
    reference: str | None
    n_reference: int | None
    reference_resolution: int | None
    k: int | None
    card: Card

    @property
    def not_known(self) -> list[str]:
        """Names of what the record does not say, without which it is alike to nothing."""
        names = {"encoder": self.encoder, "number of images": self.n_generated}
        if self.compares:
            names["reference"] = self.reference
        return [name for name, value in names.items() if value is None]

    @property
    def compares(self) -> bool:
        """Whether the metric is a comparison with other images."""
        return self.metric not in ALONE

    @property
    def doubt(self) -> str:
        """In what results of this way may differ, since their cards do not say it; "" for nothing."""
        told = {name for name, of in SAID_BESIDE.items() if getattr(self, of) is not None} | {"ema_decay"}
        told |= set() if self.metric == SPACES else set(OF_SPACES)
        return in_doubt(self.card, told if self.compares else {*told, *OF_REFERENCE})

    def apart(self, other: Evaluated) -> str:
        """What makes it another than `other`, in words; every setting that differs is named."""
        differing = [f"{' and '.join(self.not_known)} {NOT_KNOWN}"] if self.not_known else []
        told: set[str] = set()
        for item in dataclasses.fields(self):
            mine, its = getattr(self, item.name), getattr(other, item.name)
            if item.name == "card" or mine == its:
                continue
            told |= {name for name, of in SAID_BESIDE.items() if of == item.name}
            if mine is None and self.not_known:
                continue
            word = item.name.replace("_", " ").replace("n generated", "images").replace("n reference", "its images")
            values = " is another" if item.name in ("encoder", "reference") else f" {mine}, not {its}"
            differing.append(f"{word}{values}")
        return ", ".join([*differing, *apart_in_words(self.card, other.card, told)])


ALONE = ("inception_score",)  # measures of images without a reference
OF_REFERENCE = ("reference_sha256", "n_reference")
HELD_OUT = "held_out"  # of FDr⁶'s record: where the images lay that its divisors are of
SAID_BESIDE = {  # settings of a card that a record says in other words as well
    "n_images": "n_generated",
    "reference_sha256": "reference",
    "n_reference": "n_reference",
    "crop": "resolution",
    **dict.fromkeys([name for name in names_of(PROTOCOL) if name.startswith("extractor")], "encoder"),
}


def evaluated(line: Evaluation, metric: str) -> Evaluated:
    """How a line of a run's record was measured."""
    figures = line.metrics[metric]
    compares = metric not in ALONE
    counts = [name for name in names_of(PROTOCOL) if compares or name not in OF_REFERENCE]
    return Evaluated(
        name=line.name,
        metric=metric,
        encoder=_of_encoder(line),
        n_generated=figures.n_generated,
        resolution=line.generated.resolution or 0,
        reference=(line.reference.digest or line.reference.path) if compares else None,  # what lay there, or where
        n_reference=figures.n_reference,
        # The digest is of the pixels as they were cropped, since such a record counts what could not be read.
        reference_resolution=None if line.reference.n_failed is not None else line.reference.resolution,
        k=figures.k,
        card=as_of_any_method(Card(**{name: getattr(line.card, name) for name in counts})),
    )


def _of_encoder(line: Evaluation) -> str | None:
    """What an extractor's record says, but for a path as it was typed where the card has what lay there."""
    typed = {HELD_OUT} if line.card.divisors_of else set()
    said = {name: value for name, value in line.encoder.items() if name not in typed}
    return json.dumps(said, sort_keys=True) if said else None


def evaluated_alike(records: Sequence[RunRecord], name: str, metric: str) -> list[Group[Evaluated, Evaluation]]:
    """Every way that a metric was measured in, with the last line of each run; the way of most runs is first."""
    ways: dict[tuple[Evaluated, int], dict[int, Evaluation]] = {}
    for i, record in enumerate(records):
        for line in record.evaluations:
            if line.name == name and metric in line.metrics:
                way = evaluated(line, metric)
                ways.setdefault((way, i if way.not_known else -1), {})[i] = line
    groups = [Group(protocol=way, values=lines) for (way, _), lines in ways.items()]
    newest_last = {id(group): place for place, group in enumerate(groups)}
    return sorted(
        groups,
        key=lambda group: (len(group.values), group.protocol.n_generated or 0, newest_last[id(group)]),
        reverse=True,
    )
