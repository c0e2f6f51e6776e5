"""From the measures that are there: figures by arm and step, what vanilla needs to reach REPA, tables and curves.

Every figure is that of the averaged weights. Of several seeds: mean, least and most. "Steps to reach" reads the step at
which the line through vanilla's means first is as good as REPA's mean, over the seeds that both have there.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.effect.arms import REPA, VANILLA, Arm
from benchmarks.effect.measure import ALIGNED_EYES, OTHER_EYES
from benchmarks.report import table
from storage.base.shown import counted

Figures = dict[str, dict[int, dict[int, float]]]  # arm → step → seed → value
LossByTime = dict[int, dict[int, dict[float, float]]]  # step → seed → t → loss


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A figure of a run at a step. `less_is_better` says whether a sign is a gain."""

    key: str
    title: str
    less_is_better: bool
    digits: int = 3


QUANTITIES = (
    Quantity(key="loss", title="held-out denoising loss", less_is_better=True, digits=4),
    Quantity(key="trained", title="denoising loss of as many training images", less_is_better=True, digits=4),
    Quantity(key="fd_aligned", title="Fréchet distance, aligned encoder", less_is_better=True, digits=2),
    Quantity(key="fd_other", title="Fréchet distance, other encoder", less_is_better=True, digits=2),
    Quantity(key="probe", title="linear probe, best block", less_is_better=False),
    Quantity(key="cknna", title="CKNNA, best block", less_is_better=False),
)


def read_measures(folder: Path) -> dict[str, float]:
    """The figures of one run at one step, those that are there."""
    found: dict[str, float] = {}
    for key, name, read in (
        ("loss", "heldout_loss", lambda record: record["mean"]),
        ("trained", "trained_loss", lambda record: record["mean"]),
        ("fd_aligned", ALIGNED_EYES, lambda record: record["metrics"]["fd"]["value"]),
        ("fd_other", OTHER_EYES, lambda record: record["metrics"]["fd"]["value"]),
        ("probe", "probe", lambda record: max(point["probe"] for point in record["points"])),
        ("cknna", "cknna", lambda record: max(point["cknna"] for point in record["points"])),
    ):
        path = folder / f"{name}.json"
        if path.is_file():
            found[key] = read(json.loads(path.read_text()))
    return found


def collect(measures: Path, of_arms: Mapping[str, Arm]) -> dict[str, Figures]:
    """Quantity → figures of all runs."""
    found: dict[str, Figures] = {quantity.key: {} for quantity in QUANTITIES}
    for name, arm in of_arms.items():
        for seed in arm.seeds:
            for folder in sorted((measures / f"{name}-seed{seed}").glob("[0-9]*")):
                for key, value in read_measures(folder).items():
                    found[key].setdefault(name, {}).setdefault(int(folder.name), {})[seed] = value
    return found


def steps_to_reach(curve: Mapping[int, float], value: float, *, less_is_better: bool) -> float | None:
    """The step at which the line through the curve's points first is as good as `value`; None: not within it."""
    sign = 1 if less_is_better else -1
    before: tuple[int, float] | None = None
    for step, at in sorted(curve.items()):
        gap = sign * (at - value)
        if gap <= 0:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * before[1] / (before[1] - gap)
        before = step, gap
    return None


def vanilla_beside(figures: Figures, step: int) -> tuple[dict[int, float], float | None]:
    """Vanilla's means by step, and REPA's at `step`, both over the seeds that have both there; None: there is none."""
    of_repa, of_vanilla = figures.get(REPA, {}).get(step, {}), figures.get(VANILLA, {})
    seeds = of_repa.keys() & of_vanilla.get(step, {}).keys()
    if not seeds:
        return {}, None
    whole = {at: [of[seed] for seed in seeds] for at, of in sorted(of_vanilla.items()) if seeds <= of.keys()}
    return {at: statistics.mean(of) for at, of in whole.items()}, statistics.mean(of_repa[seed] for seed in seeds)


