"""The whole of stage one, side by side with its parts and with other ways of running it: images a second.

    python -m benchmarks.precompute [--rounds 3] [--full-size]

Contestants do the same work on the same images, one core decoding and one encoder (one core, or a GPU):

    decoders alone     read, decode, crop into memory                     a bound
    encoders alone     the actor's encoding, fed from memory              a bound
    one process        a decoding thread, two calls in hand, published    the job without Ray
    ours               Ray tasks and actors, the driver's ledger          `pipeline.job.run_on_cluster`
    Ray Data           map(decode) | map(encoding actor that publishes)   the same graph in Ray Data

Cases: *encode-bound*, the built-in encoders on the built-in photographs at 128 px; *decode-bound*, photographs of
500 × 375 px and an encoder that only averages pixels, into arrays of the same shapes. `--full-size` instead takes
SD-VAE and DINOv2-B, real architectures with seeded random weights at 256 px, on photographs of 500 × 375 px: for a GPU.

Each run is a process of its own; a rate counts what was published after the first unit, over the time since it, so that
starting Ray and loading models are left out. Rounds go through all contestants in turn; medians, and ratios within a
round. What a stage costs in CPU time is measured apart, one stage after the other in one process, so that nothing
waits: user and system time of all of its threads, Ray's among them. Handing over is `ray.put` and `ray.get` of a unit;
publishing is statistics, checksums, writing and syncing, in every group.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.precompute_cases import DECODE_CPUS, MORE_TO_DECODE, SHARD_ROWS, WORK, Case, make_cases
from benchmarks.report import RESULTS, machine, table
from benchmarks.without_ray import decoded_unit
from pipeline.cluster.environment import prepare_ray
from pipeline.decode import decode_unit, to_rgb
from pipeline.encode import CALLS_IN_HAND, Block, UnitEncoder
from pipeline.plan import Plan, create, make_plan
from pipeline.sources import Source, open_source
from pipeline.sources.protocol import Unreadable
from pipeline.transforms import center_crop
from storage import Staging
from storage.receipts import scan
from storage.roots import open_root
from storage.samples import sample_crc32c

IMAGENET = 1_281_167


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one run of one contestant gave."""

    images_per_s: float
    cpu_s: dict[str, float] = field(default_factory=dict)  # of a stage, an image
    peak_store_bytes: int = 0
    store_bytes: int = 0
    encoder_busy: float = 0.0


def blocks_of(plan: Plan, source: Source, resolution: int) -> Iterator[tuple[np.ndarray, Block]]:
    """Every unit, decoded here and now."""
    for unit in plan.missing:
        yield decoded_unit(plan, source, resolution, unit)


def rate(done: list[tuple[float, int]]) -> float:
    """Images after the first unit over the time since it, of (when, images) of each unit."""
    done = sorted(done)
    return sum(n for _, n in done[1:]) / (done[-1][0] - done[0][0])


def decoders_alone(case: Case, plan: Plan, source: Source, run_id: str) -> Figures:
    done = [(time.perf_counter(), len(images)) for images, _ in blocks_of(plan, source, case.resolution)]
    return Figures(images_per_s=rate(done))


def encoders_alone(case: Case, plan: Plan, source: Source, run_id: str) -> Figures:
    blocks = list(blocks_of(plan, source, case.resolution))
    encoder = make_encoder(case, plan, run_id)
    encoder.ready()
    done = []
    for images, block in blocks:
        pixels = encoder.upload(images)
        for path in block.paths:
            encoder.encode(path, pixels, np.arange(len(images)), case.config(Path()).batch, 0)
        done.append((time.perf_counter(), len(images)))
    return Figures(images_per_s=rate(done))


def one_process(case: Case, plan: Plan, source: Source, run_id: str) -> Figures:
    encoder = make_encoder(case, plan, run_id)
    encoder.ready()
    with ThreadPoolExecutor(1) as decoding, ThreadPoolExecutor(CALLS_IN_HAND) as calls:
        blocks = blocks_of(plan, source, case.resolution)
        ahead = decoding.submit(next, blocks, None)
        waiting: list[Any] = []
        while (decoded := ahead.result()) is not None:
            ahead = decoding.submit(next, blocks, None)
            if len(waiting) >= CALLS_IN_HAND:
                waiting.pop(0).result()
            waiting.append(calls.submit(encoder.encode_and_publish, *decoded, time.time()))
        for call in waiting:
            call.result()
    return published(plan)


