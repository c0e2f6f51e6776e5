"""The worked example of CONTRIBUTING.md: taken from there, put into a module, registered, and read through."""

from __future__ import annotations

import importlib
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline import sources
from pipeline.__main__ import main
from pipeline.decode import decode_unit
from storage.base.console import EXIT_OK
from storage.base.errors import UserError

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()


def code_block(section: str) -> str:
    after = TEXT[TEXT.index(f"## {section}\n") :]
    found = re.search(r"```python\n(.*?)```", after, re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_example_of_a_source_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "npz_source.py").write_text(code_block("Adding a source"))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("npz_source")
    monkeypatch.setattr(sources, "SOURCES", [*sources.SOURCES, module.Npz])

    images = np.random.default_rng(0).integers(0, 256, (7, 40, 40, 3), dtype=np.uint8)
    data = tmp_path / "data"
    data.mkdir()
    np.savez(data / "a.npz", images=images[:4], labels=[0, 1, 1, 0])
    np.savez(data / "b.npz", images=images[4:], labels=[2, 2, 2])
    (data / "classes.txt").write_text("cat\ndog\nfish\n")
    (data / "notes.md").write_text("left out, and said so")

    source = pickle.loads(pickle.dumps(sources.open_source(str(data))))
    listing = source.listing()
    assert source.kind == "npz"
    assert listing.index.labels.tolist() == [0, 1, 1, 0, 2, 2, 2]
    assert listing.index.class_names == ["cat", "dog", "fish"]
    assert listing.left_out == ("notes.md",)
    decoded, (failures, *_) = decode_unit(source, 0, listing.index.keys, listing.index.locations, 40)
    assert not failures
    np.testing.assert_array_equal(decoded, images)
    reopened = sources.open_source(**{"data": source.provenance()["path"], "kind": source.provenance()["kind"]})
    assert reopened.listing() == listing
    assert main(["index", str(data), "--source", "npz"]) == EXIT_OK
    assert "classes    3: cat, dog, fish" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--source must be one of .*, npz, got 'lmdb'"):  # no other file knows of it
        sources.open_source(str(data), "lmdb")
