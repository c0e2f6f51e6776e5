"""Statistics of every place of the grid are those of all numbers at once, of the rows that there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from storage import GroupReader, open_store, places
from storage.__main__ import main
from storage.base.errors import StoreError, UserError
from storage.codecs import CODECS, Codec
from storage.verify import verify
from tests.stores import FEATURES, decoded, make_store

KEY = places.key_of(FEATURES)


def count(root: Path, *more: str) -> int:
    return main(["statistics", str(root), FEATURES, *more])


def read(root: Path) -> places.PlaceStatistics | None:
    store = open_store(root)
    group: GroupReader = store.group(FEATURES)
    try:
        return places.read(store.root, group)
    finally:
        group.close()


@pytest.mark.parametrize("codec", [None, CODECS["int8"]])
def test_they_are_those_of_all_numbers(tmp_path: Path, codec: Codec | None) -> None:
    """Of every row and view that could be decoded, tokens decoded, to the last digits of float64."""
    data = make_store(tmp_path, n_views=2, failed_rows=[7, 33], codec=codec)[FEATURES]
    kept = np.delete(np.arange(40), [7, 33])
    tokens = data["patches"] if codec is None else decoded(data, codec)
    assert count(tmp_path) == 0
    assert read(tmp_path) is None
    assert count(tmp_path, "--places") == 0
    statistics = read(tmp_path)
    assert statistics is not None
    assert statistics.mean_class is not None
    assert statistics.var_class is not None
    for mean, var, array in (
        (statistics.mean.reshape(24, 64).T, statistics.var.reshape(24, 64).T, tokens),
        (statistics.mean_class, statistics.var_class, data["cls"]),
    ):
        numbers = array[kept].astype(np.float64).reshape(-1, *array.shape[2:])
        np.testing.assert_allclose(mean, numbers.mean(0), atol=1e-14, rtol=0)
        np.testing.assert_allclose(var, numbers.var(0), atol=0, rtol=1e-13)
    assert sorted(load_file(tmp_path / KEY)) == ["mean", "mean_cls_token", "var", "var_cls_token"]
    assert not list(verify(tmp_path, deep=True))


def test_a_file_is_the_same_however_many_threads_counted(tmp_path: Path) -> None:
    make_store(tmp_path, shard_rows=3)
    group: GroupReader = open_store(tmp_path).group(FEATURES)
    one, many = (places.count(group, n) for n in (1, 7))
    group.close()
    assert one.digest == many.digest
    assert one.packed() == many.packed()


def test_they_are_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path)
    for state in ("were counted", "are there"):
        count(tmp_path, "--places")
        assert f"statistics of 64 places {state}: std " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^--places is of features, and latents/tiny-vae are latents; leave it out$"):
        main(["statistics", str(tmp_path), "latents/tiny-vae", "--places"])


def test_those_of_other_rows_are_refused_and_counted_again(tmp_path: Path) -> None:
    make_store(tmp_path / "other", features={"patches": np.ones((40, 1, 64, 24), np.float16)})
    make_store(tmp_path / "store")
    count(tmp_path / "other", "--places")
    there = tmp_path / "store" / KEY
    there.parent.mkdir(parents=True)
    there.write_bytes((tmp_path / "other" / KEY).read_bytes())
    with pytest.raises(StoreError, match=r"is of other rows than features/tiny-vit has now; run `python -m storage st"):
        read(tmp_path / "store")
    count(tmp_path / "store", "--places")
    statistics = read(tmp_path / "store")
    assert statistics is not None
    assert statistics.var.min() > 0


def test_no_number_changes_unseen(tmp_path: Path) -> None:
    make_store(tmp_path)
    count(tmp_path, "--places")
    raw = bytearray((tmp_path / KEY).read_bytes())
    raw[-5] ^= 1
    (tmp_path / KEY).write_bytes(raw)
    with pytest.raises(
        StoreError, match=r"is damaged \(its numbers are not as they were written\); run `python -m stor"
    ):
        read(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"mean": np.zeros((2, 3, 3))}, r"holds mean; statistics of features are mean and var, \(D, h, w\); FIX"),
        ({"mean": np.zeros((2, 3)), "var": np.zeros((2, 3))}, r"is of tokens 2×3 \(var 2×3\), not 2×3×3; FIX"),
        ({"mean": np.zeros((4, 3, 3)), "var": np.ones((4, 3, 3))}, r"is of tokens 4×3×3 .*, not 2×3×3; FIX"),
        ({"mean": np.zeros((2, 3, 3)), "var": -np.ones((2, 3, 3))}, "NaN, infinite or below 0; FIX"),
        ({"mean": np.full((2, 3, 3), np.nan), "var": np.ones((2, 3, 3))}, "NaN, infinite or below 0; FIX"),
        (
            {"mean": np.zeros((2, 3, 3)), "var": np.ones((2, 3, 3)), "mean_cls_token": np.zeros(2)},
            "has class tokens of 2, not mean and var of 2; FIX",
        ),
    ],
)
def test_what_is_no_statistics_is_one_line(tmp_path: Path, arrays: dict[str, np.ndarray], says: str) -> None:
    save_file(arrays, tmp_path / "s.safetensors")
    with pytest.raises(StoreError, match=says):
        places.unpacked((tmp_path / "s.safetensors").read_bytes(), "s", "FIX", (2, 3, 3))
    with pytest.raises(StoreError, match="s is damaged"):
        places.unpacked(b"no such file", "s", "FIX")


def test_axes_of_one_are_taken_off() -> None:
    """As public files have them."""
    statistics = places.checked(
        {"mean": np.zeros((1, 2, 3, 3)), "var": np.ones((1, 2, 3, 3)), "mean_cls_token": np.zeros((1, 2)),
         "var_cls_token": np.ones((1, 1, 2))}, "s", "FIX", (2, 3, 3),
    )  # fmt: skip
    assert statistics.mean.shape == (2, 3, 3)
    assert statistics.var_class is not None
    assert statistics.var_class.shape == (2,)
