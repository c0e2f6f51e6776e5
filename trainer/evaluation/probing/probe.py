"""Linear probing: how well a linear classifier on frozen representations names the class of images it has not seen.

Multinomial logistic regression on standardised inputs (mean and deviation of the training part, as the batch norm
before the classifier in MAE's protocol, arXiv 2111.06377, which REPA follows):

    minimise over W, b    Σᵢ −log softmax(W xᵢ + b)[yᵢ] + ½ ‖W‖² / C,      b is free,

convex, so that L-BFGS (Liu and Nocedal 1989) ends at the one minimum whatever the start; scikit-learn's
`LogisticRegression` minimises the same. Every fifth sample is for validation, by its place among the samples: rows of a
store are sorted by class, so that each class has its share.

Cost: two products of (N, D) by (D, classes) an iteration, on the device of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from storage.base.errors import UserError

VALIDATION_EVERY = 5
ITERATIONS = 500


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Share of right answers on either part, in [0, 1]."""

    accuracy: float
    train_accuracy: float


def split(n: int) -> tuple[Tensor, Tensor]:
    """Places of the training and of the validation samples among n."""
    place = torch.arange(n)
    validation = place % VALIDATION_EVERY == VALIDATION_EVERY - 1
    return place[~validation], place[validation]


def probe(x: Tensor, labels: Tensor, c: float = 1.0) -> ProbeResult:
    """Fit on the training part of x (N, D) with labels int64 (N,), judge on both. Raises UserError."""
    train, validation = split(len(x))
    if len(validation) == 0 or len(labels[train].unique()) < 2:
        raise UserError(
            f"a probe needs {VALIDATION_EVERY} samples and 2 classes at least, got {len(x)} samples of "
            f"{len(labels.unique())}; raise --n"
        )
    train, validation = train.to(x.device), validation.to(x.device)
    weight, bias = fit(x[train], labels[train], int(labels.max()) + 1, c)
    right = (x.float() @ weight.T + bias).argmax(dim=1) == labels
    return ProbeResult(
        accuracy=right[validation].float().mean().item(), train_accuracy=right[train].float().mean().item()
    )


def fit(x: Tensor, labels: Tensor, n_classes: int, c: float = 1.0) -> tuple[Tensor, Tensor]:
    """W (classes, D) and b (classes,) float32, for inputs that are not standardised."""
    if not c > 0:
        raise UserError(f"the probe's C must be positive, got {c}")
    x = x.float()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    scale = torch.where(std > 0, 1 / std, 0.0)  # a channel that never changes says nothing
    standard = (x - mean) * scale
    weight = torch.zeros(n_classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(standard, weight, bias), labels) + weight.square().sum() / (2 * c * len(x))
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    folded = weight.detach() * scale
    return folded, bias.detach() - folded @ mean