def pairs(figures: Figures, step: int, arm: str = REPA, beside: str = VANILLA) -> list[float]:
    """An arm − another, seed by seed, at a step."""
    ours, theirs = (figures.get(each, {}).get(step, {}) for each in (arm, beside))
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def write_report(out: Path, measures: Path, of_arms: Mapping[str, Arm], heading: str, about: Sequence[str]) -> str:
    """OUT.md, OUT.json, OUT.svg and, of REPA and vanilla alone, OUT_difference.svg; returns the text."""
    found = collect(measures, of_arms)
    main = {name: arm for name, arm in of_arms.items() if not arm.variant}
    by_t = {name: read_by_t(measures, name, arm.seeds) for name, arm in main.items()}
    tables = [*_tables(found, main), *_variants(found, of_arms)]
    text = "\n".join([f"## {heading}", "", *about, "", *tables, ""])
    out.parent.mkdir(exist_ok=True)
    out.with_suffix(".md").write_text(text)
    out.with_suffix(".json").write_text(json.dumps({"figures": found, "heldout_loss_by_t": by_t}, indent=1) + "\n")
    if any(found.values()):
        draw(out.with_suffix(".svg"), found, by_t, main)
        if any(pairs(found["loss"], step) for step in found["loss"].get(REPA, {})):
            draw_differences(out.with_name(f"{out.stem}_difference.svg"), found)
    return text


def read_by_t(measures: Path, name: str, seeds: Iterable[int]) -> LossByTime:
    """Held-out loss by step, seed and t, of what is there."""
    found: LossByTime = {}
    for seed in seeds:
        for path in sorted((measures / f"{name}-seed{seed}").glob("[0-9]*/heldout_loss.json")):
            by_t = json.loads(path.read_text())["by_t"]
            found.setdefault(int(path.parent.name), {})[seed] = {float(t): value for t, value in by_t.items()}
    return found


def less_vanilla(by_t: Mapping[str, LossByTime], name: str, step: int) -> dict[float, float]:
    """t → an arm's held-out loss − vanilla's of the same seeds, mean over these; {} where there are none."""
    ours, theirs = (by_t.get(each, {}).get(step, {}) for each in (name, VANILLA))
    gaps: dict[float, list[float]] = {}
    for seed in ours.keys() & theirs.keys():
        for t, value in ours[seed].items():
            gaps.setdefault(t, []).append(value - theirs[seed][t])
    return {t: statistics.mean(of_seeds) for t, of_seeds in sorted(gaps.items())}


def _tables(found: Mapping[str, Figures], of_arms: Mapping[str, Arm]) -> list[str]:
    lines: list[str] = []
    for quantity in QUANTITIES:
        figures = found[quantity.key]
        steps = sorted({step for name in of_arms for step in figures.get(name, {})})
        if not steps:
            continue
        rows = [
            [of_arms[name].title, *(_spread(figures[name].get(step, {}), quantity.digits) for step in steps)]
            for name in of_arms
            if name in figures
        ]
        differences = [pairs(figures, step) for step in steps]
        if any(differences):
            reached = []
            for step in steps:
                vanilla, repa = vanilla_beside(figures, step)
                better = quantity.less_is_better
                reached.append(
                    "–" if repa is None else _reached(steps_to_reach(vanilla, repa, less_is_better=better), vanilla)
                )
            rows.append(["REPA − vanilla", *(_difference(values, quantity) for values in differences)])
            rows.append(["steps vanilla needs for REPA's", *reached])
        lines += [f"### {quantity.title[0].upper()}{quantity.title[1:]}", ""]
        lines += [table(["", *(f"{step:,} steps" for step in steps)], rows), ""]
    return lines


def _variants(found: Mapping[str, Figures], of_arms: Mapping[str, Arm]) -> list[str]:
    """Variants' figures, vanilla's and REPA's of the same seeds first, and what each gains over the arm beside it."""
    variants = {name: arm for name, arm in of_arms.items() if arm.variant}
    seeds = {seed for arm in variants.values() for seed in arm.seeds}
    shown = [quantity for quantity in QUANTITIES if any(name in found[quantity.key] for name in variants)]
    if not shown:
        return []
    steps = sorted({step for quantity in shown for name in variants for step in found[quantity.key].get(name, {})})
    lines = [
        f"### Other settings (seeds {', '.join(map(str, sorted(seeds)))}; in brackets: less the same unaligned)",
        "",
    ]
    for quantity in shown:
        figures: Figures = {
            name: {step: {seed: of[seed] for seed in of if seed in seeds} for step, of in at.items()}
            for name, at in found[quantity.key].items()
        }
        rows = []
        for name in (VANILLA, REPA, *variants):
            beside = VANILLA if name == REPA else of_arms[name].beside if name in of_arms else ""
            cells = []
            for step in steps:
                values = figures.get(name, {}).get(step, {}).values()
                gains = pairs(figures, step, name, beside)
                cell = f"{statistics.mean(values):.{quantity.digits}f}" if values else "–"
                cells.append(cell + (f" ({statistics.mean(gains):+.{quantity.digits}f})" if gains else ""))
            if name in of_arms and set(cells) != {"–"}:
                rows.append([of_arms[name].title, *cells])
        lines += [table([quantity.title, *(f"{step:,} steps" for step in steps)], rows), ""]
    return lines


