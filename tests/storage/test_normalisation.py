"""Statistics of latents: from files of others, from receipts however they were cut, and in identities."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from storage import StoreError, open_store
from storage.__main__ import main
from storage.base.errors import UserError
from storage.identity import LatentsIdentity, parse
from storage.normalisation import Normalisation, made, normalisation_of
from storage.receipts import read_receipt, write_receipt
from storage.staging import Staging
from storage.statistics import Sums, latent_mean_std, merged
from storage.weights.latent_statistics import read_statistics
from tests.stores import FEATURES, LATENTS, make_store
from trainer.data.latent_scale import measured

C = 3


def lightningdit_folder(folder: Path, counts: tuple[int, ...] = (5, 9, 3), statistics: bool = True) -> dict[str, Any]:
    """A folder as LightningDiT's extraction leaves it; latents are far from standard ones."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    n = sum(counts)
    spread, centre = rng.uniform(1, 5, (1, C, 1, 1)), rng.uniform(-3, 3, (1, C, 1, 1))
    both = {name: (rng.standard_normal((n, C, 4, 4)) * spread + centre).astype("f4") for name in ("latents", "flip")}
    arrays = {"latents": both["latents"], "latents_flip": both["flip"], "labels": rng.integers(0, 4, n)}
    stop = 0
    for shard, count in enumerate(counts):
        start, stop = stop, stop + count
        part = {name: np.ascontiguousarray(array[start:stop]) for name, array in arrays.items()}
        save_file(part, folder / f"latents_rank00_shard{shard:03d}.safetensors")
    if statistics:
        latents = torch.from_numpy(arrays["latents"])
        of = {"mean": latents.mean([0, 2, 3], keepdim=True), "std": latents.std([0, 2, 3], keepdim=True)}
        torch.save(of, folder / "latents_stats.pt")
        arrays |= {name: value.numpy() for name, value in of.items()}
    return arrays


def repa_e_file(path: Path, n: int = 7, statistics: bool = True) -> dict[str, Any]:
    """NAME.h5 as REPA-E's caching script writes it, and NAME_h5.json; the statistics lie beside the weights there."""
    rng = np.random.default_rng(1)
    moments = np.concatenate([rng.normal(2, 3, (n, C, 4, 4)), rng.uniform(0.1, 0.9, (n, C, 4, 4))], 1).astype("f4")
    labels = rng.integers(0, 4, n).tolist()
    names = [f"{i // 3:05d}/img-mean-std-{i:08d}.npy" for i in range(n)]
    with h5py.File(path, "w") as file:
        for name, row in zip(reversed(names), moments[::-1], strict=True):
            file.require_group(name.split("/")[0]).create_dataset(name.split("/")[1], data=row)
        text = json.dumps({"labels": list(zip(names, labels, strict=True))}).encode()
        file.create_dataset("dataset.json", data=np.array(text, dtype="S"))
    path.with_name(f"{path.stem}_h5.json").write_text(json.dumps([*names, "dataset.json"]))
    scale, bias = rng.uniform(0.2, 0.5, (1, C, 1, 1)).astype("f4"), rng.normal(2, 0.1, (1, C, 1, 1)).astype("f4")
    if statistics:
        of = {"latents_scale": torch.from_numpy(scale), "latents_bias": torch.from_numpy(bias)}
        torch.save(of, path.with_name(f"{path.stem}-latents-stats.pt"))
    return {"moments": moments, "labels": labels, "names": names, "scale": scale, "bias": bias}


def bring(source: Path, kind: str, store: Path, *options: str) -> Any:
    assert main(["import", str(source), "--from", kind, "--store", str(store), "--name", "x", *options]) == 0
    return open_store(store).group("latents/x")


