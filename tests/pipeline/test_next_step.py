"""What stage one names as the next command is one that the trainer takes, whatever the store holds."""

from __future__ import annotations

import itertools
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline.encoders.catalogue import VAES, VISION
from pipeline.encoders.tiny import RESOLUTION
from pipeline.next_step import train_commands
from storage.derive import derive_group
from tests.stores import make_groups
from trainer.config.command_line import train_config
from trainer.config.presets import PRESETS, preset
from trainer.config.schema import TrainConfig
from trainer.data.groups import geometry_of, open_data


def configured(command: str) -> TrainConfig:
    """The configuration that a `make train` line comes to."""
    words = dict(word.split("=", 1) for word in shlex.split(command)[2:])
    values = preset(words["PRESET"]) and {"preset": words["PRESET"], "store": words["STORE"], "run": "/nowhere"}
    options = shlex.split(words.get("ARGS", ""))
    named = {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in zip(options[::2], options[1::2], strict=True)
    }
    return train_config({**values, **named})


SD, DC, F16 = {"n": 4, "side": 32}, {"n": 32, "side": 8}, {"n": 32, "side": 16}


def taken(command: str) -> TrainConfig:
    """The configuration, which the trainer accepts for the store."""
    config = configured(command)
    data = open_data(config)
    geometry_of(config, data)
    data.close()
    return config


@pytest.mark.parametrize(
    ("resolution", "groups", "says"),
    [
        (128, {"latents/a": {"n": 4, "side": 16}, "features/b": {"n": 24, "side": 8}}, "sit-tiny-2"),
        (256, {"latents/a": SD, "features/b": {"n": 24, "side": 16}}, "sit-xl-2-reg"),
        (256, {"latents/a": SD, "features/b": {"n": 24, "side": 16, "arrays": ["patches"]}}, "sit-xl-2"),
        (256, {"latents/a": F16, "features/b": {"n": 24, "side": 16}}, "sit-xl-1"),
        (256, {"latents/a": F16}, "sit-xl-1-vanilla"),
        (512, {"latents/a": {"n": 32, "side": 32}, "features/b": {"n": 24, "side": 32}}, "--data.resolution 512"),
        (384, {"latents/a": {"n": 32, "side": 24}, "features/b": {"n": 24, "side": 24}}, "--model.patch 1"),
        (512, {"latents/a": {"n": 16, "side": 64}, "features/b": {"n": 24, "side": 32}}, "sit-xl-2-512"),
        (256, {"latents/a": SD, "features/b": {"n": 24, "side": 8}}, "sit-xl-4"),
        (256, {"latents/a": SD, "features/b": {"n": 24, "side": 14}}, "sit-xl-2-vanilla"),
        (256, {"latents/a": DC, "features/b": {"n": 24, "side": 16}}, "sit-xl-1-vanilla"),
        (256, {"latents/a": SD}, "sit-xl-2-vanilla"),
        (384, {"latents/a": {"n": 4, "side": 48}, "features/b": {"n": 24, "side": 12}}, "--model.patch 4"),
        (384, {"latents/a": {"n": 4, "side": 48}}, "--loss.projection-weight 0"),
        (256, {"latents/a": SD, "features/b": {"n": 24, "side": 16, "arrays": ["cls"]}}, "sit-xl-2-vanilla"),
        (
            256,
            {
                "latents/a": DC,
                "latents/z": SD,
                "features/b": {"n": 24, "side": 14},
                "features/c": {"n": 24, "side": 16},
            },
            "--data.latents z --data.features c",
        ),
        (
            128,
            {"latents/a": {"n": 4, "side": 16}, "features/b": {"n": 24, "side": 8}, "features/c": SD | {"side": 8}},
            "c",
        ),
        (256, {"features/b": {"n": 24, "side": 16}}, "rit-xl-1"),
        (64, {"features/b": {"n": 24, "side": 4, "arrays": ["patches"]}}, "--model.class-token false"),
        (64, {"features/w": {"n": 1153, "side": 4}, "features/z": {"n": 24, "side": 4}}, "--data.latents features/z"),
        (256, {"features/b": {"n": 1153, "side": 16}}, ""),
        (256, {"features/b": {"n": 24, "side": 16, "arrays": ["cls"]}}, ""),
        (96, {"latents/a": {"n": 4, "side": 3}}, "--model.patch 1"),
    ],
)
def test_the_trainer_takes_it(tmp_path: Path, resolution: int, groups: dict[str, Any], says: str) -> None:
    make_groups(tmp_path / "it's $x", resolution, groups)
    commands = train_commands(str(tmp_path / "it's $x"), {"features/c"})
    if not says:
        assert commands == []
        return
    *before, command = commands
    config = taken(command)
    assert len(before) == config.data.latents.startswith("features/")
    if before:
        assert shlex.split(before[0])[3:] == ["statistics", config.store, config.data.latents, "--places"]
    assert config.preset == says if says in PRESETS else says in command


