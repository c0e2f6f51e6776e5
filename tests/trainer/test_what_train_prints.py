"""What `train` prints: how the run differs from its preset, and its outcome in a few lines or as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.encoders.tiny import TINY_VAE
from storage.base.least_time import least_time
from tests.commands import run_here
from tests.trainer.runs import command, micro
from trainer.__main__ import main
from trainer.commands import PROG
from trainer.config.command_line import train_config
from trainer.ranks.arithmetic import product_flops
from trainer.run.summary import MOST_SHOWN, settings_line


def test_a_run_ends_in_a_few_lines_and_has_the_rest_in_files(
    shared_tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    line = command(shared_tiny_store, run, steps=2)[3:]
    status, out, err = run_here(main, PROG, line, capsys)
    assert status == 0, err
    lines = out.strip().splitlines()
    assert len(lines) < 20
    assert lines[0].startswith("settings   sit-tiny-2, but --steps 2, --batch 8,")
    assert lines[0].endswith(f"(all in {run / 'config.yaml'})")
    summary = json.loads((run / "summary.json").read_text())
    first = next(i for i, line in enumerate(lines) if line.startswith("steps "))
    table = dict(line.split("  ", 1) for line in lines[first:-1])
    assert table["steps"].strip().startswith("2; 2 now, ")
    assert f"→ {summary['last']['denoising_loss']:.4f}" in table["denoising loss"]
    assert table["checkpoint"].strip() == summary["checkpoint"]
    assert lines[-1].startswith(f"next: {PROG} generate {run} ")

    status, out, err = run_here(main, PROG, [*line, "--json"], capsys)
    assert status == 0, err
    assert json.loads(out[out.index("{") : out.rindex("}") + 1])["steps_now"] == 0
    _, out, _ = run_here(main, PROG, line, capsys)
    assert "2; complete before, nothing trained" in out


def test_settings_are_named_as_options_where_they_differ_from_the_preset(tmp_path: Path) -> None:
    config = train_config({"preset": "sit-b-2", "run": str(tmp_path / "r"), "store": "/s", "optim.lr": "2e-4"})
    assert settings_line(config) == f"sit-b-2, but --optim.lr 0.0002 (all in {tmp_path / 'r'}/config.yaml)"
    same = train_config({"preset": "sit-b-2", "run": str(tmp_path / "r"), "store": "/s"})
    assert settings_line(same) == f"sit-b-2 (all in {tmp_path / 'r'}/config.yaml)"
    many = settings_line(micro(tmp_path / "s", tmp_path / "r", seed=4, **{"data.threads": 3, "data.prefetch": 5}))
    assert many.count("--") == MOST_SHOWN
    assert ", and " in many


def test_the_least_time_is_said_where_it_is_more_than_a_minute() -> None:
    assert least_time(59, 1e12, "a step") == ""
    assert least_time(1800, 1e12, "a step").startswith("at least 30 minutes, if a step ran at the 1,000 GFLOP/s")
    assert least_time(7200, 1e13, "a step").startswith("at least 2.0 hours, if a step ran at the 10 TFLOP/s")
    assert least_time(1.728e7, 1e11, "encoders").startswith("at least 4,800 hours, if encoders ran at the 100 GFLOP/s")


def test_a_long_run_says_so_before_it_starts(
    shared_tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.loop.opening.product_flops", lambda *_: 1e6)
    line = command(shared_tiny_store, tmp_path / "run", steps=1)[3:]
    status, out, err = run_here(main, PROG, line, capsys)
    assert status == 0, err
    assert "\ntime       at least " in out
    assert "align" in err, "the bar has the losses from the first step"


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_products_are_timed_without_a_random_number(precision: str) -> None:
    before = torch.get_rng_state()
    assert 1e8 < product_flops(torch.device("cpu"), precision) < 1e14
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_too_short_for_its_average_says_so_before_it_begins(
    shared_tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And so do images of it."""
    run = tmp_path / "run"
    line = command(shared_tiny_store, run, steps=100, ema_decay=0.999)[3:]
    status, out, err = run_here(main, PROG, line, capsys)
    assert status == 0, err
    assert (
        "averages   90% of them are still the weights that the run began with after 100 steps at --ema-decay 0.999"
        in out
    )
    assert "0.95 holds 0.6%" in out
    status, _, err = run_here(main, PROG, ["generate", str(run), "--n", "1", "--vae", str(TINY_VAE)], capsys)
    assert "averaged weights: 90% of them are still the weights that the run began with after 100 steps" in err
