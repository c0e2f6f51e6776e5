"""Several ranks (gloo) against one: the same batches and losses, DDP and FSDP alike; checkpoints that any number reads.

Float tolerance: ranks and micro-batches add the same numbers in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from storage import StoreLayout
from storage.base.errors import UserError
from storage.order import Order
from tests.stores import FEATURES, make_layouts, make_store, random_arrays
from tests.trainer.runs import assert_same_run, curve, micro, train_on_ranks, weights
from trainer.loop.train import train
from trainer.ranks.world import World, world_of_ranks
from trainer.run.checkpoint import latest_checkpoint, read_state
from trainer.run.lock import only_writer
from trainer.run.metrics import read_metrics

BAD_ROW = 17
BATCH = 12  # which 1, 2 and 3 ranks share
N_ROWS = 40


@pytest.fixture(scope="module")
def poisoned_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one sample whose features are not finite."""
    root = tmp_path_factory.mktemp("poisoned") / "store"
    layout = StoreLayout(n_rows=N_ROWS, views=("original",), resolution=128, shard_rows=16)
    patches = random_arrays(make_layouts(layout)[FEATURES], seed=1)["patches"]
    patches[BAD_ROW] = np.inf
    make_store(root, n_rows=N_ROWS, features={"patches": patches})
    return root


