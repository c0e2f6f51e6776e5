"""`python -m pipeline features`: one vector an image from a named encoder, for `python -m trainer evaluate`.

Encoders are Inception (FID), the extractors of FDr⁶ and CMMD, and every vision encoder a store can be made with: a
Fréchet distance in DINOv2's features (Stein et al., arXiv 2306.04675) uses the same code, weights and preprocessing as
the alignment does.

Several sets of images are described by one command, all of which are looked at before the first is described. An image
that cannot be read is left out and named, up to the limit that `precompute` has. What was described is kept whatever
ends the command, in parts beside the file, and an image that is described already, in the file or in a part of it, is
not described again.

Memory: what is described stays in memory until it is written; of Inception 20 kB an image, 2 GB in all for 50,000.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from pipeline.config import FeaturesCommand, FeaturesConfig
from pipeline.encoders import registry
from pipeline.failures import allowed_failures
from pipeline.images import KEY_BYTES, Images, open_images, spread
from pipeline.sources.protocol import Unreadable
from storage.base.choices import INCEPTION, SPACES, Token
from storage.base.console import progress_bar
from storage.base.errors import UserError
from storage.base.shown import shown
from storage.base.waiting import waiting
from storage.feature_file import FEATURES, FeatureFile, open_feature_file, write_feature_file
from storage.identity import FeaturesIdentity, VectorsIdentity, unlike

KEYS, DIGESTS = "image_keys", "image_digests"
PART_IMAGES = 2048  # a part of Inception's has 40 MB
LOOKED_AT = 64  # images of a set whose sizes are compared before anything is described
SHOWN = 5  # images in a message
Encode = Callable[[np.ndarray], dict[str, np.ndarray]]
# of an encoder's name, weights, vector and images' (height, width): its identity, and what loads it onto a named device
Resolve = Callable[[str, Path | None, Token, tuple[int, int]], tuple[VectorsIdentity, Callable[[str], Encode]]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A set of images, at most `limit` of them (0: all), and the feature file that it becomes."""

    where: Path | str
    out: Path
    limit: int = 0


def write_features(jobs: Sequence[Job], config: FeaturesConfig, resolver: Resolve | None = None) -> list[str]:
    """Describe every set of images into its feature file; returns what was done, a line a set.

    `resolver` knows encoders of other names than `resolve` does.

    Raises UserError: before anything is computed when images or weights are missing, sets would be described otherwise
    than one another or than the file `config.like`, or have fewer than `config.at_least` images; later, when too many
    cannot be read or one has another size.
    """
    quiet = isinstance(config, FeaturesCommand) and config.check and not config.next  # who asks says so itself
    with waiting("looking at the images", hidden=quiet):
        opened = [open_images(job.where, resolution=config.resolution, limit=job.limit) for job in jobs]
        sizes = [_look(job, images, config) for job, images in zip(jobs, opened, strict=True)]
    of_name = resolver or resolve
    with waiting(f"looking for {config.encoder} and its weights", hidden=quiet):
        resolved = [of_name(config.encoder, config.weights, config.token, size) for size in sizes]
    compared = [(str(job.where), identity) for job, (identity, _) in zip(jobs, resolved, strict=True)]
    if config.like is not None:
        compared.append((str(config.like), open_feature_file(config.like).identity))
    for where, identity in compared[1:]:
        _require_alike(*compared[0], where, identity)
    if config.check:
        return []
    loaded: list[Encode] = []

    def encode(images: np.ndarray) -> dict[str, np.ndarray]:
        if not loaded:
            loaded.append(resolved[0][1](config.device))
        return loaded[0](images)

    identity = resolved[0][0]
    return [
        _Description(job, images, size, identity, config).write(encode)
        for job, images, size in zip(jobs, opened, sizes, strict=True)
    ]


