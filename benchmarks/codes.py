"""What codes lose, token by token, and what is left of it in a gradient.

    python -m benchmarks.codes --stores STORE [MORE …] --features features/A[,features/B] [--images N] [--steps 300]

A store has latents and float16 patch tokens of real photographs, made by `python -m pipeline precompute`.

*Errors.* Every codec encodes and decodes the tokens of the first `--images` rows of each group of every store (rows of
further stores are numbered on, so that each has keys of its own), and synthetic ones of 64 images of 256 × 768:
Gaussian; one channel of fifteen times the others' size; Student's t of three degrees of freedom; an activation of 60 in
one token of fifty. Given are the stored bytes of an image, mean and smallest cosine of a decoded token to the exact
one, and the mean cosine of the two directions that iREPA makes of them (γ = 0.6).

*Gradients* (not with `--steps 0`). A small SiT takes `--steps` real steps from exact targets of the first store's first
group, so that its gates have left zero. Then, for batches of 4, 32 and 256 images, the gradient of the whole loss,
velocity + λ · alignment, by all parameters, is compared with the one from exact targets: ‖g − g*‖/‖g*‖, the root mean
square over batches. Noise, times and everything else of a batch are equal. Rotated codes come with signs keyed by
token, as they are stored, with those of an image's first token for all of its tokens, and with one key for all tokens
of all images: the same codec but for its keys. An error that is independent from token to token falls with the square
root of the batch.

Cost: some twenty minutes of one core and 4 GB for 5,421 images of 64 × 384.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import RESULTS, machine, table
from storage import Store, open_store
from storage.base.console import progress_bar
from storage.codecs import CODECS, Codec
from storage.codecs.rotated import Rotated
from storage.order import Order
from storage.torch.codecs import Tokens, twin_of
from storage.visits import Views
from trainer.alignment.irepa import IREPA
from trainer.config.presets import preset
from trainer.config.schema import TrainConfig
from trainer.config.tree import override
from trainer.data.groups import TrainingData, geometry_of, open_data
from trainer.data.latent_scale import LatentScale
from trainer.data.loader import Batch
from trainer.loop.losses import losses
from trainer.loop.step import TrainingState, build, train_step
from trainer.ranks.world import World

CPU = torch.device("cpu")
SPELLINGS = ("float16", "int8", "rotated4", "rotated2", "rotated1")
BATCHES = {4: 16, 32: 8, 256: 2}  # images of a batch: batches
AT_ONCE = 64  # images encoded at a time
Key = Literal["token", "image", "none"]
KEYED: dict[Key, str] = {"token": "by token, as stored", "image": "by image", "none": "one for all"}


@dataclass(frozen=True, kw_only=True)
class SharedKey(Rotated):
    """Rotated codes with fewer keys than tokens: what the format would be without them."""

    by: Key = "none"

    def _words(self, rows: np.ndarray, views: Views, n_tokens: int, channels: int) -> np.ndarray:
        of = rows if self.by == "image" else np.zeros_like(rows)
        words = super()._words(of, views if self.by == "image" else 0, n_tokens, channels)
        return np.broadcast_to(words[:, :1], words.shape)


def codec_with(spelling: str, by: Key) -> Codec:
    """A codec, or its variant of fewer keys."""
    codec = CODECS[spelling]
    if by == "token" or not isinstance(codec, Rotated):
        return codec
    return SharedKey(bits=codec.bits, by=by)


def coded(codec: Codec, tokens: np.ndarray, rows: np.ndarray) -> Tokens:
    """What the trainer has of tokens float (B, T, D) that were stored by a codec."""
    if isinstance(codec, SharedKey):  # whose keys only the codec itself knows
        stored = codec.encode(tokens, rows, 0)
        known = twin_of(CODECS[codec.spelling]).decode(_tensors(stored), torch.from_numpy(rows), 0)
        return known._replace(values=torch.from_numpy(codec.decode(stored, rows, 0)))
    twin = twin_of(codec)
    stored = codec.encode(tokens, rows, 0)
    return twin.decode(_tensors(stored), torch.from_numpy(rows), 0)


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def synthetic(n: int = 64, n_tokens: int = 256, width: int = 768) -> Iterator[tuple[str, np.ndarray]]:
    """Kind of tokens, and tokens float32 (n, T, D)."""
    rng = np.random.default_rng(0)
    shape = (n, n_tokens, width)
    gaussian = rng.standard_normal(shape, dtype=np.float32)
    yield "Gaussian", gaussian
    outlier = gaussian.copy()
    outlier[..., 5] *= 15
    yield "outlier channel", outlier
    yield "Student t₃", rng.standard_t(3, shape).astype(np.float32)
    massive = gaussian.copy()
    massive[:, ::50, 7] = 60
    yield "massive activations", massive


def errors(name: str, parts: Iterator[tuple[np.ndarray, np.ndarray]]) -> list[list[str]]:
    """Rows of the first table, of (rows, tokens) in parts."""
    cosines: dict[str, list[Tensor]] = {spelling: [] for spelling in SPELLINGS}
    directions: dict[str, list[Tensor]] = {spelling: [] for spelling in SPELLINGS}
    n_bytes = {}
    alignment = IREPA()
    for rows, tokens in parts:
        exact = torch.from_numpy(tokens)
        wanted = alignment.prepared(Tokens(exact))
        for spelling in SPELLINGS:
            codec = CODECS[spelling]
            decoded = coded(codec, tokens, rows)
            cosines[spelling].append(F.cosine_similarity(decoded.values.float(), exact, dim=-1).flatten())
            directions[spelling].append(F.cosine_similarity(alignment.prepared(decoded), wanted, dim=-1).flatten())
            arrays = codec.arrays(*tokens.shape[1:])
            n_bytes[spelling] = sum(np.dtype(a.dtype).itemsize * int(np.prod(a.row_shape)) for a in arrays.values())
    lines = []
    for spelling in SPELLINGS:
        of_tokens, of_directions = torch.cat(cosines[spelling]), torch.cat(directions[spelling])
        lines.append([
            name, spelling, f"{n_bytes[spelling]:,}", f"{of_tokens.double().mean():.4f}", f"{of_tokens.min():.4f}",
            f"{of_directions.double().mean():.4f}",
        ])  # fmt: skip
    return lines


def of_groups(stores: Sequence[Store], path: str, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows int64 (B,), numbered through all stores, and their tokens float32 (B, T, D)."""
    counts = [min(limit or store.n_rows, store.n_rows) for store in stores]
    with progress_bar(sum(counts), unit="row", description=path) as bar:
        for store, n, before in zip(stores, counts, np.cumsum([0, *counts[:-1]]), strict=True):
            group = store.group(path)
            for start in range(0, n, AT_ONCE):
                rows = np.arange(start, min(n, start + AT_ONCE), dtype=np.int64)
                yield before + rows, group.tokens(rows)
                bar.update(len(rows))
            group.close()


