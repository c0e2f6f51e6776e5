"""CONTRIBUTING.md's codec, taken from the document as it stands: encoded, read, exported, verified and trained from."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import storage.codecs
from pipeline.config import PrecomputeConfig
from pipeline.plan import plan_groups
from storage import StoreLayout, UserError, open_store
from storage.__main__ import main
from storage.codecs import CODECS, Codec
from storage.verify import verify
from tests.pipeline.encoding import encode_store
from tests.stores import FEATURES, make_store
from tests.trainer.runs import micro
from trainer.data.groups import open_data
from trainer.loop.train import train
from trainer.run.metrics import read_metrics

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"
LAYOUT = StoreLayout(n_rows=3, views=("original", "hflip"), resolution=128, shard_rows=4)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Codec:
    """The file below the package, and its line in the table, for one test."""
    section = GUIDE.read_text().partition("## Adding a codec of features\n")[2].partition("\n## ")[0]
    file, line = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    first, _, code = file.partition("\n")
    name = Path(first.removeprefix("# ")).stem
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / f"{name}.py").write_text(code)
    monkeypatch.setattr(storage.codecs, "__path__", [*storage.codecs.__path__, str(tmp_path / "added")])
    module = __import__(f"storage.codecs.{name}", fromlist=["*"])
    codec: Codec = getattr(module, line.split("\n")[1].strip().rstrip(","))
    monkeypatch.setitem(CODECS, codec.spelling, codec)
    monkeypatch.delitem(sys.modules, module.__name__)
    return codec


def test_the_pipeline_writes_it(tmp_path: Path, example: Codec) -> None:
    asked = PrecomputeConfig(
        data=str(tmp_path), store=str(tmp_path / "s"), latents="none", features="tiny-vit",
        features_dtype=example.spelling, resolution=128, flip=True,
    )  # fmt: skip
    images = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
    tokens = {}
    for dtype in (example.spelling, "float16"):
        groups = plan_groups(PrecomputeConfig(**{**vars(asked), "features_dtype": dtype}), LAYOUT, "digest")
        encode_store(tmp_path / dtype, groups, images)
        group = open_store(tmp_path / dtype).group("features/tiny-vit")
        tokens[dtype] = group.tokens(range(3), 1)
        group.close()
    np.testing.assert_allclose(tokens[example.spelling], tokens["float16"], rtol=2**-8, atol=1e-6)
    with pytest.raises(UserError, match=r"--features-dtype must be one of float16, .*bfloat16, got 'fp4'"):
        PrecomputeConfig(**{**vars(asked), "features_dtype": "fp4"})


def test_a_codec_right_on_average_only_needs_a_twin(
    tmp_path: Path, example: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "s", codec=example)
    monkeypatch.setattr(type(example), "exact", False)
    with pytest.raises(UserError, match=rf"^{FEATURES} is in bfloat16 codes, .* no twin in .*; add one to TWINS, or"):
        open_data(micro(tmp_path / "s", tmp_path / "run"))


def test_everything_reads_it(tmp_path: Path, example: Codec, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "s"
    make_store(root, codec=example, n_views=2)
    assert list(verify(root, deep=True, n_workers=1)) == []
    assert main(["ls", str(root)]) == 0
    assert "bfloat16" in capsys.readouterr().out
    out = tmp_path / "out"
    assert main(["export", str(root), "--to", "npy", "--out", str(out), "--decode", "--groups", FEATURES]) == 0
    group = open_store(root).group(FEATURES)
    exported = np.load(out / "features.tiny-vit.patches.npy")
    np.testing.assert_array_equal(exported[:, 1], group.tokens(range(40), 1, dtype=np.float16))
    group.close()
    train(micro(root, tmp_path / "run", steps=2))
    assert all(np.isfinite(line["alignment_loss"]) for line in read_metrics(tmp_path / "run"))
