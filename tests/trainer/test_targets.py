"""Several alignment targets: each with its features, block, weight and projector; read once, logged one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage import ArrayLayout, GroupLayout, Staging, open_store
from storage.base.errors import StoreError, UserError
from storage.codecs.int8 import INT8
from storage.codecs.int8 import numbers as decode
from tests.storage.servers import http_server
from tests.stores import FEATURES, LATENTS, make_identities, make_layouts, make_store, publish_all, random_arrays
from trainer.config.presets import preset
from trainer.config.saved import read_config, to_yaml
from trainer.config.schema import AlignmentTarget, TrainConfig
from trainer.config.tree import flatten, override
from trainer.data.groups import geometry_of, open_data
from trainer.data.loader import Loader
from trainer.loop.train import train
from trainer.run.metrics import read_metrics

OTHER = "features/other-vit"
CPU = torch.device("cpu")
MICRO: dict[str, Any] = {
    "device": "cpu",
    "batch": 8,
    "steps": 3,
    "model.depth": 3,
    "model.width": 32,
    "model.heads": 2,
    "model.projector_width": 32,
    "log.every": 1,
    "log.tensorboard": False,
    "log.samples_every": 0,
}


def micro(store: Path, run: Path, **changes: Any) -> TrainConfig:
    return override(preset("sit-tiny-2"), {**MICRO, "store": str(store), "run": run, **changes})


def add_group(root: Path, name: str, width: int, n_tokens: int = 64) -> None:
    """A second features group of int8 patches, beside the float16 ones that `make_store` wrote."""
    store = open_store(root).layout
    layout = make_layouts(store, width, INT8)[FEATURES]
    arrays = tuple(
        ArrayLayout(name=a.name, dtype=a.dtype, row_shape=(n_tokens, *a.row_shape[1:]), store=store)
        for a in layout.arrays
        if a.name != "cls"
    )
    group = GroupLayout(path=f"features/{name}", arrays=arrays)
    side = int(n_tokens**0.5)
    identity = replace(make_identities(width, INT8)[FEATURES], name=name, token_grid=(side, side))
    keys = open_store(root).index.keys
    with Staging(root) as staging:
        publish_all(root, group, identity, random_arrays(group, 7, INT8), keys, (), staging)


@pytest.fixture(scope="module")
def two_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two") / "store"
    make_store(root, n_views=2)
    add_group(root, "other-vit", 40)
    return root


BOTH = {"data.features": ("tiny-vit", "other-vit"), "model.align_block": (1, 3), "loss.projection_weight": (0.5, 0.25)}


def test_a_store_over_http_trains_when_its_groups_are_named(two_features: Path, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    with http_server(two_features.parent) as (url, _):
        config = override(micro(two_features, tmp_path / "run", **BOTH), {"store": f"{url}/store", "steps": 2})
        with pytest.raises(UserError, match="cannot be listed over http; name the groups"):
            open_data(config)
        config = override(config, {"data.latents": "tiny-vae"})
        train(config)
    assert [row["step"] for row in read_metrics(config.run)] == [1, 2]


def test_each_target_has_its_features_block_and_weight(two_features: Path, tmp_path: Path) -> None:
    config = micro(two_features, tmp_path / "run", **BOTH)
    assert config.targets == (
        AlignmentTarget(features="tiny-vit", block=1, weight=0.5),
        AlignmentTarget(features="other-vit", block=3, weight=0.25),
    )
    data = open_data(config)
    assert geometry_of(config, data).targets == ((1, 24), (3, 40))
    assert set(data.identities) == {LATENTS, FEATURES, OTHER}
    data.close()


def test_every_target_s_tokens_are_of_the_same_row_and_view(two_features: Path, tmp_path: Path) -> None:
    config = micro(two_features, tmp_path / "run", **BOTH)
    stored = open_store(two_features)
    groups = {path: stored.group(path) for path in (LATENTS, FEATURES, OTHER)}
    everything: dict[tuple[str, str], np.ndarray] = {}
    for path, group in groups.items():
        for name, reader in group.arrays.items():
            views = []
            for view in range(2):
                out = np.empty((40, *reader.row_shape), reader.dtype)
                reader.read_into(np.arange(40), view, out)
                views.append(out)
            everything[path, name] = np.stack(views, axis=1)
    other = decode(everything[OTHER, "patches"], everything[OTHER, "scale"], INT8)
    data = open_data(config)
    seen = set()
    options: dict[str, Any] = {"seed": 3, "batch": 12, "start": 0, "stop": 4, "rank": 0, "world_size": 1, "prefetch": 2}
    with Loader(data, device=CPU, **options) as batches:
        for batch in batches:
            first, second = (target.values.numpy() for target in batch.targets)
            assert (first.dtype, second.dtype) == (np.float16, np.float32)
            for i, row in enumerate(batch.rows.tolist()):
                (view,) = (
                    v
                    for v in range(2)
                    if np.array_equal(batch.moments[i].numpy(), everything[LATENTS, "moments"][row, v])
                )
                np.testing.assert_array_equal(first[i], everything[FEATURES, "patches"][row, view])
                np.testing.assert_array_equal(second[i], other[row, view])
                seen.add(view)
    assert seen == {0, 1}
    data.close()


def test_the_log_shows_each_target_and_a_resume_counts_on(two_features: Path, tmp_path: Path) -> None:
    config = micro(two_features, tmp_path / "run", **BOTH)
    train(config)
    lines = read_metrics(tmp_path / "run")
    for line in lines:
        first, second = line["alignment_loss/tiny-vit@1"], line["alignment_loss/other-vit@3"]
        assert line["loss"] == pytest.approx(line["denoising_loss"] + 0.5 * first + 0.25 * second, rel=1e-6)
        assert line["alignment_loss"] == pytest.approx((first + second) / 2, rel=1e-6)
        assert first != second
    again = read_config(tmp_path / "run" / "config.yaml").config
    assert flatten(again) == {**flatten(config), **{n: flatten(again)[n] for n in ("precision", "data.latents")}}
    assert train(override(again, {"steps": 4}))["steps_now"] == 1


def test_one_value_applies_to_all_targets_and_shared_features_are_read_once(two_features: Path, tmp_path: Path) -> None:
    config = micro(two_features, tmp_path / "run", **{"data.features": ("tiny-vit",), "model.align_block": (1, 2)})
    assert [(t.features, t.block, t.weight) for t in config.targets] == [("tiny-vit", 1, 0.5), ("tiny-vit", 2, 0.5)]
    data = open_data(config)
    assert [group.path for group in data.groups] == [LATENTS, FEATURES]
    options: dict[str, Any] = {"seed": 3, "batch": 4, "start": 0, "stop": 1, "rank": 0, "world_size": 1, "prefetch": 1}
    with Loader(data, device=CPU, **options) as batches:
        (batch,) = batches
        assert batch.targets[0] is batch.targets[1]
    data.close()
    train(config)
    assert {"alignment_loss/tiny-vit@1", "alignment_loss/tiny-vit@2"} <= read_metrics(tmp_path / "run")[0].keys()


def test_which_features_is_a_question_when_there_are_two(two_features: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"several features \(other-vit, tiny-vit\); choose with --data.features NAME"):
        open_data(micro(two_features, tmp_path / "run"))
    with pytest.raises(StoreError, match="no features/none"):
        open_data(micro(two_features, tmp_path / "run", **{"data.features": ("tiny-vit", "none")}))


def test_features_without_patch_tokens_are_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    store = open_store(tmp_path / "store")
    group = GroupLayout(
        path="features/cls-only",
        arrays=(ArrayLayout(name="cls", dtype="float16", row_shape=(24,), store=store.layout),),
    )
    identity = replace(make_identities()[FEATURES], name="cls-only")
    with Staging(tmp_path / "store") as staging:
        publish_all(tmp_path / "store", group, identity, random_arrays(group), store.index.keys, (), staging)
    with pytest.raises(UserError, match="features/cls-only holds cls and no patch tokens"):
        open_data(micro(tmp_path / "store", tmp_path / "run", **{"data.features": ("cls-only",)}))


def test_a_token_grid_that_is_not_the_model_s_is_named(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    add_group(tmp_path / "store", "coarse", 24, n_tokens=16)
    config = micro(tmp_path / "store", tmp_path / "run", **{"data.features": ("tiny-vit", "coarse")})
    data = open_data(config)
    with pytest.raises(UserError, match=r"features/coarse has 4×4 tokens, the model 8×8 .*choose --model.patch 4"):
        geometry_of(config, data)
    data.close()


def test_lists_survive_yaml_and_a_single_value_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for changes in (BOTH, {"loss.projection_weight": (0.25,)}, {"data.features": ("tiny-vit",)}):
        config = override(preset("sit-tiny-2"), changes)
        path.write_text(to_yaml(config), encoding="utf-8")
        assert read_config(path).config == config
    assert "projection_weight: 0.5\n" in to_yaml(preset("sit-tiny-2"))
    path.write_text(
        "model: {align_block: 4}\nloss: {projection_weight: [0.5, 1e-1]}\ndata: {features: [a, features/b]}"
    )
    config = read_config(path).config
    assert [(t.features, t.block, t.weight) for t in config.targets] == [("a", 4, 0.5), ("b", 4, 0.1)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.align_block": (1, 2, 3), "loss.projection_weight": (0.5, 0.5)}, "do not agree on the number of"),
        ({"loss.projection_weight": (0.5, 0.0)}, "gives a target no weight"),
        ({"loss.projection_weight": ()}, "--loss.projection-weight must be at least 0"),
        ({"loss.projection_weight": (float("nan"),)}, "--loss.projection-weight must be at least 0, got nan"),
        (
            {"loss.projection_weight": (0.0,), "data.features": ("a",)},
            "would not be read with --loss.projection-weight 0",
        ),
        ({"model.align_block": ()}, "--model.align-block must name a block"),
        ({"model.align_block": (1, 99)}, "--model.align-block must be a block, 1 to 4"),
        ({"data.features": ("a", "")}, "has an empty name"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        override(preset("sit-tiny-2"), changes)
    assert "\n" not in str(caught.value)
