"""Public checkpoints: every layout is read, SiT's function survives its conversion, and a run goes on from one.

Random weights, saved as the public scripts save them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.encoders.tiny import TINY_VAE
from storage.base.errors import UserError
from tests.stores import make_store
from tests.trainer.test_transformer import SMALL, inputs, randomised
from trainer.__main__ import main
from trainer.config.presets import preset
from trainer.config.saved import read_config
from trainer.config.schema import Kind, TrainConfig
from trainer.config.tree import override
from trainer.evaluation.generate.generate import GenerateConfig, generate
from trainer.loop.train import train
from trainer.models.transformer import DiffusionTransformer, Geometry
from trainer.run.checkpoint import latest_checkpoint, load_ema_weights
from trainer.run.published import Release
from trainer.run.releases import converted, import_checkpoint, read_release

LAYOUTS = ("scripts", "bare", "safetensors")
TINY: dict[str, Any] = {
    "device": "cpu",
    "model.depth": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.align_block": (1,),
    "model.projector_width": 32,
    "batch": 8,
    "steps": 2,
    "log.every": 1,
    "log.tensorboard": False,
    "log.samples_every": 0,
}


def tiny(kind: Kind, store: Path, run: Path, **changes: Any) -> TrainConfig:
    return override(preset(f"{kind}-tiny-2"), {**TINY, "store": str(store), "run": run, **changes})


def geometry_of(kind: Kind, *, aligned: bool = True) -> Geometry:
    """What `tiny` is on the tests' store, with twenty classes where the store has five."""
    return Geometry(
        kind=kind,
        input_size=16,
        channels=4,
        patch=2,
        width=32,
        depth=2,
        heads=2,
        n_classes=20,
        targets=((1, 24),) if aligned else (),
        projector_width=32,
    )


def save(path: Path, layout: str, weights: dict[str, Tensor], averaged: dict[str, Tensor]) -> Path:
    if layout == "safetensors":
        save_file(averaged, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    file = path.with_suffix(".pt")
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    whole = {"model": weights, "ema": averaged, "opt": optimizer, "args": argparse.Namespace(lr=1e-4), "steps": 3}
    torch.save(whole if layout == "scripts" else averaged, file)
    return file


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(tmp_path: Path, layout: str) -> None:
    weights, averaged = randomised(SMALL).state_dict(), randomised(SMALL, seed=1).state_dict()
    release = read_release(save(tmp_path / "c", layout, weights, averaged))
    found, found_averaged = release.weights, release.averaged
    assert_equal(found_averaged, averaged)
    assert_equal(found, weights if layout == "scripts" else averaged)


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    weights = {name: value.half() for name, value in randomised(SMALL).state_dict().items()}
    found = read_release(save(tmp_path / "c", "bare", {}, weights)).weights
    assert_equal(found, {name: value.float() for name, value in weights.items()})


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["hostile", "truncated", "text", "list", "options"])
def test_what_is_not_weights_is_refused_and_nothing_in_it_is_run(tmp_path: Path, kind: str) -> None:
    file, touched = tmp_path / "c.pt", tmp_path / "touched"
    torch.save({"list": [1], "options": {"ema": {"a": 1}}, "hostile": Hostile(f"touch {touched}")}.get(kind, {}), file)
    if kind == "truncated":
        torch.save(randomised(SMALL).state_dict(), file)
        file.write_bytes(file.read_bytes()[:5000])
    if kind == "text":
        file.write_text("junk\n")
    with pytest.raises(UserError, match=str(file)) as caught:
        read_release(file)
    assert "\n" not in str(caught.value)
    assert not touched.exists()


