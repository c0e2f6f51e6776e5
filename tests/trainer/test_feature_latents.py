"""An encoder's features as latents: the public implementation's, what is read, refused and kept, and what follows."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.encoders import registry
from storage import GroupReader, Staging, StoreLayout, create_group, create_store, open_store, places, publish_unit
from storage.__main__ import main as storage_main
from storage.base.errors import StoreError, UserError
from storage.codecs import CODECS, PLAIN, Codec
from storage.derive import derive_group
from storage.final_norm import AFFINE, ATTRIBUTE, FinalNorm, final_norm_of
from storage.final_norm import PLAIN as PLAIN_NORM
from storage.index import make_index
from storage.order import ValidRows
from storage.roots import open_root
from tests.stores import FEATURES, encoded, make_identities, make_layouts, make_store
from tests.trainer.reference import load_reference
from tests.trainer.runs import assert_same_run, micro
from trainer.data.feature_latents import (
    on_grid,
    read_latents,
    require_normal,
    scale_of,
    statistics_of,
    without_affine,
)
from trainer.data.groups import geometry_of, open_data
from trainer.data.loader import Loader
from trainer.evaluation.generate.generate import GenerateConfig, generate
from trainer.evaluation.probing.sweep import SweepConfig, sweep
from trainer.loop.train import train
from trainer.run.folder import RunFolder
from trainer.run.latent_map import map_of
from trainer.run.opened import open_run
from trainer.run.settings import remember

CPU = torch.device("cpu")
RIT: dict[str, Any] = {
    "data.latents": FEATURES, "model.kind": "rit", "model.patch": 1, "model.class_token": True, "model.context": 3,
    "model.context_block": 2, "loss.projection_weight": (0.0,), "loss.time_shift": 0.0, "sample.shift": 0.0,
}  # fmt: skip
DITDH: dict[str, Any] = {
    "data.latents": FEATURES, "model.kind": "ditdh", "model.patch": 1, "model.head_width": 32, "model.head_depth": 1,
    "model.head_heads": 2, "loss.projection_weight": (0.0,),
}  # fmt: skip
NORM = FinalNorm(
    weight=np.linspace(-1.5, 2.0, 24, dtype=np.float32), bias=np.linspace(-3, 3, 24, dtype=np.float32)
)  # no channel's weight is 0


def write(
    root: Path,
    tokens: np.ndarray,
    *,
    layer: str,
    codec: Codec = PLAIN,
    norm: FinalNorm | None = None,
    encoder: str = "test",
) -> None:
    """A store of features (N, V, 64, 24), whose first is the class token too, with counted statistics."""
    views = ("original", "hflip")[: tokens.shape[1]]
    store = StoreLayout(n_rows=len(tokens), views=views, resolution=128, shard_rows=16)
    layout, identity = make_layouts(store, codec=codec)[FEATURES], make_identities(codec=codec)[FEATURES]
    identity = dataclasses.replace(identity, layer=layer, encoder=encoder)  # type: ignore[call-arg]
    keys = [str(row) for row in range(len(tokens))]
    arrays = {"cls": tokens[:, :, 0].astype(np.float16), **encoded(tokens.astype(np.float32), codec)}
    with Staging(root) as staging:
        index = make_index(keys, [row % 5 for row in range(len(keys))], [""] * len(keys), keys, [0] * len(keys))
        create_store(root, store, index, {}, staging.run_id)
        more = {ATTRIBUTE: norm.packed()} if norm is not None else {}
        digest = create_group(root, layout, identity, {}, staging.run_id, more=more)
        staging.prepare(FEATURES)
        for unit in range(store.n_units):
            cut = {n: array[store.unit_rows(unit).start : store.unit_rows(unit).stop] for n, array in arrays.items()}
            publish_unit(root, layout, digest, unit, cut, [], staging.run_id, {})
    assert storage_main(["statistics", str(root), FEATURES, "--places"]) == 0


def plain_tokens(n: int = 48) -> np.ndarray:
    """Like those of a final norm without its affine part, places and channels not alike."""
    rng = np.random.default_rng(5)
    mean, deviation = rng.standard_normal((64, 24)), np.exp(0.5 * rng.standard_normal((64, 24)))
    return (mean + deviation * rng.standard_normal((n, 1, 64, 24))).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features after the affine norm, as they are stored for REPA, that say what it is."""
    root = tmp_path_factory.mktemp("features") / "store"
    write(root, plain_tokens() * NORM.weight + NORM.bias, layer=AFFINE, norm=NORM)
    return root


