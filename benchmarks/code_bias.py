"""What is left of the codes' error on average: the mean, over keys, of what projections are compared with.

    python -m benchmarks.code_bias STORE --features features/A features/B [--images 6] [--keys 80]

STORE has float16 patch tokens. Each of `--images` images is encoded with `--keys` different keys, decoded, and prepared
by REPA's alignment and by iREPA's; the mean is compared with what they make of the exact tokens:

    along        mean over tokens of the mean's length along the exact direction: 1 where it is unbiased
    bias         ‖mean − exact‖ / ‖exact‖ over all numbers, less what so few keys leave of the error: its variance over
                 keys, estimated from the same draws, over their number
    gains        the same along each channel, mean of the tenth of channels that vary least over their image, of the
                 middle tenth, and of the tenth that varies most
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import RESULTS, machine, table
from storage import open_store
from storage.codecs import CODECS
from storage.torch.codecs import Tokens, twin_of
from trainer.alignment import alignment_named
from trainer.alignment.kind import Alignment

CODES = ("rotated1", "rotated2", "rotated4")
KINDS = {"REPA": "cosine", "iREPA": "irepa"}


@torch.inference_mode()
def measured(kind: Alignment, y: Tensor, codec: str, keys: int) -> list[str]:
    """Cells of the table, of tokens (B, T, D)."""
    twin, exact = twin_of(CODECS[codec]), kind.prepared(Tokens(y)).double()
    total, squares = torch.zeros_like(exact), torch.zeros_like(exact)
    for key in range(keys):
        rows = torch.arange(len(y)) + len(y) * key
        once = kind.prepared(twin.decode(twin.encode(y, rows, 0), rows, 0)).double()
        total += once
        squares += once.square()
    mean = total / keys
    of_mean = (squares / keys - mean.square()) / (keys - 1)
    bias = (((mean - exact).square() - of_mean).sum() / exact.square().sum()).clamp(min=0).sqrt().item()
    along = (mean * exact).sum(-1).mean().item()
    gains = ((mean * exact).sum(1) / exact.square().sum(1)).gather(1, y.std(1).argsort(1)).mean(0)
    tenth, middle = len(gains) // 10, len(gains) // 2
    parts = gains[:tenth], gains[middle - tenth // 2 : middle + tenth // 2], gains[-tenth:]
    return [f"{along:.3f}", f"{bias:.3f}", ", ".join(f"{part.mean().item():.2f}" for part in parts)]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--features", nargs="+", required=True)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--keys", type=int, default=80)
    args = parser.parse_args()
    store, lines = open_store(args.store), []
    for path in args.features:
        group = store.group(path, expect=None)
        rows = np.linspace(0, store.n_rows - 1, args.images).astype(np.int64)
        y = torch.from_numpy(group.tokens(rows)).float()
        group.close()
        for name, kind in KINDS.items():
            for codec in CODES:
                lines.append([path, name, codec, *measured(alignment_named(kind), y, codec, args.keys)])
                print(*lines[-1], flush=True)
    header = ["features", "alignment", "codec", "along", "bias", "gains: least, middle, most varying"]
    text = ["# What codes leave of a target on average", "", machine(RESULTS, ("torch", "numpy")), ""]
    text += [
        f"{args.images} images, {args.keys} keys each: `python -m benchmarks.code_bias`",
        "",
        table(header, lines),
        "",
    ]
    (RESULTS / "code_bias.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