# From receipts --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(-50, 50), st.floats(0.01, 30))
def test_sums_of_any_parts_in_any_order_are_numpys(seed: int, n: int, centre: float, spread: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(centre, spread, (n, 2 * C))
    x[:, C:] = np.abs(x[:, C:])
    cuts = np.sort(rng.integers(0, n + 1, 3))
    parts = [Sums(len(p), p.sum(0), np.square(p).sum(0)) for p in np.split(x, cuts) if len(p)]
    whole = merged(parts)
    shuffled = merged([parts[i] for i in rng.permutation(len(parts))])
    assert whole.count == shuffled.count == n
    assert (whole.total == shuffled.total).all()
    assert (whole.squares == shuffled.squares).all()
    mean, std = latent_mean_std(whole, C)
    magnitude = np.abs(x).max() + 1
    np.testing.assert_allclose(mean, x[:, :C].mean(0), atol=1e-12 * magnitude)
    wanted = x[:, :C].var(0) + np.square(x[:, C:]).mean(0)
    np.testing.assert_allclose(np.square(std), wanted, atol=1e-11 * magnitude**2)


def test_sums_that_are_not_finite_stay_so() -> None:
    parts = [Sums(1, np.array([np.inf, 1.0]), np.array([np.inf, 1.0])), Sums(1, np.array([-np.inf, 1.0]), np.ones(2))]
    total = merged(parts).total
    assert np.isnan(total[0])
    assert total[1] == 2


@pytest.mark.parametrize("shard_rows", ["1", "4", "512"])
def test_imported_latents_are_measured_whole_however_they_are_cut(tmp_path: Path, shard_rows: str) -> None:
    written = lightningdit_folder(tmp_path / "source")
    group = bring(tmp_path / "source", "lightningdit", tmp_path / "t", "--shard-rows", shard_rows)
    both = np.concatenate([written["latents"], written["latents_flip"]]).astype(np.float16).astype(np.float64)
    found = measured(group)
    np.testing.assert_allclose(found.mean, both.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found.std, both.std((0, 2, 3)), rtol=1e-12)


def test_a_recount_gives_the_sums_that_encoding_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stores of before: their receipts have none. Failed rows count for nothing."""
    data = make_store(tmp_path, failed_rows=[3, 17])
    group = open_store(tmp_path).group(LATENTS)
    with pytest.raises(
        UserError,
        match=r"^3 of 3 receipts of latents/tiny-vae have no sums of their latents, by which channels are normalised; "
        "run `python -m storage statistics STORE latents/tiny-vae` once$",
    ):
        measured(group)
    before = {name: path.read_bytes() for name, path in files_of(tmp_path).items()}
    assert main(["statistics", str(tmp_path), LATENTS]) == 0
    assert "3 of 3 units counted" in capsys.readouterr().out
    changed = {name for name, path in files_of(tmp_path).items() if path.read_bytes() != before[name]}
    assert changed == {f"receipts/{LATENTS}/{unit:08d}.json" for unit in range(3)}
    assert main(["verify", str(tmp_path), "--deep"]) == 0
    kept = np.delete(data[LATENTS]["moments"], [3, 17], axis=0).astype(np.float64)
    found = measured(open_store(tmp_path).group(LATENTS))
    mean, std = kept[:, 0, :4], kept[:, 0, 4:]
    np.testing.assert_allclose(found.mean, mean.mean((0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(np.square(found.std), mean.var((0, 2, 3)) + np.square(std).mean((0, 2, 3)), rtol=1e-10)
    capsys.readouterr()
    assert main(["statistics", str(tmp_path), LATENTS]) == 0
    assert "3 units, all counted before" in capsys.readouterr().out
    assert main(["statistics", str(tmp_path), FEATURES]) == 0
    assert "patches norm of a token" in capsys.readouterr().out


def test_a_recount_equals_what_the_import_counted_to_the_bit(tmp_path: Path) -> None:
    lightningdit_folder(tmp_path / "source")
    group = bring(tmp_path / "source", "lightningdit", tmp_path / "t", "--shard-rows", "4")
    root = open_store(tmp_path / "t").root
    counted = [read_receipt(root, group.layout, unit) for unit in range(group.layout.store.n_units)]
    with Staging(root) as staging:
        for receipt in counted:
            assert receipt is not None
            write_receipt(root, group.layout, replace(receipt, statistics={}), staging.run_id)
    assert main(["statistics", str(tmp_path / "t"), "latents/x"]) == 0
    assert [read_receipt(root, group.layout, unit) for unit in range(group.layout.store.n_units)] == counted


def files_of(root: Path) -> dict[str, Path]:
    return {
        str(path.relative_to(root)): path
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    }


# From files of others -------------------------------------------------------------------------------------------------


def test_lightningdits_folder_brings_its_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = lightningdit_folder(tmp_path / "source")
    group = bring(tmp_path / "source", "lightningdit", tmp_path / "t", "--shard-rows", "4")
    said = (
        f"latents are normalised channel by channel with the statistics of {tmp_path / 'source' / 'latents_stats.pt'}"
    )
    assert said in capsys.readouterr().out
    found = normalisation_of(group.identity)
    assert found is not None
    assert found.source == "mean and std of a file"
    np.testing.assert_array_equal(np.float32(found.mean), written["mean"].ravel())
    np.testing.assert_array_equal(np.float32(found.std), written["std"].ravel())
    assert (group.identity.latent_scale_factor, group.identity.latent_shift_factor) == (1.0, 0.0)
    stored = group.gather(np.arange(17), 1, ["moments"])["moments"]
    np.testing.assert_array_equal(stored[:, :C], written["latents_flip"].astype(np.float16))
    assert parse(LatentsIdentity, group.identity.plain(), "", "") == group.identity


def test_other_statistics_are_another_identity(tmp_path: Path) -> None:
    lightningdit_folder(tmp_path / "source")
    bring(tmp_path / "source", "lightningdit", tmp_path / "t")
    torch.save({"mean": torch.zeros(1, C, 1, 1), "std": torch.ones(1, C, 1, 1)}, tmp_path / "other.pt")
    with pytest.raises(StoreError, match=r"was made differently \(latent_normalisation\.mean: found .*; latent_norm"):
        bring(tmp_path / "source", "lightningdit", tmp_path / "t", "--latent-statistics", str(tmp_path / "other.pt"))
    with pytest.raises(StoreError, match=r"latent_normalisation: found \{.*, asked for nothing"):
        bring(tmp_path / "source", "lightningdit", tmp_path / "t", "--latent-statistics", "none")


def test_without_statistics_an_import_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lightningdit_folder(tmp_path / "source", statistics=False)
    group = bring(tmp_path / "source", "lightningdit", tmp_path / "t")
    assert group.identity.latent_normalisation is None
    assert "latent_normalisation" not in group.identity.plain()
    assert (
        f"there is no {tmp_path / 'source' / 'latents_stats.pt'}: latents are normalised by one factor, unless a run "
        "says --data.latent-normalisation channel" in capsys.readouterr().out
    )


def test_a_file_of_statistics_that_cannot_be_read_is_not_said_to_be_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lightningdit_folder(tmp_path / "source")
    (tmp_path / "damaged.pt").write_bytes(b"x")
    for name in ("none-such.pt", "damaged.pt"):
        with pytest.raises(UserError, match=name):
            bring(tmp_path / "source", "lightningdit", tmp_path / "t", "--latent-statistics", str(tmp_path / name))
        assert "statistics of" not in capsys.readouterr().out


def test_repa_es_file_is_imported_in_the_order_of_its_loader(tmp_path: Path) -> None:
    written = repa_e_file(tmp_path / "e2e-vavae.h5")
    group = bring(tmp_path / "e2e-vavae.h5", "repa-e", tmp_path / "t", "--shard-rows", "3")
    store = open_store(tmp_path / "t")
    assert list(store.index.keys) == written["names"]
    assert store.index.labels.tolist() == written["labels"]
    moments = group.gather(np.arange(7), 0, ["moments"])["moments"]
    np.testing.assert_array_equal(moments, written["moments"].astype(np.float16))
    found = normalisation_of(group.identity)
    assert found is not None
    std = np.sqrt(1 / np.square(written["scale"].astype(np.float64)) + 1e-4)
    np.testing.assert_allclose(found.std, std.ravel(), rtol=1e-12)
    np.testing.assert_array_equal(np.float32(found.mean), written["bias"].ravel())


def test_files_that_are_not_repa_es_are_refused_in_a_line(tmp_path: Path) -> None:
    repa_e_file(tmp_path / "a.h5")

    def refused(path: Path, message: str) -> None:
        with pytest.raises((UserError, StoreError), match=message):
            bring(path, "repa-e", tmp_path / f"store-{len(list(tmp_path.iterdir()))}")

    refused(tmp_path, r"is a folder; name the file of latents in it \(there is a\.h5\)$")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["00001/img-mean-std-00000004.npy"]
        file["00001/img-mean-std-00000004.npy"] = np.zeros((2 * C, 4, 5), "f4")
    refused(
        tmp_path / "a.h5", r"a\.h5: '00001/img-mean-std-00000004\.npy' has shape \(6, 4, 5\), the first \(6, 4, 4\);"
    )
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["00001/img-mean-std-00000004.npy"]
    refused(tmp_path / "a.h5", r"it has no data set '00001/img-mean-std-00000004\.npy', which its dataset\.json names;")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["moments"] = np.zeros((2, 3))
    refused(tmp_path / "b.h5", r"b\.h5: it has no data set 'dataset\.json', so its labels are unknown;")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["dataset.json"] = np.array(b'{"labels": 3}', dtype="S")
    refused(tmp_path / "c.h5", r"dataset\.json is damaged \(labels: .*\); it must be")
    (tmp_path / "d.h5").write_bytes(b"no file of HDF5")
    refused(tmp_path / "d.h5", "is not an HDF5 file")


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("/tmp/ran-from-a-pickle"),)  # type: ignore[return-value]


def test_statistics_that_cannot_be_used_are_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "latents_stats.pt"
    ones = torch.ones(1, C, 1, 1)

    def refused(content: Any, message: str) -> None:
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            read_statistics(path, C)

    refused({"mean": ones, "std": 0 * ones}, r"channel 0 has mean 1.0 and deviation 0.0; a mean must be finite and")
    refused({"mean": ones * torch.nan, "std": ones}, "channel 0 has mean nan and deviation 1.0")
    refused({"mean": ones[:, :2], "std": ones[:, :2]}, "has 2 means and 2 deviations, and the latents 3 channels")
    refused({"mean": ones.long(), "std": ones.long()}, "mean and std must be floating-point numbers")
    refused({"mu": ones}, r"holds mu; statistics of latents are mean and std \(LightningDiT\), or latents_bias and")
    refused({"mean": torch.zeros(1 << 20), "std": ones}, r"mean is \[1048576\]; statistics are a number a channel$")
    refused({"latents_scale": 0 * ones, "latents_bias": ones}, "channel 0 has mean 1.0 and deviation inf")
    path.write_bytes(pickle.dumps({"mean": Bomb(), "std": Bomb()}))
    with pytest.raises(UserError, match=r"latents_stats\.pt"):
        read_statistics(path, C)
    assert not Path("/tmp/ran-from-a-pickle").exists()


def test_statistics_of_patches_are_told_by_their_number_where_there_may_be_some() -> None:
    with pytest.raises(UserError, match="w has 8 means and 8 deviations, and the latents 2 channels"):
        made(range(8), [1.0] * 8, channels=2, source="s", where="w")
    found = made(range(8), [1.0] * 8, channels=2, source="s", where="w", of_patches=True)
    assert found.patch == 2
    mean, _ = found.arrays()
    assert mean[1].tolist() == [[4.0, 5.0], [6.0, 7.0]]
    assert found.plain()["patch"] == 2


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3)), min_size=4, max_size=4),
    st.sampled_from([1, 2]),
)
def test_an_identity_keeps_its_statistics_to_the_bit(numbers: list[tuple[float, float]], patch: int) -> None:
    mean, std = zip(*numbers, strict=True)
    wanted = Normalisation(mean=mean, std=std, source="s", patch=patch)
    identity = LatentsIdentity(
        latent_channels=4 // patch**2, latent_size=(4, 4), latent_scale_factor=1.0, latent_normalisation=wanted.plain()
    )
    again = parse(LatentsIdentity, json.loads(json.dumps(identity.plain())), "", "")
    assert again.digest == identity.digest
    assert normalisation_of(again) == wanted


def test_statistics_that_are_not_of_the_channels_are_refused_as_they_are_computed_with() -> None:
    def of(**fields: Any) -> LatentsIdentity:
        plain = {"mean": [0.0] * 4, "std": [1.0] * 4, "source": "s", **fields}
        return LatentsIdentity(name="x", latent_channels=4, latent_size=(4, 4), latent_normalisation=plain)

    assert normalisation_of(of()) is not None
    for wrong in ({"mean": [0.0] * 3}, {"std": [1.0, 1.0, 1.0, 0.0]}, {"std": [1.0] * 5}, {"patch": 2}, {"mean": "a"}):
        with pytest.raises(StoreError, match=r"^the latent_normalisation of x "):
            normalisation_of(of(**wrong))
