"""How high an alignment's cosine is without looking: the best that a vector says that is the same for every image.

    python -m benchmarks.effect.constant_cosine STORE FEATURES [FEATURES ...] [--n 400]

Of unit vectors u, the constant c of unit length with the largest mean of u · c is along their mean, and reaches its
length. "of all": one vector for all patches; "by place": one for each, which a projector has from the position
embedding alone. What a run reaches above that, it has from the image.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from benchmarks.report import table
from storage import open_store
from storage.base.console import Parser, run_command

PROG = "python -m benchmarks.effect.constant_cosine"


def constant_cosine(tokens: np.ndarray) -> tuple[float, float]:
    """Of tokens (B, P, D): the mean cosine with the best vector of all, and with the best by place."""
    units = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    by_place = np.linalg.norm(units.mean(0), axis=-1).mean()
    return float(np.linalg.norm(units.mean((0, 1)))), float(by_place)


def main(argv: Sequence[str]) -> int:
    """Print a line a group; returns the exit status."""
    parser = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("features", nargs="+", help="names below features/")
    parser.add_argument("--n", type=int, default=400, help="images, evenly spread")
    args = parser.parse_args(argv)
    store = open_store(args.store)
    rows = np.linspace(0, store.n_rows - 1, min(args.n, store.n_rows)).astype(int)
    lines = []
    for name in args.features:
        with closing(store.group(f"features/{name}")) as group:
            found = constant_cosine(group.tokens(rows).astype(np.float32))
        lines.append([name, *(f"{value:.3f}" for value in found)])
    print(table(["best constant's mean cosine", "of all", "by place"], lines))
    return 0


if __name__ == "__main__":
    run_command(main, PROG)
