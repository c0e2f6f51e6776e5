"""The probe against scikit-learn on the same features, and where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from storage.base.errors import UserError
from trainer.evaluation.probing.probe import fit, probe, split


def blobs(n: int, width: int, n_classes: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes around random centres, channels of very different scales and offsets; sorted by class as a store is."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, n_classes, n))
    x = rng.standard_normal((n_classes, width))[labels] + spread * rng.standard_normal((n, width))
    return (x * np.logspace(-2, 2, width) + 100 * rng.standard_normal(width)).astype(np.float32), labels


@pytest.mark.parametrize(
    ("n", "width", "n_classes", "spread", "c"),
    [(1500, 24, 10, 2.0, 1.0), (2000, 40, 5, 3.0, 0.01), (600, 64, 3, 4.0, 10.0)],
)
def test_accuracy_equals_scikit_learns(n: int, width: int, n_classes: int, spread: float, c: float) -> None:
    x, labels = blobs(n, width, n_classes, spread, seed=n)
    train, validation = (part.numpy() for part in split(n))
    scaler = StandardScaler().fit(x[train].astype(np.float64))
    theirs = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(scaler.transform(x[train]), labels[train])
    found = probe(torch.from_numpy(x), torch.from_numpy(labels), c)
    assert 0.3 < found.accuracy < 0.99  # neither trivial nor hopeless, so that agreement says something
    assert found.accuracy == pytest.approx(theirs.score(scaler.transform(x[validation]), labels[validation]), abs=0.005)
    assert found.train_accuracy == pytest.approx(theirs.score(scaler.transform(x[train]), labels[train]), abs=0.005)


def test_the_minimum_itself_is_scikit_learns() -> None:
    x, labels = blobs(800, 12, 4, 2.0, seed=1)
    weight, bias = fit(torch.from_numpy(x), torch.from_numpy(labels), 4)
    scaler = StandardScaler().fit(x.astype(np.float64))
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000).fit(scaler.transform(x), labels)
    mine = torch.softmax(torch.from_numpy(x).double() @ weight.double().T + bias.double(), dim=1).numpy()
    np.testing.assert_allclose(mine, theirs.predict_proba(scaler.transform(x)), atol=2e-3)


def test_validation_is_every_fifth_and_never_trained_on() -> None:
    train, validation = split(13)
    assert validation.tolist() == [4, 9]
    assert sorted(train.tolist() + validation.tolist()) == list(range(13))
    labels = torch.arange(200) // 100
    x = torch.nn.functional.one_hot(labels, 2).float() + 0.01 * torch.randn(
        200, 2, generator=torch.Generator().manual_seed(0)
    )
    x[split(200)[1]] *= -1  # right on what it was trained on, wrong on the rest
    found = probe(x, labels)
    assert (found.train_accuracy, found.accuracy) == (1, 0)


def test_a_channel_that_never_changes_is_harmless() -> None:
    x, labels = blobs(300, 6, 3, 0.5, seed=2)
    with_constant = np.concatenate([x, np.full((300, 1), 7, dtype=np.float32)], axis=1)
    assert probe(torch.from_numpy(with_constant), torch.from_numpy(labels)) == probe(
        torch.from_numpy(x), torch.from_numpy(labels)
    )


@pytest.mark.parametrize("labels", [[0, 1], [1] * 10])
def test_too_little_to_learn_from_is_refused(labels: list[int]) -> None:
    with pytest.raises(UserError, match="5 samples and 2 classes"):
        probe(torch.randn(len(labels), 3), torch.tensor(labels))