def _look(job: Job, images: Images, config: FeaturesConfig) -> tuple[int, int]:
    """(height, width) of a set's images, as far as some tell, evenly spread. Raises UserError."""
    if images.left_out:
        what = f"{len(images.left_out)} leftovers of systems, or links that lead back to a folder that holds them"
        print(shown(f"left out of {job.where}: {what}, such as {images.left_out[0]}"), file=sys.stderr)
    n = len(images.names)
    if n < config.at_least:
        raise UserError(f"{job.where} holds {n} images, and at least {config.at_least} are needed; name another place")
    failed: list[tuple[str, str]] = []
    sizes: dict[tuple[int, int], str] = {}
    places = spread(n, LOOKED_AT).tolist() if images.record["kind"] == "folder" else [0]
    for place, image in zip(places, images.read(places), strict=True):
        if isinstance(image, Unreadable):
            failed.append((images.names[place], image.reason))
            _require_few(failed, n, job, config)
        else:
            sizes.setdefault((image.shape[0], image.shape[1]), images.names[place])
    if not sizes:
        failed.clear()
    for place, image in zip(range(n), images.read(range(n)), strict=True) if not sizes else ():
        if not isinstance(image, Unreadable):
            sizes[image.shape[0], image.shape[1]] = images.names[place]
            break
        failed.append((images.names[place], image.reason))
        _require_few(failed, n, job, config)
    if not sizes:
        raise UserError(f"none of the {n} images of {job.where} can be read ({_first(failed)}); name another place")
    (size, name), *others = sizes.items()
    if others:
        _refuse_size(job, (others[0][1], others[0][0]), (name, size))
    return size


def _refuse_size(job: Job, one: tuple[str, tuple[int, ...]], other: tuple[str, tuple[int, ...]]) -> None:
    a, b = (f"{shown(name)} is {size[1]}×{size[0]}" for name, size in (one, other))
    raise UserError(f"images of {job.where} differ in size: {a}, {b}; pass --resolution to crop them all to one")


def _require_few(failed: list[tuple[str, str]], n: int, job: Job, config: FeaturesConfig) -> None:
    allowed = allowed_failures(config.max_failures, n)
    if len(failed) > allowed:
        raise UserError(
            f"{len(failed)} of the {n:,} images of {job.where} cannot be read, and {allowed} may (--max-failures "
            f"{config.max_failures:g}): {_first(failed)}; mend or remove them, or raise --max-failures. What is "
            "described already is kept"
        )


def _first(failed: Sequence[tuple[str, str]]) -> str:
    named = "; ".join(f"{shown(name)} ({shown(reason)[:80]})" for name, reason in failed[:SHOWN])
    return named + (f" and {len(failed) - SHOWN} more" if len(failed) > SHOWN else "")


def _require_alike(where: str, identity: VectorsIdentity, other: str, its: VectorsIdentity) -> None:
    """Raise UserError when vectors of two identities do not compare."""
    if values := unlike(identity, its):
        raise UserError(f"{where} and {other} would be described differently ({values}); describe both alike")


