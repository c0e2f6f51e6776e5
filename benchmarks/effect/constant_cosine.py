"""How high an alignment's cosine is without looking: the best that a vector says that is the same for every image.

    python -m benchmarks.effect.constant_cosine STORE FEATURES [FEATURES ...] [--n 1000]

Of unit vectors u, the constant c of unit length with the largest mean of u · c is along their mean, and reaches its
length. "of all": one vector for all patches; "by place": one for each, which a projector has from the position
embedding alone; "by place and class": one for each of both, which the label gives (too high where a class has few
images, by chance). What a run reaches above that, it has from the image.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from benchmarks.report import table
from pipeline.images import spread
from storage import open_store
from storage.base.console import Parser, run_command

PROG = "python -m benchmarks.effect.constant_cosine"


def constant_cosine(tokens: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """Of tokens (B, P, D) of images of classes (B,): the mean cosine with the best vector of all, with the best by
    place, and with the best by place and class."""
    units = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    by_class = sum(np.linalg.norm(units[labels == label].sum(0), axis=-1).mean() for label in np.unique(labels))
    return (
        float(np.linalg.norm(units.mean((0, 1)))),
        float(np.linalg.norm(units.mean(0), axis=-1).mean()),
        float(by_class / len(units)),
    )


def main(argv: Sequence[str]) -> int:
    """Print a line a group; returns the exit status."""
    parser = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("features", nargs="+", help="names below features/")
    parser.add_argument("--n", type=int, default=0, help="at most so many images, evenly spread")
    args = parser.parse_args(argv)
    store = open_store(args.store)
    lines = []
    for name in args.features:
        with closing(store.group(f"features/{name}", expect=None)) as group:
            rows = np.setdiff1d(np.arange(store.n_rows), group.failed_rows)
            rows = rows[spread(len(rows), args.n)]
            found = constant_cosine(group.tokens(rows), store.classes.labels[rows])
        lines.append([name, *(f"{value:.3f}" for value in found)])
    print(table(["best constant's mean cosine", "of all", "by place", "by place and class"], lines))
    return 0


if __name__ == "__main__":
    run_command(main, PROG)
