"""CKNNA: how far two representations of the same samples agree on nearest neighbours and on how near they are.

Huh et al., arXiv 2405.07987, section 3 and appendix A, as in the implementation that they published. With kernels
Kᵢⱼ = ⟨φᵢ, φⱼ⟩ and Lᵢⱼ = ⟨ψᵢ, ψⱼ⟩ of unit vectors, and

    αᵢⱼ = 1 if j ≠ i is among the k nearest of i both in φ and in ψ, else 0,
    A(K, L) = HSIC( α∘K, α∘L ),          CKNNA = A(K, L) / ( √( A(K, K) · A(L, L) ) + 10⁻⁶ ),

where HSIC is the unbiased estimator (Song et al., JMLR 13, 2012, equation 5), for matrices with an empty diagonal

    HSIC(K, L) = [ tr KL + 1ᵀK1 · 1ᵀL1 / ((n−1)(n−2)) − 2/(n−2) · 1ᵀKL1 ] / (n(n−3)).

(A is about k/n, so the 10⁻⁶ of their implementation takes a thousandth off at n = 10,000.) k = 10 as in REPA (arXiv
2410.06940), whose authors average hidden states and features over patches first.

The masked kernels have k entries a row and are kept so: memory is N·k, and one block of B·N similarities at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.base.errors import UserError

NEIGHBOURS = 10
EPSILON = 1e-6
BLOCK_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The k nearest of each sample: indices int64 (N, k) and similarities float64 (N, k)."""

    index: Tensor
    similarity: Tensor


def cknna(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> float:
    """Alignment of representations x (N, D) and y (N, E) of the same samples; near 1 for equal neighbourhoods."""
    return alignment(nearest(x, k), nearest(y, k))


def nearest(x: Tensor, k: int = NEIGHBOURS, block_rows: int = BLOCK_ROWS) -> Neighbours:
    """The k nearest by cosine of each of x (N, D). Raises UserError when there are too few samples."""
    if k < 2 or len(x) < max(k + 1, 4):
        raise UserError(
            f"CKNNA needs k of at least 2 and more than k samples (4 or more), got k = {k} and {len(x)} samples"
        )
    x = F.normalize(x.float(), dim=-1)
    blocks = []
    for start in range(0, len(x), block_rows):
        similarities = x[start : start + block_rows] @ x.T
        own = torch.arange(len(similarities), device=x.device)
        similarities[own, start + own] = -torch.inf
        blocks.append(similarities.topk(k))
    similarity, index = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return Neighbours(index=index, similarity=similarity.double())


def alignment(a: Neighbours, b: Neighbours) -> float:
    """CKNNA of two sets of neighbours of the same samples."""
    assert a.index.shape == b.index.shape, (a.index.shape, b.index.shape)
    norm2 = max(0.0, _agreement(a, a) * _agreement(b, b))  # an unbiased estimate of nothing may be negative
    return _agreement(a, b) / (norm2**0.5 + EPSILON)


def _agreement(a: Neighbours, b: Neighbours) -> float:
    """A(K, L): the unbiased HSIC of both kernels where both have a neighbour."""
    n = len(a.index)
    row, slot_a, slot_b = (a.index[:, :, None] == b.index[:, None, :]).nonzero(as_tuple=True)
    column = a.index[row, slot_a]
    k, l = a.similarity[row, slot_a], b.similarity[row, slot_b]  # noqa: E741 — the formula's letters
    key, order = (row * n + column).sort()
    mirrored = column * n + row
    place = torch.searchsorted(key, mirrored).clamp(max=len(key) - 1)
    both_ways = key[place] == mirrored
    trace = (k * l[order][place])[both_ways].sum()
    into = torch.zeros(n, dtype=torch.float64, device=k.device).index_add_(0, column, k)  # 1ᵀK
    out_of = torch.zeros(n, dtype=torch.float64, device=k.device).index_add_(0, row, l)  # L1
    hsic = trace + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (into @ out_of)
    return float(hsic) / (n * (n - 3))