@dataclass
class _Described:
    """Vectors of images by key, in the chunks that they came in."""

    chunks: list[dict[str, np.ndarray]] = field(default_factory=list)
    place: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # key → chunk and row

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Take in the arrays of some images, KEYS and DIGESTS among them."""
        self.place |= {key.tobytes(): (len(self.chunks), row) for row, key in enumerate(arrays[KEYS])}
        self.chunks.append(arrays)

    def gathered(self, keys: Sequence[bytes]) -> dict[str, np.ndarray]:
        """One array of each name, in the order of the keys."""
        first = self.chunks[0]
        out = {name: np.empty((len(keys), *array.shape[1:]), array.dtype) for name, array in first.items()}
        for i, key in enumerate(keys):
            chunk, row = self.place[key]
            for name, array in self.chunks[chunk].items():
                out[name][i] = array[row]
        return out


class _Description:
    """One set's way into its feature file."""

    def __init__(
        self, job: Job, images: Images, size: tuple[int, int], identity: VectorsIdentity, config: FeaturesConfig
    ) -> None:
        self.job, self.images, self.size, self.identity, self.config = job, images, size, identity, config
        self.parts = job.out.with_name(f"{job.out.name}.parts")
        self.described = _Described()
        self.pending: list[dict[str, np.ndarray]] = []
        self.failed: list[tuple[str, str]] = []

    def write(self, encode: Encode) -> str:
        """Describe what is not described yet, and write the file unless it says so already; returns what was done."""
        out, n = self.job.out, len(self.images.names)
        with waiting(f"reading what {out.name} has"):
            existing = _read(out, self.identity)
            self._take_in(existing)
            for part in sorted(self.parts.glob("*.npz")):
                self._take_in(_read(part, self.identity))
        missing = [i for i, key in enumerate(self.images.keys) if key not in self.described.place]
        try:
            with progress_bar(n, unit="img", done=n - len(missing), description=self.config.encoder) as bar:
                bar.set_postfix_str("loading the encoder, reading images" if missing else "")
                self._describe(missing, encode, partial(_move, bar))
        finally:
            self._write_part()
        names = {name for name, _ in self.failed}
        keys = [key for name, key in zip(self.images.names, self.images.keys, strict=True) if name not in names]
        if not keys:
            raise UserError(f"none of the {n} images of {self.job.where} can be read ({_first(self.failed)})")
        arrays = self.described.gathered(keys)
        record = {
            **self.images.record,
            "n": len(keys),
            "size": list(self.size),  # height and width, as the encoder is given them
            "n_failed": len(self.failed),
            "failed": [list(pair) for pair in self.failed],
            "digest": hashlib.sha256(arrays[DIGESTS].tobytes()).hexdigest(),
        }
        left_out = f"; {len(self.failed)} could not be read and are left out: {_first(self.failed)}" * bool(self.failed)
        if existing is not None and existing.images == record:
            shutil.rmtree(self.parts, ignore_errors=True)
            return f"{out} describes these {len(keys)} images by {self.config.encoder} already; it was kept{left_out}"
        with waiting(f"writing {out.name}"):
            write_feature_file(out, arrays, self.identity, record)
        shutil.rmtree(self.parts, ignore_errors=True)
        before = f", {n - len(missing):,} of them described before" if len(missing) < n else ""
        return f"{out}: {len(keys)} images by {self.config.encoder}{before}{left_out}"

    def _take_in(self, file: FeatureFile | None) -> None:
        if file is not None and {KEYS, DIGESTS} <= set(file.arrays):
            with suppress(UserError):  # a damaged one is described anew
                arrays = {name: file.read(name) for name in file.arrays}
                if arrays[KEYS].shape[1:] == arrays[DIGESTS].shape[1:] == (KEY_BYTES,) and self._fits(arrays):
                    self.described.add(arrays)

    def _fits(self, arrays: dict[str, np.ndarray]) -> bool:
        """Whether the arrays are of the names and widths of those before."""
        first = self.described.chunks[0] if self.described.chunks else arrays
        return all(name in arrays and arrays[name].shape[1:] == array.shape[1:] for name, array in first.items())

    def _describe(self, missing: Sequence[int], encode: Encode, progress: Callable[[int], object]) -> None:
        batch: list[tuple[bytes, np.ndarray]] = []
        for place, image in zip(missing, self.images.read(missing), strict=True):
            name = self.images.names[place]
            if isinstance(image, Unreadable):
                self.failed.append((name, image.reason))
                _require_few(self.failed, len(self.images.names), self.job, self.config)
                progress(1)
                continue
            if image.shape[:2] != self.size:
                _refuse_size(self.job, (name, image.shape), ("those before", self.size))
            batch.append((self.images.keys[place], image))
            if len(batch) == self.config.batch:
                self._encode(batch, encode, progress)
                batch = []
        if batch:
            self._encode(batch, encode, progress)

    def _encode(
        self, batch: Sequence[tuple[bytes, np.ndarray]], encode: Encode, progress: Callable[[int], object]
    ) -> None:
        digests = [hashlib.blake2b(image.tobytes(), digest_size=KEY_BYTES).digest() for _, image in batch]
        arrays = encode(np.stack([image for _, image in batch]))
        arrays[KEYS], arrays[DIGESTS] = (
            np.frombuffer(b"".join(column), np.uint8).reshape(-1, KEY_BYTES)
            for column in ([key for key, _ in batch], digests)
        )
        if not self._fits(arrays):
            raise UserError(f"{self.job.out} or {self.parts} hold other numbers than the encoder gives; remove both")
        self.described.add(arrays)
        self.pending.append(arrays)
        progress(len(batch))
        if sum(len(arrays[KEYS]) for arrays in self.pending) >= PART_IMAGES:
            self._write_part()

    def _write_part(self) -> None:
        """What was described since the last part, beside the file; it is read again when the command is."""
        if not self.pending:
            return
        arrays = {name: np.concatenate([each[name] for each in self.pending]) for name in self.pending[0]}
        self.pending = []
        record = {**self.images.record, "n": len(arrays[KEYS])}
        write_feature_file(self.parts / f"{secrets.token_hex(8)}.npz", arrays, self.identity, record)


