"""A process that holds one trainer of `train_step.py` and times its steps when it is told to.

It is started with a `Task` as JSON, answers each line of its standard input, a JSON `Request`, with a line `RESULT …`,
and ends with its input. Between requests it holds the weights and the optimiser's state on the GPU and nothing more, so
that two workers can take turns and a worker's peak memory is its own.

Ours is `trainer.loop.step.train_step` with the numbers read back a step later, as in `trainer.loop.train`; where a
batch comes from is all that differs between the variants. Steps too large for the memory are taken in 2, 4, …
micro-batches.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import LEARNT, N_CLASSES, latents_of, measured_step, method
from benchmarks.online import Encoders, encode_moments, encode_tokens, random_images
from benchmarks.public_repa import PublicStep
from benchmarks.random_store import LATENTS
from storage.base.errors import UserError
from storage.torch.codecs import Tokens
from trainer.config.tree import override
from trainer.data.feature_latents import on_grid
from trainer.data.groups import geometry_of, open_data
from trainer.data.loader import Batch, Loader
from trainer.loop.readback import Readback
from trainer.loop.step import build, compile_blocks, train_step, without_alignment
from trainer.ranks.arithmetic import set_arithmetic
from trainer.ranks.world import world_of_ranks
from trainer.run.latent_map import map_of
from trainer.run.settings import resolve

FEWEST_STEPS, WARM_UP_STEPS, PROFILED_STEPS = 3, 3, 3
RESULT = "RESULT "


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker holds."""

    preset: str  # as `methods.py` spells it
    batch: int
    store: str
    encoder: str
    device: str
    features: str  # the group that is aligned with or, where a model learns an encoder's tokens, learnt
    public: str = ""  # a clone of REPA's repository; empty: our trainer


@dataclass(frozen=True, kw_only=True)
class Request:
    """What it is asked: run a variant, untimed (`seconds` 0) until it is warm, or timed, or into a profile."""

    variant: str  # store, ceiling, online, online+vae or public
    compiled: bool
    seconds: float
    profile: str = ""  # the stem of the files to write


Step = Callable[[Any], float]  # a batch to seconds of stall, once the numbers of the step before are on the host


class Ours:
    """Our trainer, on batches from a store, from memory, or from encoders in the loop."""

    def __init__(self, task: Task, device: torch.device) -> None:
        config = method(task.preset)
        channels, side = latents_of(config)
        latents = next((path for path, of in LATENTS.items() if of == (channels, side)), "")
        if config.model.kind in LEARNT:
            latents = task.features
        elif config.aligns:
            config = override(config, {"data.features": (task.features.removeprefix("features/"),)})
        # The published label embedding, whatever the store's classes.
        changes = {"store": task.store, "batch": task.batch, "device": task.device, "model.classes": N_CLASSES}
        config = override(config, {**changes, "data.latents": latents})
        self.task, self.device, self.data = task, device, open_data(config)
        with world_of_ranks(task.device) as world:
            config = resolve(config, self.data, world)
            set_arithmetic(config)
            geometry = geometry_of(config, self.data)
            self.parts = build(config, geometry, map_of(config, self.data, config.run), world)
        self.start = measured_step(config)
        if config.aligns and not config.aligns_at(self.start):
            self.parts = without_alignment(self.parts)
        with self._loader() as batches:
            self.batch: Batch = _to(next(batches), torch.device("cpu"))
        self.encoders: dict[tuple[str, bool], Encoders] = {}
        self.compiled: list[Any] = []
        self.position = itertools.count(self.start)

    @contextmanager
    def steps(self, request: Request, micro_batches: int) -> Iterator[tuple[Iterator[Any], Step]]:
        """The variant's batches, and what is done with one."""
        self._switch(request.compiled)
        config = override(self.parts.config, {"accumulate": micro_batches, "compile": request.compiled})
        parts = dataclasses.replace(self.parts, config=config)
        before: list[Readback] = []

        def step(batch: Batch) -> float:
            numbers, _ = train_step(parts, batch)
            before.append(Readback(numbers.packed()))
            if len(before) > 1:
                before.pop(0).wait()
            return batch.stall_s

        source: AbstractContextManager[Iterator[Batch]]
        if request.variant == "store":
            source = self._loader()
        elif request.variant == "ceiling":
            source = nullcontext(self._repeated())
        else:
            source = self._online(request.variant == "online+vae", request.compiled)
        try:
            with source as batches:
                yield batches, step
        finally:
            parts.optimizer.zero_grad(set_to_none=True)

    def _switch(self, compiled: bool) -> None:
        """Compile the blocks as the trainer does, or take their own forward again; a compilation is kept."""
        blocks = self.parts.model.blocks
        if compiled and not self.compiled:
            compile_blocks(self.parts.model)
            self.compiled = [block.forward for block in blocks]
        for i, block in enumerate(blocks):
            block.__dict__.pop("forward", None)
            if compiled:
                block.forward = self.compiled[i]

    @contextmanager
    def _loader(self) -> Iterator[Iterator[Batch]]:
        config = self.parts.config
        with Loader(
            self.data, seed=config.seed, batch=config.batch, start=self.start, stop=2**31, rank=0, world_size=1,
            device=self.device, prefetch=config.data.prefetch, with_targets=config.aligns_at(self.start),
        ) as loader:  # fmt: skip
            yield iter(loader)

    def _repeated(self) -> Iterator[Batch]:
        batch = _to(self.batch, self.device)
        for step in self.position:
            yield dataclasses.replace(batch, step=step)

    @contextmanager
    def _online(self, with_vae: bool, compiled: bool) -> Iterator[Iterator[Batch]]:
        """Batches whose features (and moments) are computed when they are asked for."""
        key = ("vae" if with_vae else "", compiled)
        if key not in self.encoders:
            self.encoders[key] = Encoders(
                self.task.encoder, with_vae=with_vae, compiled=compiled, device=self.device
            )  # fmt: skip
        encoders = self.encoders[key]
        encoders.to(self.device)
        images = random_images(self.task.batch, self.device)

        def batches() -> Iterator[Batch]:
            for batch in self._repeated():
                if self.data.of_features:
                    yield self._learnt(batch, encode_tokens(encoders.vision, images, class_token=True))
                    continue
                moments = batch.moments if encoders.vae is None else encode_moments(encoders.vae, images)
                with_class = batch.class_tokens is not None
                tokens = encode_tokens(encoders.vision, images, class_token=with_class)
                class_tokens = tokens[:, 0] if with_class else None
                yield dataclasses.replace(batch, moments=moments, targets=(Tokens(tokens),), class_tokens=class_tokens)

        try:
            yield batches()
        finally:
            encoders.to(torch.device("cpu"))

    def _learnt(self, batch: Batch, tokens: torch.Tensor) -> Batch:
        """The batch with the class and patch tokens that it learns computed."""
        latents = on_grid(tokens[:, 1:], self.data.latents.identity.token_grid)
        class_tokens = None if batch.class_tokens is None else tokens[:, 0]
        return dataclasses.replace(batch, moments=latents, class_tokens=class_tokens)


