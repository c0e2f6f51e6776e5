"""KID beside torch-fidelity's own, CMMD beside a rendering of the paper's equation, pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from storage.base.errors import UserError
from trainer.evaluation.quality.kernels import cmmd, kid


def sets(n: int = 60, m: int = 50, width: int = 7, apart: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, width)).astype(np.float32), (rng.standard_normal((m, width)) + apart).astype("f4")


def naive_unbiased(real: np.ndarray, generated: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a.astype(float) @ b.astype(float) / len(a) + 1) ** 3)

    def within(x: np.ndarray) -> float:
        n = len(x)
        return sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    between = sum(k(a, b) for a in real for b in generated) / (len(real) * len(generated))
    return within(real) + within(generated) - 2 * between


def test_kid_is_torch_fidelity_s_to_the_subsets_drawn() -> None:
    real, generated = sets(90, 80)
    library = kid_features_to_metric(
        *(torch.from_numpy(generated), torch.from_numpy(real)),
        **{"kid_subsets": 12, "kid_subset_size": 30, "kid_kernel": "poly", "kid_kernel_poly_degree": 3},
        **{"kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1, "rng_seed": 2020, "verbose": False},
    )
    found = kid(real, generated, subsets=12, subset_size=30)
    assert found.value == pytest.approx(library["kernel_inception_distance_mean"], rel=1e-5)
    assert found.deviation == pytest.approx(library["kernel_inception_distance_std"], rel=1e-4)


def test_kid_of_few_images_is_of_all_pairs_and_unbiased() -> None:
    real, generated = sets(25, 21)
    found = kid(real, generated)
    assert found.value == pytest.approx(naive_unbiased(real, generated), rel=1e-10)
    assert (found.subsets, len(found.influence)) == (0, 21)
    rng = np.random.default_rng(1)
    alike = [kid(rng.standard_normal((20, 4)), rng.standard_normal((30, 4))).value for _ in range(300)]
    assert abs(np.mean(alike)) < 3 * np.std(alike) / math.sqrt(len(alike)), "an unbiased estimate is 0 on average"
    with pytest.raises(UserError, match="KID needs at least 2 images"):
        kid(real, generated[:1])


def test_cmmd_is_the_paper_s() -> None:
    real, generated = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in sets(23, 19, 6))

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        pairs = [math.exp(-(math.dist(x, y) ** 2) / (2 * 10**2)) for x in a for y in b]
        return sum(pairs) / len(pairs)

    expected = 1000 * (mean(real, real) + mean(generated, generated) - 2 * mean(real, generated))
    assert cmmd(real, generated).value == pytest.approx(expected, rel=1e-6)
    assert cmmd(real, real).value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("metric", [kid, cmmd])
def test_what_an_image_adds_says_what_the_metric_does_when_it_counts_more(metric: object) -> None:
    """Two copies of one image among many move the metric by what its influence says, to first order."""
    real, generated = sets(300, 400, 3, apart=1.0)
    if metric is cmmd:
        real, generated = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (real, generated))
    before = metric(real, generated)  # type: ignore[operator]
    for i in (0, int(np.argmax(before.influence))):
        after = metric(real, np.concatenate([generated, generated[i : i + 1]])).value  # type: ignore[operator]
        expected = before.influence[i] / len(generated)
        assert after - before.value == pytest.approx(expected, rel=0.15, abs=abs(before.influence).max() * 1e-4)
