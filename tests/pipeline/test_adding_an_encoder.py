"""CONTRIBUTING.md's worked example, taken from the document as it stands and run into a store."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import pipeline.encoders
from pipeline.config import PrecomputeConfig
from pipeline.encoders import catalogue, listing
from pipeline.encoders.catalogue import VISION
from pipeline.plan import plan_groups
from storage import StoreLayout, UserError, open_store
from tests.pipeline.encoding import encode_store

CONTRIBUTING = Path(__file__).parent.parent.parent / "CONTRIBUTING.md"
LAYOUT = StoreLayout(n_rows=4, views=("original",), resolution=128, shard_rows=4)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example added to the package and to the catalogue, for one test; its name."""
    section = CONTRIBUTING.read_text().partition("## Adding an encoder\n")[2].partition("\n## ")[0]
    file, line = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    first, _, code = file.partition("\n")
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / Path(first.removeprefix("# ")).name).write_text(code)
    monkeypatch.setattr(pipeline.encoders, "__path__", [*pipeline.encoders.__path__, str(tmp_path / "added")])
    entries = eval(f"{{{line}}}", vars(catalogue))
    for name, model in entries.items():
        monkeypatch.setitem(VISION, name, model)
    (name,) = entries
    return name


def config(tmp_path: Path, name: str, **changes: object) -> PrecomputeConfig:
    settings = {"latents": "none", "features": name, "resolution": 128, "shard_rows": 4} | changes
    return PrecomputeConfig(data=str(tmp_path), store=str(tmp_path / "store"), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_example_encodes_a_store(tmp_path: Path, example: str, dtype: str) -> None:
    groups = plan_groups(config(tmp_path, example, features_dtype=dtype), LAYOUT, "digest")
    images = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), dtype=np.uint8)
    encode_store(tmp_path / "store", groups, images)
    group = open_store(tmp_path / "store").group(f"features/{example}")
    patches = group.tokens(range(4))
    wanted = images.reshape(4, 8, 16, 8, 16, 3).mean((2, 4)).reshape(4, 64, 3) / 255
    np.testing.assert_allclose(patches, wanted, atol=5e-4 if dtype == "float16" else 3e-3)
    group.close()


def test_the_example_is_listed_and_refuses_what_does_not_fit(tmp_path: Path, example: str) -> None:
    assert f"\n{example} " in listing.list_encoders()
    with pytest.raises(UserError, match="--resolution must be a multiple of 16 for patch-colour, got 100"):
        plan_groups(config(tmp_path, example, resolution=100), LAYOUT, "digest")