def test_features_are_learned_from_codes_that_stand_for_themselves(tmp_path: Path) -> None:
    """As the docs precompute them; rotated codes would be refused, and another group is named."""
    make_groups(tmp_path, 256, {"features/b": {"n": 24, "side": 16}})
    derive_group(tmp_path, "features/b", "int8", n_workers=1)
    derive_group(tmp_path, "features/b", "rotated4", n_workers=1)
    for preferred, chosen in (("b-int8", "b-int8"), ("b-rotated4", "b"), ("b", "b")):
        *_, command = train_commands(str(tmp_path), {f"features/{preferred}"})
        assert taken(command).data.latents == f"features/{chosen}"


@pytest.mark.parametrize("resolution", [RESOLUTION, 256, 384, 512])
def test_the_trainer_takes_what_follows_any_pair_of_encoders(tmp_path: Path, resolution: int) -> None:
    """Every latent and every kind of features that the catalogue can make, and latents of factor 16 from elsewhere."""
    latents = {(vae.channels, vae.factor) for vae in VAES.values()} | {(32, 16)}
    features = {
        (model.width, math.isqrt(model.n_tokens(resolution)), kept)
        for model in VISION.values()
        if model.resolution in (0, resolution)
        for kept in (("patches", "cls"), ("patches",), ("cls",))
        if model.has_cls or kept == ("patches",)
    }
    groups: dict[str, dict[str, Any]] = {
        f"latents/f{factor}c{channels}": {"n": channels, "side": resolution // factor} for channels, factor in latents
    } | {
        f"features/{width}-{'-'.join(kept)}": {"n": width, "side": side, "arrays": kept}
        for width, side, kept in features
        if width in (128, 1152, 768)  # which width it is changes nothing
    }
    make_groups(tmp_path, resolution, groups, n_rows=1)
    for source, target in itertools.product(*([g for g in groups if g.startswith(kind)] for kind in ("lat", "fea"))):
        config = taken(*train_commands(str(tmp_path), {source, target}))
        side, grid = groups[source]["side"], groups[target]["side"]
        assert config.aligns
        if side % grid == 0 and "patches" in groups[target]["arrays"]:  # otherwise another group's turn
            assert (f"latents/{config.data.latents}", f"features/{config.data.features[0]}") == (source, target)
            has_reg = resolution == 256 and side // grid == 2 and "cls" in groups[target]["arrays"]
            assert config.model.class_token == has_reg
            assert config.model.patch == side // grid


def test_a_store_with_some_labels_is_trained_on_without_them(tmp_path: Path) -> None:
    make_groups(tmp_path, 256, {"latents/a": SD}, labels=[0, -1])
    (command,) = train_commands(str(tmp_path))
    assert "--loss.label-dropout 1" in command
    assert taken(command).preset == "sit-xl-2-vanilla"
