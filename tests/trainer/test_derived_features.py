"""A run trains on features that `python -m storage derive` made, by their group's name."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from storage.derive import derive_group
from tests.stores import FEATURES, make_store
from tests.trainer.runs import micro
from trainer.loop.train import train
from trainer.run.metrics import read_metrics


def test_a_run_on_derived_codes_equals_one_on_codes_that_were_encoded(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    path = derive_group(tmp_path / "s", FEATURES, "rotated2", n_workers=1)
    losses = []
    for name in (path.partition("/")[2], "tiny-vit"):
        train(micro(tmp_path / "s", tmp_path / name, **{"data.features": name}))
        losses.append([record["loss"] for record in read_metrics(tmp_path / name)])
    assert np.isfinite(losses).all()
    assert losses[0] != losses[1]  # codes, not the parent's numbers