def batch_of(data: TrainingData, step: int, size: int, order: Order) -> Batch:
    """A batch as the loader makes it, from the first view."""
    rows = data.valid_rows.rows(order.global_batch(step, size))
    return Batch(
        step=step,
        rows=torch.from_numpy(rows),
        labels=torch.from_numpy(data.labels[rows].astype(np.int64)),
        moments=torch.from_numpy(data.latents.gather(rows, 0, ["moments"])["moments"]),
        targets=(Tokens(torch.from_numpy(data.features[0].tokens(rows))),),
        stall_s=0.0,
    )


def gradient(training: TrainingState, batch: Batch) -> Tensor:
    """Of the whole loss by all parameters, float64, in micro-batches."""
    parameters = [p for p in training.model.parameters() if p.requires_grad]
    parts = batch.split(max(1, len(batch.rows) // AT_ONCE))
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for part in parts:
        loss = losses(training.model, part, training.scale, training.config, training.geometry).total(training.config)
        of_part = torch.autograd.grad(loss / len(parts), parameters, allow_unused=True)
        total += torch.cat([
            torch.zeros(p.numel(), dtype=torch.float64) if g is None else g.flatten().double()
            for p, g in zip(parameters, of_part, strict=True)
        ])  # fmt: skip
    return total


def gradients(config: TrainConfig, n_steps: int) -> list[list[str]]:
    """Rows of the second table."""
    data = open_data(config)
    try:
        geometry = geometry_of(config, data)
        scale = LatentScale.of(data.latents.identity, config.data)
        training = build(config, geometry, scale, World(rank=0, size=1, device=CPU))
        order = Order(data.n_samples, config.seed)
        with progress_bar(n_steps, unit="step", description="exact targets") as bar:
            for step in range(n_steps):
                train_step(training, batch_of(data, step, config.batch, order))
                bar.update()
        variants: list[tuple[str, Key]] = [(spelling, "token") for spelling in SPELLINGS[:2]]
        variants += [(spelling, key) for key in KEYED for spelling in SPELLINGS[2:]]
        square: dict[tuple[str, Key], dict[int, list[float]]] = {v: {size: [] for size in BATCHES} for v in variants}
        with progress_bar(sum(BATCHES.values()), unit="batch", description="gradients") as bar:
            for size, n in BATCHES.items():
                for i in range(n):
                    exact = batch_of(data, i, size, Order(data.n_samples, config.seed + 1))
                    wanted = gradient(training, exact)
                    tokens, rows = exact.targets[0].values.numpy(), exact.rows.numpy()
                    for spelling, key in variants:
                        target = coded(codec_with(spelling, key), tokens, rows)
                        taken = gradient(training, dataclasses.replace(exact, targets=(target,)))
                        relative = float((taken - wanted).norm() / wanted.norm())
                        square[spelling, key][size].append(relative**2)
                    bar.update()
    finally:
        data.close()
    return [
        [f"{spelling}", KEYED[key] if spelling.startswith("rotated") else "",
         *(f"{np.sqrt(np.mean(square[spelling, key][size])):.2g}" for size in BATCHES)]
        for spelling, key in variants
    ]  # fmt: skip


def main() -> None:
    """Measure; print both tables and write them to `results/codes.md` and `results/code_gradients.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", nargs="+", required=True, help="stores of real photographs")
    parser.add_argument("--features", required=True, help="groups of float16 patch tokens, with commas")
    parser.add_argument("--images", type=int, default=0, help="rows of each store (default: all)")
    parser.add_argument("--steps", type=int, default=300, help="steps before gradients are compared; 0: errors only")
    args = parser.parse_args()
    stores = [open_store(store) for store in args.stores]
    lines = []
    for path in args.features.split(","):
        lines += errors(path.removeprefix("features/"), of_groups(stores, path, args.images))
    for kind, tokens in synthetic():
        cuts = range(0, len(tokens), AT_ONCE)
        lines += errors(kind, ((np.arange(i, i + AT_ONCE), tokens[i : i + AT_ONCE]) for i in cuts))
    n = sum(min(args.images or store.n_rows, store.n_rows) for store in stores)
    write("codes.md", [
        "## What codes lose", "", machine(Path(), ("torch", "numpy")), "",
        f"{n:,} photographs; synthetic tokens of 64 images of 256 × 768.", "",
        table(["tokens", "codec", "bytes an image", "mean cosine", "least", "mean after iREPA's normalisation"], lines),
    ])  # fmt: skip
    if args.steps:
        first = args.features.split(",")[0]
        features = (first.removeprefix("features/"),)
        options = {"store": args.stores[0], "precision": "fp32", "batch": 32, "data.features": features}
        measured = gradients(override(preset("sit-tiny-2"), options), args.steps)
        write("code_gradients.md", [
            "## The whole gradient's relative error, by images a batch", "", machine(Path(), ("torch", "numpy")), "",
            f"sit-tiny-2 after {args.steps} steps from exact targets of {first}; float32.", "",
            table(["codec", "signs keyed", *(str(size) for size in BATCHES)], measured),
        ])  # fmt: skip


def write(name: str, lines: list[str]) -> None:
    """Print a result and keep it below `results/`."""
    text = "\n".join([*lines, ""])
    print(text)
    (RESULTS / name).write_text(text)


if __name__ == "__main__":
    main()
