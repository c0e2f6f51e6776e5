"""What stage one names as the next command is one that the trainer takes, whatever the store holds."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.next_step import train_command
from storage import ArrayLayout, GroupLayout, Staging, StoreLayout, create_store
from storage.index import make_index
from tests.stores import FEATURES, LATENTS, make_identities, publish_all
from trainer.config.command_line import train_config
from trainer.config.presets import preset
from trainer.config.schema import TrainConfig
from trainer.data.groups import geometry_of, open_data


def make_groups(root: Path, resolution: int, groups: dict[str, dict[str, Any]]) -> None:
    """A store of two rows; each group's geometry is (channels or width, side), and `arrays` if they are others."""
    store = StoreLayout(n_rows=2, views=("original",), resolution=resolution, shard_rows=2)
    index = make_index(["a", "b"], [0, 1], ["a", "b"], ["a", "b"], [1, 1])
    with Staging(root) as staging:
        create_store(root, store, index, {"source": "none"}, staging.run_id)
        for path, of in groups.items():
            n, side = of["n"], of["side"]
            kind = LATENTS if path.startswith("latents/") else FEATURES
            identity = replace(make_identities()[kind], name=path.partition("/")[2], resolution=resolution)
            if kind == LATENTS:
                identity = replace(identity, latent_channels=n, latent_size=(side, side))
                shapes: dict[str, tuple[int, ...]] = {"moments": (2 * n, side, side)}
            else:
                identity = replace(identity, width=n, token_grid=(side, side))
                shapes = {"patches": (side * side, n), "cls": (n,)}
            arrays = [
                ArrayLayout(name=name, dtype="float16", row_shape=shapes[name], store=store)
                for name in of.get("arrays", shapes)
            ]
            layout = GroupLayout(path=path, arrays=tuple(arrays))
            numbers = {array.name: np.zeros(array.shape, np.float16) for array in arrays}
            publish_all(root, layout, identity, numbers, ["a", "b"], [], staging)


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


SD, DC = {"n": 4, "side": 32}, {"n": 32, "side": 8}


@pytest.mark.parametrize(
    ("resolution", "groups", "says"),
    [
        (128, {"latents/a": {"n": 4, "side": 16}, "features/b": {"n": 24, "side": 8}}, "sit-tiny-2"),
        (256, {"latents/a": SD, "features/b": {"n": 24, "side": 16}}, "sit-xl-2"),
        (512, {"latents/a": {"n": 16, "side": 64}, "features/b": {"n": 24, "side": 32}}, "sit-xl-2-512"),
        (256, {"latents/a": SD, "features/b": {"n": 24, "side": 8}}, "sit-xl-4"),
        (256, {"latents/a": SD, "features/b": {"n": 24, "side": 14}}, "sit-xl-2-vanilla"),
        (256, {"latents/a": DC, "features/b": {"n": 24, "side": 16}}, "sit-xl-2-vanilla"),
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
        (256, {"features/b": {"n": 24, "side": 16}}, ""),
        (96, {"latents/a": {"n": 4, "side": 3}}, ""),
    ],
)
def test_the_trainer_takes_it(tmp_path: Path, resolution: int, groups: dict[str, Any], says: str) -> None:
    make_groups(tmp_path / "it's $x", resolution, groups)
    command = train_command(str(tmp_path / "it's $x"), {"features/c"})
    if not says:
        assert command == ""
        return
    assert says in command
    config = configured(command)
    data = open_data(config)
    geometry_of(config, data)
    data.close()
