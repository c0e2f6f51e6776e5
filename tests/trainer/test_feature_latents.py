"""An encoder's features as latents: the public implementation's, how they are normalised, and which codes are taken."""

from __future__ import annotations

import dataclasses
import re
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
from storage import GroupReader, open_store, places
from storage.base.errors import UserError
from storage.codecs import CODECS
from storage.derive import derive_group
from storage.final_norm import AFFINE, FinalNorm, final_norm_of
from storage.final_norm import PLAIN as PLAIN_NORM
from storage.order import ValidRows
from tests.stores import FEATURES
from tests.trainer.feature_stores import NORM, plain_tokens, write, write_affine
from tests.trainer.reference import load_reference
from trainer.data.feature_latents import (
    _class_tokens_looked_at,
    _require_mean_and_deviation,
    _require_small_error,
    on_grid,
    read_latents,
    require_normal,
    scale_of,
    statistics_of,
    without_affine,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("features") / "store"
    write_affine(root)
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
    with pytest.raises(UserError, match=r"and a decoder takes tokens without; precompute with"):
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


def test_rounding_that_spoils_a_channel_is_refused(tmp_path: Path) -> None:
    """Float16 of a channel that hardly varies beside its mean: what undoing the norm makes of it is rounding."""
    weight = np.ones(24, np.float32)
    weight[7] = 2e-3
    norm = FinalNorm(weight=weight, bias=np.full(24, 6, np.float32))
    tokens = plain_tokens()
    write(tmp_path, tokens * norm.weight + norm.bias, layer=AFFINE, norm=norm)
    group = open_store(tmp_path).group(FEATURES)
    statistics, _ = statistics_of(open_store(tmp_path), group, Path(), class_token=False)
    scale = scale_of(group, statistics, source="s")
    says = r"is in float16 numbers, .* and (0\.\d+) in channel 7; .*: precompute with --features ENCODER:norm=plain"
    with pytest.raises(UserError, match=says) as refused:
        require_normal(group, ValidRows(48, np.array([])), scale, accept=False)
    exact = scale.normalised(on_grid(torch.from_numpy(tokens[:, 0] * norm.weight + norm.bias), (8, 8)))
    error = scale.normalised(read_latents(group, np.arange(48))) - exact
    said = re.search(says, str(refused.value))
    assert said is not None
    assert float(said[1]) == pytest.approx(float(error[:, 7].square().mean().sqrt()), rel=0.15)
    group.close()


@pytest.mark.parametrize(("mean", "var"), [(50.0, 1.0), (0.0, 1e6), (0.0, 1e-6)])
def test_statistics_of_other_class_tokens_are_refused(store: Path, group: GroupReader, mean: float, var: float) -> None:
    statistics, _ = statistics_of(open_store(store), group, Path(), class_token=True)
    assert statistics.mean_class is not None
    assert statistics.var_class is not None
    other = dataclasses.replace(
        statistics, mean_class=statistics.mean_class + mean, var_class=statistics.var_class * var
    )
    require_normal(group, ValidRows(48, np.array([])), scale_of(group, statistics, source="s"), accept=False)
    with pytest.raises(UserError, match=r"^the class token of features/\S+ is normalised by s, after which"):
        require_normal(group, ValidRows(48, np.array([])), scale_of(group, other, source="s"), accept=False)


def test_the_class_token_of_coded_features_is_float16(tmp_path: Path) -> None:
    """What is said of it is of the class token, and of the channel that is off."""
    tokens = plain_tokens()
    tokens[:, :, 0, 3] = 2000 + np.linspace(-1, 1, 48)[:, None]
    write(tmp_path, tokens, layer=PLAIN_NORM, codec=CODECS["int8"])
    group = open_store(tmp_path).group(FEATURES)
    statistics, _ = statistics_of(open_store(tmp_path), group, Path(), class_token=True)
    scale = scale_of(group, statistics, source="s")
    looked_at = _class_tokens_looked_at(group, np.arange(48), scale)
    with pytest.raises(UserError, match=r"^it is in float16 numbers, .* in channel 3; .*: take features of another"):
        _require_small_error("it", looked_at)
    off = dataclasses.replace(looked_at, mean=np.zeros(24), std=np.ones(24))
    off.mean[:2], off.std[:2] = (0.9, 1.1), (0.6, 1)
    with pytest.raises(UserError, match=r"after which channel 1 has mean 1\.1 and deviation 1;"):
        _require_mean_and_deviation("it", off, scale)
    group.close()


def test_statistics_of_other_features_are_refused(store: Path, group: GroupReader) -> None:
    statistics, _ = statistics_of(open_store(store), group, Path(), class_token=False)
    other = dataclasses.replace(statistics, var=statistics.var * 9)
    with pytest.raises(UserError, match=r"is normalised by s, after which channel \d+ has mean \S+ and deviation 0\.3"):
        require_normal(group, ValidRows(48, np.array([])), scale_of(group, other, source="s"), accept=False)