def ours(case: Case, plan: Plan, source: Source, run_id: str) -> Figures:
    from pipeline.cluster.connection import ray_cluster
    from pipeline.job import run_on_cluster

    with ray_cluster("", verbose=False):
        import ray

        store_bytes = int(ray.cluster_resources()["object_store_memory"])
        outcome = run_on_cluster(case.config(Path("unused")), plan, source, run_id, encoder=case.encoder)
    assert not outcome.given_up
    return published(plan, peak=outcome.store_peak_bytes, store=store_bytes, busy=outcome.encoder_busy)


def ray_data(case: Case, plan: Plan, source: Source, run_id: str) -> Figures:
    from pipeline.cluster.connection import ray_cluster

    resolution = case.resolution
    parts = {unit: (plan.layout.unit_rows(unit).start, plan.index.slice(plan.layout.unit_rows(unit)), paths)
             for unit, paths in plan.missing.items()}  # fmt: skip

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        start, samples, _ = parts[row["unit"]]
        images, (_, timings_s, crcs) = decode_unit(source, start, samples.keys, samples.locations, resolution)
        return {"unit": row["unit"], "images": images, "timings_s": json.dumps(timings_s), "crcs": crcs}

    class Encode:
        def __init__(self) -> None:
            self.encoder = make_encoder(case, plan, run_id)
            self.encoder.ready()

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            unit = int(row["unit"])
            timings_s, paths = json.loads(row["timings_s"]), parts[unit][2]
            block = Block(unit=unit, failures=[], timings_s=timings_s, paths=paths, crcs=row["crcs"])
            self.encoder.encode_and_publish(row["images"], block, time.time())
            return {"unit": unit}

    with ray_cluster("", verbose=False):
        import ray

        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = ray.data.from_items([{"unit": unit} for unit in parts], override_num_blocks=len(parts))
        decoded = rows.map(decode, num_cpus=DECODE_CPUS)
        encoded = decoded.map(Encode, concurrency=1, num_cpus=1)  # type: ignore[arg-type]  # a class is called per row
        assert len(encoded.take_all()) == len(parts)  # `count` would not run it
    return published(plan)


def stages(case: Case, plan: Plan, source: Source, run_id: str) -> Figures:
    """No contestant: CPU time by stage, without the first unit."""
    from pipeline.cluster.connection import ray_cluster

    encoder = make_encoder(case, plan, run_id)
    encoder.ready()
    cpu_s: dict[str, float] = {}
    at_s = 0.0

    def took(stage: str) -> None:
        nonlocal at_s
        cpu_s[stage] = cpu_s.get(stage, 0.0) + time.process_time() - at_s
        at_s = time.process_time()

    start_s = time.perf_counter()
    with ray_cluster("", verbose=False):
        import ray

        for unit, paths in plan.missing.items():
            if unit == 1:
                cpu_s, start_s = {}, time.perf_counter()
            samples = plan.index.slice(plan.layout.unit_rows(unit))
            images = np.zeros((len(samples), case.resolution, case.resolution, 3), dtype=np.uint8)
            crcs = np.zeros(len(samples), dtype=np.uint32)
            at_s = time.process_time()
            for i, sample in enumerate(source.read_many(samples.locations)):
                took("read")
                if isinstance(sample, Unreadable):
                    raise SystemExit(f"{samples.keys[i]} cannot be read: {sample.reason}")
                crcs[i] = sample_crc32c(sample)
                took("checksum")
                image = to_rgb(sample)
                took("decode")
                images[i] = center_crop(image, case.resolution)
                took("crop")
            handed_over = ray.get(ray.put(images))
            took("hand over")
            block = Block(unit=unit, failures=[], timings_s={}, paths=paths, crcs=crcs)
            pixels, present = encoder.upload(handed_over), np.arange(len(images))
            for path in paths:
                arrays = encoder.encode(path, pixels, present, case.config(Path()).batch, 0)
                took("encode")
                encoder._publish(path, block, arrays, present, {}, {})
                took("publish")
        seconds = time.perf_counter() - start_s
    n = len(plan.index) - len(plan.layout.unit_rows(0))
    return Figures(images_per_s=n / seconds, cpu_s={stage: total_s / n for stage, total_s in cpu_s.items()})


CONTESTANTS: dict[str, Callable[[Case, Plan, Source, str], Figures]] = {
    "decoders alone": decoders_alone, "encoders alone": encoders_alone, "one process": one_process, "ours": ours,
    "Ray Data": ray_data,
}  # fmt: skip


def make_encoder(case: Case, plan: Plan, run_id: str) -> UnitEncoder:
    """The actor's class, here."""
    config = case.config(Path("unused"))
    return case.encoder(plan.root, plan.groups, dict(plan.digests), config.batch, config.encoder_cpus, run_id)


