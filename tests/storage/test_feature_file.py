"""Feature files: what is written is read back, and what is none is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from storage.errors import UserError
from storage.feature_file import open_feature_file, write_feature_file

IDENTITY = {"name": "vit", "encoder": "test", "vector": "cls"}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    path = tmp_path / "folder" / "f.npz"
    write_feature_file(path, {"features": features}, IDENTITY, {"n": 5, "path": "Bilder/ä"})
    found = open_feature_file(path)
    assert (found.identity, found.images, found.arrays) == (IDENTITY, {"n": 5, "path": "Bilder/ä"}, ("features",))
    assert found.label == "vit"
    np.testing.assert_array_equal(found.read("features"), features)
    assert [p.name for p in path.parent.iterdir()] == ["f.npz"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    write_feature_file(path, {"features": np.ones((2, 2), np.float32)}, IDENTITY, {"n": 2})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="allow_pickle"):
        write_feature_file(path, {"features": np.array([object()])}, IDENTITY, {"n": 1})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["f.npz"]


def test_what_is_no_feature_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_feature_file(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(UserError, match=r"is not an \.npz file"):
        open_feature_file(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    with pytest.raises(UserError, match="holds arr_0"):
        open_feature_file(tmp_path / "other.npz")
    write_feature_file(tmp_path / "nan.npz", {"features": np.array([[np.nan]])}, IDENTITY, {"n": 1})
    with pytest.raises(UserError, match="NaN or infinity"):
        open_feature_file(tmp_path / "nan.npz").read("features")