def _move(bar: tqdm[NoReturn], n_images: int) -> None:
    bar.set_postfix_str("", refresh=False)
    bar.update(n_images)


def _read(path: Path, identity: VectorsIdentity) -> FeatureFile | None:
    """A feature file of this identity; None where there is none, or another thing, which is overwritten."""
    try:
        file = open_feature_file(path) if path.exists() else None
    except UserError:
        return None
    return file if file is not None and file.identity == identity else None


def resolve(
    name: str, weights: Path | None, token: Token, size: tuple[int, ...]
) -> tuple[VectorsIdentity, Callable[[str], Encode]]:
    """An encoder's identity, and what loads it onto a named device. Raises UserError when its weights are missing."""
    if name == INCEPTION:
        from pipeline.encoders import inception

        return inception.describe(weights), lambda device: partial(
            registry.encode_images, inception.Inception(weights, _device(device))
        )
    if name in SPACES:
        from pipeline.encoders import spaces

        return spaces.describe(name, weights), lambda device: partial(
            registry.encode_images, spaces.Extractor(name, weights, _device(device))
        )
    try:
        spec = registry.resolve_features(name, weights)
    except UserError as error:
        raise UserError(f"{error}, and {', '.join((INCEPTION, *SPACES))}") from None
    if size[0] != size[1]:
        raise UserError(f"{name} takes square images, these are {size[1]}×{size[0]}; pass --resolution to crop them")
    described = registry.describe(spec, resolution=size[0])
    assert isinstance(described, FeaturesIdentity), described
    identity = VectorsIdentity(  # without what says how a store keeps its features
        name=name,
        vector=token,
        resolution=described.resolution,
        arithmetic=described.arithmetic,
        encoder=described.encoder,
        weights_sha256=described.weights_sha256,
        preprocessing=described.preprocessing,
        layer=described.layer,
        tokens=described.tokens,
        token_grid=described.token_grid,
        width=described.width,
        others=described.others,
    )

    def load(device: str) -> Encode:
        loaded = registry.load(spec, resolution=size[0], device=_device(device))

        def encode(images: np.ndarray) -> dict[str, np.ndarray]:
            arrays = registry.encode_images(loaded, images)
            if token == "mean" and "patches" in arrays:
                return {FEATURES: arrays["patches"].astype(np.float32).mean(axis=1)}
            if token not in arrays:
                raise UserError(f"{name} has no vector {token!r}; pass --token {'cls' if token == 'mean' else 'mean'}")
            return {FEATURES: arrays["cls"].astype(np.float32)}

        return encode

    return identity, load


def _device(name: str) -> Any:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for and torch sees no GPU; pass --device cpu or mend the driver")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
