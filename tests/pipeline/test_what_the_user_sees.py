"""The plan without a run, a store's status, failures.parquet, and the pictures of a store with several groups."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.__main__ import main
from pipeline.encode import Block
from pipeline.encoders.tiny import TINY_VAE
from pipeline.failures import FAILURES_FILE, allowed_failures, write_failures
from pipeline.originals import write_originals
from pipeline.plan import create
from pipeline.preview import find_decoder, open_originals, psnr, write_preview
from pipeline.status import rate
from pipeline.status import status as status_lines
from storage import Staging, UserError, open_store
from storage.base.console import run_command
from storage.receipts import Failure
from storage.staging import living_runs
from storage.verify import verify
from tests.pipeline.fakes import NumpyEncoder, Pictures, plan_of
from tests.pipeline.hub import empty_cache
from tests.stores import FEATURES, LATENTS

ENCODERS = "--latents tiny-vae --features tiny-vit --resolution 128 --shard-rows 4".split()


def write_pictures(root: Path, n: int = 10) -> None:
    rng = np.random.default_rng(0)
    (root / "class").mkdir(parents=True)
    for number in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((150, 140), Image.Resampling.BICUBIC).save(root / "class" / f"{number:03d}.png")


def partly(root: Path, units: range, marks: dict[int, str] | None = None) -> None:
    """A made-up store of 5 units of 8 rows, of which `units` are done."""
    source = Pictures(40, marks or {}, "")
    with Staging(root) as staging:
        plan = plan_of(str(root), source.listing().index, shard_rows=8)
        create(plan, source, staging)
        encoder = NumpyEncoder(plan.root, plan.groups, plan.digests, 8, 1, staging.run_id)
        for unit in units:
            rows = plan.layout.unit_rows(unit)
            images = np.stack(list(Pictures(40, {}, "").read_many(plan.index.slice(rows).locations)))
            failures = [Failure(row=r, key=f"{r:06d}", reason="test") for r in rows if (marks or {}).get(r) == "broken"]
            encoder.encode_and_publish(
                images, Block(unit=unit, failures=failures, timings_s={}, paths=(LATENTS, FEATURES)), time.time()
            )
        groups = [(group.layout, plan.digests[group.layout.path]) for group in plan.groups]
        write_failures(plan.root, groups, plan.index, staging.run_id)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "data")
    store = tmp_path / "new" / "store"
    arguments = ["precompute", "--data", str(tmp_path / "data"), "--store", str(store), *ENCODERS, "--dry-run"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "images     10 of 1 classes at 128 px, views original" in shown
    assert "units      3 of 4 rows, 3 to do" in shown
    assert re.search(r"latents/tiny-vae  moments 8×16×16 float16  \d+ bytes an image  3 units to encode, 0.0 MB", shown)
    assert re.search(r"to write   \d+\.\d MB, \d+\.\d\d GB free", shown)
    assert "a dry run: nothing was written" in shown
    assert not store.parent.exists()


def test_a_dry_run_refuses_what_a_run_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "data")
    store = tmp_path / "store"
    store.mkdir()
    (store / "thesis.tex").write_text("mine")
    with pytest.raises(SystemExit) as end:
        run_command(
            main,
            "pipeline",
            ["precompute", "--data", str(tmp_path / "data"), "--store", str(store), *ENCODERS, "--dry-run"],
        )
    assert end.value.code == 2
    assert "exists and is not a store" in capsys.readouterr().err


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "data")
    monkeypatch.setattr("storage.space.free_bytes", lambda root: 1000.0)
    with pytest.raises(UserError, match=r"has 0\.0 MB free and .* MB are to be written"):
        main(["precompute", "--data", str(tmp_path / "data"), "--store", str(tmp_path / "store"), *ENCODERS])
    assert "to write" in capsys.readouterr().out  # the plan comes first
    assert not (tmp_path / "store").exists()


def test_status_of_a_store_that_is_being_made(tmp_path: Path) -> None:
    partly(tmp_path, range(3), {9: "broken"})
    with Staging(tmp_path) as staging:
        lines = list(status_lines(str(tmp_path)))
        assert lines[0] == f"{tmp_path}: 40 images, 5 units of 8 rows"
        assert lines[1] == f"at work now: {staging.run_id}"
        assert living_runs(staging.root) == [staging.run_id]
        for path, line in zip((LATENTS, FEATURES), lines[2::2], strict=True):
            assert line.startswith(f"{path}  units 3 done, 2 missing  images 24  failed 1  ")
            assert "images/s in the last 10 minutes" in line
            assert line.endswith("hours for the rest")
        assert lines[3] == "  failed: row 9 000009: test"
    assert list(status_lines(str(tmp_path)))[1] == "no run is at work on this store"


def test_status_of_a_store_that_one_may_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partly(tmp_path, range(1))
    may_write = os.open

    def open_to_read(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return may_write(path, flags, *rest)

    with Staging(tmp_path) as staging:
        monkeypatch.setattr(os, "open", open_to_read)
        assert list(status_lines(str(tmp_path)))[1] == f"at work now: {staging.run_id}"


def test_the_rate_leaves_out_what_came_before_the_first_unit() -> None:
    assert rate([(100.0, 8), (102.0, 8), (101.0, 8)]) == 8
    assert rate([]) == rate([(5.0, 8)]) == rate([(5.0, 8), (5.0, 8)]) == 0


def test_failures_are_a_table_beside_the_index_and_no_stray_file(tmp_path: Path) -> None:
    partly(tmp_path, range(5), {30: "broken", 2: "broken"})
    table = pq.read_table(tmp_path / FAILURES_FILE)
    assert table.to_pylist() == [
        {"row": row, "key": f"{row:06d}", "location": f"{row:06d}", "reason": "test"} for row in (2, 30)
    ]
    assert not list(verify(tmp_path, deep=True))
    assert open_store(tmp_path).group(LATENTS).failed_rows.tolist() == [2, 30]
    before = (tmp_path / FAILURES_FILE).read_bytes()
    partly(tmp_path, range(0))
    assert (tmp_path / FAILURES_FILE).read_bytes() == before


def test_a_share_of_failures_is_allowed_but_never_fewer_than_ten() -> None:
    assert [allowed_failures(0.001, n) for n in (1, 10_000, 1_281_167)] == [10, 10, 1281]


def test_psnr_is_its_definition() -> None:
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[0] += 255
    b[1, 0, 0] = 10
    assert psnr(a, b)[0] == pytest.approx(0)
    assert psnr(a, b)[1] == pytest.approx(10 * np.log10(255**2 / (100 / 16)))


def test_several_groups_have_a_picture_each(tmp_path: Path, waits: list[str]) -> None:
    from pipeline.config import PrecomputeConfig
    from pipeline.encode import UnitEncoder
    from pipeline.plan import make_plan
    from pipeline.sources import open_source
    from storage.roots import open_root

    write_pictures(tmp_path / "data")
    source = open_source(str(tmp_path / "data"))
    index = source.listing().index
    for dtype, store in (("float16", "store"), ("int8", "int8")):
        config = PrecomputeConfig(
            data=str(tmp_path / "data"),
            store=str(tmp_path / store),
            latents="tiny-vae",
            features="tiny-vit,tiny-vit:tokens=patch" if dtype == "float16" else "tiny-vit",
            features_dtype=dtype,
            resolution=128,
            shard_rows=16,
        )
        with Staging(config.store) as staging:
            plan = make_plan(config, source, index, open_root(config.store))
            create(plan, source, staging)
            encoder = UnitEncoder(plan.root, plan.groups, plan.digests, 8, 1, staging.run_id)
            from pipeline.decode import decode_unit

            images, (failures, timings_s, _) = decode_unit(source, 0, index.keys, index.locations, 128)
            encoder.encode_and_publish(
                images, Block(unit=0, failures=failures, timings_s=timings_s, paths=plan.missing[0]), time.time()
            )
        waits.clear()
        pictures = write_preview(config.store, tmp_path / f"{store}-pictures", n_images=3)
        assert waits[:3] == ["opening the store", "reading the originals", "decoding latents/tiny-vae"]
        assert waits[3] == "principal components of features/tiny-vit"
        names = [picture.path.name for picture in pictures]
        assert len(set(names)) == len(plan.groups)
        assert names[0] == "reconstruction.png"
        assert all(Image.open(picture.path).size == (3 * 130 - 2, 2 * 130 - 2) for picture in pictures)
        decibels = re.fullmatch(
            rf"latents/tiny-vae: PSNR (\d+\.\d) dB over 3 images, decoded by {TINY_VAE}", pictures[0].caption
        )
        assert decibels is not None
        assert float(decibels[1]) > 15
    originals = write_originals(config.store, [5, 0], tmp_path / "originals")
    expected = open_originals(open_store(config.store))(np.array([5, 0]))
    for original, pixels in zip(originals, expected, strict=True):
        assert original.path == tmp_path / "originals" / f"{original.row}.png"
        np.testing.assert_array_equal(np.asarray(Image.open(original.path)), pixels)
    with pytest.raises(UserError, match=r"--rows must be of the store's \d+ rows, from 0, got -1"):
        write_originals(config.store, [-1], tmp_path / "originals")


def test_latents_are_decoded_by_the_first_decoder_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_cache(tmp_path / "hub", monkeypatch)
    other = tmp_path / "other"
    shutil.copytree(TINY_VAE, other)

    def group(**provenance: str) -> Any:
        return SimpleNamespace(path="latents/x", attributes={"provenance": provenance})

    absent, gone = "stabilityai/sd-vae-ft-ema", str(tmp_path / "gone")
    assert find_decoder(group(decoder=str(TINY_VAE), weights=str(other)), "") == TINY_VAE
    assert find_decoder(group(decoder=absent, weights=str(other)), "") == other
    assert find_decoder(group(decoder=absent, weights=gone), str(other)) == other
    for asked, named in (("", f"{absent} or {gone}"), ("nowhere", "nowhere")):
        with pytest.raises(UserError, match=rf"latents/x: no VAE to decode with at {named}; pass --vae"):
            find_decoder(group(decoder=absent, weights=gone), asked)


def test_a_store_without_a_single_image_has_no_picture(tmp_path: Path) -> None:
    partly(tmp_path, range(5), dict.fromkeys(range(40), "broken"))
    with pytest.raises(UserError, match="holds no image to show: all 40 failed to decode"):
        write_preview(str(tmp_path), tmp_path / "pictures")
