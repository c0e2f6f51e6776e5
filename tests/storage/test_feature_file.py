"""Feature files: what is written is read back, and what is none is refused in one line."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.base.errors import UserError
from storage.feature_file import open_feature_file, write_feature_file
from storage.identity import VectorsIdentity
from tests.examples import examples

IDENTITY = VectorsIdentity(name="vit", encoder="test", vector="cls")


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


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.binary(max_size=200)
    | st.sampled_from(
        [
            b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3), }",
            b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999999999999, 3), }",
            b"{'descr': '<U999999999', 'fortran_order': False, 'shape': (), }",
            b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }",
            b"{'descr': '<f4', 'fortran_order': False, 'shape': ('a',), }",
            b"{'descr': '<f4'" + b"(" * 5000,
        ]
    ),
    version=st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\xff\xff"]),
    name=st.sampled_from(["features", "identity", "images"]),
)
def test_headers_of_any_kind_are_read_or_one_line(tmp_path: Path, header: bytes, version: bytes, name: str) -> None:
    path = tmp_path / "f.npz"
    write_feature_file(path, {"features": np.ones((2, 2), np.float32)}, IDENTITY, {"n": 2})
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    size = len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    members[f"{name}.npy"] = b"\x93NUMPY" + version + size + header
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    with pytest.raises(UserError) as refused:
        open_feature_file(path).read("features")
    assert "\n" not in str(refused.value)