@pytest.fixture(scope="module")
def runs(
    shared_tiny_store: Path,
    poisoned_store: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Any:
    """Every run of this file by name, and what the two ranks said; one rank's are trained here.

    Three ranks, which take longest to start, only where the test that needs them is among those that run.
    """
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")

    def plan(name: str, store: Path = shared_tiny_store, **changes: Any) -> dict[str, Any]:
        return {"store": store, "run": root / name, "batch": BATCH, **changes}

    samples = {"log.samples_every": 3, "log.samples": 3, "sample.steps": 2}
    on_two = [
        plan("ddp", **samples),
        plan("fsdp", parallel="fsdp", **samples),
        plan("accumulated", accumulate=3),
        plan("fsdp-accumulated", parallel="fsdp", accumulate=2),
        plan("resumed-fsdp", parallel="fsdp", steps=3),
        plan("resumed-fsdp", parallel="fsdp"),
        plan("to-1", parallel="fsdp", steps=3),
        plan("to-3", steps=3),
        plan("ddp-bf16", precision="bf16"),
        plan("fsdp-bf16", precision="bf16", parallel="fsdp"),
        plan("fsdp-fp16", precision="fp16", parallel="fsdp", steps=3),
        plan("poisoned", poisoned_store, steps=8, max_skipped=3),
        plan("poisoned-fsdp", poisoned_store, steps=8, max_skipped=3, parallel="fsdp"),
        plan("given-up", poisoned_store, steps=8, max_skipped=0),
        plan("odd", batch=7),
        plan("locked"),
    ]
    with only_writer(root / "locked", World(rank=0, size=1, device=torch.device("cpu"))):
        said = train_on_ranks(2, on_two)
    if any(item.name.endswith("[to-3]") for item in request.session.items):
        assert train_on_ranks(3, [plan("to-3")]) == [[""]] * 3
    for changes in (plan("one", **samples), plan("to-1"), plan("one-poisoned", poisoned_store, steps=8, max_skipped=3)):
        train(micro(**changes))
    names = [run["run"].name for run in on_two]
    return root, {name: [rank[i] for rank in said] for i, name in enumerate(names)}


def test_ranks_that_were_joined_for_gpus_refuse_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray Train joins them on a cluster that has any."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    with pytest.raises(UserError, match="joined for GPUs, which --device cpu leaves idle"), world_of_ranks("cpu"):
        pass


@pytest.mark.parametrize(
    "name",
    [
        *("ddp", "fsdp", "accumulated", "fsdp-accumulated", "resumed-fsdp", "to-1"),
        pytest.param("to-3", marks=pytest.mark.slow),
    ],
)
def test_ranks_and_micro_batches_train_as_one(runs: Any, name: str) -> None:
    root, said = runs
    assert said[name] == ["", ""]
    assert len(curve(root / name)) == 6
    for one, other in zip(curve(root / "one"), curve(root / name), strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    for kind in ("model", "ema"):
        mine, theirs = weights(root / "one", kind), weights(root / name, kind)
        assert list(mine) == list(theirs)
        assert all(torch.allclose(mine[key], theirs[key], atol=2e-4) for key in mine)


def test_a_sharded_run_resumes_bit_for_bit(runs: Any) -> None:
    root, _ = runs
    assert_same_run(root / "fsdp", root / "resumed-fsdp")


def test_half_precision_is_the_same_sharded_or_not(runs: Any) -> None:
    """bf16 weights are rounded alike by autocast and by FSDP; a residual stream in bf16 would be off by a percent."""
    root, _ = runs
    exact, ddp, fsdp = (np.array(curve(root / name))[:, 1:] for name in ("one", "ddp-bf16", "fsdp-bf16"))
    np.testing.assert_allclose(fsdp, ddp, rtol=1e-3, atol=1e-5)
    assert not np.array_equal(exact, ddp)
    np.testing.assert_allclose(ddp, exact, rtol=0.05, atol=1e-3)


def test_fp16_shards_agree_on_the_loss_scale(runs: Any) -> None:
    root, said = runs
    assert said["fsdp-fp16"] == ["", ""]
    state = read_state(latest_checkpoint(root / "fsdp-fp16"))
    assert state.scaler["scale"] in {2.0**power for power in range(10, 17)}
    assert state.skipped == 0


def bad_steps(n_steps: int) -> list[int]:
    order = Order(N_ROWS, 0)
    return [step for step in range(n_steps) if BAD_ROW in order.global_batch(step, BATCH)]


@pytest.mark.parametrize("name", ["poisoned", "poisoned-fsdp"])
def test_ranks_leave_out_the_same_steps(runs: Any, name: str) -> None:
    root, said = runs
    assert said[name] == ["", ""]
    left_out = bad_steps(8)
    assert 0 < len(left_out) <= 3
    lines = {line["step"] - 1: line for line in read_metrics(root / name)}
    assert [step for step, line in lines.items() if line["loss"] is None] == left_out
    assert lines[7]["skipped_steps"] == len(left_out)
    mine, theirs = weights(root / "one-poisoned"), weights(root / name)
    assert all(torch.allclose(mine[key], theirs[key], atol=2e-4) for key in mine)


def test_the_budget_ends_every_rank_with_the_row_that_is_to_blame(runs: Any) -> None:
    root, said = runs
    first, second = said["given-up"]
    assert first == second
    assert first.startswith(f"step {bad_steps(8)[0]}: ")
    assert f"rows [{BAD_ROW}]; nothing was updated. Such steps: 1, --max-skipped 0" in first
    assert not (root / "given-up" / "latest").exists()


def test_a_batch_that_ranks_cannot_share_is_refused(runs: Any) -> None:
    _, said = runs
    assert said["odd"] == ["--batch 7 must be a multiple of the 2 ranks times --accumulate 1"] * 2


def test_every_rank_ends_where_another_process_trains(runs: Any) -> None:
    root, said = runs
    main, other = said["locked"]
    assert main == f"another process is training in {root / 'locked'}; name another folder, or wait for it"
    assert other == f"the main rank could not begin in {root / 'locked'}, and says why"


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_samples_do_not_depend_on_the_ranks(runs: Any, name: str) -> None:
    from PIL import Image

    root, _ = runs
    for step in (3, 6):
        one, other = (
            np.asarray(Image.open(root / run / "samples" / f"step-000000{step}.png"), dtype=int)
            for run in ("one", name)
        )
        assert one.shape == other.shape
        assert np.abs(one - other).mean() < 2


@pytest.mark.slow
def test_compiled_ranks_train_as_one(shared_tiny_store: Path, tmp_path: Path) -> None:
    """A compiler for the CPU is needed."""

    def plan(name: str, **changes: Any) -> dict[str, Any]:
        return {"store": shared_tiny_store, "run": tmp_path / name, "batch": BATCH, **changes}

    compiled = [plan("ddp", compile=True), plan("fsdp", compile=True, parallel="fsdp", accumulate=2)]
    assert train_on_ranks(2, compiled) == [["", ""], ["", ""]]
    train(micro(**plan("one")))
    for name in ("ddp", "fsdp"):
        for one, other in zip(curve(tmp_path / "one"), curve(tmp_path / name), strict=True):
            assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