def published(plan: Plan, peak: int = 0, store: int = 0, busy: float = 0.0) -> Figures:
    """The rate, from the receipts."""
    done: dict[int, float] = {}
    for group in plan.groups:
        for unit, receipt, reason in scan(plan.root, group.layout, plan.digests[group.layout.path]):
            assert receipt is not None, reason
            done[unit] = max(done.get(unit, 0.0), receipt.made["finished_unix_s"])
    return Figures(
        images_per_s=rate([(at_s, len(plan.layout.unit_rows(unit))) for unit, at_s in done.items()]),
        peak_store_bytes=peak, store_bytes=store, encoder_busy=busy,
    )  # fmt: skip


def run_task(name: str, contestant: str, full_size: bool, n_per_class: int) -> None:
    """One run, in this process; prints what it found as JSON."""
    prepare_ray("")  # before Ray is imported, which reads its settings then
    case = make_cases(full_size, n_per_class)[name]
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        root = open_root(Path(folder).absolute() / "store")
        source = open_source(str(case.data.absolute()))
        plan = make_plan(case.config(Path(str(root))), source, source.listing().index, root)
        with Staging(root) as staging:
            create(plan, source, staging)
            figures = {**CONTESTANTS, "stages": stages}[contestant](case, plan, source, staging.run_id)
    print("RESULT", json.dumps(vars(figures)))


def report(case: Case, name: str, figures: dict[str, list[Figures]]) -> str:
    """The table of one case, and what follows from it."""
    costs = [run.cpu_s for run in figures.pop("stages")]
    cpu_s = {stage: statistics.median(cost[stage] for cost in costs) for stage in costs[0]}
    rates = {c: [f.images_per_s for f in runs] for c, runs in figures.items()}

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True))

    rows = [[c, f"{statistics.median(r):,.1f}", f"{ratio('ours', c):.3f}"] for c, r in rates.items()]
    bound = min(("decoders alone", "encoders alone"), key=lambda c: statistics.median(rates[c]))
    last = figures["ours"][-1]
    rate_now = statistics.median(rates["ours"])
    decoding_s = sum(cpu_s[stage] for stage in ("read", "decode", "crop"))
    hours = IMAGENET / rate_now / 3600
    lines = [
        f"### {name}: {case.title}", "", table(["", "images/s", "ours / this"], rows), "",
        f"- ours / {bound}, the tighter of the two bounds: {ratio('ours', bound):.3f}; "
        f"ours / one process: {ratio('ours', 'one process'):.3f}",
        f"- encoder busy {last.encoder_busy:.0%}; object store at most {last.peak_store_bytes / 1e6:.0f} MB of "
        f"{last.store_bytes / 1e6:.0f} MB",
        "- CPU µs an image: " + ", ".join(f"{stage} {seconds * 1e6:,.0f}" for stage, seconds in cpu_s.items()),
    ]  # fmt: skip
    if name == "full-size":
        lines.append(
            f"- ImageNet: {hours:.1f} hours with one such encoder, {hours / 8:.1f} with eight; decoding then takes "
            f"{rate_now * decoding_s:.1f} and {8 * rate_now * decoding_s:.0f} CPU cores"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-class", type=int, default=72, help="images of each of 16 classes (default 72)")
    parser.add_argument("--full-size", action="store_true", help="SD-VAE and DINOv2-B, for a GPU")
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if args.task:
        name, contestant = args.task
        run_task(name, contestant, args.full_size, args.per_class)
        return
    cases = make_cases(args.full_size, args.per_class)
    texts = []
    for name, case in cases.items():
        figures: dict[str, list[Figures]] = {contestant: [] for contestant in [*CONTESTANTS, "stages"]}
        for number in range(args.rounds):
            for contestant, runs in figures.items():
                line = [sys.executable, "-m", "benchmarks.precompute", "--per-class", str(args.per_class), "--task",
                        name, contestant, *(["--full-size"] if args.full_size else [])]  # fmt: skip
                done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
                answer = next(li for li in done.stdout.splitlines() if li.startswith("RESULT "))
                runs.append(Figures(**json.loads(answer.removeprefix("RESULT "))))
                print(f"{name}, round {number + 1}: {contestant} {runs[-1].images_per_s:.1f} images/s", file=sys.stderr)
        texts.append(report(case, name, figures))
    packages = ("ray", "torch", "diffusers", "timm", "pillow")
    text = "\n".join([
        "## Stage one, images a second", "", machine(WORK, packages), "",
        f"{16 * args.per_class} photographs, {16 * args.per_class * MORE_TO_DECODE} of 500 × 375 px, in units of "
        f"{SHARD_ROWS}; medians of {args.rounds} rounds.", "", *texts,
    ])  # fmt: skip
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / ("precompute_full_size.md" if args.full_size else "precompute.md")).write_text(text)


if __name__ == "__main__":
    main()
