"""RAE's and RiT's checkpoints as runs: what they compute is what the public implementations computed with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from storage.base.errors import UserError
from storage.base.options import spelled
from tests.stores import count_places, make_groups
from tests.trainer.reference import load_reference, reference_state
from tests.trainer.test_method_releases import newest, save
from trainer.__main__ import main
from trainer.config.saved import read_config
from trainer.models.lightningdit import rotary_angles
from trainer.models.reg import join
from trainer.run.opened import load_model, open_run
from trainer.run.published import Release, check_release

CPU = torch.device("cpu")
FEATURES = "features/f"
VECTORS: dict[Release, str] = {"rae": "ditdh", "rit": "rit"}
SIZES: dict[Release, dict[str, Any]] = {
    "rae": {"preset": "ditdh-xl-1", "model.depth": 3, "model.head_width": 64, "model.head_heads": 4},
    "rit": {"preset": "rit-xl-1", "model.depth": 4, "model.context": 5, "model.context_block": 3},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stores") / "store"
    make_groups(root, 64, {FEATURES: {"n": 24, "side": 4}}, n_rows=12)
    count_places(root, FEATURES)
    return root


def public_state(release: Release) -> dict[str, Tensor]:
    """With tables of rotary positions, of patches alone and behind other tokens."""
    state = reference_state(VECTORS[release])
    for name, width, n_before in (("feat_rope", 12, 0), ("feat_rope_incontext", 12, 6)):
        angles = F.pad(rotary_angles(width, 4), (0, 0, n_before, 0))
        if release == "rit" or not n_before:
            state |= {f"{name}.freqs_cos": angles.cos(), f"{name}.freqs_sin": angles.sin()}
    return state


def argv(file: Path, release: Release, store: Path, run: Path, **changes: Any) -> list[str]:
    options = {
        "store": store, "run": run, "data.latents": FEATURES, "data.resolution": 0, "model.width": 48, "model.heads": 4,
        "model.align_block": 2, "data.latent_deviation": "accept", "device": "cpu", **SIZES[release], **changes,
    }  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={spelled(value)}" for name, value in options.items()]
    return ["import", str(file), f"--release={release}", *flags]


@pytest.mark.parametrize("release", ["rae", "rit"])
def test_an_imported_run_computes_what_the_public_code_computed(
    release: Release, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = load_reference(VECTORS[release])
    file = save(tmp_path / "c.pt", public_state(release))
    assert main(argv(file, release, store, tmp_path / "run")) == 0
    said = capsys.readouterr().out
    assert "it was trained on latents standardised" in said
    run = open_run(tmp_path / "run")
    run.data.close()
    assert run.config.model.classes == 10
    x = join(reference["x"], reference["cls"]) if release == "rit" else reference["x"]
    with torch.no_grad():
        output, _ = load_model(run, newest(run.path), "ema", CPU)(x, reference["t"], reference["y"])
    want = join(reference["x_pred"], reference["cls_pred"]) if release == "rit" else reference["v"]
    torch.testing.assert_close(output, want, atol=1e-5, rtol=1e-5)


def test_statistics_beside_the_weights_are_the_run_s(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics = {"mean": torch.randn(24, 4, 4), "var": torch.rand(24, 4, 4) + 0.5}
    statistics |= {"mean_cls_token": torch.randn(24), "var_cls_token": torch.rand(24) + 0.5}
    torch.save(statistics, tmp_path / "stat.pt")
    file = save(tmp_path / "c.pt", public_state("rit"))
    assert main(argv(file, "rit", store, tmp_path / "run")) == 0
    assert f"its latents are normalised by channel and place with {tmp_path / 'stat.pt'}" in capsys.readouterr().out
    run = open_run(tmp_path / "run")
    run.data.close()
    assert isinstance(run.scale.shift, Tensor)
    torch.testing.assert_close(run.scale.shift[0], statistics["mean"])
    config = read_config(tmp_path / "run" / "config.yaml").config
    assert config.data.latent_statistics == tmp_path / "stat.pt"


def test_rae_s_plain_dit_is_named() -> None:
    """Its file has RAE's time embedding and no head; another --release would not fit it either."""
    state = {name: value for name, value in public_state("rae").items() if not name.startswith("s_")}
    says = r"has t_embedder.W and no s_embedder.proj.weight, so it is RAE's plain DiT"
    releases: tuple[Release, ...] = ("rae", "lightningdit")
    for release in releases:
        with pytest.raises(UserError, match=says):
            check_release(release, state, Path("c.pt"))