@pytest.fixture
def group(store: Path) -> Iterator[GroupReader]:
    opened = open_store(store).group(FEATURES)
    yield opened
    opened.close()


# ---- the public implementation's latents ------------------------------------------------------------------------


def reference_encoder(tmp_path: Path, norm: str) -> tuple[Any, dict[str, Tensor]]:
    vectors = load_reference("rae_latents")
    width, depth, heads, registers, _, _ = vectors["config"].tolist()
    assert registers == 4
    path = tmp_path / "weights.safetensors"
    save_file({k.removeprefix("state/"): v for k, v in vectors.items() if k.startswith("state/")}, path)
    spec = registry.resolve_features(f"dinov2-vitb14-reg:norm={norm}", weights=path)
    assert spec.vision is not None
    settings = {**spec.vision.settings, "embed_dim": width, "depth": depth, "num_heads": heads}
    spec = dataclasses.replace(
        spec, vision=dataclasses.replace(spec.vision, width=width, depth=depth, settings=settings)
    )
    return spec, vectors


def test_they_are_the_public_implementation_s(tmp_path: Path) -> None:
    """From pixels to latents, by an encoder without the affine part, and by one with it whose weights are undone."""
    latents = {}
    for norm in ("plain", "affine"):
        spec, vectors = reference_encoder(tmp_path, norm)
        statistics = places.PlaceStatistics(
            mean=vectors["latent_mean"].double().numpy(), var=vectors["latent_var"].double().numpy()
        )
        identity: Any = registry.describe(spec, resolution=256)
        encoder: Any = registry.load(spec, resolution=256, device=CPU)
        patches, cls = encoder.encode_tokens(vectors["images_uint8_nhwc"])
        attributes = registry.attributes(spec)
        group: Any = type("Group", (), {"identity": identity, "attributes": attributes, "path": "features/x"})
        stored = on_grid(patches, (16, 16))
        scale = scale_of(group, statistics, source="")
        latents[norm] = scale.normalised(stored)
        decoded = without_affine(scale.stored(vectors["latents"]), group).flatten(2).transpose(1, 2)
        torch.testing.assert_close(decoded, vectors["decoder_input"], atol=1e-4, rtol=0)
        torch.testing.assert_close(without_affine(stored, group), vectors["latents_raw"], atol=1e-4, rtol=0)
        torch.testing.assert_close(latents[norm], vectors["latents"], atol=1e-4, rtol=1e-4)
        if norm == "plain":
            assert attributes == {}
            assert identity.layer == PLAIN_NORM
            torch.testing.assert_close(cls, vectors["cls_raw"], atol=1e-4, rtol=0)
    assert (latents["plain"] - latents["affine"]).abs().max() < 1e-4


def test_what_a_name_says_of_the_norm() -> None:
    spec = registry.resolve_features("dinov2-vits14-reg:norm=plain")
    assert (spec.store_name, spec.plain_norm) == ("dinov2-vits14-reg-plain", True)
    assert registry.resolve_features("dinov2-vits14-reg:norm=affine").store_name == "dinov2-vits14-reg"
    for wrong in ("dinov2-vits14-reg:norm=none", "dinov2-vits14-reg:norm=plain:layer=8"):
        with pytest.raises(UserError, match="norm= is one of affine, plain, and of layer=norm"):
            registry.resolve_features(wrong)


# ---- the map ----------------------------------------------------------------------------------------------------