class Public:
    """REPA's own step."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.of = PublicStep(Path(task.public), method(task.preset).model, task.encoder, N_CLASSES, device)

    @contextmanager
    def steps(self, request: Request, micro_batches: int) -> Iterator[tuple[Iterator[Any], Step]]:
        """The same batch for ever, and the public step."""

        def step(batch: Any) -> float:
            self.of.step(batch, micro_batches)
            return 0.0

        try:
            yield self.of.batches(self.task.batch, N_CLASSES), step
        finally:
            self.of.optimizer.zero_grad(set_to_none=True)


class Timer:
    """Times a trainer's steps, in as few micro-batches as the memory allows, found while warming up."""

    def __init__(self, trainer: Ours | Public, batch: int, device: torch.device) -> None:
        self.trainer, self.batch, self.device = trainer, batch, device
        self.micro_batches = {False: 1, True: 1}

    def answer(self, request: Request) -> dict[str, Any]:
        """Images a second, stalls, memory; or, after a warm-up, nothing but the number of micro-batches."""
        while True:
            n = self.micro_batches[request.compiled]
            try:
                with self.trainer.steps(request, n) as (batches, step):
                    found = self._timed(request, batches, step) | {"micro_batches": n}
                break
            except torch.OutOfMemoryError:
                if self.batch % (2 * n):
                    raise
                self.micro_batches[request.compiled] = 2 * n
            finally:
                self._let_go()
        return found

    def _timed(self, request: Request, batches: Iterator[Any], step: Step) -> dict[str, Any]:
        for batch in itertools.islice(batches, WARM_UP_STEPS):
            step(batch)
        self._synchronise()
        if request.profile:
            return self._profile(request.profile, batches, step)
        if not request.seconds:
            return {}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        n, stall_s, start_s = 0, 0.0, time.perf_counter()
        for batch in batches:
            stall_s += step(batch)
            n += 1
            if n >= FEWEST_STEPS and time.perf_counter() - start_s >= request.seconds:
                break
        self._synchronise()
        passed_s = time.perf_counter() - start_s
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return {"images_per_s": n * self.batch / passed_s, "stall": stall_s / passed_s, "peak_bytes": peak}

    def _profile(self, stem: str, batches: Iterator[Any], step: Step) -> dict[str, Any]:
        """STEM.txt, the operations by time, and STEM.json.gz, a trace for a browser's tracing page."""
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
            for batch in itertools.islice(batches, PROFILED_STEPS):
                step(batch)
            self._synchronise()
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        Path(f"{stem}.txt").write_text(profiler.key_averages().table(sort_by=order, row_limit=60))
        profiler.export_chrome_trace(f"{stem}.json.gz")
        return {}

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _let_go(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _to(batch: Batch, device: torch.device) -> Batch:
    """A batch with tensors of its own on another device."""
    return dataclasses.replace(
        batch,
        rows=batch.rows.to(device),
        labels=batch.labels.to(device),
        moments=batch.moments.to(device),
        targets=tuple(target.each(lambda tensor: tensor.to(device)) for target in batch.targets),
        class_tokens=None if batch.class_tokens is None else batch.class_tokens.to(device),
    )


def attempt(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `function` returns, or why it failed, which the table tells while its other rows go on."""
    try:
        return function()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except (UserError, ImportError) as error:
        return {"failed": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def main(argument: str) -> None:
    """Make the trainer, then answer until the input ends."""
    task = Task(**json.loads(argument))
    device = torch.device("cuda", 0) if task.device == "cuda" else torch.device("cpu")
    timers: list[Timer] = []

    def make() -> dict[str, Any]:
        timers.append(Timer((Public if task.public else Ours)(task, device), task.batch, device))
        return {}

    failure = attempt(make)
    for line in sys.stdin:
        request = Request(**json.loads(line))
        answer = attempt(lambda: timers[0].answer(request)) if timers else failure  # noqa: B023 — called at once
        print(RESULT + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