def _spread(of_seeds: Mapping[int, float], digits: int) -> str:
    """mean (least to most)."""
    values = list(of_seeds.values())
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _difference(values: Sequence[float], quantity: Quantity) -> str:
    if not values:
        return "–"
    gains = sum((value < 0) == quantity.less_is_better for value in values if value)
    return f"{statistics.mean(values):+.{quantity.digits}f}, better in {gains} of {len(values)}"


def _reached(step: float | None, vanilla: Mapping[int, float]) -> str:
    if step is None:
        return f"> {max(vanilla):,}"
    return f"≤ {min(vanilla):,}" if step <= min(vanilla) else f"{step:,.0f}"


def draw(path: Path, found: Mapping[str, Figures], by_t: Mapping[str, LossByTime], of_arms: Mapping[str, Arm]) -> None:
    """A panel a quantity over steps, seeds as a band; and the loss by t less vanilla's of the same seeds, at the newest
    step that vanilla and REPA have.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "effect"  # or the same figure would be another file
    import matplotlib.pyplot as plt

    shown = [quantity for quantity in QUANTITIES if found[quantity.key] and quantity.key != "trained"]
    figure, panels = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    axes = panels.flatten()
    for unused in axes[len(shown) : -1]:
        unused.set_visible(False)
    for panel, quantity in zip(axes, shown, strict=False):
        for number, (name, arm) in enumerate(of_arms.items()):
            of_steps = found[quantity.key].get(name, {})
            steps = sorted(of_steps)
            if not steps:
                continue
            values = [list(of_steps[step].values()) for step in steps]
            label = f"{arm.title} ({counted(len(values[-1]), 'seed')})"
            panel.plot(steps, [statistics.mean(v) for v in values], "o-", ms=3, color=f"C{number}", label=label)
            panel.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], color=f"C{number}", alpha=0.2, lw=0
            )
        panel.set(title=quantity.title, xlabel="training step")
        panel.grid(alpha=0.3)
    common = [step for step in by_t.get(VANILLA, {}) if step in by_t.get(REPA, {})]
    if common:
        newest = max(common)
        for number, name in enumerate(of_arms):
            if gaps := less_vanilla(by_t, name, newest):
                axes[-1].plot(list(gaps), list(gaps.values()), "o-", ms=3, color=f"C{number}")
        title = f"loss − vanilla's, same seeds, step {newest:,}"
        axes[-1].set(title=title, xlabel="t (0 image, 1 noise)")
        axes[-1].grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_differences(path: Path, found: Mapping[str, Figures]) -> None:
    """REPA − vanilla over steps, a line a seed and their mean, in what neither was aligned with."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "effect"  # or the same figure would be another file
    import matplotlib.pyplot as plt

    shown = [quantity for quantity in QUANTITIES if quantity.key in ("loss", "fd_other")]
    figure, axes = plt.subplots(1, len(shown), figsize=(9, 3), layout="constrained")
    for panel, quantity in zip(axes, shown, strict=True):
        figures = found[quantity.key]
        of_seed: dict[int, dict[int, float]] = {}
        for step in sorted(figures.get(REPA, {})):
            ours, theirs = figures[REPA][step], figures.get(VANILLA, {}).get(step, {})
            for seed in sorted(ours.keys() & theirs.keys()):
                of_seed.setdefault(seed, {})[step] = ours[seed] - theirs[seed]
        panel.axhline(0, color="gray", lw=1)
        for seed, curve in of_seed.items():
            panel.plot(list(curve), list(curve.values()), "o-", ms=3, lw=1, alpha=0.5, label=f"seed {seed}")
        whole = [step for step in figures.get(REPA, {}) if all(step in curve for curve in of_seed.values())]
        if len(of_seed) > 1:
            mean = [statistics.mean(curve[step] for curve in of_seed.values()) for step in sorted(whole)]
            panel.plot(sorted(whole), mean, "k-", lw=2, label="mean")
        side = "below" if quantity.less_is_better else "above"
        panel.set(title=f"{quantity.title}: REPA − vanilla", xlabel="training step", ylabel=f"{side} 0: REPA is better")
        panel.grid(alpha=0.3)
        if of_seed:
            panel.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