def named(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weights as wrappers and scripts name them; `{}` is the name, and before a colon stands whose are renamed."""
    only, _, pattern = name.rpartition(":")
    return {pattern.format(key) if only in key else key: value for key, value in weights.items()}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("of_weights", "of_averaged"),
    [
        ("model.{}", "ema.{}"),
        ("model.module.{}", "ema.{}"),
        ("model._orig_mod.module.{}", "ema.module._orig_mod.{}"),
        ("model.module._orig_mod.module.{}", "ema._orig_mod.{}"),
        ("blocks:model.module.{}", "ema.{}"),
        ("state_dict.model.{}", "state_dict.model_ema.{}"),
        ("state_dict.net._orig_mod.{}", "state_dict.ema_model.module.{}"),
        ("model_state_dict.{}", "ema_state_dict.{}"),
        ("module.{}", "averaged.module.{}"),
    ],
)
def test_weights_are_found_wherever_they_lie(tmp_path: Path, of_weights: str, of_averaged: str, suffix: str) -> None:
    weights, averaged = randomised(SMALL).state_dict(), randomised(SMALL, seed=1).state_dict()
    if of_weights.startswith("blocks:"):  # some of one set's names are longer, the others only nested
        flat = named(named(weights, "model.{}"), "blocks:model.module.{}")
        flat = {name.replace("model.module.model.", "model.module."): value for name, value in flat.items()}
    else:
        flat = named(weights, of_weights)
    flat |= named(averaged, of_averaged) | {"ema_beside.n_averaged": torch.tensor(3)}
    file = tmp_path / f"c{suffix}"
    if suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in flat.items()}, file)
    else:
        tree: dict[str, Any] = {"train_steps": np.int64(5), "args": argparse.Namespace(lr=np.float32(1e-4))}
        for name, value in flat.items():
            first, _, rest = name.partition(".")
            tree.setdefault(first, {})[rest] = value
        torch.save(tree, file)
    found = read_release(file)
    assert_equal(found.weights, weights)
    assert_equal(found.averaged, averaged)
    assert any("left out: " in note and "ema_beside" in note for note in found.notes)


def test_one_set_stands_for_both_and_counters_are_left_out(tmp_path: Path) -> None:
    state = randomised(SMALL).state_dict()
    torch.save({"ema": {"n_averaged": torch.tensor(3), **named(state, "module.{}")}}, tmp_path / "c.pt")
    found = read_release(tmp_path / "c.pt")
    assert_equal(found.weights, state)
    assert found.notes == (
        "it has one set of weights, ema, which stands for the averaged ones too",
        "left out: ema.n_averaged",
    )


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"a": {"x_embedder.proj.weight": torch.zeros(2)}, "b": {"x_embedder.proj.weight": torch.zeros(2)}}, "a, b"),
        (
            {"x_embedder.proj.weight": np.zeros(3), "blocks.0": torch.zeros(2)},
            "x_embedder.proj.weight is a NumPy array",
        ),
        ({"x_embedder.proj.weight": torch.zeros(2, dtype=torch.int64)}, "int64"),
        ({"ema": {"shadow_params": [torch.zeros(2)]}}, "it has ema"),
        ({"\x1b[31mred": 1}, r"it has \\x1b\[31mred"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(tmp_path: Path, tree: dict[str, Any], says: str) -> None:
    torch.save(tree, tmp_path / "c.pt")
    with pytest.raises(UserError, match=says):
        read_release(tmp_path / "c.pt")


def test_a_folder_is_told_which_file_to_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"is a folder.*name one in it \(model\.safetensors\)"):
        read_release(tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(UserError, match="dcp_to_torch"):
        read_release(tmp_path)


@pytest.mark.parametrize("release", ["repa", "sit"])
@pytest.mark.parametrize("name", ["x_embedder.proj.weight", "t_embedder.mlp.0.weight", "decoder_blocks.x.weight"])
def test_shapes_and_numbers_of_no_release_are_one_line(
    shared_tiny_store: Path, tmp_path: Path, name: str, release: Release
) -> None:
    state = randomised(geometry_of("dit" if release == "sit" else "sit")).state_dict() | {name: torch.zeros(3)}
    file = save(tmp_path / "c", "bare", {}, state)
    with pytest.raises(UserError, match=r"c\.pt") as caught:
        import_checkpoint(file, release, tiny("sit", shared_tiny_store, tmp_path / "run"))
    assert "\n" not in str(caught.value)


def test_sit_s_own_function_with_time_and_velocity_reversed() -> None:
    """SiT's network is DiT's, of which the first C channels are the velocity from noise (s = 0) to image."""
    theirs = randomised(dataclasses.replace(SMALL, kind="dit"))
    ours = DiffusionTransformer(SMALL)
    ours.load_state_dict(converted(theirs.state_dict(), "sit"), strict=True)
    x, t, y = inputs(SMALL, 6)
    t[0], t[1] = 0, 1
    with torch.no_grad():
        expected, expected_projections = theirs(x, 1 - t, y)
        velocity, projections = ours(x, t, y)
    torch.testing.assert_close(velocity, -expected[:, : SMALL.channels], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(projections, expected_projections, atol=1e-5, rtol=1e-4)


def test_repa_s_first_release_counts_its_blocks_twice() -> None:
    state = randomised(SMALL).state_dict()
    legacy = {}
    for name, value in state.items():  # two blocks up to the aligned one, then `decoder_blocks` from 0
        renamed = name.replace("blocks.2.", "decoder_blocks.0.")
        legacy[renamed] = value
    assert any(name.startswith("decoder_blocks.0.") for name in legacy)
    assert_equal(converted(legacy, "repa"), state)
    assert_equal(converted(state, "repa"), state)


@pytest.mark.parametrize("release", ["repa", "sit", "dit"])
def test_a_run_is_made_and_training_goes_on_from_it(shared_tiny_store: Path, tmp_path: Path, release: Release) -> None:
    kind: Kind = "dit" if release == "dit" else "sit"
    saved = geometry_of("dit" if release == "sit" else kind, aligned=release == "repa")
    weights, averaged = randomised(saved).state_dict(), randomised(saved, seed=1).state_dict()
    run = tmp_path / "run"
    notes = import_checkpoint(
        save(tmp_path / "c", "scripts", weights, averaged), release, tiny(kind, shared_tiny_store, run)
    )
    assert ("it has no projectors; the run's are new" in notes) == (release != "repa")
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    found, expected = load_ema_weights(checkpoint), converted(averaged, release)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    config = read_config(run / "config.yaml").config
    assert config.model.classes == 20
    assert config.precision == "auto"
    summary = train(config)
    assert (summary["steps"], summary["steps_now"]) == (2, 2)
    after = latest_checkpoint(run)
    assert after is not None
    # Two steps of the learning rate 2e-3 move no weight by more than twice that, so these are the checkpoint's.
    trained = load_ema_weights(after)["blocks.0.mlp.fc1.weight"]
    assert not torch.equal(trained, expected["blocks.0.mlp.fc1.weight"])
    wandered = (trained - expected["blocks.0.mlp.fc1.weight"]).abs().max().item()
    apart = (converted(weights, release)["blocks.0.mlp.fc1.weight"] - expected["blocks.0.mlp.fc1.weight"]).abs().max()
    assert wandered < 0.05 * apart.item() + 1e-2


def test_images_are_drawn_from_it(shared_tiny_store: Path, tmp_path: Path) -> None:
    for kind in ("sit", "dit"):
        run = tmp_path / kind
        averaged = randomised(geometry_of(kind, aligned=False)).state_dict()
        config = tiny(kind, shared_tiny_store, run, **{"loss.projection_weight": (0.0,), "sample.steps": 3})
        import_checkpoint(
            save(tmp_path / kind, "safetensors", {}, averaged), "dit" if kind == "dit" else "repa", config
        )
        folder, _ = generate(GenerateConfig(run=run, n=6, batch=6, vae=str(TINY_VAE), device="cpu"))
        assert len(list(folder.glob("*.png"))) == 6
        assert (folder / "labels.txt").read_text().split() == list("012345"), "the store has 5 classes, the model 20"


def test_a_vanilla_run_leaves_projectors_out(shared_tiny_store: Path, tmp_path: Path) -> None:
    state = randomised(geometry_of("sit")).state_dict()
    config = tiny("sit", shared_tiny_store, tmp_path / "run", **{"loss.projection_weight": (0.0,)})
    notes = import_checkpoint(save(tmp_path / "c", "bare", {}, state), "repa", config)
    assert "its projectors beyond the run's 0 alignment targets were left out" in notes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.depth": 3}, "blocks.2.attn.qkv.weight is missing"),
        ({"model.depth": 1}, "blocks.1.attn.qkv.weight is unknown"),
        ({"model.width": 64}, r"pos_embed is \[1, 64, 32\], the model's \[1, 64, 64\] .*and \d+ more"),
        ({"model.qk_norm": True}, "blocks.0.attn.q_norm.weight is missing"),
        ({"model.kind": "dit", "sample.sampler": "ddpm"}, "--release repa is not of --model.kind dit"),
        ({"model.classes": 7}, r"embedding_table.weight is \[21, 32\], the model's \[8, 32\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_model_s_weights_are_refused(
    shared_tiny_store: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    file = save(tmp_path / "c", "bare", {}, randomised(geometry_of("sit")).state_dict())
    with pytest.raises(UserError, match=says.replace(" .*", ".*")) as caught:
        import_checkpoint(file, "repa", tiny("sit", shared_tiny_store, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert latest_checkpoint(tmp_path / "run") is None


def test_a_run_that_is_there_is_kept(shared_tiny_store: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "c", "bare", {}, randomised(geometry_of("sit")).state_dict())
    config = tiny("sit", shared_tiny_store, tmp_path / "run")
    import_checkpoint(file, "repa", config)
    with pytest.raises(UserError, match="has a checkpoint already; name another --run"):
        import_checkpoint(file, "repa", config)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], waits: list[str]) -> None:
    make_store(tmp_path / "store")
    file = save(tmp_path / "c", "scripts", *[randomised(geometry_of("sit")).state_dict()] * 2)
    options = ["--model.depth=2", "--model.width=32", "--model.heads=2", "--model.align-block=1"]
    options += ["--model.projector-width=32", f"--store={tmp_path / 'store'}", f"--run={tmp_path / 'run'}"]
    assert main(["import", "--release=repa", "--preset=sit-tiny-2", *options, "--log.tensorboard", str(file)]) == 0
    assert f"trainer generate {tmp_path / 'run'}" in capsys.readouterr().out
    assert waits[2:] == ["loading PyTorch", f"reading {file.name}", f"making a run of {file.name}"]
    with pytest.raises(UserError, match=r"none\.pt does not exist"):
        main(
            ["import", str(tmp_path / "none.pt"), "--release=repa", "--preset=sit-tiny-2", *options[:-1], "--run=/none"]
        )
