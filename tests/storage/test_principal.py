"""`python -m storage derive --pca`: components are those of a singular value decomposition in float64, however made."""

from __future__ import annotations

import base64
import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import StoreError, UserError, open_store
from storage.__main__ import main
from storage.base.console import EXIT_OK
from storage.codecs import CODECS
from storage.codecs.int8 import INT8
from storage.derive import derive_group
from storage.order import Order, ValidRows
from storage.principal import Basis, Request, Sums, basis_from, basis_of
from storage.statistics import group_sums
from storage.verify import verify
from tests.storage.test_derive import FAILED, republish, shards, unlike
from tests.stores import FEATURES, decoded, make_store

DATA = Path(__file__).parents[1] / "data"
N_TOKENS, WIDTH = 64, 24
KILLS = 20


def request(k: int, *, sample_rows: int = 1000, seed: int = 0, standardised: bool = False) -> Request:
    return Request(components=k, sample_rows=sample_rows, seed=seed, standardised=standardised)


def coloured(n_rows: int = 40, n_views: int = 1, width: int = WIDTH) -> np.ndarray:
    """Tokens whose channels hang together, with means far from zero, so that the leading components differ."""
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((n_rows, n_views, N_TOKENS, width)) * 0.8 ** np.arange(width)
    return (mixed @ np.linalg.qr(rng.standard_normal((width, width)))[0] + 30 * rng.standard_normal(width)).astype(
        "<f2"
    )


def by_svd(tokens: np.ndarray, k: int, standardised: bool = False) -> Basis:
    """The same by another way: singular values of all tokens (n, D) at once."""
    tokens = tokens.astype(np.float64)
    mean = tokens.mean(0)
    deviation = tokens.std(0) if standardised else np.ones(tokens.shape[1])
    deviation[deviation == 0] = 1
    _, singular, components = np.linalg.svd((tokens - mean) / deviation, full_matrices=True)
    values = np.zeros(tokens.shape[1])
    values[: len(singular)] = singular**2 / max(1, len(tokens) - 1)
    for component in components[:k]:
        component *= np.sign(component[np.abs(component).argmax()])
    return Basis(
        mean=mean, deviation=deviation, components=components[:k], eigenvalues=values[:k],
        total_variance=values.sum(keepdims=True),
    )  # fmt: skip


def assert_alike(found: Basis, expected: Basis) -> None:
    for name in ("mean", "deviation", "eigenvalues", "total_variance"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.components, expected.components, atol=1e-7)


@pytest.mark.parametrize("standardised", [False, True])
@pytest.mark.parametrize("n_views", [1, 2])
def test_tokens_are_the_components_that_svd_finds(tmp_path: Path, n_views: int, standardised: bool) -> None:
    tokens = coloured(n_views=n_views)
    make_store(tmp_path, n_views=n_views, failed_rows=FAILED, features={"patches": tokens})
    wanted = request(5, standardised=standardised)
    paths = [
        derive_group(tmp_path, FEATURES, components=wanted, name=f"by-{n}", n_workers=n) for n in (1, 2)
    ]  # fmt: skip
    assert unlike(*(shards(tmp_path, path) for path in paths)) == []
    group, again = (open_store(tmp_path).group(path) for path in paths)
    assert group.identity == again.identity
    basis = basis_of(group)
    valid = [row for row in range(40) if row not in FAILED]
    expected = by_svd(tokens[valid].reshape(-1, WIDTH), 5, standardised)
    assert_alike(basis, expected)
    for view in range(n_views):
        found = group.tokens(np.array(valid), view)
        assert found.shape == (len(valid), N_TOKENS, 5)
        of_svd = ((tokens[valid, view] - expected.mean) / expected.deviation) @ expected.components.T
        np.testing.assert_allclose(found, of_svd, rtol=1e-3, atol=1e-3 * np.abs(of_svd).max())
    assert [failure.row for failure in group.failures] == FAILED
    assert list(verify(tmp_path, deep=True, n_workers=1)) == []
    sums, without = group_sums(open_store(tmp_path).root, group.layout, group.identity_digest, group.identity)
    assert without == 0
    spread = np.sqrt(basis.eigenvalues)
    np.testing.assert_allclose(sums["patches"].std, spread, rtol=1e-3)
    np.testing.assert_allclose(sums["patches"].mean / spread, 0, atol=1e-3)


