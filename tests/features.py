"""Random features with the distributions that quantisation meets: Gaussian, outlier channels, heavy tails, massive.

The constants follow what was reported of transformers: about one channel in a thousand is many times the others
(LLM.int8(), arXiv 2208.07339), and single activations tens of times larger appear in few tokens (massive activations,
arXiv 2402.17762).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

WIDTHS = (384, 768, 1024, 1536)
Draw = Callable[[np.random.Generator, int, int], np.ndarray]


def gaussian(rng: np.random.Generator, n_tokens: int, width: int) -> np.ndarray:
    """Standard normal (n_tokens, width)."""
    return rng.standard_normal((n_tokens, width)).astype(np.float32)


def outlier_channels(factor: float, one_in: int = 1000) -> Draw:
    """Standard normal with one channel in `one_in` (at least one) `factor` times as large."""

    def draw(rng: np.random.Generator, n_tokens: int, width: int) -> np.ndarray:
        x = gaussian(rng, n_tokens, width)
        x[:, rng.choice(width, max(1, round(width / one_in)), replace=False)] *= factor
        return x

    return draw


def student_t(rng: np.random.Generator, n_tokens: int, width: int) -> np.ndarray:
    """Student's t with four degrees of freedom: independent heavy tails in every channel."""
    return rng.standard_t(4, (n_tokens, width)).astype(np.float32)


def massive_activations(rng: np.random.Generator, n_tokens: int, width: int) -> np.ndarray:
    """Standard normal with one channel of 50 to 100 in a tenth of the tokens."""
    x = gaussian(rng, n_tokens, width)
    tokens = rng.choice(n_tokens, n_tokens // 10, replace=False)
    x[tokens, rng.integers(width)] = rng.uniform(50, 100, len(tokens)).astype(np.float32)
    return x


DISTRIBUTIONS: dict[str, Draw] = {
    "Gaussian": gaussian,
    "outlier channels 8×": outlier_channels(8),
    "outlier channels 15×": outlier_channels(15),
    "Student-t(4)": student_t,
    "massive activations": massive_activations,
}


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine of each token's x and y (..., D), in float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
