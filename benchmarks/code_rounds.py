"""Why rotations have two rounds of signs: what is left of a code's error on average over signs, with one round and two.

    python -m benchmarks.code_rounds [--keys 20000] [--tokens 8]

Tokens r of 384 channels: Gaussian ones, and one channel that has the share a of the token's length. With R = H S₁ (one
round) or H S₂ H S₁ (two, as stored), signs drawn independently for every key, and r̂ as the codec decodes it, the table
has ‖E r̂ − r‖/‖r‖ over keys, the root mean square over tokens, less what so many keys leave of the error itself: its
variance over keys, from the same draws, over their number. Arithmetic in float64, transform and levels the codec's.
Cost: some five minutes of one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.report import RESULTS, machine, table
from storage.codecs.rotated import ROTATED, Rotated
from storage.codecs.rotation import kronecker

CHANNELS = 384
SHARES = (0.0, 0.4, 0.6, 0.8, 0.95)
AT_ONCE = 2000  # keys


def token(share: float, rng: np.random.Generator) -> np.ndarray:
    """Float64 (D,) of length one, whose first channel is `share` (Gaussian like the others for 0)."""
    r = rng.standard_normal(CHANNELS)
    if share:
        r[0] = 0
        r *= np.sqrt(1 - share**2) / np.linalg.norm(r)
        r[0] = share
    return np.asarray(r / np.linalg.norm(r))


def decoded(codec: Rotated, r: np.ndarray, n: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """r̂ float64 (n, D) by n keys."""
    h = np.kron(*kronecker(CHANNELS)).astype(np.float64)
    signs = 1.0 - 2 * rng.integers(0, 2, (rounds, n, CHANNELS))
    z = np.broadcast_to(r, (n, CHANNELS))
    for s in signs:
        z = (z * s) @ h.T
    unit = np.linalg.norm(r) / np.sqrt(CHANNELS)
    levels = codec.levels.astype(np.float64)[np.searchsorted(codec.thresholds, z / unit, side="right")]
    x = levels * (r @ r / (levels * z).sum(-1, keepdims=True))
    for s in signs[::-1]:
        x = (x @ h) * s
    return x


def bias(codec: Rotated, share: float, rounds: int, keys: int, tokens: int) -> float:
    """‖E r̂ − r‖/‖r‖."""
    rng = np.random.default_rng(0)
    square = 0.0
    for _ in range(tokens):
        r, total, squares = token(share, rng), np.zeros(CHANNELS), np.zeros(CHANNELS)
        for start in range(0, keys, AT_ONCE):
            drawn = decoded(codec, r, min(AT_ONCE, keys - start), rounds, rng)
            total += drawn.sum(0)
            squares += np.square(drawn).sum(0)
        mean = total / keys
        of_mean = (squares / keys - np.square(mean)) / (keys - 1)
        square += (np.square(mean - r) - of_mean).sum()
    return float(np.sqrt(max(0.0, square / tokens)))


def main() -> None:
    """Measure; print the table and write it to `results/code_rounds.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=8)
    args = parser.parse_args()
    lines = [
        [codec.spelling, str(rounds), *(f"{bias(codec, a, rounds, args.keys, args.tokens):.3f}" for a in SHARES)]
        for codec in ROTATED
        for rounds in (1, 2)
    ]
    text = "\n".join([
        "## What codes leave of a token on average, by rounds of signs", "", machine(Path(), ("numpy",)), "",
        f"‖E r̂ − r‖/‖r‖, {CHANNELS} channels of which one has the share a of the length; {args.keys:,} keys, "
        f"{args.tokens} tokens.", "",
        table(["codec", "rounds", *(f"a = {a:g}" for a in SHARES)], lines), "",
    ])  # fmt: skip
    print(text)
    (RESULTS / "code_rounds.md").write_text(text)


if __name__ == "__main__":
    main()