def test_the_identity_names_parent_request_and_basis_and_the_sample_is_keyed(tmp_path: Path) -> None:
    tokens = coloured()
    make_store(tmp_path, failed_rows=FAILED, features={"patches": tokens})
    parent = open_store(tmp_path).group(FEATURES)
    wanted = request(3, sample_rows=7, seed=5)
    group = open_store(tmp_path).group(derive_group(tmp_path, FEATURES, components=wanted, n_workers=1))
    assert group.path == f"{FEATURES}-pca3"
    assert list(group.arrays) == ["patches"]
    origin = {
        "identity_digest": parent.identity_digest,
        "dtype": "float16",
        "pca": {
            "components": 3, "sample_rows": 7, "seed": 5, "standardised": False, "basis_sha256": basis_of(group).digest,
        },
    }  # fmt: skip
    assert group.identity.plain() == {**parent.identity.plain(), "width": 3, "derived_from": origin}
    valid = ValidRows(40, np.array(FAILED))
    rows = valid.rows(Order(len(valid), 5).rows(0, np.arange(7)))
    assert_alike(basis_of(group), by_svd(tokens[rows].reshape(-1, WIDTH), 3))
    other = derive_group(tmp_path, FEATURES, components=request(3, sample_rows=7, seed=6), name="o", n_workers=1)
    assert basis_of(open_store(tmp_path).group(other)).digest != basis_of(group).digest


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 40),
    n=st.integers(1, 60),
    seed=st.integers(0, 2**32),
    standardised=st.booleans(),
    constant=st.sampled_from(["none", "some", "all"]),
    data=st.data(),
)
def test_any_width_and_constant_channels(
    width: int, n: int, seed: int, standardised: bool, constant: str, data: st.DataObject
) -> None:
    """Orthonormal rows, values in order, and back come the nearest tokens of that rank; of all components, all."""
    rng = np.random.default_rng(seed)
    k = data.draw(st.integers(1, width))
    tokens = (rng.standard_normal((n, width)) * rng.uniform(0.1, 10, width) + rng.normal(0, 100, width)).astype("<f2")
    if constant != "none":
        tokens[:, :: 1 if constant == "all" else 3] = tokens[0, :: 1 if constant == "all" else 3]
    shift = tokens[: max(1, n // 2)].mean(0, dtype=np.float64)
    sums = Sums.of(tokens[: n // 3], shift) + Sums.of(tokens[n // 3 :], shift)
    basis = basis_from((shift, request(k, standardised=standardised)), sums)
    expected = by_svd(tokens, k, standardised)
    np.testing.assert_allclose(basis.components @ basis.components.T, np.eye(k), atol=1e-9)
    tolerance = 1e-8 * max(1.0, float(expected.total_variance[0]))
    np.testing.assert_allclose(basis.eigenvalues, expected.eigenvalues, rtol=1e-7, atol=tolerance)
    assert (np.diff(basis.eigenvalues) <= tolerance).all()
    signs = basis.components[np.arange(k), np.abs(basis.components).argmax(1)]
    assert (signs > 0).all()
    restored = basis.restore(basis.project(tokens).astype(np.float64))
    lost = (((restored - tokens) / basis.deviation) ** 2).sum()
    not_kept = (expected.total_variance[0] - expected.eigenvalues.sum()) * max(1, n - 1)
    np.testing.assert_allclose(lost, not_kept, rtol=1e-3, atol=1e-3 * n * max(1.0, float(expected.total_variance[0])))
    if constant == "all":
        assert np.abs(basis.project(tokens)).max() < 1e-6
    unpacked = Basis.unpacked(basis.packed())
    assert unpacked.digest == basis.digest
    np.testing.assert_array_equal(unpacked.components, basis.components)


def test_redis_fit_and_redis_projection() -> None:
    """`tests/data/redi_pca.npz`, of the public method: components but for their signs, and what they make of tokens."""
    theirs = np.load(DATA / "redi_pca.npz")
    features = theirs["fit/features"]
    shift = features[:1].mean(0, dtype=np.float64)
    basis = basis_from((shift, request(features.shape[1], standardised=True)), Sums.of(features, shift))
    np.testing.assert_allclose(basis.mean, theirs["fit/feature_mean"], atol=1e-5)
    np.testing.assert_allclose(basis.deviation, theirs["fit/feature_std"], rtol=1e-5)
    np.testing.assert_allclose(basis.eigenvalues, theirs["fit/explained_variance"], atol=1e-6)  # a fit in float32
    signs = np.sign((basis.components * theirs["fit/components"]).sum(1))
    np.testing.assert_allclose(basis.components, signs[:, None] * theirs["fit/components"], atol=2e-5)
    given = Basis(
        mean=theirs["pca/feature_mean"] + theirs["pca/feature_std"] * theirs["pca/mean"].astype(np.float64),
        deviation=theirs["pca/feature_std"].astype(np.float64),
        components=theirs["pca/components"].astype(np.float64),
        eigenvalues=np.ones(8), total_variance=np.ones(1),
    )  # fmt: skip
    found = given.project(theirs["dino"]).reshape(-1, 16, 16, 8).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(twice_as_large(twice_as_large(found).swapaxes(2, 3)).swapaxes(2, 3), theirs["joint"],
                               atol=1e-4)  # fmt: skip


def twice_as_large(images: np.ndarray) -> np.ndarray:
    """The last axis interpolated linearly to twice its length, between centres of pixels, as the method lays them."""
    before = np.concatenate([images[..., :1], images[..., :-1]], axis=-1)
    after = np.concatenate([images[..., 1:], images[..., -1:]], axis=-1)
    pairs = np.stack([0.75 * images + 0.25 * before, 0.75 * images + 0.25 * after], axis=-1)
    return pairs.reshape(*images.shape[:-1], -1)


def test_in_a_codec_and_of_int8(tmp_path: Path) -> None:
    """Codes are of the components; a parent in int8 is one of numbers, one in rotated codes is refused."""
    data = make_store(tmp_path, codec=INT8)[FEATURES]
    child = derive_group(tmp_path, FEATURES, "rotated4", components=request(8), n_workers=1)
    assert child == f"{FEATURES}-pca8-rotated4"
    group = open_store(tmp_path).group(child)
    rows, views = np.arange(40), np.zeros(40, dtype=np.int64)
    exact = basis_of(group).project(decoded(data, INT8)[:, 0])
    expected = CODECS["rotated4"].encode(exact, rows, views)
    for name, array in expected.items():
        np.testing.assert_array_equal(group.gather(rows, views)[name], array)
    assert group.identity.codec == {"name": "rotated", "bits": 4}
    assert group.identity.derived_from["codec"]["name"] == "int8"
    with pytest.raises(UserError, match="errors would add up"):
        derive_group(tmp_path, child, components=request(2), n_workers=1)
    with pytest.raises(UserError, match=r"packs 8 channels into a byte, which do not divide 3"):
        derive_group(tmp_path, FEATURES, "rotated1", components=request(3), n_workers=1)


def test_nothing_is_derived_from_components(tmp_path: Path) -> None:
    """A further group would not have their basis; at once it does."""
    make_store(tmp_path)
    child = derive_group(tmp_path, FEATURES, components=request(8, sample_rows=7), n_workers=1)
    asked = r"--pca 8 --pca-sample 7 --pca-seed 0\)"
    said = rf"{child} holds principal components, .*; derive from {FEATURES} at once, .*{asked}"
    for codec, components in (("rotated4", None), ("", request(4))):
        with pytest.raises(UserError, match=said):
            derive_group(tmp_path, child, codec, components=components, n_workers=1)
    assert open_store(tmp_path).groups() == ["latents/tiny-vae", FEATURES, child]
    at_once = derive_group(tmp_path, FEATURES, "rotated4", components=request(8, sample_rows=7), n_workers=1)
    assert basis_of(open_store(tmp_path).group(at_once)).digest == basis_of(open_store(tmp_path).group(child)).digest


def test_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path)
    assert main(["derive", str(tmp_path), "tiny-vit", "--pca", "4", "--pca-standardise", "--workers", "1"]) == EXIT_OK
    assert main(["info", f"{tmp_path}/{FEATURES}-pca4"]) == EXIT_OK
    out = capsys.readouterr().out
    for what in ("pca.basis_sha256 ", "pca.standardised True", "patches over 4 dimensions", "3/3 done"):
        assert what in out
    assert main(["derive", str(tmp_path), "tiny-vit", "--pca", "4", "--pca-standardise", "--workers", "1"]) == EXIT_OK
    assert "0 of 3 units new" in capsys.readouterr().out


def test_what_is_refused(tmp_path: Path) -> None:
    tokens = coloured()
    tokens[21, 0, 5, 7] = np.nan
    make_store(tmp_path, features={"patches": tokens})

    def derive(*argv: str) -> None:
        main(["derive", str(tmp_path), "tiny-vit", *argv, "--workers", "1"])

    for argv, said in {
        ("--pca", "25"): r"--pca 25 is more than the 24 channels of features/tiny-vit; ask for fewer",
        ("--pca", "-1"): r"--pca must be at least 0, got -1",
        ("--pca-seed", "1", "--codec", "int8"): r"are of components; pass --pca K too",
        (): r"nothing is to be derived; pass --codec",
        ("--pca", "2"): r"tiny-vit, row 21, \(view, token\) in brackets: token \(0, 5\) holds NaN or infinity",
    }.items():
        with pytest.raises(UserError, match=said):
            derive(*argv)
    assert len(open_store(tmp_path).groups()) == 2  # nothing was begun
    seed = next(seed for seed in range(99) if 21 not in Order(40, seed).rows(0, np.arange(3)))
    asked = ("--pca", "2", "--pca-sample", "3", "--pca-seed", str(seed))
    with pytest.raises(UserError, match=r"row 21, .* token \(0, 5\) holds NaN or infinity"):
        derive(*asked)  # which the sample has not seen
    with pytest.raises(StoreError, match=r"pca\.seed: found .*choose another --name"):
        derive(*asked[:-1], str(seed + 1))
    with pytest.raises(StoreError, match=r"is there and holds no components; choose another --name"):
        derive(*asked, "--name", "tiny-vit")
    with pytest.raises(StoreError, match=r"does not hold principal components"):
        basis_of(open_store(tmp_path).group(FEATURES))


def test_a_component_beyond_float16_is_refused() -> None:
    tokens = np.full((4, WIDTH), 60000, dtype=np.float32) * np.array([1, -1, 1, -1], dtype=np.float32)[:, None]
    basis = by_svd(tokens, 1)
    with pytest.raises(UserError, match=r"token \(0,\) has a component beyond float16's 65504"):
        basis.project(tokens)


def test_mended_rows_are_projected_with_the_basis_there_is(tmp_path: Path) -> None:
    tokens = coloured()
    data = make_store(tmp_path, failed_rows=FAILED, features={"patches": tokens})[FEATURES]
    child = derive_group(tmp_path, FEATURES, components=request(4), n_workers=1)
    before = basis_of(open_store(tmp_path).group(child))
    republish(tmp_path, 1, data, [])  # row 17 was mended
    derive_group(tmp_path, FEATURES, components=request(4), n_workers=1)
    group = open_store(tmp_path).group(child)
    assert basis_of(group).digest == before.digest
    assert [failure.row for failure in group.failures] == [3]
    found = group.tokens(np.array([17]))[0]
    np.testing.assert_array_equal(found, before.project(tokens[17, 0]).astype(np.float16))


def test_an_edited_basis_is_found(tmp_path: Path) -> None:
    make_store(tmp_path)
    group = open_store(tmp_path).group(derive_group(tmp_path, FEATURES, components=request(4), n_workers=1))
    packed = group.attributes["basis"]
    group.attributes["basis"] = {**packed, "mean": packed["deviation"]}
    with pytest.raises(StoreError, match="its basis is not the one that its identity names"):
        basis_of(group)
    group.attributes["basis"] = {**packed, "mean": packed["eigenvalues"]}
    with pytest.raises(StoreError, match="the basis is damaged"):
        basis_of(group)
    group.attributes["basis"] = {**packed, "mean": 5}
    with pytest.raises(StoreError, match="the basis"):
        basis_of(group)


def test_the_basis_is_read_as_the_format_page_says(tmp_path: Path) -> None:
    tokens = coloured()
    make_store(tmp_path, features={"patches": tokens})
    path = derive_group(tmp_path, FEATURES, components=request(4, standardised=True), n_workers=1)
    attributes = json.loads((tmp_path / path / "zarr.json").read_bytes())["attributes"]
    raw = {name: base64.b64decode(text) for name, text in attributes["basis"].items()}
    pca = attributes["identity"]["derived_from"]["pca"]
    order = ("mean", "deviation", "components", "eigenvalues", "total_variance")
    assert pca["basis_sha256"] == hashlib.sha256(b"".join(raw[name] for name in order)).hexdigest()
    mean, deviation, components, *_ = (np.frombuffer(raw[name], "<f8") for name in order)
    z = ((tokens[7, 0] - mean) / deviation) @ components.reshape(pca["components"], -1).T
    found = open_store(tmp_path).group(path).tokens(np.array([7]))[0]
    np.testing.assert_allclose(found, z, rtol=1e-3, atol=1e-3)


def killed(tmp_path: Path, n_kills: int) -> None:
    """Kill one derivation again and again, while it fits too, then finish it."""
    tokens = coloured(n_rows=(n_kills + 1) * 10, width=WIDTH)
    make_store(tmp_path, n_rows=len(tokens), shard_rows=2, features={"patches": tokens})
    expected = shards(tmp_path, derive_group(tmp_path, FEATURES, components=request(6), name="whole", n_workers=2))
    child = f"{FEATURES}-pca6"
    rng = np.random.default_rng(n_kills)
    argv = [sys.executable, "-m", "storage", "derive", str(tmp_path), "tiny-vit", "--pca=6", "--pca-sample=1000"]
    for number in range(n_kills):
        n_before = len(list((tmp_path / "receipts" / child).glob("0*.json")))
        process = subprocess.Popen([*argv, "--workers=2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if number == 0:
            time.sleep(rng.uniform(0.5, 2))  # while it imports or fits
        else:
            wanted = n_before + int(rng.integers(0, 4))
            while len(list((tmp_path / "receipts" / child).glob("0*.json"))) < wanted:
                assert process.poll() is None, process.communicate()
                time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    derive_group(tmp_path, FEATURES, components=request(6), n_workers=2)
    assert unlike(shards(tmp_path, child), expected) == []
    assert open_store(tmp_path).group(child).identity == open_store(tmp_path).group("features/whole").identity
    assert list(verify(tmp_path, deep=True, n_workers=1)) == []
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".") or "partial" in path.name]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_more_often(tmp_path: Path) -> None:
    killed(tmp_path, KILLS)
