"""What codes add to features as latents, and at which noise level that is as much as the noise.

    python -m benchmarks.feature_codes --store STORE --features features/A[,features/B] [--images 542]

STORE has float16 patch tokens of real photographs and the statistics of their places (`python -m storage statistics
STORE features/A --places`). Every codec encodes and decodes the tokens of the first `--images` rows; given are the root
mean square ε of what that changes in normalised latents x, the noise level t = ε / (1 + ε) at which the noise is as
large, the share of training times below t for logit-normal ones shifted by the latents' dimension, what ε is in the
worst channel, and what `Codec.error_variance` says ε is, by which a run refuses codes.

Cost: a minute of one core for 542 images of 64 × 384.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import table
from storage import GroupReader, open_store
from storage.codecs import CODECS, Codec
from trainer.data.feature_latents import on_grid, scale_of, statistics_of
from trainer.data.latent_scale import LatentScale

AT_ONCE = 64
SPELLINGS = ("float16", "int8", "rotated4", "rotated2", "rotated1")
DIMENSION = 4096


def lines(store: str, paths: list[str], n: int) -> str:
    """The table."""
    cells = []
    for path in paths:
        opened = open_store(store)
        group: GroupReader = opened.group(path)
        statistics, source = statistics_of(opened, group, Path(), class_token=False)
        scale = scale_of(group, statistics, source=source)
        for spelling in SPELLINGS:
            cells.append([path, spelling, *_measured(group, scale, CODECS[spelling], min(n, opened.n_rows))])
        group.close()
    headings = ("features", "codec", "ε", "level t", "times below t", "worst channel", "ε as said")
    return table(headings, cells)


def _measured(group: GroupReader, scale: LatentScale, codec: Codec, n: int) -> list[str]:
    factors, size = torch.as_tensor(scale.scale).double(), group.identity.token_grid
    square, said, n_seen = np.zeros(group.identity.width), 0.0, 0
    for start in range(0, n, AT_ONCE):
        rows = np.setdiff1d(np.arange(start, min(n, start + AT_ONCE)), group.failed_rows)
        exact = group.tokens(rows)
        stored = codec.encode(exact, rows, 0)
        error = codec.decode(stored, rows, 0).astype(np.float64) - exact
        if codec.spelling == "float16":  # of which these are exact: what rounding can be
            error = np.spacing(exact.astype(np.float16)).astype(np.float64) / math.sqrt(12)
        of_x = on_grid(torch.from_numpy(error), size) * factors
        square += of_x.square().mean((2, 3)).sum(0).numpy()
        variance = np.broadcast_to(codec.error_variance(stored), exact.shape)
        said += float((on_grid(torch.from_numpy(np.array(variance)), size) * factors.square()).mean()) * len(rows)
        n_seen += len(rows)
    deviation, worst = math.sqrt(square.mean() / n_seen), math.sqrt(square.max() / n_seen)
    level = deviation / (1 + deviation)
    shift = math.sqrt(group.identity.width * math.prod(size) / DIMENSION)
    below = level / (shift - (shift - 1) * level)
    share = 0.5 * math.erfc(-math.log(below / (1 - below)) / math.sqrt(2))
    return [f"{deviation:.2g}", f"{level:.2g}", f"{share:.1g}", f"{worst:.2g}", f"{math.sqrt(said / n_seen):.2g}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--features", required=True)
    parser.add_argument("--images", type=int, default=542)
    given = parser.parse_args()
    print(lines(given.store, given.features.split(","), given.images))


if __name__ == "__main__":
    main()
