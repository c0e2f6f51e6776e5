"""A Fréchet distance while a run trains (`--log.distance-every`): a curve to watch a training by, not to publish.

    every K steps   N images of the averaged weights, in blocks that ranks share out as `generate` shares them; decoded,
                    and gathered on the main rank
                    described by `python -m pipeline features`, in a process of its own: the trainer loads no encoder
                    d² to the reference, as `evaluate` computes it, as a line of metrics.jsonl

Noise and labels are keyed by (seed, image), so every point is of the same images, on any number of ranks. Nothing is
drawn from a generator that training draws from: weights are the same bits with and without the curve. A resumed run
takes the point of the step that it begins at where the log lacks it, so its curve is that of an unbroken run.

What it needs, a decoder, a reference, the encoder's weights, is looked at before training starts, by decoding a blank
latent and asking the other command whether it could. Later a failure costs a point, which is said, and not the run.

While the main rank describes and computes, the others meet it in a collective every TICK_S: a wait of any length is no
time-out, and a signal to any rank ends it. Cost: N draws and decodings, the start of a process, the encoder's passes;
N images uint8 in the main rank's memory and once on the run's disk.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from storage.base.console import Stop
from storage.base.errors import UserError
from storage.base.shown import shown
from storage.feature_file import FEATURES, open_feature_file
from trainer.config.schema import TrainConfig
from trainer.data.groups import TrainingData
from trainer.data.latent_scale import LatentScale
from trainer.evaluation.generate.decode import decode_latents, decoder_of, load_decoder, to_decode
from trainer.evaluation.generate.draw import draw_latents, in_words, labels_of
from trainer.evaluation.quality.description import Description
from trainer.evaluation.quality.frechet import Gaussian, frechet_distance, gaussian_of
from trainer.evaluation.quality.reference import contents
from trainer.loop.step import TrainingState
from trainer.models.transformer import Geometry
from trainer.ranks.parallel import reshard
from trainer.ranks.world import World
from trainer.run.metrics import DistanceOf, read_logged

BLOCK = 64  # images computed together, as `generate` does by default
TICK_S = 0.5
ASIDE = ".distance-"  # folders of images that are being described
GOES_ON, DONE, FAILED, STOPPED = range(4)
VECTORS = ("cls", "mean")  # a vision encoder's; that of Inception and its like has no choice
Show = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Point:
    """What came of a measurement: a line for the log and words for people, both on the main rank only."""

    seconds: float
    stopped: bool = False  # a rank was asked to stop, so there is no line
    line: dict[str, Any] | None = None
    said: str = ""


class DistanceCurve:
    """What every point of a run's curve has in common; `describes` and `reference` are the main rank's."""

    def __init__(
        self, config: TrainConfig, data: TrainingData, geometry: Geometry, scale: LatentScale, world: World
    ) -> None:
        """Look whether all is there. Every rank must; raises UserError on all of them where one lacks something."""
        self.config, self.data, self.geometry, self.world = config, data, geometry, world
        self.scale = scale.on(world.device)
        self.decoder = decoder_of(data, config)
        self.reference: _Reference | None = None
        failure: Exception | None = None
        try:
            if not self.decoder:
                raise UserError(
                    f"--log.distance-every {config.log.distance_every} needs pictures, and {data.latents.path} does "
                    "not say what decodes it; pass --data.decoder"
                )
            if world.is_main:
                self.reference = _reference(Path(config.log.distance_reference), world.device)
            side = self._side_of_pictures()
            if self.reference is not None:
                self.reference.require_comparable(side)
        except (UserError, ModuleNotFoundError) as error:
            failure = error
        world.end_together(failure, "another rank cannot measure --log.distance-every, and says why")

    def is_due(self, step: int) -> bool:
        """Whether there is a point after so many steps."""
        return step > 0 and step % self.config.log.distance_every == 0

    def lacks(self, step: int) -> bool:
        """Whether a point is due that the log does not have: the run ended before it was measured."""
        if not self.is_due(step):
            return False
        return not any(line.step == step and line.frechet_distance is not None for line in read_logged(self.config.run))

    def in_words(self) -> str:
        """What is measured, and how much it is worth, for the opening lines of the main rank."""
        assert self.reference is not None
        log, of = self.config.log, self.reference
        width = len(of.gaussian.mean)
        few = [
            f"{n:,} {what}"
            for n, what in ((log.distance_images, "images"), (of.n, "images of the reference"))
            if n <= width
        ]
        worth = "too large by about c / N"
        if few:
            worth = f"far too large ({' and '.join(few)} do not determine a covariance)"
        return (
            f"every {log.distance_every:,} steps, of {log.distance_images:,} images in {width:,} features of "
            f"{shown(of.description.label)}, to {of.n:,} images of {shown(str(of.path))}; {worth}, to watch by and not "
            "to publish"
        )

    def measure(self, training: TrainingState, step: int, stop: Stop, show: Show) -> Point:
        """The point after `step` steps. Every rank must call it; what it is doing is shown by `show`."""
        start_s = time.perf_counter()
        pixels, how, reason = self._pictures(training, stop, show)
        value = None
        if how == DONE:
            value, how, reason = self._distance(pixels, stop, show)
        seconds = time.perf_counter() - start_s
        if how == STOPPED or self.reference is None:
            return Point(seconds=seconds, stopped=how == STOPPED)
        if value is None:
            return Point(seconds=seconds, said=f"step {step}: no Fréchet distance: {reason}")
        of = self._of(self.reference)
        line = {
            "step": step,
            "frechet_distance": value,
            "frechet_seconds": round(seconds, 2),
            "distance_of": asdict(of),
        }
        said = (
            f"step {step}: Fréchet distance {value:.4f} of {of.images:,} images in features of {shown(of.extractor)}, "
            f"in {seconds:.0f} s"
        )
        return Point(seconds=seconds, line=line, said=said)

    def _of(self, reference: _Reference) -> DistanceOf:
        config = self.config
        labels = f", {config.sample.labels} labels" if len(self.data.class_names) else ""
        return DistanceOf(
            images=config.log.distance_images,
            drawn=f"{in_words(config)}{labels}, {config.precision}",
            extractor=reference.description.label,
            extractor_sha256=reference.weights_sha256,
            width=len(reference.gaussian.mean),
            reference_sha256=reference.sha256,
            n_reference=reference.n,
        )

    def _load_decoder(self, *, fetch: bool) -> nn.Module:
        return load_decoder(self.decoder, self.world.device, fetch=fetch, of=self.data)

    def _decoded(self, latents: Tensor, decoder: nn.Module) -> np.ndarray:
        return decode_latents(to_decode(latents, self.scale, self.data), decoder)

    def _side_of_pictures(self) -> tuple[int, int]:
        """(height, width) of what the decoder makes of a latent. Raises UserError where it makes nothing."""
        shape = (1, self.geometry.channels, self.geometry.input_size, self.geometry.input_size)
        try:
            blank = self._decoded(torch.zeros(shape, device=self.world.device), self._load_decoder(fetch=True))
        except UserError as error:
            raise UserError(str(error).replace("--vae", "--data.decoder")) from error
        except RuntimeError as error:  # latents of other channels, say
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self.decoder} cannot decode {self.data.latents.path} ({first}); pass --data.decoder"
            ) from error
        _empty_cache(self.world.device)
        return blank.shape[1], blank.shape[2]

    def _labels(self, images: Tensor) -> Tensor:
        """As `generate` has them of the store's classes; the null label of a model that knows no other."""
        n_classes = len(self.data.class_names)
        if not n_classes:
            return torch.full_like(images, self.geometry.n_classes)
        return labels_of(images, n_classes, self.config.sample.labels, self.config.seed)

    @torch.no_grad()
    def _pictures(self, training: TrainingState, stop: Stop, show: Show) -> tuple[np.ndarray, int, str]:
        """Images uint8 (N, H, W, 3) on the main rank; how it ended, the same on every rank; and why, here."""
        config, world, n = self.config, self.world, self.config.log.distance_images
        block = min(BLOCK, n)
        n_blocks = -(-n // block)
        decoder: nn.Module | None = None
        drawn = np.empty(0, np.uint8)
        reason, how = "another rank failed", GOES_ON
        for first in range(0, n_blocks, world.size):
            # As many calls on each rank, since sharded weights are gathered together: the last block may be repeated.
            mine = min(first + world.rank, n_blocks - 1)
            images = torch.arange(mine * block, (mine + 1) * block, device=world.device)
            done = min(n, first * block)

            def show_call(n_calls: int, done: int = done) -> None:
                show(f"distance: {done:,} of {n:,} images drawn, {n_calls} calls of the model in this block")

            latents = draw_latents(
                training.ema.model, images, self._labels(images), self.geometry, config, config.seed, on_call=show_call
            )
            state, pixels = GOES_ON, np.empty(0, np.uint8)
            try:
                if not latents.isfinite().all():
                    raise UserError(f"the averaged weights give NaN or infinity for images {images[0]} to {images[-1]}")
                decoder = decoder if decoder is not None else self._load_decoder(fetch=False)
                pixels = self._decoded(latents, decoder)
            except (UserError, torch.OutOfMemoryError) as error:
                state, reason = FAILED, _one_line(error)
            how = int(world.max(STOPPED if stop.signal is not None else state))
            if how != GOES_ON:
                break
            gathered = world.gather(torch.from_numpy(pixels).to(world.device))
            if world.is_main:
                drawn = drawn if first else np.empty((n, *pixels.shape[1:]), np.uint8)
                here = gathered[: n - done].cpu().numpy()
                drawn[done : done + len(here)] = here
        reshard(training.ema.model)
        del decoder
        _empty_cache(world.device)
        return drawn, how or DONE, reason

    def _distance(self, pixels: np.ndarray, stop: Stop, show: Show) -> tuple[float | None, int, str]:
        """The distance of images on the main rank; how it ended, the same on every rank; and why, here."""
        work = _Work(self.reference, pixels, self.config.run) if self.reference is not None else None
        try:
            while True:
                state = GOES_ON
                if work is not None:
                    show(f"distance: describing {len(pixels):,} images")
                    state = work.state(TICK_S)
                how = int(self.world.max(STOPPED if stop.signal is not None else state))
                if how != GOES_ON:
                    break
        finally:
            if work is not None:
                work.end()
        if work is None or how == STOPPED:
            return None, how, ""
        try:
            return work.result(), how, ""
        except (UserError, OSError, MemoryError) as error:
            return None, how, _one_line(error)


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """A feature file, and how images are described to be comparable with it."""

    path: Path
    description: Description
    gaussian: Gaussian
    n: int
    sha256: str
    weights_sha256: str

    def require_comparable(self, side: tuple[int, int]) -> None:
        """Raise UserError when images (height, width) = `side` could not be described as the file's were."""
        with tempfile.TemporaryDirectory() as aside:
            blank = Path(aside) / "blank.npz"
            np.savez(blank, arr_0=np.zeros((2, *side, 3), dtype=np.uint8))
            try:
                _run(self.command(blank, Path(aside) / "out.npz", check=True))
            except UserError as error:
                reason = str(error).replace(str(blank), f"samples of {side[1]}×{side[0]} pixels")
                raise UserError(f"--log.distance-reference {self.path} cannot be compared with: {reason}") from None

    def command(self, images: Path, out: Path, *, check: bool = False) -> list[str]:
        """The command that describes images."""
        return self.description.command([(images, out, 0)], self.path, check=check, at_least=2)


def _reference(path: Path, device: torch.device) -> _Reference:
    """Raises UserError for what is no feature file of two images."""
    found = contents(path)
    if not found.features:
        raise UserError(
            f"--log.distance-reference {path} holds {'statistics' if found.statistics else 'images'}; make a feature "
            f"file of the images, `python -m pipeline features IMAGES --encoder NAME --out FILE`"
        )
    file = open_feature_file(path)
    features, name, vector = file.read(FEATURES), file.identity.name, file.identity.vector
    if len(features) < 2:
        raise UserError(
            f"--log.distance-reference {path} describes {len(features)} image, of which there is no covariance"
        )
    description = Description(encoder=name, token=vector if vector in VECTORS else "cls", device=device.type)
    return _Reference(
        path=path.absolute(),
        description=description,
        gaussian=gaussian_of(features),
        n=len(features),
        sha256=hashlib.sha256(features.tobytes()).hexdigest(),
        weights_sha256=str(file.identity.weights_sha256),
    )


@dataclass
class _Work:
    """Describing images and computing their distance, in a thread beside the one that signals reach."""

    reference: _Reference
    pixels: np.ndarray
    run: Path
    process: subprocess.Popen[str] | None = None
    is_ended: bool = False

    def __post_init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "distance")
        self.future: Future[float] = self.pool.submit(self._distance)

    def _distance(self) -> float:
        for stray in self.run.glob(f"{ASIDE}*"):  # of a process that was killed as it measured
            shutil.rmtree(stray, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=ASIDE, dir=self.run) as aside:
            images, out = Path(aside) / "samples.npz", Path(aside) / "described.npz"
            np.savez(images, arr_0=self.pixels)
            _run(self.reference.command(images, out), self._started)
            generated = gaussian_of(open_feature_file(out).read(FEATURES))
        return frechet_distance(generated, self.reference.gaussian)

    def _started(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        if self.is_ended:
            process.kill()

    def state(self, seconds: float) -> int:
        """Whether it is done, after at most so long."""
        wait([self.future], seconds)
        return DONE if self.future.done() else GOES_ON

    def result(self) -> float:
        """The distance, or the exception."""
        return self.future.result()

    def end(self) -> None:
        """Begin nothing more; what the thread is at ends by itself."""
        self.is_ended = True
        if self.process is not None:
            self.process.kill()
        self.pool.shutdown(wait=False)


def _run(command: Sequence[str], started: Callable[[subprocess.Popen[str]], object] = id) -> None:
    """Run the command that describes; `started` is given its process. Raises UserError with its last line."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        started(process)
        _, said = process.communicate()
    if process.returncode:
        last = (said.strip().splitlines() or [f"status {process.returncode}"])[-1]
        raise UserError(shown(last.partition(": error: ")[2] or last))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _empty_cache(device: torch.device) -> None:
    """Give freed memory back, which the other process needs."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
