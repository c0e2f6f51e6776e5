"""Statistics that add up over units equal those of all numbers at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from storage import Staging, StoreLayout, create_group, create_store, open_store, publish_unit
from storage.__main__ import main
from storage.codecs import CODECS, PLAIN, Codec
from storage.codecs.int8 import INT8
from storage.index import make_index
from storage.receipts import Failure
from storage.statistics import Sums, group_sums, latent_mean_std, unit_sums
from tests.stores import FEATURES, LATENTS, decoded, make_identities, make_layouts, random_arrays

N, FAILED, WIDTH = 20, 7, 200


def write(root: Path, codec: Codec | None) -> dict[str, dict[str, np.ndarray]]:
    store = StoreLayout(n_rows=N, views=("original", "hflip"), resolution=128, shard_rows=6)
    layouts, identities = make_layouts(store, WIDTH, codec), make_identities(WIDTH, codec)
    keys = [str(row) for row in range(N)]
    data = {}
    with Staging(root) as staging:
        create_store(root, store, make_index(keys, [0] * N, [""] * N, keys, [0] * N), {}, staging.run_id)
        for seed, (path, layout) in enumerate(layouts.items()):
            used = codec if path == FEATURES and codec else PLAIN
            data[path] = random_arrays(layout, seed, codec if path == FEATURES else None)
            digest = create_group(root, layout, identities[path], {}, staging.run_id)
            staging.prepare(path)
            for unit in range(store.n_units):
                rows = store.unit_rows(unit)
                cut = {name: array[rows.start : rows.stop] for name, array in data[path].items()}
                failed = [Failure(row=FAILED, key=str(FAILED), reason="test")] if FAILED in rows else []
                present = np.array([i for i, row in enumerate(rows) if row != FAILED])
                sums = {name: of.packed() for name, of in unit_sums(layout, cut, present, used, rows.start).items()}
                publish_unit(root, layout, digest, unit, cut, failed, staging.run_id, {}, statistics=sums)
    return data


def read(root: Path, path: str) -> dict[str, Sums]:
    layout, attributes = open_store(root).group_layout(path)
    sums, without = group_sums(
        open_store(root).root, layout, attributes["identity_digest"], open_store(root).group(path).identity
    )
    assert without == 0
    return sums


@pytest.mark.parametrize("codec", [None, INT8, CODECS["rotated2"]])
def test_sums_of_units_are_those_of_all_numbers(tmp_path: Path, codec: Codec | None) -> None:
    data = write(tmp_path, codec)
    kept = [row for row in range(N) if row != FAILED]
    moments = data[LATENTS]["moments"][kept].astype(np.float64)
    found = read(tmp_path, LATENTS)["moments"]
    assert found.count == len(kept) * 2 * 16 * 16
    np.testing.assert_allclose(found.mean, moments.mean(axis=(0, 1, 3, 4)), atol=1e-12)
    np.testing.assert_allclose(found.std, moments.std(axis=(0, 1, 3, 4)), rtol=1e-10)
    patches = data[FEATURES]["patches"][kept]
    tokens = patches.astype(np.float64) if codec is None else decoded(data[FEATURES], codec)[kept]
    sums = read(tmp_path, FEATURES)
    assert sorted(sums) == ["cls", "cls.norm", "patches", "patches.norm"]
    np.testing.assert_allclose(sums["patches"].mean, tokens.mean(axis=(0, 1, 2), dtype=np.float64), atol=1e-9)
    np.testing.assert_allclose(sums["patches"].std, tokens.std(axis=(0, 1, 2), dtype=np.float64), rtol=1e-7)
    norms = np.linalg.norm(tokens.astype(np.float64), axis=-1)
    assert sums["patches.norm"].mean[0] == pytest.approx(norms.mean(), rel=1e-9)
    assert sums["patches.norm"].std[0] == pytest.approx(norms.std(), rel=1e-6)


def test_the_latents_deviation_counts_the_posteriors() -> None:
    rng = np.random.default_rng(0)
    mean, std = rng.normal(2, 3, (100_000, 1)), rng.uniform(0.5, 1.5, (100_000, 1))
    both = np.concatenate([mean, std], axis=1)
    sums = Sums(len(both), both.sum(0), np.square(both).sum(0))
    drawn = mean + std * rng.standard_normal(mean.shape)
    found = latent_mean_std(sums, 1)
    assert found[0][0] == pytest.approx(drawn.mean(), abs=0.05)
    assert found[1][0] == pytest.approx(drawn.std(), rel=0.01)
    alone = Sums(len(mean), mean.sum(0), np.square(mean).sum(0))  # an autoencoder without a posterior
    assert latent_mean_std(alone, 1)[1][0] == pytest.approx(mean.std())


@pytest.mark.parametrize("spelling", ["int8", "rotated1"])
def test_norms_of_codes_say_that_they_include_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spelling: str
) -> None:
    write(tmp_path, CODECS[spelling])
    main(["info", f"{tmp_path}/{FEATURES}"])
    lines = [
        line.strip() for line in capsys.readouterr().out.split("\n") if " dimensions: " in line or " norm of " in line
    ]
    marked = [line.partition(" ")[0] for line in lines if line.endswith(", with the codes' error")]
    assert [line.partition(" ")[0] for line in lines] == ["cls", "cls", "patches", "patches"]
    assert marked == (["patches", "patches"] if spelling == "rotated1" else [])


def test_info_shows_them_and_says_what_has_none(
    tmp_path: Path, shared_tiny_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, None)
    main(["info", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "latent mean a channel  " in shown
    assert "latent std a channel  " in shown
    assert "patches over 200 dimensions: mean from " in shown
    assert "patches norm of a token 14." in shown  # √200 = 14.1
    main(["info", str(shared_tiny_store)])
    assert "3 were written without" in capsys.readouterr().out
