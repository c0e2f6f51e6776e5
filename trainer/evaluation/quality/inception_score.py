"""The Inception Score (Salimans et al., arXiv 1606.03498, section 4): exp E_x KL( p(y|x) ‖ p(y) ).

As ADM's evaluator, whose numbers are the published ones: images in their order, 5,000 a split, the mean of the splits'
scores; class probabilities from logits without the final layer's bias.
"""

from __future__ import annotations

import numpy as np

SPLIT = 5000


def inception_score(logits: np.ndarray, split: int = SPLIT) -> float:
    """The score of logits (N, classes)."""
    return score_and_influence(logits, split)[0]


def score_and_influence(logits: np.ndarray, split: int = SPLIT) -> tuple[float, np.ndarray]:
    """The score, and what each image adds to it, float64 (N,), mean 0.

    An image's weight in p(y) drops out to first order, so it adds its own divergence less the mean of its split's.
    """
    scores, added = [], []
    for start in range(0, len(logits), split):
        part = logits[start : start + split].astype(np.float64)
        log_p = part - part.max(axis=1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        divergences = (p * (log_p - np.log(p.mean(axis=0)))).sum(axis=1)
        score = np.exp(divergences.mean())
        scores.append(score)
        added.append(score * (divergences - divergences.mean()) / len(part))
    return float(np.mean(scores)), np.concatenate(added) * (len(logits) / len(scores))
