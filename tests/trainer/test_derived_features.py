"""A run trains on features that `python -m storage derive` made, by their group's name."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from storage.codecs import CODECS
from storage.derive import derive_group
from tests.stores import FEATURES, encoded, make_store
from tests.trainer.runs import micro
from trainer.loop.train import train
from trainer.run.metrics import read_metrics


def test_a_run_on_derived_codes_equals_one_on_codes_that_were_encoded(tmp_path: Path) -> None:
    data = make_store(tmp_path / "float16")[FEATURES]
    path = derive_group(tmp_path / "float16", FEATURES, "rotated2", n_workers=1)
    codec = CODECS["rotated2"]
    features = {**encoded(data["patches"], codec), "cls": data["cls"]}
    make_store(tmp_path / "rotated2", codec=codec, features=features)
    losses = []
    for store, name in (("float16", path.partition("/")[2]), ("rotated2", "tiny-vit")):
        train(micro(tmp_path / store, tmp_path / f"run-{store}", **{"data.features": (name,)}))
        losses.append([line["loss"] for line in read_metrics(tmp_path / f"run-{store}")])
    assert np.isfinite(losses).all()
    assert losses[0] == losses[1] != []