def test_tokens_become_latents_of_mean_0_and_deviation_1_and_go_back(store: Path, group: GroupReader) -> None:
    statistics, source = statistics_of(open_store(store), group, Path(), class_token=True)
    assert source == "all tokens of the group"
    rows = np.arange(48)
    stored = read_latents(group, rows)
    assert torch.equal(stored[:, :, 2, 5], torch.from_numpy(group.tokens(rows))[:, 2 * 8 + 5])
    n = torch.from_numpy(plain_tokens()[:, 0]).double()
    want = (n - n.mean(0)) / (n.var(0, correction=0) + 1e-5).sqrt()
    scale = scale_of(group, statistics, source=source)
    x = scale.normalised(stored)
    torch.testing.assert_close(x.double(), on_grid(want, (8, 8)), atol=0.03, rtol=0)  # of float16's rounding of f
    torch.testing.assert_close(x.mean(0), torch.zeros(24, 8, 8), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(24, 8, 8), atol=1e-3, rtol=0)
    torch.testing.assert_close(scale.stored(x), stored, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(without_affine(stored, group).double(), on_grid(n, (8, 8)), atol=0.03, rtol=0)
    class_tokens = torch.from_numpy(group.gather(rows, 0, ["cls"])["cls"])
    torch.testing.assert_close(scale.normalised_class(class_tokens), x[:, :, 0, 0], atol=1e-3, rtol=0)


def test_a_published_file_is_of_tokens_without_the_affine_part(store: Path, group: GroupReader, tmp_path: Path) -> None:
    counted, _ = statistics_of(open_store(store), group, Path(), class_token=True)
    file = tmp_path / "stats.pt"
    torch.save({name: torch.from_numpy(values).float()[None] for name, values in counted.arrays().items()}, file)
    published, source = statistics_of(open_store(store), group, file, class_token=True)
    assert source == str(file)
    np.testing.assert_allclose(published.mean, counted.mean, rtol=1e-6)
    x, y = (scale_of(group, of, source="").normalised(read_latents(group, np.arange(4))) for of in (published, counted))
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    torch.save({"mean": torch.zeros(24, 8, 8), "var": torch.ones(24, 8, 8)}, file)
    with pytest.raises(UserError, match=r"have no class tokens, which --model.class-token needs; take a file that has"):
        statistics_of(open_store(store), group, file, class_token=True)
    torch.save({"mean": torch.zeros(24, 16, 16), "var": torch.ones(24, 16, 16)}, file)
    with pytest.raises(UserError, match=r"mean is \[24, 16, 16\], and the features are \[24, 8, 8\]; use the stat"):
        statistics_of(open_store(store), group, file, class_token=False)


def test_a_norm_that_nobody_recorded(tmp_path: Path) -> None:
    """Its statistics absorb it, but for what is added to variances; a published file's do not, nor does a decoder."""
    root = tmp_path / "store"
    write(root, plain_tokens() * NORM.weight + NORM.bias, layer=AFFINE)
    group = open_store(root).group(FEATURES)
    statistics, _ = statistics_of(open_store(root), group, Path(), class_token=True)
    x = scale_of(group, statistics, source="").normalised(read_latents(group, np.arange(48)))
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(24, 8, 8), atol=0.1, rtol=0)
    with pytest.raises(UserError, match=r"does not say what that is, and x.pt is of tokens without; precompute with"):
        statistics_of(open_store(root), group, Path("x.pt"), class_token=True)
    with pytest.raises(UserError, match=r"and a decoder takes tokens without; precompute it again"):
        without_affine(x, group)
    group.close()


