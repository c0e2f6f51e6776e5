"""The loop: exact resume (stopped, SIGTERM, SIGKILL), refusals. Real processes wherever a process is the point.

A micro model on random numbers; what is checked is equality of runs, not that anything is learnt, but for one test.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from storage import ArrayLayout, GroupLayout, Staging, open_store
from storage.base.errors import UserError
from storage.base.options import option
from tests.commands import run_here
from tests.stores import FEATURES, make_identities, make_store, publish_all, random_arrays
from tests.trainer.runs import assert_same_run, command, curve, is_at, micro, start, wait_for_step, wait_until, weights
from trainer.__main__ import PROG, main
from trainer.alignment import ALIGNMENTS
from trainer.alignment.cosine import alignment_loss
from trainer.alignment.kind import Alignment
from trainer.config.saved import read_config
from trainer.config.tree import override
from trainer.data.loader import Batch
from trainer.loop.losses import LatentScale, sample_latents
from trainer.loop.non_finite import NonFiniteError
from trainer.loop.step import TrainingState, train_step
from trainer.loop.train import train
from trainer.run.checkpoint import latest_checkpoint, read_state
from trainer.run.metrics import read_metrics


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """As the subprocesses run, so that sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss.projection_weight": (0.0,)}, {"log.every": 4}, {"model.kind": "dit", "sample.sampler": "ddpm"}],
    ids=str,
)
def test_stopping_and_resuming_is_never_having_stopped(
    shared_tiny_store: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    train(micro(shared_tiny_store, tmp_path / "whole", steps=8, **changes))
    stopped = micro(shared_tiny_store, tmp_path / "resumed", steps=8, **{**changes, "checkpoint.every": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.loop.train.train_step", raise_at(5))
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(stopped)
    summary = train(stopped)
    assert summary["steps_now"] == 5  # from the checkpoint of step 3
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def raise_at(step: int) -> Any:
    def wrapped(parts: TrainingState, batch: Batch, *, stop: bool) -> Any:
        if batch.step == step:
            raise RuntimeError("pulled the plug")
        return train_step(parts, batch, stop=stop)

    return wrapped


def test_latents_are_drawn_from_the_posterior_afresh_at_each_visit() -> None:
    """z = (mean + std · ε − shift) · scale, with ε of the row and the step, wherever in the batch the row stands."""

    def drawn(step: int, rows: list[int], std: float = 2.0) -> torch.Tensor:
        moments = torch.full((len(rows), 8, 16, 16), 3.0, dtype=torch.float16)
        moments[:, 4:] = std
        index = torch.tensor(rows)
        batch = Batch(step=step, rows=index, labels=index, moments=moments, targets=(), stall_s=0.0)
        return sample_latents(batch, LatentScale(scale=0.5, shift=1.0), seed=0)

    assert torch.equal(drawn(0, [7], std=0.0), torch.full((1, 4, 16, 16), 1.0))
    z = drawn(0, list(range(64)))
    assert z.mean().item() == pytest.approx(1.0, abs=0.02)  # 65,536 draws: four standard errors
    assert z.std().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(drawn(0, [9, 7])[1], z[7])
    assert not torch.equal(drawn(1, [7])[0], z[7])


def test_steps_may_be_raised(shared_tiny_store: Path, tmp_path: Path) -> None:
    train(micro(shared_tiny_store, tmp_path / "whole", steps=6))
    train(micro(shared_tiny_store, tmp_path / "longer", steps=2))
    train(micro(shared_tiny_store, tmp_path / "longer", steps=6, **{"checkpoint.every": 2, "checkpoint.keep": 1}))
    assert_same_run(tmp_path / "whole", tmp_path / "longer")
    again = train(micro(shared_tiny_store, tmp_path / "longer", steps=6))
    assert (again["steps"], again["steps_now"]) == (6, 0)
    with pytest.raises(UserError, match="is at step 6, beyond --steps 3"):
        train(micro(shared_tiny_store, tmp_path / "longer", steps=3))


@contextmanager
def signalled(run: Path, step: int, number: signal.Signals) -> Iterator[None]:
    """This process gets a signal once the run, which is trained here meanwhile, is at a step."""

    def send() -> None:
        wait_until(lambda: is_at(run, step))
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


def test_sigterm_saves_and_sigkill_loses_only_what_followed_the_checkpoint(
    shared_tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command, ended by SIGTERM, by SIGKILL, then left alone: as if nothing had happened."""
    options = {"steps": 120, "checkpoint.every": 15}
    train(micro(shared_tiny_store, tmp_path / "whole", **options))
    run = tmp_path / "hit"
    argv = command(shared_tiny_store, run, **options)

    with signalled(run, 5, signal.SIGTERM):
        status, out, err = run_here(main, PROG, argv[3:], capsys)
    assert status == 0, err
    reached = curve(run)[-1][0]
    assert f"stopped by SIGTERM; step {reached} is saved in {run}" in out
    assert (run / "latest").read_text() == f"step-{reached:07d}"

    process = start(argv)
    wait_for_step(process, run, reached + 20)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL

    status, _, err = run_here(main, PROG, argv[3:], capsys)
    assert status == 0, err
    assert_same_run(tmp_path / "whole", run)


def test_ctrl_c_saves_and_ends_with_130(
    shared_tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with signalled(run, 3, signal.SIGINT):
        status, _, err = run_here(main, PROG, command(shared_tiny_store, run, steps=100_000)[3:], capsys)
    assert status == 130, err
    assert (run / "latest").read_text() == f"step-{curve(run)[-1][0]:07d}"


def test_it_learns(shared_tiny_store: Path, tmp_path: Path) -> None:
    """Random numbers can be learnt by heart to a degree: alignment improves, and the loss is finite all along."""
    summary = train(micro(shared_tiny_store, tmp_path / "run", steps=80, **{"optim.lr": 1e-2}))
    lines = curve(tmp_path / "run")
    assert all(math.isfinite(value) for line in lines for value in line)
    assert lines[-1][2] < lines[0][2] - 0.01
    assert summary["last"]["denoising_loss"] < summary["first"]["denoising_loss"]


def test_seed_changes_the_run(shared_tiny_store: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        train(micro(shared_tiny_store, tmp_path / str(seed), steps=1, seed=seed))
    assert curve(tmp_path / "0") != curve(tmp_path / "1")


def test_a_resume_with_other_settings_is_refused_unless_asked_for(shared_tiny_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(micro(shared_tiny_store, run, steps=2))
    changed = micro(shared_tiny_store, run, steps=3, **{"optim.lr": 5e-4})
    with pytest.raises(UserError, match=r"optim.lr: was 0.002, is 0.0005.*--resume-with-changes"):
        train(changed)
    assert len(curve(run)) == 2  # refused before anything was touched
    assert train(changed, accept_changes=True)["steps"] == 3


def test_a_resume_on_another_store_is_refused(shared_tiny_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(micro(shared_tiny_store, run, steps=2))
    make_store(tmp_path / "other", width=20)
    with pytest.raises(UserError, match=r"store features/tiny-vit: was \w+, is \w+"):
        train(micro(tmp_path / "other", run, steps=3))


def test_a_second_encoder_in_the_store_does_not_stop_a_run(tmp_path: Path) -> None:
    """A run that chose the only features keeps to them when an ablation adds others to the same store."""
    store, run = tmp_path / "store", tmp_path / "run"
    make_store(store)
    train(micro(store, run, steps=2))
    layout = open_store(store).layout
    patches = ArrayLayout(name="patches", dtype="float16", row_shape=(64, 24), store=layout)
    group = GroupLayout(path="features/other", arrays=(patches,))
    keys = open_store(store).index.keys
    with Staging(store) as staging:
        identity = replace(make_identities()[FEATURES], name="other")
        publish_all(store, group, identity, random_arrays(group), keys, (), staging)
    assert train(micro(store, run, steps=3))["steps"] == 3


def test_a_non_finite_loss_names_step_and_rows_and_keeps_the_checkpoint(
    shared_tiny_store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(micro(shared_tiny_store, run, steps=2))
    good = weights(run)
    bad = micro(shared_tiny_store, run, steps=50, **{"optim.lr": 1e30})
    with pytest.raises(NonFiniteError, match=r"step \d+: .* rows \[\d+(, \d+){7}\]"):
        train(bad, accept_changes=True)
    assert all(torch.equal(good[name], tensor) for name, tensor in weights(run).items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"store": "/nowhere/at/all"}, "/nowhere/at/all does not exist"),
        (
            {"data.features": ("dinov2-vitb14",)},
            "no features/dinov2-vitb14; it has latents/tiny-vae, features/tiny-vit",
        ),
        ({"model.patch": 4}, "--model.patch 2"),
        ({"device": "tpu"}, "--device must be one of auto, cpu, cuda"),
        ({"data.resolution": 256}, "was made at 128 px, --data.resolution asks for 256"),
        ({"batch": 9, "accumulate": 2}, "--batch 9 must be a multiple of the 1 ranks times --accumulate 2"),
    ],
    ids=["store", "features", "grid", "device", "resolution", "accumulate"],
)
def test_a_users_mistake_is_named(
    shared_tiny_store: Path, tmp_path: Path, options: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=says) as caught:
        main(command(**{"store": shared_tiny_store, "run": run, **options})[3:])
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
    assert not run.exists()


def test_a_users_mistake_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_here(main, PROG, command(tmp_path / "none", tmp_path / "run")[3:], capsys)
    assert status == 2, err
    assert err.startswith(f"python -m trainer train: error: {tmp_path / 'none'} does not exist")
    assert err.count("\n") == 1, err
    assert out == ""


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(
    shared_tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system refuses to write beyond a size, as it does when there is no room."""
    run = tmp_path / "run"
    train(micro(shared_tiny_store, run, steps=2))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        status, _, err = run_here(main, PROG, command(shared_tiny_store, run, steps=4)[3:], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2, err
    last = err.splitlines()[-1]
    assert "error: step 4 could not be saved" in last
    assert "goes on from the checkpoint before" in last
    assert not list((run / "checkpoints").glob(".*"))
    assert train(micro(shared_tiny_store, run, steps=4))["steps_now"] == 2


def test_a_saved_configuration_runs_again(shared_tiny_store: Path, tmp_path: Path) -> None:
    """`--config RUN/config.yaml`: the same run elsewhere, bit for bit."""
    train(micro(shared_tiny_store, tmp_path / "a", steps=3))
    config = read_config(tmp_path / "a" / "config.yaml").config
    train(override(config, {"run": tmp_path / "b"}))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_line_says_what_the_issue_asks_for(shared_tiny_store: Path, tmp_path: Path) -> None:
    train(micro(shared_tiny_store, tmp_path / "run", steps=8, **{"log.every": 4}))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [4, 8]
    for line in lines:
        assert line["alignment_cosine"] == -line["alignment_loss"]
        assert line["loss"] == pytest.approx(line["denoising_loss"] + 0.5 * line["alignment_loss"])
        assert len(line["loss_by_time"]) == 10
        assert 0 <= line["stall_share"] <= 1
        assert line["images_per_s"] > 0
        assert line["skipped_steps"] == 0


def test_samples_without_a_decoder_are_the_latents_as_colours(shared_tiny_store: Path, tmp_path: Path) -> None:
    from PIL import Image

    changes = {"log.samples_every": 2, "log.samples": 4, "sample.steps": 2}
    train(micro(shared_tiny_store, tmp_path / "run", steps=5, **changes))
    pictures = sorted((tmp_path / "run" / "samples").iterdir())
    assert [path.name for path in pictures] == ["step-0000002.png", "step-0000004.png"]
    assert Image.open(pictures[0]).size == (2 * 64 + 2, 2 * 64 + 2)
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_micro_batches_must_fit_the_batch(shared_tiny_store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--batch 8 must be a multiple of the 1 ranks times --accumulate 3"):
        train(micro(shared_tiny_store, tmp_path / "run", accumulate=3))


def test_a_cosine_is_logged_whatever_the_loss_is(
    shared_tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {"model.align_block": (1, 2), "loss.projection_weight": (0.5, 0.0625), "steps": 2}
    plain = micro(shared_tiny_store, tmp_path / "a", **two)
    train(plain)

    monkeypatch.setitem(ALIGNMENTS, "other", f"{__name__}:Other")
    halved = {**two, "loss.projection_weight": (0.25, 0.03125)}
    train(micro(shared_tiny_store, tmp_path / "b", **halved, **{"loss.alignment": ("other",)}))
    for line, same in zip(read_metrics(tmp_path / "b"), read_metrics(tmp_path / "a"), strict=True):
        cosines = [value for name, value in line.items() if name.startswith("alignment_cosine/")]
        losses = [value for name, value in line.items() if name.startswith("alignment_loss/")]
        assert [3 - 2 * cosine for cosine in cosines] == pytest.approx(losses, rel=1e-6)
        assert cosines == pytest.approx([v for k, v in same.items() if k.startswith("alignment_cosine/")], rel=1e-5)
        assert line["alignment_cosine"] == pytest.approx(sum(cosines) / 2)
        assert len(cosines) == 2
    assert len(latest_sums(tmp_path / "b")) == len(latest_sums(tmp_path / "a")) + 2


@dataclass(frozen=True, kw_only=True)
class Other(Alignment):
    """Its gradient has the direction of the cosine's, not the size."""

    factor: float = option(2.0, "of the cosine's loss")

    def loss(self, projection: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 3 + self.factor * alignment_loss(projection, target)


def latest_sums(run: Path) -> list[float]:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return read_state(checkpoint).log_sums
