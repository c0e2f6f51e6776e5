"""The two ways to read a store from another trainer: the torch data set, and the plain iterator."""

from __future__ import annotations

import pickle
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from storage import UserError, open_store
from storage.batches import iterate_batches
from storage.codecs.int8 import INT8
from storage.codecs.int8 import numbers as decode
from storage.order import Order
from storage.torch import RowDataset, collate
from tests.stores import FEATURES, LATENTS, make_store

GROUPS = [LATENTS, FEATURES]


@pytest.mark.parametrize(
    ("workers", "method"), [(0, None), (2, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)]
)
def test_a_dataloader_gives_every_sample_once_and_right(tmp_path: Path, workers: int, method: str | None) -> None:
    data = make_store(tmp_path / "s", n_views=2, failed_rows=[3, 17])
    dataset = RowDataset(tmp_path / "s", GROUPS, view=1)
    loader = DataLoader(
        dataset, batch_size=7, shuffle=True, num_workers=workers, multiprocessing_context=method, collate_fn=collate
    )
    rows = []
    for batch in loader:
        for path in GROUPS:
            for name, written in data[path].items():
                np.testing.assert_array_equal(batch[f"{path}/{name}"].numpy(), written[batch["row"].numpy(), 1])
        np.testing.assert_array_equal(batch["label"].numpy(), batch["row"].numpy() % 5)
        rows += batch["row"].tolist()
    assert len(rows) == len(dataset) == 38
    assert sorted(rows) == [row for row in range(40) if row not in (3, 17)]


def test_single_samples_negative_positions_and_pickling(shared_tiny_store: Path) -> None:
    dataset = pickle.loads(pickle.dumps(RowDataset(shared_tiny_store, GROUPS, arrays=["moments"])))
    assert dataset[-1]["row"] == 39
    assert set(dataset[0]) == {"row", "label", f"{LATENTS}/moments"}
    assert dataset[0][f"{LATENTS}/moments"].shape == (8, 16, 16)
    stacked = collate([dataset[1], dataset[2]])
    assert stacked["row"].tolist() == [1, 2]
    with pytest.raises(IndexError):
        dataset[40]


def test_int8_features_come_as_numbers_or_as_stored(tmp_path: Path) -> None:
    data = make_store(tmp_path / "s", codec=INT8)[FEATURES]
    numbers = decode(data["patches"][:, 0], data["scale"][:, 0], INT8, dtype=np.float16)
    batch = RowDataset(tmp_path / "s", [FEATURES])[5]
    np.testing.assert_array_equal(batch[f"{FEATURES}/patches"].numpy(), numbers[5])
    assert f"{FEATURES}/scale" not in batch
    stored = RowDataset(tmp_path / "s", [FEATURES], decode=False)[5]
    np.testing.assert_array_equal(stored[f"{FEATURES}/patches"].numpy(), data["patches"][5, 0])
    np.testing.assert_array_equal(stored[f"{FEATURES}/scale"].numpy(), data["scale"][5, 0])


def test_the_iterator_follows_the_order_and_resumes(tmp_path: Path) -> None:
    data = make_store(tmp_path / "s", n_views=2)
    whole = list(iterate_batches(tmp_path / "s", GROUPS, batch=6, seed=4, stop=15))
    order = Order(40, 4)
    for number, batch in enumerate(whole):
        np.testing.assert_array_equal(batch["row"], order.global_batch(number, 6))
    views = set()
    for batch in whole:
        for got, row in zip(batch[f"{LATENTS}/moments"], batch["row"], strict=True):
            same = [view for view in range(2) if np.array_equal(got, data[LATENTS]["moments"][row, view])]
            assert same
            views |= set(same)
    assert views == {0, 1}
    for resumed, batch in zip(
        iterate_batches(tmp_path / "s", GROUPS, batch=6, seed=4, start=9, stop=15), whole[9:], strict=True
    ):
        assert resumed.keys() == batch.keys()
        for name in batch:
            np.testing.assert_array_equal(resumed[name], batch[name])
    parts = [
        list(iterate_batches(tmp_path / "s", GROUPS, batch=6, seed=4, stop=15, rank=rank, world_size=3))
        for rank in range(3)
    ]
    for number, batch in enumerate(whole):
        for name in batch:
            together = np.concatenate([part[number][name] for part in parts])
            np.testing.assert_array_equal(together, batch[name])


def test_a_visit_takes_the_view_that_it_always_took(tmp_path: Path) -> None:
    """Recorded, and as the trainer takes it (`tests/trainer/test_loader.py`)."""
    moments = make_store(tmp_path / "s", n_views=2)[LATENTS]["moments"]
    for start, recorded in ((0, ["010100101011", "001000111110"]), (1000, ["000000111001", "100000001100"])):
        batches = iterate_batches(tmp_path / "s", [LATENTS], batch=12, seed=3, start=start, stop=start + 2)
        for batch, views in zip(batches, recorded, strict=True):
            pairs = zip(batch[f"{LATENTS}/moments"], batch["row"], strict=True)
            assert "".join(str(int(np.array_equal(got, moments[row, 1]))) for got, row in pairs) == views


def test_leaving_the_loop_ends_the_thread(shared_tiny_store: Path) -> None:
    before = threading.active_count()
    batches = iterate_batches(shared_tiny_store, [LATENTS], batch=4, seed=0)
    assert len(list(islice(batches, 30))) == 30  # three epochs and no end
    assert threading.active_count() > before
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_what_reading_raises_is_raised_in_the_loop(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    batches = iterate_batches(tmp_path / "s", [LATENTS], batch=40, seed=0)
    shard = tmp_path / "s" / LATENTS / "moments/c/1/0/0/0/0"
    raw = bytearray(shard.read_bytes())
    raw[9] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(UserError, match=r"row 16, view 0: wrong checksum"):
        list(islice(batches, 2))


def test_mistakes_are_named_before_the_first_batch(shared_tiny_store: Path) -> None:
    with pytest.raises(UserError, match="name the groups to read"):
        RowDataset(shared_tiny_store, [])
    with pytest.raises(UserError, match=r"has 1 views, so view is 0 to 0 or random"):
        RowDataset(shared_tiny_store, [LATENTS], view=1)
    with pytest.raises(UserError, match="not patches"):
        RowDataset(shared_tiny_store, [LATENTS], arrays=["patches"])
    with pytest.raises(UserError, match="has no features/clip"):
        iterate_batches(shared_tiny_store, ["features/clip"], batch=4, seed=0)
    with pytest.raises(UserError, match="not shared out over 3 ranks"):
        iterate_batches(shared_tiny_store, [LATENTS], batch=4, seed=0, world_size=3)
    with pytest.raises(UserError, match="not shared out over 0 ranks"):
        iterate_batches(shared_tiny_store, [LATENTS], batch=4, seed=0, world_size=0)
    for wrong in ({"start": -1}, {"prefetch": 0}):
        with pytest.raises(UserError, match="counted from 0 and at least one is gathered ahead"):
            iterate_batches(shared_tiny_store, [LATENTS], batch=4, seed=0, **wrong)  # type: ignore[arg-type]
    assert open_store(shared_tiny_store).n_rows == 40