def test_derived_groups_take_the_norm_over(store: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(store, root)
    child = derive_group(root, FEATURES, "int8", n_workers=1)
    group = open_store(root).group(child)
    norm = final_norm_of(group.attributes, group.identity, child)
    assert norm is not None
    np.testing.assert_array_equal(norm.weight, NORM.weight)
    group.close()


@pytest.mark.parametrize("spelling", ["float16", "int8", "rotated4", "rotated1"])
def test_codes_whose_error_would_be_felt_are_refused(tmp_path: Path, spelling: str) -> None:
    """What is said of the error is what it is, of tokens that are known."""
    tokens = plain_tokens()
    write(tmp_path, tokens, layer=PLAIN_NORM, codec=CODECS[spelling])
    group = open_store(tmp_path).group(FEATURES)
    statistics, _ = statistics_of(open_store(tmp_path), group, Path(), class_token=False)
    scale, rows = scale_of(group, statistics, source="s"), np.arange(48)
    exact = scale.normalised(on_grid(torch.from_numpy(tokens[:, 0]), (8, 8)))
    error = float((scale.normalised(read_latents(group, rows)) - exact).square().mean().sqrt())
    if spelling.startswith("rotated"):
        with pytest.raises(UserError, match=rf"is in {spelling} codes, whose error in normalised tokens is 0\.\d+, as"):
            require_normal(group, ValidRows(48, np.array([])), scale, accept=False)
    told = require_normal(group, ValidRows(48, np.array([])), scale, accept=True)
    if spelling == "float16":
        assert "codes" not in told
        assert error < 1e-3
    else:
        assert float(told.split(" codes are ")[1].split(" ")[0]) == pytest.approx(error, rel=0.25)
    assert require_normal(group, ValidRows(48, np.array([])), scale, accept=spelling != "int8")
    group.close()


def test_codes_that_spoil_one_channel_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel far weaker than those that share its factor is nothing but codes, which hundreds of others hide."""
    monkeypatch.setattr("trainer.data.feature_latents.MOST_LEVEL", 0.5)  # there are 24 here
    tokens = plain_tokens()
    tokens[..., 5] /= 150
    write(tmp_path, tokens, layer=PLAIN_NORM, codec=CODECS["int8"])
    group = open_store(tmp_path).group(FEATURES)
    statistics, _ = statistics_of(open_store(tmp_path), group, Path(), class_token=False)
    scale = scale_of(group, statistics, source="s")
    with pytest.raises(UserError, match=r"is in int8 codes, .* in channel 5; .*: store float16, or pass"):
        require_normal(group, ValidRows(48, np.array([])), scale, accept=False)
    group.close()


def test_statistics_of_other_features_are_refused(store: Path, group: GroupReader) -> None:
    statistics, _ = statistics_of(open_store(store), group, Path(), class_token=False)
    other = dataclasses.replace(statistics, var=statistics.var * 9)
    with pytest.raises(UserError, match=r"is normalised by s, after which channel \d+ has mean \S+ and deviation 0\.3"):
        require_normal(group, ValidRows(48, np.array([])), scale_of(group, other, source="s"), accept=False)


# ---- a run ------------------------------------------------------------------------------------------------------


def test_a_step_reads_one_group_and_no_vae_latents(store: Path, tmp_path: Path) -> None:
    """There are none in this store."""
    config = micro(store, tmp_path / "run", **RIT)
    data = open_data(config)
    assert sorted(data.readers(with_targets=True)) == [f"{FEATURES}/cls", f"{FEATURES}/patches"]
    with Loader(data, seed=0, batch=8, start=0, stop=2, rank=0, world_size=1, device=CPU, prefetch=1) as loader:
        for batch in loader:
            rows = batch.rows.numpy()
            assert torch.equal(batch.moments, read_latents(data.latents, rows).half())
            assert batch.class_tokens is not None
            assert np.array_equal(batch.class_tokens, data.latents.gather(rows, 0, ["cls"])["cls"])
            assert batch.targets == ()
    geometry = geometry_of(config, data)
    assert (geometry.channels, geometry.input_size, geometry.class_width) == (24, 8, 24)
    data.close()


def test_either_view_of_an_image_is_learned(tmp_path: Path) -> None:
    """Where the store has its mirror image too; its class token goes with it, and both are in the statistics."""
    views = np.concatenate([plain_tokens(), 3 + plain_tokens()[:, :, ::-1]], axis=1)
    write(tmp_path / "store", views, layer=PLAIN_NORM)
    data = open_data(micro(tmp_path / "store", tmp_path / "run", **RIT))
    statistics, _ = statistics_of(data.store, data.latents, Path(), class_token=True)
    mean = views.astype(np.float16).astype(np.float64).mean((0, 1)).T.reshape(24, 8, 8)
    np.testing.assert_allclose(statistics.mean, mean, atol=1e-4)
    seen = set()
    with Loader(data, seed=0, batch=8, start=0, stop=6, rank=0, world_size=1, device=CPU, prefetch=1) as loader:
        for batch in loader:
            assert batch.class_tokens is not None
            for row, latents, class_token in zip(batch.rows, batch.moments, batch.class_tokens, strict=True):
                of_views = on_grid(torch.from_numpy(views[int(row)]), (8, 8)).half()
                (view,) = [view for view in (0, 1) if torch.equal(latents, of_views[view])]
                assert np.array_equal(class_token, views[int(row), view, 0].astype(np.float16))
                seen.add(view)
    assert seen == {0, 1}
    data.close()


def test_aligned_with_another_encoder(tmp_path: Path) -> None:
    """Each group is read once, also where latents and target are the same; class tokens are not aligned."""
    make_store(tmp_path / "store")
    storage_main(["statistics", str(tmp_path / "store"), FEATURES, "--places"])
    config = micro(tmp_path / "store", tmp_path / "run", **{**RIT, "loss.projection_weight": (0.5,)}, steps=2)
    data = open_data(config)
    assert sorted(data.readers(with_targets=True)) == [f"{FEATURES}/cls", f"{FEATURES}/patches"]
    data.close()
    last = train(config)["last"]
    parts = last["denoising_loss"] + 0.03 * last["class_denoising_loss"] + 0.5 * last["alignment_loss"]
    assert last["loss"] == pytest.approx(parts)


def test_a_run_in_memory_is_the_same(store: Path, tmp_path: Path) -> None:
    for resident in ("stream", "ram"):
        train(micro(store, tmp_path / resident, steps=3, **RIT, **{"data.resident": resident}))
    assert_same_run(tmp_path / "stream", tmp_path / "ram")


def test_a_run_keeps_its_statistics(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the store has lost them; with neither it says so. The shift is that of the latents' dimension."""
    root, whole, parts = tmp_path / "store", tmp_path / "whole", tmp_path / "parts"
    shutil.copytree(store, root)
    train(micro(root, whole, steps=4, **RIT))
    assert "a channel and place of 8², by statistics " in capsys.readouterr().out
    train(micro(root, parts, steps=2, **RIT))
    (root / places.key_of(FEATURES)).unlink()
    train(micro(root, parts, steps=4, **RIT))
    assert_same_run(whole, parts)
    run = open_run(whole)
    run.data.close()
    assert run.config.loss.time_shift == run.config.sample.shift == pytest.approx((24 * 64 / 4096) ** 0.5)
    assert str(run.scale) == str(map_of(run.config, run.data, parts))
    kept = RunFolder(parts).latent_statistics
    copy = kept.read_bytes()
    kept.unlink()
    with pytest.raises(UserError, match=r"has no statistics of its places, by which latents are normalised; run `pyt"):
        train(micro(root, parts, steps=5, **RIT))
    group = open_store(root).group(FEATURES)
    counted = places.count(group, 1)
    with Staging(root) as staging:
        others = dataclasses.replace(counted, var=1.01 * counted.var)
        places.publish(open_root(root), group, others, staging.run_id)
    group.close()
    with pytest.raises(
        UserError, match=r"was trained with other statistics of \S+ than all tokens of the group .*; res"
    ):
        train(micro(root, parts, steps=5, **RIT))
    with pytest.raises(UserError, match=r"was trained with other statistics of"):
        generate(GenerateConfig(run=parts, n=1, device="cpu"))
    kept.write_bytes(copy)
    train(micro(root, parts, steps=5, **RIT))
    train(micro(root, whole, steps=5, **RIT))  # by its own copy
    assert_same_run(whole, parts)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {**DITDH, "model.head_width": 16},
            "--model.head-width 16 is below the 24 numbers of a token of features/tin",
        ),
        (
            {"data.latents": FEATURES, "model.patch": 2, "loss.projection_weight": (0.0,)},
            "--model.width 32 is below the 96 numbers .* give at least 96, or --model.kind rit, which predicts",
        ),
        ({**RIT, "data.latent_normalisation": "scale"}, "is normalised by channel and place; leave"),
        ({**RIT, "data.latents": "features/none"}, "has no features/none"),
        ({**RIT, "model.heads": 16}, r"--model.width over its heads must be a multiple of 4 .* got 32 over 16 = 2;"),
        (
            {**DITDH, "model.head_heads": 16},
            r"--model.head-width over its heads must be a multiple of 4 .* --model.kind ditdh, got 32 over 16 = 2;",
        ),
        (
            {"data.latents": FEATURES, "model.patch": 1, "model.class_token": True},
            f"of --model.kind sit joins an autoencoder's latents, and {FEATURES} is of an encoder, whose own class",
        ),
        (
            {"data.latent_statistics": Path("x.pt")},
            "--data.latent-statistics is of features as latents; pass --data",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(store: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        train(micro(store, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)


def test_what_a_store_lacks_is_one_line(shared_tiny_store: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "bare")
    with pytest.raises(UserError, match=r"run `python -m storage statistics \S+ features/tiny-vit --places` once, or"):
        train(micro(tmp_path / "bare", tmp_path / "run", **RIT))
    with pytest.raises(UserError, match=r"and latents/tiny-vae is of an autoencoder; pass --data.latents feat"):
        train(micro(shared_tiny_store, tmp_path / "run", **{**RIT, "data.latents": ""}))
    write(tmp_path / "features", np.random.default_rng(0).normal(size=(16, 1, 64, 24)), layer=PLAIN_NORM)
    for changes in (RIT, {}):
        with pytest.raises(UserError, match=f"has no latents; pass --data.latents {FEATURES} to learn features as la"):
            train(micro(tmp_path / "features", tmp_path / "run", **{**changes, "data.latents": ""}))


def test_statistics_that_are_gone_or_damaged_are_named_before_anything_is_drawn(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(micro(store, tmp_path / "run", **{**RIT, "steps": 1, "sample.sampler": "ode"}))
    copy = RunFolder(tmp_path / "run").latent_statistics
    copy.write_bytes(copy.read_bytes()[:1000])
    loaded: list[object] = []
    monkeypatch.setattr("trainer.evaluation.generate.generate.load_model", lambda *given: loaded.append(given))
    monkeypatch.setattr("trainer.evaluation.probing.sweep.pooled_features", lambda *given: loaded.append(given))
    drawn = GenerateConfig(run=tmp_path / "run", n=1, device="cpu", vae=str(tmp_path))
    measured = SweepConfig(n=16, device="cpu", features=FEATURES.partition("/")[2])
    for measure in (lambda: generate(drawn), lambda: sweep(tmp_path / "run", measured, ["probe"])):
        with pytest.raises(StoreError, match=r"latent-statistics.safetensors is damaged .*; restore it, or remove it"):
            measure()
    assert not loaded


def test_a_run_that_goes_on_otherwise_is_told_what_is_other(store: Path, tmp_path: Path) -> None:
    """Not that statistics, or features that nobody named, do not fit what is asked for now."""
    run = tmp_path / "run"
    aligned = {**RIT, "data.features": (FEATURES.partition("/")[2],), "loss.projection_weight": (0.5,)}
    train(micro(store, run, **{**aligned, "steps": 1}))
    vanilla = micro(store, run, **{**RIT, "steps": 2})
    with pytest.raises(
        UserError, match=r"was made otherwise \(data.features: was .*loss.projection_weight: was 0.5, is"
    ):
        train(vanilla)
    other = f"{FEATURES}-again"
    remembered = remember(micro(store, run, **{**aligned, "data.latents": other}))
    assert not remembered.data.latent_statistics_sha256
    assert remember(micro(store, run, **aligned)).data.latent_statistics_sha256
