"""The effects of a protocol's settings: a row each, measured once, of what one model drew."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import timm
import torch

from benchmarks import protocol_effects
from benchmarks.repa_effect import Commands
from pipeline.sources.photos import write_photos

STEPS, N, MANY = 2, 20, 24
ROWS = (
    "base: SDE", "random labels", "ODE (Euler)", "half the steps", "truncated", "guidance 1.8 up to 0.7",
    "another seed", "guidance 1.8 everywhere", "bf16, not fp32", "4 images, not 20", "of the reference",
    "the reference is held out", "the reference is cut by torchvision", "saved as JPEG, quality 75",
    "EfficientNet-Lite0, as it was trained", "padded as another library pads", "by bilinear interpolation",
    "20 images", "24 images",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_setting_has_a_row_and_a_second_call_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = Commands(tmp_path / "log", 1, math.inf)
    torch.manual_seed(0)
    weights = tmp_path / "lite0.pth"
    torch.save(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict(), weights)
    for split, n in (("train", 4), ("heldout", 2)):
        write_photos(tmp_path / split, n_per_class=n, split=split)
        command(["pipeline", "precompute", "--data", str(tmp_path / split), "--store", f"{tmp_path}/{split}-store",
                 "--latents", "tiny-vae", "--features", "tiny-vit", "--resolution", "128"])  # fmt: skip
    run = tmp_path / "run"
    command(["trainer", "train", "--preset=sit-tiny-2", f"--store={tmp_path}/train-store", f"--run={run}", "--steps=2",
             "--batch=4", "--model.depth=2", "--model.width=32", "--model.heads=2", "--loss.projection-weight=0",
             "--log.samples-every=0"])  # fmt: skip
    words = [
        str(run), f"--n={N}", f"--steps={STEPS}", f"--data={tmp_path}/train", f"--out={tmp_path}/out",
        f"--other-reference={tmp_path}/heldout-store", f"--second-weights={weights}", f"--many={MANY}", "--device=cpu",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["protocol_effects", *words])
    protocol_effects.main()
    tables = capsys.readouterr().out
    for row in ROWS:
        assert row in tables
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json") if "numbers" in str(path)}
    assert files
    protocol_effects.main()
    assert capsys.readouterr().out == tables
    assert files == {path: path.stat().st_mtime_ns for path in files}
