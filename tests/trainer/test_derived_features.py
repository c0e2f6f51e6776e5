"""A run trains on features that `python -m storage derive` made, by their group's name."""

from __future__ import annotations

from pathlib import Path

from storage.derive import derive_group
from tests.stores import FEATURES, make_store
from tests.trainer.runs import micro
from trainer.loop.train import train
from trainer.run.metrics import read_metrics


def test_a_run_on_derived_codes_differs_from_one_on_exact_features_by_its_alignment(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    derived = derive_group(tmp_path / "s", FEATURES, "rotated2", n_workers=1).partition("/")[2]
    first = {}
    for name in (derived, "tiny-vit"):
        train(micro(tmp_path / "s", tmp_path / name, **{"data.features": (name,), "steps": 2, "log.every": 1}))
        first[name] = read_metrics(tmp_path / name)[0]
    codes, exact = first[derived], first["tiny-vit"]
    assert codes["denoising_loss"] == exact["denoising_loss"]
    assert 0 < abs(codes["alignment_loss"] - exact["alignment_loss"]) < 0.05
