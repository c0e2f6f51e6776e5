"""What the page says first: which method is best, by how much, and whether that is more than its seeds differ.

Methods are compared by the first measure (`measures.TITLES`) that most of them have, measured alike (`alike.py`). What
cannot be said is not: with one seed each the spread is unknown, a method of one seed among others of several has its
spread from theirs and the sentence says so, and where nothing compares, it says what is missing and `missing` has the
command lines that get it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from storage import StoreError, UserError, open_store
from storage.base.choices import INCEPTION
from storage.base.ending import command as command_line
from storage.roots import is_url
from trainer.evaluation.quality.card import DRAWN
from trainer.evaluation.quality.measures import PUBLISHED_IMAGES
from trainer.evaluation.quality.record import Evaluation
from trainer.evaluation.report.alike import Evaluated, Group, evaluated_alike
from trainer.evaluation.report.cards import apart_in_words, drawn_in_words, own_in_words
from trainer.evaluation.report.measures import better, decides, measured, place, span, spelled, title, with_spread
from trainer.evaluation.report.methods import Method
from trainer.evaluation.report.remeasure import measure_alike
from trainer.evaluation.report.run_record import RunRecord
from trainer.evaluation.report.spread import LEVEL, Difference, deviation, difference, mean, pooled
from trainer.evaluation.report.training import unlike_training

Outcome = Literal["clear", "open", "within", "unknown", "missing", "alone"]
BUILT_IN = ("tiny-vit", "glyph-vit", "glyph-namer")  # encoders that need no weights
OF_FEATURES = "features/"  # latents that are an encoder's features
FEW_IMAGES = 512  # where such an encoder will do


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A method with its values by run; `behind` is its mean less the best one's, None for the best."""

    method: Method
    values: dict[int, float]
    behind: Difference | None = None

    @property
    def mean(self) -> float:
        """Over its runs."""
        return mean(list(self.values.values()))

    @property
    def text(self) -> str:
        """Mean, and deviation where there is one."""
        return with_spread(self.mean, deviation(list(self.values.values())))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The sentence, how its numbers were measured, and what to run for what is missing.

    `doubt` names what the cards of all that is compared leave out, in which they may differ.
    """

    outcome: Outcome
    sentence: str
    doubt: str = ""
    how: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    ranking: list[Ranked] = field(default_factory=list)
    group: Group[Evaluated, Evaluation] | None = None

    @property
    def is_answered(self) -> bool:
        """Whether the sentence says which method is best, or that seeds do not tell them apart."""
        return self.outcome in ("clear", "open", "within")


def verdict(records: Sequence[RunRecord], methods: Sequence[Method]) -> Verdict:
    """The answer for runs in methods."""
    group = deciding(records, methods)
    if group is None:
        return _nothing(records, methods)
    ranking = rank(group, methods)
    missing = _missing(records, methods, group)
    metric = title(group.protocol.metric, group.protocol.name)
    doubt = group.protocol.doubt if len(group.values) > 1 else ""
    own = own_in_words([line.card for line in group.values.values()])
    otherwise = _otherwise(records, group, [each for each in methods if all(i not in group.values for i in each.runs)])
    how = [
        _how(records, group, ranking),
        *([f"Known of none of them, and so perhaps different: {doubt}"] if doubt else []),
        *([f"Of the methods' own, and not the same: {own}"] if own else []),
        *_spread(ranking),
        *unlike_training(records, group.values, [ranked.method for ranked in ranking]),
        *([f"Left out, not measured alike: {'; '.join(otherwise.values())}"] if otherwise else []),
        *_others(records, group, ranking),
    ]
    outcome: Outcome
    if len(ranking) < 2:
        one = ranking[0]
        said = f"{one.method.name} has {metric} {_stated(one)}"
        if len(methods) == 1:
            sentence, outcome = f"{said}; there is no other method to compare it with.", "alone"
        else:
            why = f" ({'; '.join(otherwise)})" if otherwise else ""
            sentence = f"Which is better is not known: {said}, and no other was measured alike{why}."
            outcome = "missing"
    else:
        sentence, outcome = _compared(ranking, metric, better(group.protocol.metric) == "lower")
        if outcome == "unknown":
            missing += _other_seeds(records, ranking)
    return Verdict(
        outcome=outcome,
        sentence=sentence,
        doubt=doubt,
        how=how,
        missing=missing,
        ranking=ranking,
        group=group,
    )


def _otherwise(
    records: Sequence[RunRecord], group: Group[Evaluated, Evaluation], left: Sequence[Method]
) -> dict[str, str]:
    """Of methods that were not measured as a group was, how each was measured → that with its value."""
    way = group.protocol
    found: dict[str, str] = {}
    ways = evaluated_alike(records, way.name, way.metric)
    for method in left:
        of_method = [(other, ranked) for other in ways for ranked in rank(other, [method])]
        for other, ranked in of_method:
            differs = other.protocol.apart(way)
            found[f"{method.name}: {differs}"] = f"{method.name} has {ranked.text}: {differs}"
        if not of_method:
            found[f"{method.name}: not measured"] = f"{method.name}: not measured"
    return found


def deciding(records: Sequence[RunRecord], methods: Sequence[Method]) -> Group[Evaluated, Evaluation] | None:
    """The measure, and how it was measured, by which methods are compared: of most methods, then of most runs."""
    groups = [
        group
        for name, metric in measured(records)
        if decides(metric)
        for group in evaluated_alike(records, name, metric)
    ]

    def weight(group: Group[Evaluated, Evaluation]) -> tuple[int, int, bool, int]:
        way = group.protocol
        n_methods = sum(any(i in group.values for i in method.runs) for method in methods)
        return n_methods, len(group.values), way.name == INCEPTION, -place(way.metric)

    return max(groups, key=weight, default=None)


def rank(group: Group[Evaluated, Evaluation], methods: Sequence[Method]) -> list[Ranked]:
    """The methods that have a value, the best first, and how far each is behind it."""
    metric = group.protocol.metric
    found = []
    for method in methods:
        values = {i: group.values[i].metrics[metric].value for i in method.runs if i in group.values}
        if values:
            found.append(Ranked(method=method, values=values))
    found.sort(key=lambda ranked: ranked.mean, reverse=better(metric) == "higher")
    of_all = [list(ranked.values.values()) for ranked in found]
    return [
        Ranked(
            method=ranked.method,
            values=ranked.values,
            behind=difference(of_all[i], of_all[0], of_all, len(found) - 1) if i else None,
        )
        for i, ranked in enumerate(found)
    ]


def _stated(ranked: Ranked) -> str:
    n = len(ranked.values)
    return f"{ranked.text} (mean and deviation of {n} seeds)" if n > 1 else f"{ranked.text} (one seed)"


def spread_lent(ranking: Sequence[Ranked], of: Sequence[Ranked]) -> str:
    """Where the spread of those of `of` comes from that have one seed; "" where none has, or there is no spread."""
    single = [ranked.method.name for ranked in of if len(ranked.values) == 1]
    if not single or all(len(ranked.values) == 1 for ranked in ranking):
        return ""
    have = "have one seed each" if len(single) > 1 else "has one seed"
    return f"{' and '.join(single)} {have}: spread taken from the other methods' seeds"


def _compared(ranking: Sequence[Ranked], metric: str, lower: bool) -> tuple[str, Outcome]:
    first, second = ranking[0], ranking[1]
    behind = second.behind
    assert behind is not None
    apart = spelled(abs(behind.value))
    word = "lower" if lower else "higher"
    best = f"{first.method.name} is better than {second.method.name}"
    if len(ranking) > 2:
        best = f"{first.method.name} is the best of {len(ranking)} methods, before {second.method.name}"
    both = f"{metric} {first.text} against {second.text}, {apart} {word}"
    seeds = _seeds(first, second)
    if behind.spread is None or behind.interval is None:
        said = f"{first.method.name} has the {'lowest' if lower else 'highest'} {metric}"
        if len(ranking) == 2:
            said = f"{first.method.name} has the {word} {metric}"
        return (
            f"{said}, {first.text} against {second.text} of {second.method.name} ({apart} {word}). One seed each: "
            "cannot say whether that is more than luck, since how much seeds differ is unknown.",
            "unknown",
        )
    spread = spelled(behind.spread)
    lent = spread_lent(ranking, (first, second))
    of_seeds = f"{seeds}; {lent}" if lent else seeds
    low, high = sorted(abs(end) for end in behind.interval)
    if behind.is_settled:
        sure = f"{LEVEL:.0%} interval {span(low, high)}, of {of_seeds}"
        return f"{best}: {both} ({sure}), which is more than the seeds' spread of {spread}.", "clear"
    reach = f"seeds alone could make a difference of {spelled(behind.reach or 0.0)} ({LEVEL:.0%} interval, {of_seeds})"
    others = _well_behind(ranking)
    if behind.is_within:
        return (
            f"{first.method.name} and {second.method.name} cannot be told apart: {metric} {first.text} and "
            f"{second.text} are {apart} apart, and {reach}.{others}",
            "within",
        )
    return f"{first.method.name} is ahead of {second.method.name}, but not surely: {both}, and {reach}.{others}", "open"


def _well_behind(ranking: Sequence[Ranked]) -> str:
    """Of methods below the first two, those that the seeds put behind the best."""
    settled = [each for each in ranking[2:] if each.behind is not None and each.behind.is_settled]
    if not settled:
        return ""
    words = [f"{each.method.name} ({spelled(abs(each.behind.value))})" for each in settled if each.behind is not None]
    return f" Behind {ranking[0].method.name} by more than seeds explain: {', '.join(words)}."


def _seeds(first: Ranked, second: Ranked) -> str:
    n, m = len(first.values), len(second.values)
    each = [f"{k} seed{'s' if k > 1 else ''}" for k in (n, m)]
    return f"{n} seeds each" if n == m else " and ".join(each)


def _how(records: Sequence[RunRecord], group: Group[Evaluated, Evaluation], ranking: Sequence[Ranked]) -> str:
    """How the deciding measure was measured."""
    way = group.protocol
    images = "a number of images that is not known" if way.n_generated is None else f"{way.n_generated:,} images a run"
    against = ""
    if way.n_reference is not None:
        against = f" against {way.n_reference:,} real ones"
    elif way.metric != "inception_score":
        against = " against given statistics"
    steps = sorted({line.step for i, line in group.values.items() if line.step is not None})
    after = f", after {steps[0]:,} steps" if len(steps) == 1 else ""
    word = better(way.metric)
    few = ""
    if way.n_generated is not None and way.n_generated < PUBLISHED_IMAGES:
        few = f"; too few images to compare with published figures, which are of {PUBLISHED_IMAGES:,}"
    intervals = [found for line in group.values.values() if (found := line.metrics[way.metric].interval) is not None]
    drawn = ""
    if intervals:
        half = mean([(high - low) / 2 for low, high in intervals])
        drawn = f"; drawing as many other images would move a run's value by some {spelled(half)} ({LEVEL:.0%})"
    by = f", drawn by {how}" if (how := drawn_in_words(way.card)) else ""
    return f"{title(way.metric, way.name)} of {images}{against}{after}{by}; {word} is better{drawn}{few}"


def _spread(ranking: Sequence[Ranked]) -> list[str]:
    """Whose seeds the spread is of."""
    found = pooled([list(ranked.values.values()) for ranked in ranking])
    if len(ranking) < 2:
        return []
    if found is None:
        return ["One seed each: no interval can be given for a difference between methods"]
    several_seeds = [(ranked, list(ranked.values.values())) for ranked in ranking if len(ranked.values) > 1]
    of = [f"{spelled(deviation(v) or 0.0)} in {len(v)} seeds of {ranked.method.name}" for ranked, v in several_seeds]
    lent = spread_lent(ranking, ranking)
    several = f", {LEVEL:.0%} for all {len(ranking) - 1} of them together (Bonferroni)" if len(ranking) > 2 else ""
    return [
        f"The seeds' spread is the deviation of one training from its method's mean, {spelled(found[0])}, "
        f"taken to be the same for all methods ({', '.join(of)}); intervals for differences from the best are "
        f"Student's{several}" + (f". {lent}" if lent else "")
    ]


def _others(records: Sequence[RunRecord], group: Group[Evaluated, Evaluation], ranking: Sequence[Ranked]) -> list[str]:
    """By which other measures, and ways of measuring, the same method is first of the two that lead, and by which not.

    What was drawn otherwise than for the deciding measure is named with it.
    """
    if len(ranking) < 2:
        return []
    a, b = ranking[0].method, ranking[1].method
    words = ("ahead of", "behind", "level with")
    listed: dict[str, list[str]] = {word: [] for word in words}
    for name, metric in measured(records):
        sense = better(metric)
        for other in evaluated_alike(records, name, metric) if sense is not None else []:
            means = {ranked.method: ranked.mean for ranked in rank(other, [a, b])}
            if len(means) < 2 or other.protocol == group.protocol:
                continue
            word = title(metric, INCEPTION if name == group.protocol.name else name)  # the encoder is named above
            word += _drawn_otherwise(other.protocol, group.protocol)
            if spelled(means[a]) == spelled(means[b]):
                listed["level with"].append(word)
                continue
            is_ahead = (means[a] < means[b]) == (sense == "lower")
            both = f"{word} ({spelled(means[a])} against {spelled(means[b])})"
            listed["ahead of" if is_ahead else "behind"].append(both)
    parts = [f"{a.name} is {word} {b.name} in {', '.join(names)}" for word, names in listed.items() if names]
    return [f"Other measures, whose spread is below: {'; '.join(parts)}"] if parts else []


def _drawn_otherwise(way: Evaluated, main: Evaluated) -> str:
    """In what images were drawn otherwise than those of another measure, in brackets."""
    if way.metric == main.metric and way.name == main.name:
        return f" [{way.apart(main)}]"
    differing = apart_in_words(way.card, main.card, set(vars(way.card)) - {*DRAWN, "n_images"})
    if way.doubt != main.doubt and way.doubt:
        differing.append(f"known of neither: {way.doubt}")
    return f" [{', '.join(differing)}]" if differing else ""


# ---- what is missing --------------------------------------------------------------------------------------------


def _nothing(records: Sequence[RunRecord], methods: Sequence[Method]) -> Verdict:
    missing = [(f"{run.name}: not evaluated", evaluation_command(records, run)) for run in records]
    if len(methods) == 1:
        what = f"{len(records)} runs" if len(records) > 1 else "the run"
        sentence = f"How good {methods[0].name} is, is not known: no images of {what} were measured."
    else:
        sentence = (
            f"Which of the {len(methods)} methods is better is not known: no images of theirs were measured "
            "(a loss or an alignment does not say how good images are)."
        )
    return Verdict(outcome="missing", sentence=sentence, missing=missing)


def _missing(
    records: Sequence[RunRecord], methods: Sequence[Method], group: Group[Evaluated, Evaluation]
) -> list[tuple[str, str]]:
    """Runs that lack the deciding measure, and the commands that get it."""
    way, like = group.protocol, next(iter(group.values.values()))
    rows = []
    for i, run in enumerate(records):
        if i in group.values:
            continue
        lines = [line for line in run.evaluations if line.name == way.name and way.metric in line.metrics]
        if lines:
            rows.append(measure_alike(run, lines[-1], like, way).row(f"{run.name}: measured otherwise"))
        else:
            of_run = Evaluation(name=way.name, metrics={})
            rows.append(measure_alike(run, of_run, like, way).row(f"{run.name}: not measured"))
    return rows


def evaluation_command(records: Sequence[RunRecord], run: RunRecord, images: Path | None = None) -> str:
    """The command line that evaluates a run against its own store, drawing images first where none are there.

    `images` are the ones to evaluate (default: those drawn last).
    """
    stored = [path.partition("/")[2] for path in _groups(run.config.store) if path.startswith("features/")]
    used = [name for record in records for name in record.config.data.features]
    used += [record.config.data.latents.removeprefix(OF_FEATURES) for record in records if _of_features(record)]
    tiny = [name for group in [*used, *stored] for name in BUILT_IN if group == name or group.startswith(f"{name}-")]
    options = ["--encoder", tiny[0]] if tiny else []
    reference = ["--reference", run.config.store or "REFERENCE"]
    if images is None and not run.drawn:
        n = str(FEW_IMAGES if tiny else PUBLISHED_IMAGES)
        return command_line("trainer", "score", run.path, "--n", n, *reference, *options)
    folder = str(images or run.drawn[-1].folder)
    return command_line("trainer", "evaluate", folder, *reference, *options, "--run", run.path)


def _groups(store: str) -> list[str]:
    """Of a store on this machine, which may be gone; a page of a run is made without a network."""
    if is_url(store):
        return []
    with suppress(StoreError, UserError, OSError):
        return open_store(store).groups()
    return []


def _of_features(record: RunRecord) -> bool:
    return record.config.data.latents.startswith(OF_FEATURES)


def _other_seeds(records: Sequence[RunRecord], ranking: Sequence[Ranked]) -> list[tuple[str, str]]:
    """How the two that lead are trained with another seed."""
    rows = []
    for ranked in ranking[:2]:
        run = records[ranked.method.runs[0]]
        seed = max(records[i].config.seed for i in ranked.method.runs) + 1
        to = run.path.with_name(f"{run.path.name}-seed{seed}")
        line = command_line("trainer", "train", "--config", run.path / "config.yaml", "--seed", str(seed), "--run", to)
        rows.append((f"{ranked.method.name}: another seed", line))
    return rows
