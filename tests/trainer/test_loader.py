"""Batches: the right rows and views, together; the same on any number of ranks and from any step."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage import gather_into
from storage.base.errors import StoreError, UserError
from storage.order import Order
from tests.stores import FEATURES, LATENTS, make_store
from trainer.config.presets import preset
from trainer.config.tree import override
from trainer.data.groups import TrainingData, geometry_of, open_data, pick_group
from trainer.data.loader import Loader

CPU = torch.device("cpu")


def opened(store: Path, **changes: object) -> TrainingData:
    return open_data(override(preset("sit-tiny-2"), {"store": store, **changes}))


def loader(data: TrainingData, *, start: int = 0, stop: int = 6, rank: int = 0, size: int = 1) -> Loader:
    return Loader(
        data, seed=3, batch=12, start=start, stop=stop, rank=rank, world_size=size, device=CPU, prefetch=2
    )  # fmt: skip


def rows_by_step(data: TrainingData, **options: int) -> dict[int, list[int]]:
    with loader(data, **options) as batches:
        return {batch.step: batch.rows.tolist() for batch in batches}


@pytest.mark.parametrize("n_views", [1, 2])
def test_moments_and_patches_are_of_the_same_row_and_view(tmp_path: Path, n_views: int) -> None:
    arrays = make_store(tmp_path / "s", n_views=n_views)
    moments, patches = arrays[LATENTS]["moments"], arrays[FEATURES]["patches"]
    data = opened(tmp_path / "s")
    seen = set()
    with loader(data) as batches:
        for batch in batches:
            for i, row in enumerate(batch.rows.tolist()):
                views = [v for v in range(n_views) if np.array_equal(batch.moments[i].numpy(), moments[row, v])]
                assert len(views) == 1
                np.testing.assert_array_equal(batch.targets[0].values[i].numpy(), patches[row, views[0]])
                seen.add(views[0])
            assert batch.labels.tolist() == [row % 5 for row in batch.rows.tolist()]
    assert seen == set(range(n_views))
    data.close()


def test_views_are_drawn_afresh_at_each_visit(tmp_path: Path) -> None:
    arrays = make_store(tmp_path / "s", n_views=2)
    data = opened(tmp_path / "s")
    views: dict[int, set[int]] = {}
    with loader(data, stop=40) as batches:
        for batch in batches:
            for moment, row in zip(batch.moments, batch.rows.tolist(), strict=True):
                is_flipped = np.array_equal(moment.numpy(), arrays[LATENTS]["moments"][row, 1])
                views.setdefault(row, set()).add(int(is_flipped))
    data.close()
    assert sum(len(v) == 2 for v in views.values()) > 35  # 12 visits of each of 40 rows


def test_a_visit_takes_the_view_that_it_always_took(tmp_path: Path) -> None:
    """Recorded: a run that is resumed by a later version goes on with the same numbers."""
    moments = make_store(tmp_path / "s", n_views=2)[LATENTS]["moments"]
    data = opened(tmp_path / "s")
    recorded = {0: "010100101011", 1: "001000111110", 1000: "000000111001", 1001: "100000001100"}
    for start in (0, 1000):
        with loader(data, start=start, stop=start + 2) as batches:
            for batch in batches:
                pairs = zip(batch.moments.numpy(), batch.rows.tolist(), strict=True)
                views = [int(np.array_equal(got, moments[row, 1])) for got, row in pairs]
                assert "".join(map(str, views)) == recorded.pop(batch.step)
    assert not recorded
    data.close()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_cut_the_same_global_batches(shared_tiny_store: Path, size: int) -> None:
    data = opened(shared_tiny_store)
    whole = rows_by_step(data)
    parts = [rows_by_step(data, rank=rank, size=size) for rank in range(size)]
    data.close()
    assert whole == {step: [row for part in parts for row in part[step]] for step in whole}


def test_the_state_is_the_step(shared_tiny_store: Path) -> None:
    data = opened(shared_tiny_store)
    whole = rows_by_step(data)
    resumed = rows_by_step(data, start=4)
    data.close()
    assert list(whole) == list(range(6))
    assert resumed == {step: whole[step] for step in (4, 5)}


def test_failed_rows_are_left_out_and_every_other_row_is_visited(tmp_path: Path) -> None:
    failed = (0, 17, 39)
    make_store(tmp_path / "s", failed_rows=failed)
    data = opened(tmp_path / "s")
    visited = [row for rows in rows_by_step(data, stop=37).values() for row in rows]  # 444 positions: 12 epochs of 37
    data.close()
    assert data.n_samples == 37
    assert sorted(visited) == sorted([row for row in range(40) if row not in failed] * 12)
    with pytest.raises(UserError, match=r"3 samples .* could not be decoded \(first row 0\)"):
        opened(tmp_path / "s", **{"data.failed_rows": "refuse"})


def test_a_store_without_failures_is_visited_in_the_order_itself(shared_tiny_store: Path) -> None:
    data = opened(shared_tiny_store)
    first = rows_by_step(data, stop=1)[0]
    data.close()
    assert first == Order(40, 3).global_batch(0, 12).tolist()


def test_vanilla_opens_no_features(shared_tiny_store: Path) -> None:
    config = override(preset("sit-tiny-2"), {"store": str(shared_tiny_store), "loss.projection_weight": (0.0,)})
    data = open_data(config)
    assert data.features == ()
    with loader(data) as batches:
        assert all(batch.targets == () for batch in batches)
    assert geometry_of(config, data).targets == ()
    data.close()


def test_an_error_in_the_thread_is_raised_here_and_the_thread_ends(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    shard = next(path for path in (tmp_path / "s" / LATENTS / "moments" / "c").rglob("0") if path.is_file())
    with open(shard, "r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    data = opened(tmp_path / "s")
    with pytest.raises(StoreError, match="wrong checksum"), loader(data) as batches:
        list(batches)
    assert "loader" not in [thread.name for thread in threading.enumerate()]
    data.close()


def test_leaving_early_ends_the_thread(shared_tiny_store: Path) -> None:
    data = opened(shared_tiny_store)
    with loader(data, stop=10_000) as batches:
        next(iter(batches))
    assert "loader" not in [thread.name for thread in threading.enumerate()]
    data.close()


def test_a_wait_is_measured_and_told(shared_tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is slow at the third batch: that step's stall is the wait, and whoever asked was told meanwhile."""
    told: list[float] = []
    calls = 0

    def slow(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            time.sleep(0.5)
        gather_into(*arguments)

    monkeypatch.setattr("trainer.data.rows.gather_into", slow)
    monkeypatch.setattr("storage.prefetch.WAIT_S", 0.1)
    data = opened(shared_tiny_store)
    stalls = []
    with Loader(
        data, seed=3, batch=12, start=0, stop=5, rank=0, world_size=1, device=CPU, prefetch=1, on_wait=told.append
    ) as batches:
        for batch in batches:
            stalls.append(batch.stall_s)
            time.sleep(0.02)
    data.close()
    assert 0.3 < stalls[2] < 5
    assert told == sorted(told)
    assert len(told) >= 2


def test_a_store_of_another_resolution_is_refused_with_the_fix(shared_tiny_store: Path) -> None:
    with pytest.raises(UserError, match=r"made at 128 px, --data.resolution asks for 512; .*--data.resolution 0"):
        opened(shared_tiny_store, **{"data.resolution": 512})
    opened(shared_tiny_store, **{"data.resolution": 128}).close()


def test_missing_groups_are_named(shared_tiny_store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no features/dinov2-vitb14; it has latents/tiny-vae, features/tiny-vit"):
        opened(shared_tiny_store, **{"data.features": ("dinov2-vitb14",)})
    with pytest.raises(StoreError, match="does not exist"):
        opened(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no store was named"):
        open_data(preset("sit-tiny-2"))


def test_the_only_group_is_chosen_and_several_are_a_question(shared_tiny_store: Path) -> None:
    class TwoFeatures:
        root = shared_tiny_store

        def groups(self) -> list[str]:
            return ["latents/a", "features/b", "features/c"]

    store: object = TwoFeatures()
    assert pick_group(store, "latents", "") == "latents/a"  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"several features \(b, c\); choose with --data.features NAME"):
        pick_group(store, "features", "")  # type: ignore[arg-type]


def test_a_token_grid_that_is_not_the_models_is_refused_with_the_fix(shared_tiny_store: Path) -> None:
    config = override(preset("sit-tiny-2"), {"store": shared_tiny_store, "model.patch": 4})
    data = open_data(config)
    with pytest.raises(UserError, match=r"8×8 tokens.* 4×4 .*choose --model.patch 2"):
        geometry_of(config, data)
    data.close()
