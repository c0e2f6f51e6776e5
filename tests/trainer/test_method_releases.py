"""Checkpoints of the methods after REPA, in the layout of their public scripts, through the command line.

The weights are those of the vectors (tests/data/), so that what an imported run computes is what the public
implementations computed with them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.encoders.tiny import TINY_VAE
from storage.base.errors import UserError
from storage.base.options import spelled
from tests.inception import write_random_inception
from tests.slow import slow_but
from tests.stores import make_groups
from tests.trainer.reference import GEOMETRIES, load_reference, reference_state
from tests.trainer.test_transformer import imagenet_config
from trainer.__main__ import main
from trainer.config.presets import PRESETS, preset
from trainer.config.saved import read_config
from trainer.config.tree import override
from trainer.evaluation.generate.generate import GenerateConfig, generate
from trainer.evaluation.generate.image_files import n_written
from trainer.evaluation.probing.sweep import SweepConfig, sweep
from trainer.models.lightningdit import rotary_angles
from trainer.models.make import make_model
from trainer.models.reg import join, split
from trainer.run.checkpoint import latest_checkpoint
from trainer.run.metrics import read_metrics
from trainer.run.opened import load_model, open_run
from trainer.run.published import PUBLISHED, Release, fitting_preset, settings_of

CPU = torch.device("cpu")
METHODS: tuple[Release, ...] = ("reg", "irepa", "lightningdit")
START = {"reg": "sit-xl-2-reg", "irepa": "sit-xl-2", "lightningdit": "lightningdit-xl-1"}
SIZE = {"model.depth": 3, "model.width": 48, "model.heads": 4}  # of the vectors' models, which no preset has
QUICK = {"batch": 4, "steps": 2, "log.every": 1, "log.tensorboard": False, "log.samples_every": 0, "sample.steps": 2,
         "device": "cpu"}  # fmt: skip


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[Release, Path]:
    """Of the vectors' geometries: latents of 4×8×8 or 8×4×4, and 16 tokens with class tokens, 40 wide."""
    root = tmp_path_factory.mktemp("stores")
    features = {"features/f": {"n": 40, "side": 4}}
    make_groups(root / "f8", 64, {"latents/z": {"n": 4, "side": 8}, **features}, n_rows=12)
    make_groups(root / "f16", 64, {"latents/z": {"n": 8, "side": 4}, **features}, n_rows=12)
    return {"reg": root / "f8", "irepa": root / "f8", "lightningdit": root / "f16"}


def public_state(method: Release) -> dict[str, Tensor]:
    """The vectors' weights with what the public model's state dict has besides."""
    state = reference_state(method)
    if method == "lightningdit":
        angles = rotary_angles(12, 4)
        state |= {"feat_rope.freqs_cos": angles.cos(), "feat_rope.freqs_sin": angles.sin()}
    return state


def save(path: Path, averaged: dict[str, Tensor], prefix: str = "") -> Path:
    """As the scripts of all three save: both sets of weights, the optimiser, and what they were called with."""
    weights = {f"{prefix}{name}": value + 0.01 * torch.randn_like(value) for name, value in averaged.items()}
    weights |= {name: averaged[name.removeprefix(prefix)] for name in weights if "feat_rope" in name}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4}]}
    whole = {"model": weights, "ema": averaged, "opt": optimizer, "args": argparse.Namespace(lr=1e-4), "steps": 400_000}
    torch.save(whole, path)
    return path


def argv(file: Path, method: Release, store: Path, run: Path, **changes: Any) -> list[str]:
    """The command's line; presets are those of published sizes, so the vectors' sizes are spelled."""
    options = {"preset": START[method], "store": store, "run": run, "data.resolution": 0, **SIZE, **QUICK}
    options |= {"model.align_block": 2, "model.projector_width": 64, **changes}
    flags = [f"--{n.replace('_', '-')}={spelled(value)}" for n, value in options.items() if value is not None]
    return ["import", str(file), f"--release={method}", *flags]


