"""Faster arithmetic stays within its stated bound of float32, is named by the identity, and leaves torch as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import PrecomputeConfig
from pipeline.encoders import precision, registry
from pipeline.encoders.tiny.train import split_images
from pipeline.plan import plan_groups
from storage import StoreLayout
from storage.base.errors import UserError

CPU = torch.device("cpu")
BOUNDS = {"tf32": 2e-3, "fp16": 2e-3, "bf16": 2e-2}  # those of precision.py's docstring
SWITCHES = (
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; a CPU has no TF32")
CASES = [
    ("fp16", "cpu"),
    ("bf16", "cpu"),
    *(pytest.param(arithmetic, "cuda", marks=CUDA) for arithmetic in BOUNDS),
]


def encoded(name: str, images: np.ndarray, device: torch.device = CPU, **options: Any) -> np.ndarray:
    resolve = registry.resolve_latents if "vae" in name else registry.resolve_features
    encoder: Any = registry.load(resolve(name, **options), resolution=128, device=device)
    if "vae" in name:
        return registry.encode_images(encoder, images)["moments"].astype(np.float32)
    return encoder.encode_tokens(torch.from_numpy(images))[0].cpu().numpy()


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    return split_images("heldout", 1)[0][::4]  # four of them: a CPU emulates float16


@pytest.mark.parametrize(("arithmetic", "device"), CASES)
@pytest.mark.parametrize("name", ["tiny-vae", "tiny-vit"])
def test_the_error_is_within_the_stated_bound(photographs: np.ndarray, name: str, arithmetic: str, device: str) -> None:
    wanted = encoded(name, photographs)
    found = encoded(name, photographs, torch.device(device), precision=arithmetic)
    assert relative_error(found, wanted) <= BOUNDS[arithmetic]
    if name == "tiny-vae":
        mean, std = np.split(found - wanted, 2, axis=1)
        wanted_mean, wanted_std = np.split(wanted, 2, axis=1)
        assert np.linalg.norm(mean) <= BOUNDS[arithmetic] * np.linalg.norm(wanted_mean)
        assert np.linalg.norm(std) <= BOUNDS[arithmetic] * np.linalg.norm(wanted_std)
    else:
        cosine = (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert cosine.min() >= 1 - BOUNDS[arithmetic] ** 2
    assert relative_error(found, wanted) > 1e-5  # the faster arithmetic is really used


def test_the_docstring_states_the_bounds_that_are_tested() -> None:
    rows = {line.split("|")[1].strip(" `"): line for line in (precision.__doc__ or "").splitlines() if line[:1] == "|"}
    for name, bound in BOUNDS.items():
        assert f"{bound:.0e}".replace("e-0", "e-") in rows[name]


@pytest.mark.parametrize("arithmetic", precision.ARITHMETIC)
@pytest.mark.parametrize("before", [False, True])
def test_tf32_is_on_exactly_when_it_was_asked_for(arithmetic: str, before: bool) -> None:
    saved = [getattr(where, name) for where, name in SWITCHES]
    try:
        for where, name in SWITCHES:
            setattr(where, name, before)
        with precision.arithmetic(arithmetic, CPU):
            inside = [getattr(where, name) for where, name in SWITCHES]
            assert torch.is_autocast_enabled("cpu") == (arithmetic in ("fp16", "bf16"))
        assert inside == [arithmetic == "tf32"] * 2 + [False] * 2
        assert [getattr(where, name) for where, name in SWITCHES] == [before] * 4
    finally:
        for (where, name), value in zip(SWITCHES, saved, strict=True):
            setattr(where, name, value)


def test_the_identity_names_the_arithmetic(tmp_path: Path) -> None:
    layout = StoreLayout(n_rows=4, views=("original",), resolution=128, shard_rows=4)
    named = {}
    for options in ({}, {"precision": "bf16"}, {"precision": "fp16", "compile": True}):
        config = PrecomputeConfig(
            data=str(tmp_path),
            store=str(tmp_path),
            latents="tiny-vae:precision=tf32",
            features="tiny-vit",
            resolution=128,
            **options,  # type: ignore[arg-type]
        )
        groups = plan_groups(config, layout, "digest")
        named[tuple(options)] = [group.identity.arithmetic for group in groups]
    assert list(named.values()) == [
        ["tf32", "float32"],
        ["tf32", "bfloat16 autocast"],
        ["tf32, torch.compile", "float16 autocast, torch.compile"],
    ]
    with pytest.raises(UserError, match="--precision must be one of fp32, tf32, bf16, fp16, got 'fp8'"):
        PrecomputeConfig(data=str(tmp_path), store=str(tmp_path), precision="fp8")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batches"), [("tiny-vae", [2]), ("tiny-vit", [4, 4, 3])])
def test_compiled_encoders_give_the_same_numbers_but_for_rounding(
    photographs: np.ndarray, name: str, batches: list[int]
) -> None:
    """A last batch of another size included."""
    for n in batches:
        found, wanted = encoded(name, photographs[:n], compiled=True), encoded(name, photographs[:n])
        assert relative_error(found, wanted) < 1e-3