@pytest.fixture(scope="module")
def imported(stores: dict[Release, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Release, Path]:
    """A run of each method; REG's weights have the names that torch.compile and DistributedDataParallel make."""
    root = tmp_path_factory.mktemp("imported")
    for method in METHODS:
        prefix = "module._orig_mod." if method == "reg" else ""
        file = save(root / f"{method}.pt", public_state(method), prefix)
        assert main(argv(file, method, stores[method], root / method)) == 0
    return {method: root / method for method in METHODS}


def newest(run: Path) -> Path:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize("method", METHODS)
def test_an_imported_run_computes_what_the_public_code_computed(method: Release, imported: dict[Release, Path]) -> None:
    reference, run = load_reference(method), open_run(imported[method])
    run.data.close()
    model = load_model(run, newest(run.path), "ema", CPU)
    x = join(reference["x"], reference["cls"]) if method == "reg" else reference["x"]
    with torch.no_grad():
        output, projections = model(x, reference["t"], reference["y"])
        raw, _ = load_model(run, newest(run.path), "raw", CPU)(x, reference["t"], reference["y"])
    image, class_token = split(output, run.geometry)
    torch.testing.assert_close(image, reference["v"], atol=1e-5, rtol=1e-5)
    if method == "reg":
        torch.testing.assert_close(class_token, reference["v_cls"], atol=1e-5, rtol=1e-5)
    for projection in projections:
        torch.testing.assert_close(projection, reference["projection/0"], atol=1e-5, rtol=1e-5)
    assert len(projections) == len(GEOMETRIES[method].targets)
    assert (raw - output).abs().max() > 1e-3  # weights and averaged weights are not confused


def test_settings_come_from_the_file(imported: dict[Release, Path]) -> None:
    """iREPA has no preset of its own: its projector says the kernel, its publication λ."""
    config = read_config(imported["irepa"] / "config.yaml").config
    assert (config.loss.alignment, config.loss.projection_weight) == (
        ("irepa:gamma=0.6:kernel=3:projector_kind=conv",),
        (1.0,),
    )
    config = read_config(imported["reg"] / "config.yaml").config
    assert (config.model.class_token, config.model.classes, config.sample.guidance_class) == (True, 1000, -1)
    config = read_config(imported["lightningdit"] / "config.yaml").config
    assert (config.model.kind, config.model.classes, config.loss.direction_weight) == ("lightningdit", 10, 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_from_it_and_resumes(method: Release, imported: dict[Release, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = read_config(imported[method] / "config.yaml").config
    file = save(tmp_path / "c.pt", public_state(method))
    assert main(argv(file, method, Path(config.store), run)) == 0
    before = load_file(newest(run) / "ema.safetensors")
    for steps in (1, 2):
        assert main(["train", f"--config={run / 'config.yaml'}", f"--steps={steps}"]) == 0
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
    after = load_file(newest(run) / "ema.safetensors")
    assert before.keys() == after.keys()
    apart = [(after[name] - value).abs().max().item() for name, value in before.items()]
    assert 0 < max(apart) < 1e-3  # of two steps at 1e-4 or 2e-4, averaged


@pytest.mark.parametrize("method", METHODS)
def test_images_are_drawn_and_hidden_states_measured(
    method: Release, imported: dict[Release, Path], tmp_path: Path
) -> None:
    vae = str(TINY_VAE)
    if method == "lightningdit":
        from diffusers import AutoencoderKL

        AutoencoderKL(latent_channels=8, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
        vae = str(tmp_path / "vae")
    config = GenerateConfig(
        run=imported[method], out=tmp_path / "images", n=3, batch=3, vae=vae, device="cpu", guidance=1.5
    )
    folder, _ = generate(config)
    assert n_written(folder) == 3
    chosen = SweepConfig(n=12, k=3, device="cpu", batch=8, features="f")
    (point, *_) = sweep(imported[method], chosen, ["cknna", "probe"])["points"]
    assert 0 <= point["probe"] <= 1


@pytest.mark.slow
def test_its_images_are_evaluated(imported: dict[Release, Path], tmp_path: Path) -> None:
    """With random weights of Inception, against random pictures: every figure is there."""
    weights = write_random_inception(tmp_path / "inception.pth")
    np.savez(tmp_path / "reference.npz", np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8))
    options = ["--n=6", "--batch=3", f"--vae={TINY_VAE}", "--device=cpu", f"--out={tmp_path / 'images'}"]
    assert main(["generate", str(imported["reg"]), *options]) == 0
    options = [f"--reference={tmp_path / 'reference.npz'}", f"--weights={weights}", "--device=cpu"]
    assert main(["evaluate", str(tmp_path / "images"), *options, f"--out={tmp_path / 'out'}"]) == 0
    metrics = json.loads((tmp_path / "out" / "inception.json").read_text())["metrics"]
    assert metrics["fid"]["value"] > 0
    assert metrics["fid"]["n_generated"] == 6


# ---- which preset -----------------------------------------------------------------------------------------------


EACH_KIND = (
    "sit-b-2", "sit-xl-2-512-vanilla", "dit-xl-2", "sit-xl-2-reg", "lightningdit-xl-1", "sit-l-1", "dit-s-8",
    "rit-xl-1", "ditdh-s-1",
)  # fmt: skip


@pytest.mark.parametrize("name", slow_but([name for name in PRESETS if "tiny" not in name], EACH_KIND))
def test_the_preset_of_published_sizes_is_read_off_the_shapes(name: str) -> None:
    config = preset(name)
    kind, reg = config.model.kind, config.model.class_token
    of_kind: dict[str, list[Release]] = {"lightningdit": ["lightningdit"], "rit": ["rit"], "ditdh": ["rae"]}
    releases: list[Release] = of_kind.get(kind, ["reg"] if reg else ["dit"])
    if kind == "sit" and not reg:
        releases = ["repa", "sit", "irepa"]
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in make_model(imagenet_config(name)).state_dict().items()}
    for release in releases:
        assert fitting_preset(release, shapes, Path("c.pt")) == name
    without = {name: shape for name, shape in shapes.items() if name != "pos_embed"}
    if f"{name.removesuffix('-vanilla')}-512" not in PRESETS and "-512" not in name:
        assert fitting_preset(releases[0], without, Path("c.pt")) == name
    else:
        with pytest.raises(UserError, match=r"fits several presets; pass --preset .* or "):
            fitting_preset(releases[0], without, Path("c.pt"))


def test_every_release_has_a_preset() -> None:
    assert {(of.kind, of.class_token) for of in PUBLISHED.values()} == {
        (config.model.kind, config.model.class_token) for config in map(preset, PRESETS)
    }


@pytest.mark.parametrize(
    ("layers", "spelling"),
    [
        ({"projection_layer.weight": (40, 48, 1, 1)}, "irepa:kernel=1"),
        ({"projection_layer.weight": (40, 48, 5, 5)}, "irepa:kernel=5"),
        ({"projection_layer.weight": (40, 48)}, "irepa:projector_kind=linear"),
        ({"0.weight": (64, 48), "2.weight": (64, 64), "4.weight": (40, 64)}, "irepa:projector_kind=mlp"),
    ],
)
def test_irepa_s_projector_is_read_off_its_shapes(layers: dict[str, tuple[int, ...]], spelling: str) -> None:
    shapes = {f"projectors.0.{name}": shape for name, shape in layers.items()}
    assert settings_of("irepa", shapes, aligned=True)["loss.alignment"] == (spelling,)
    two = shapes | {"projectors.1.projection_layer.weight": (8, 48, 7, 7)}
    assert settings_of("irepa", two, aligned=True)["loss.alignment"] == (spelling, "irepa:kernel=7")
    assert settings_of("irepa", shapes, aligned=False) == {}
    assert settings_of("repa", {"blocks.0.attn.q_norm.weight": (12,)}, aligned=True) == {"model.qk_norm": True}


def test_without_a_preset_the_one_that_fits_is_taken(
    stores: dict[Release, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in METHODS:
        small = {**SIZE, "model.align_block": (2,), "model.projector_width": 64, "data.resolution": 64}
        small |= {"preset": f"small-{method}"}
        monkeypatch.setitem(PRESETS, f"small-{method}", lambda m=method, s=small: override(preset(START[m]), s))
        file = save(tmp_path / f"{method}.pt", public_state(method))
        assert main(argv(file, method, stores[method], tmp_path / method, preset=None, **dict.fromkeys(SIZE))) == 0
        assert read_config(tmp_path / method / "config.yaml").config.preset == f"small-{method}"
    said = capsys.readouterr().out
    assert "standardised channel by channel with latents_stats.pt" in said
    assert "the run's are (x − 0) · 0.5" in said


def test_statistics_in_a_file_beside_the_weights_are_the_run_s(
    stores: dict[Release, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trains on with them, unless it is said otherwise."""
    file = save(tmp_path / "lightningdit.pt", public_state("lightningdit"))
    mean, std = torch.linspace(-0.5, 0.5, 8).view(1, 8, 1, 1), torch.linspace(1, 2, 8).view(1, 8, 1, 1)
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    store = stores["lightningdit"]
    assert main(argv(file, "lightningdit", store, tmp_path / "run")) == 0
    said = f"its latents are normalised channel by channel with {tmp_path / 'latents_stats.pt'}"
    assert said in capsys.readouterr().out
    opened = open_run(tmp_path / "run")
    opened.data.close()
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(opened.scale.normalised(x), (x - mean) / std)
    options = [f"--{n.replace('_', '-')}={spelled(value)}" for n, value in {**SIZE, **QUICK}.items()]
    options += ["--preset=lightningdit-xl-1", f"--store={store}", f"--run={tmp_path / 'run'}", "--data.resolution=0"]
    options += ["--model.align-block=2", "--model.projector-width=64", "--model.classes=10"]
    assert main(["train", *options]) == 0
    after = open_run(tmp_path / "run")
    after.data.close()
    torch.testing.assert_close(after.scale.scale, opened.scale.scale, rtol=0, atol=0)
    by_factor = argv(file, "lightningdit", store, tmp_path / "other", **{"data.latent-normalisation": "scale"})
    assert main(by_factor) == 0
    assert "the run's are (x − 0) · 0.5" in capsys.readouterr().out


# ---- what is refused ----------------------------------------------------------------------------------------------


def refused(arguments: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("of", "release", "message"),
    [
        ("reg", "repa", "has cls_projectors2.…, which is REG's; pass --release reg"),
        ("irepa", "repa", "has projectors.0.projection_layer.…, which is iREPA's; pass --release irepa"),
        ("lightningdit", "sit", "has blocks.0.mlp.w12.…, which is LightningDiT's; pass --release lightningdit"),
        ("irepa", "reg", "has no cls_projectors2.weight, so it is not REG's"),
        ("sit", "lightningdit", "has no blocks.0.mlp.w12.weight, so it is not LightningDiT's"),
    ],
)
def test_another_method_s_file_is_refused(of: str, release: Release, message: str, tmp_path: Path) -> None:
    torch.save({"ema": reference_state(of)}, tmp_path / "c.pt")
    assert message in refused(["import", str(tmp_path / "c.pt"), f"--release={release}"])


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("reg", {"preset": None}, "has 3 blocks of width 48 and patch 2, for 64 px, which no preset of REG has; pass"),
        ("lightningdit", {"preset": None}, "width 48 and patch 1, for 64 px, which no preset of LightningDiT has"),
        ("reg", {"preset": "sit-xl-2"}, "--release reg has a class token, and --model.class-token is false"),
        ("irepa", {"preset": "sit-xl-2-reg"}, "--release irepa has no class token, and --model.class-token is true"),
        ("lightningdit", {"preset": "sit-xl-1"}, "--release lightningdit is not of --model.kind sit"),
        ("reg", {"model.depth": 4}, "blocks.3.attn.qkv.weight is missing"),
        ("reg", {"model.projector_width": 32}, "projectors.0.0.weight is [64, 48], the model's [32, 48]"),
        ("irepa", {"loss.alignment": "irepa:kernel=1"}, "layer.weight is [40, 48, 3, 3], the model's [40, 48, 1"),
        ("irepa", {"loss.alignment": "cosine"}, "projectors.0.0.weight is missing"),
        ("lightningdit", {"model.heads": 2}, "feat_rope.freqs_cos is [16, 12], the model's [16, 24]"),
        ("lightningdit", {"model.qk_norm": "true"}, "blocks.0.attn.q_norm.weight is missing"),
        ("lightningdit", {"model.classes": 7}, "embedding_table.weight is [11, 48], the model's [8, 48]"),
    ],
)  # fmt: skip
def test_another_model_is_named_in_one_line(
    method: Release, changes: dict[str, Any], message: str, stores: dict[Release, Path], tmp_path: Path
) -> None:
    file = save(tmp_path / "c.pt", public_state(method))
    assert message in refused(argv(file, method, stores[method], tmp_path / "run", **changes))
    assert latest_checkpoint(tmp_path / "run") is None


@pytest.mark.parametrize(
    ("method", "edit", "message"),
    [
        ("reg", {"wg_norm.bias": None}, "wg_norm.bias is missing"),
        ("reg", {"final_layer.extra": torch.zeros(2)}, "final_layer.extra is unknown"),
        ("reg", {"cls_projectors2.weight": torch.zeros(48, 20)}, "cls_projectors2.weight is [48, 20], the model's [48"),
        ("lightningdit", {"final_layer.norm_final.weight": None}, "final_layer.norm_final.weight is missing"),
        ("lightningdit", {"feat_rope.freqs_sin": torch.zeros(16, 12)}, "feat_rope.freqs_sin is [16, 12]"),
        ("irepa", {"feat_rope.freqs_cos": torch.zeros(16, 12)}, "feat_rope.freqs_cos is unknown"),
    ],
)  # fmt: skip
def test_missing_and_unknown_weights_are_named(
    method: Release, edit: dict[str, Tensor | None], message: str, stores: dict[Release, Path], tmp_path: Path
) -> None:
    edited = {name: value for name, value in {**public_state(method), **edit}.items() if value is not None}
    torch.save({"ema": edited}, tmp_path / "c.pt")
    assert message in refused(argv(tmp_path / "c.pt", method, stores[method], tmp_path / "run"))


def test_statistics_beside_the_weights_must_be_the_store_s(stores: dict[Release, Path], tmp_path: Path) -> None:
    """As REPA-E's SiT has them; the test store's latents are 0.5 · x."""
    statistics = {"bn.running_mean": torch.zeros(4), "bn.running_var": torch.full((4,), 4 - 1e-4),
                  "bn.num_batches_tracked": torch.tensor(7)}  # fmt: skip
    torch.save({"ema": reference_state("irepa") | statistics}, tmp_path / "c.pt")
    assert main(argv(tmp_path / "c.pt", "irepa", stores["irepa"], tmp_path / "run")) == 0
    statistics["bn.running_mean"][1] = 1.0
    torch.save({"ema": reference_state("irepa") | statistics}, tmp_path / "c.pt")
    message = refused(argv(tmp_path / "c.pt", "irepa", stores["irepa"], tmp_path / "other"))
    assert "its bn.*, (x − [0 … 1]) · [0.5 … 0.5], and the store's are (x − 0) · 0.5; name a --store" in message
