"""Failed images that are mended, limits that hold, and images that changed between two passes."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.encode import Block
from pipeline.failures import FAILURES_FILE
from pipeline.preview import open_originals
from storage import Store, UserError, open_store
from storage.__main__ import main as storage_main
from storage.receipts import read_receipt
from storage.samples import sample_crc32c
from storage.verify import verify
from tests.examples import examples
from tests.pipeline.containers import Labelled, write_parquet, write_zip
from tests.pipeline.in_process import OPTIONS, Precompute, precompute
from tests.storage.test_store import array_files

__all__ = ["precompute"]  # the fixture
N, SHARD_ROWS = 16, 4
LATENTS, FEATURES = "latents/tiny-vae", "features/tiny-vit"
BROKEN = b"\x89PNG\r\n\x1a\n and no more"


def picture(seed: int, side: int = 8) -> bytes:
    """A PNG of noise; pictures of one side have one size in bytes."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()


def path_of(root: Path, row: int) -> Path:
    return root / f"class{row // 8}" / f"{row:02d}.bmp"


def write(root: Path, pictures: dict[int, bytes]) -> None:
    for row, data in pictures.items():
        path_of(root, row).parent.mkdir(parents=True, exist_ok=True)
        path_of(root, row).write_bytes(data)


def whole(n: int = N) -> dict[int, bytes]:
    return {row: picture(row) for row in range(n)}


def receipts(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.glob("receipts/*/*/0*.json")}


def failed(store: Path, path: str = LATENTS) -> list[int]:
    return open_store(store).group(path).failed_rows.tolist()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data", whole())
    return tmp_path / "data"


def test_a_mended_image_is_encoded_by_the_same_command_and_the_other_units_stay(
    data: Path, tmp_path: Path, precompute: Precompute
) -> None:
    write(data, {5: BROKEN, 9: BROKEN})
    precompute(data, tmp_path / "s")
    before = receipts(tmp_path / "s")
    assert failed(tmp_path / "s") == failed(tmp_path / "s", FEATURES) == [5, 9]
    assert "0 to do" in precompute(data, tmp_path / "s")
    assert receipts(tmp_path / "s") == before
    write(data, {5: picture(5)})
    said = precompute(data, tmp_path / "s")
    assert "done again: 1 unit, in which 1 image had failed" in said
    assert failed(tmp_path / "s") == failed(tmp_path / "s", FEATURES) == [9]
    after = receipts(tmp_path / "s")
    assert {name for name in before if before[name] != after[name]} == {
        f"receipts/{path}/00000001.json" for path in (LATENTS, FEATURES)
    }
    write(data, {9: picture(9)})
    assert '"images_failed": 0' in precompute(data, tmp_path / "s")
    precompute(data, tmp_path / "fresh")
    assert array_files(tmp_path / "s") == array_files(tmp_path / "fresh")
    assert not list(verify(tmp_path / "s", deep=True, n_workers=1))
    store = open_store(tmp_path / "s")
    for path in (LATENTS, FEATURES):  # what was is on record
        receipt = read_receipt(store.root, store.group_layout(path)[0], 1)
        assert receipt is not None
        assert receipt.made["replaces"]["failed"] == [5]


def test_redo_failed_takes_what_has_not_changed_too_and_leaves_it_as_it_is(
    data: Path, tmp_path: Path, precompute: Precompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(data, {5: BROKEN, 9: BROKEN})
    with monkeypatch.context() as other:
        other.setattr("pipeline.decode.decode_rgb", _refusing(picture(13)))
        precompute(data, tmp_path / "s")
    assert failed(tmp_path / "s") == [5, 9, 13]
    before = receipts(tmp_path / "s")
    assert "0 to do" in precompute(data, tmp_path / "s")  # the same bytes: nothing says that they can be decoded now
    assert "done again: 3 units, in which 3 images" in precompute(data, tmp_path / "s", "--redo-failed")
    assert failed(tmp_path / "s") == [5, 9]
    changed = {name for name, raw in receipts(tmp_path / "s").items() if raw != before[name]}
    assert changed == {f"receipts/{path}/00000003.json" for path in (LATENTS, FEATURES)}


def _refusing(data: bytes):  # type: ignore[no-untyped-def]
    from pipeline.transforms import DecodeError, decode_rgb

    def decode(sample: bytes) -> Image.Image:
        if sample == data:
            raise DecodeError("no decoder here")
        return decode_rgb(sample)

    return decode


def test_an_image_that_could_not_be_read_is_taken_when_it_is_there(
    data: Path, tmp_path: Path, precompute: Precompute
) -> None:
    path_of(data, 5).unlink()
    path_of(data, 5).symlink_to("nowhere")
    write(data, {6: b""})
    precompute(data, tmp_path / "s")
    assert failed(tmp_path / "s") == [5, 6]
    assert "0 to do" in precompute(data, tmp_path / "s")
    path_of(data, 5).unlink()
    write(data, {5: picture(5), 6: picture(6)})
    assert '"images_failed": 0' in precompute(data, tmp_path / "s")


def test_groups_are_mended_one_after_the_other_and_agree(data: Path, tmp_path: Path, precompute: Precompute) -> None:
    write(data, {5: BROKEN})
    precompute(data, tmp_path / "s")
    write(data, {5: picture(5)})
    said = precompute(data, tmp_path / "s", "--features", "none")
    assert f"images of these units have failed in {FEATURES}, too; name its encoder" in said
    assert (failed(tmp_path / "s"), failed(tmp_path / "s", FEATURES)) == ([], [5])
    assert '"images_failed": 1' in said  # of the store, not of the groups asked for
    assert not list(verify(tmp_path / "s"))
    write(data, {5: picture(50)})  # and mended otherwise
    said = precompute(data, tmp_path / "s", "--latents", "none")
    assert said.startswith(f"refused: 1 of 16 images are others than {LATENTS} was made of, by their sizes: row 5 ")
    write(data, {5: picture(5)})
    precompute(data, tmp_path / "s", "--latents", "none")
    assert failed(tmp_path / "s", FEATURES) == []
    assert not list(verify(tmp_path / "s"))


@pytest.mark.parametrize("options", [(), ("--redo-failed",)])
def test_what_one_encoder_has_stored_does_not_count_though_another_lags_behind(
    data: Path, tmp_path: Path, precompute: Precompute, options: tuple[str, ...]
) -> None:
    write(data, dict.fromkeys(range(14), BROKEN))
    precompute(data, tmp_path / "s", "--max-failures", "1")
    assert "14 of 16 images cannot be decoded" in precompute(data, tmp_path / "s", "--max-failures", "0")
    write(data, {row: picture(row) for row in range(9)})
    said = precompute(data, tmp_path / "s", "--features", "none", "--max-failures", "0", *options)
    assert not said.startswith("refused"), said
    assert failed(tmp_path / "s") == list(range(9, 14))
    said = precompute(data, tmp_path / "s", "--latents", "none", "--max-failures", "0", *options)
    assert '"images_failed": 5' in said
    assert failed(tmp_path / "s", FEATURES) == list(range(9, 14))
    assert not list(verify(tmp_path / "s"))


def test_what_is_stored_is_not_lost_and_not_replaced_by_a_redo(
    data: Path, tmp_path: Path, precompute: Precompute
) -> None:
    write(data, {5: BROKEN})
    precompute(data, tmp_path / "s")
    before = (receipts(tmp_path / "s"), array_files(tmp_path / "s"))
    write(data, {5: picture(5), 6: picture(60)})
    assert "1 of 4 images of unit 1 are others than" in precompute(data, tmp_path / "s")
    write(data, {6: picture(6)})
    path_of(data, 6).chmod(0)
    if os.geteuid():
        assert "1 images that" in precompute(data, tmp_path / "s")
    path_of(data, 6).chmod(0o644)
    write(data, {6: BROKEN + bytes(len(picture(6)) - len(BROKEN))})
    said = precompute(data, tmp_path / "s")
    assert said.startswith("refused: 1 of 4 images of unit 1 are others than")
    assert (receipts(tmp_path / "s"), array_files(tmp_path / "s")) == before


@pytest.mark.parametrize("larger", [False, True])
@pytest.mark.parametrize("older", [False, True])
def test_a_second_encoder_is_not_given_other_images(
    data: Path, tmp_path: Path, precompute: Precompute, larger: bool, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        if older:
            before.setattr("benchmarks.without_ray.Block", lambda crcs, **rest: Block(**rest))
        precompute(data, tmp_path / "s", "--features", "none")
    write(data, {row: picture(row + 100, side=9 if larger else 8) for row in (3, 8, 9, 10, 11)})
    said = precompute(data, tmp_path / "s")
    if older and not larger:
        assert '"units_encoded": 4' in said  # nothing is known of the bytes, and nothing refused
        return
    assert said.startswith("refused: ")
    assert "row 3 (class0/03.bmp)" in said
    assert ("5 of 16 images are others than" if larger else "1 of 4 images of unit 0 are others") in said
    assert not list((tmp_path / "s").glob("receipts/features/*/0*.json"))
    # With nothing to encode they are not refused, but said.
    said = precompute(data, tmp_path / "s", "--features", "none")
    assert ("warning: 5 of 16 images are others than" in said) == larger


@pytest.mark.parametrize("kind", ["tar", "zip", "parquet", "hdf5"])
def test_containers_that_are_packed_again(kind: str, tmp_path: Path, precompute: Precompute) -> None:
    """The mended member moves all that come behind it; keys and bytes stay."""

    def pack(pictures: dict[int, bytes]) -> str:
        samples = [Labelled(f"class{row // 8}", f"{row:02d}.bmp", data) for row, data in pictures.items()]
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        if kind == "zip":
            return write_zip(tmp_path / "data", samples)
        if kind == "parquet":
            return write_parquet(tmp_path / "data", samples)
        if kind == "hdf5":
            (tmp_path / "data").mkdir()
            with h5py.File(tmp_path / "data/x.h5", "w") as file:
                images = file.create_dataset("images", (len(samples),), h5py.vlen_dtype(np.uint8))
                for row, sample in enumerate(samples):
                    images[row] = np.frombuffer(sample.data, np.uint8)
                file["labels"] = [row // 8 for row in pictures]
            return str(tmp_path / "data/x.h5")
        (tmp_path / "data").mkdir()
        for name in ("class0", "class1"):
            with tarfile.open(tmp_path / f"data/{name}.tar", "w") as archive:
                for sample in samples:
                    if sample.class_name == name:
                        info = tarfile.TarInfo(sample.name)
                        info.size = len(sample.data)
                        archive.addfile(info, io.BytesIO(sample.data))
        return str(tmp_path / "data")

    precompute(pack({**whole(), 2: BROKEN}), tmp_path / "s")
    assert failed(tmp_path / "s") == [2]
    mended = {**whole(), 2: picture(2, side=60)}
    assert '"images_failed": 0' in precompute(pack(mended), tmp_path / "s")
    assert failed(tmp_path / "s", FEATURES) == []
    store = open_store(tmp_path / "s")
    assert made_of(store, FEATURES) == [sample_crc32c(data) for data in mended.values()]
    assert len(open_originals(store)(np.arange(N))) == N  # though the index says where they lay when they were listed
    pack({**mended, 7: picture(70)})
    with pytest.raises(UserError, match=r"is another image than row 7 was made of\); restore it"):
        open_originals(store)(np.arange(N))


def made_of(store: Store, path: str) -> list[int]:
    layout, _ = store.group_layout(path)
    crcs = []
    for unit in range(layout.store.n_units):
        receipt = read_receipt(store.root, layout, unit)
        assert receipt is not None
        of_unit = receipt.sample_crcs()
        assert of_unit is not None
        crcs += of_unit.tolist()
    return crcs


def test_pixels_have_checksums_too(tmp_path: Path, precompute: Precompute) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (N, 130, 140, 3), dtype=np.uint8)

    def pack() -> Path:
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["images"], file["labels"] = pixels, [0] * N
        return tmp_path / "x.h5"

    precompute(pack(), tmp_path / "s", "--features", "none")
    assert made_of(open_store(tmp_path / "s"), LATENTS) == [sample_crc32c(row) for row in pixels]
    pixels[9, 0, 0, 0] ^= 1
    assert "1 of 4 images of unit 2 are others than" in precompute(pack(), tmp_path / "s")


LIMITS = st.sampled_from([0.0, 0.3, 0.8, 1.0])
SUBSETS = st.sampled_from([(), ("--features", "none"), ("--latents", "none"), ("--redo-failed",), ("--dry-run",)])


@settings(max_examples=examples(12), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(broken=st.sets(st.integers(0, N - 1)), runs=st.lists(st.tuples(LIMITS, SUBSETS), min_size=1, max_size=4))
@example(broken=set(range(13)), runs=[(0.0, ("--redo-failed",))])
def test_the_limit_holds_however_often_a_run_is_repeated(
    broken: set[int],
    runs: list[tuple[float, tuple[str, ...]]],
    tmp_path_factory: pytest.TempPathFactory,
    precompute: Precompute,
) -> None:
    """A run succeeds only where no more have failed than it allows, whatever was published before."""
    root = tmp_path_factory.mktemp("limit")
    write(root / "data", {**whole(), **dict.fromkeys(broken, BROKEN)})
    precompute(root / "data", root / "s", "--max-failures", "1", *runs[0][1])
    for share, options in runs:
        said = precompute(root / "data", root / "s", "--max-failures", share, *options)
        known = open_store(root / "s").groups() if (root / "s").exists() else []
        too_many = bool(known) and len(broken) > max(10, int(share * N))
        assert said.startswith("refused: ") == too_many, (said, share, options)
        if too_many:
            found = re.search(rf"(\d+) of {N} images cannot be decoded, (\d+) are allowed", said)
            assert found is not None, said
            # A run that tries them again ends as soon as too many have failed again, before it has met them all.
            assert int(found[2]) < int(found[1]) <= len(broken)
            assert "--redo-failed" in options or int(found[1]) == len(broken)
            assert "--redo-failed" in said
            table = pq.read_table(root / "s" / FAILURES_FILE)
            assert table["row"].to_pylist() == sorted(broken)
            assert b"--redo-failed" in table.schema.metadata[b"summary"]
    write(root / "data", whole())
    precompute(root / "data", root / "s", "--max-failures", "0")
    said = precompute(root / "data", root / "s", "--max-failures", "0")
    assert '"images_failed": 0' in said
    assert not list(verify(root / "s"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_itself_on_ray(data: Path, tmp_path: Path) -> None:
    """Over the limit twice, mended, and other images for a second encoder: real processes, real encoders."""
    broken = list(range(12))
    write(data, dict.fromkeys(broken, BROKEN))

    def command(*more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "pipeline", "precompute", "--data", str(data), "--store", str(tmp_path / "s")]
        line += ["--shard-rows", "16", *OPTIONS, *more]
        return subprocess.run(line, capture_output=True, text=True, timeout=300)

    for _ in range(2):
        done = command("--features", "none")
        assert done.returncode == 2, done.stderr
        assert "12 of 16 images cannot be decoded, 10 are allowed" in done.stderr
    write(data, whole())
    done = command("--features", "none")
    assert done.returncode == 0, done.stderr
    assert failed(tmp_path / "s") == []
    write(data, {3: picture(30)})
    done = command()
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert f"1 of 16 images are others than {LATENTS} was made of" in last  # its size is not the broken one's
    write(data, {3: picture(3), 13: picture(130)})
    done = command()
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "1 of 16 images of unit 0 are others than" in last
    assert "row 13 (class1/13.bmp); put the images back" in last
    assert not list((tmp_path / "s").glob("receipts/features/*/0*.json"))


def test_info_verify_and_diff_say_what_rows_were_made_of(
    data: Path, tmp_path: Path, precompute: Precompute, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, changed in (("a", {}), ("b", {3: picture(30), 9: picture(90)})):
        write(data, {**whole(), **changed})
        precompute(data, tmp_path / name)
    assert storage_main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert f"{LATENTS}: rows made of other images: 3, 9" in capsys.readouterr().out
    assert storage_main(["info", str(tmp_path / "a")]) == 0
    assert "have no checksums of their images" not in capsys.readouterr().out
    for path in (FEATURES, f"receipts/{FEATURES}"):
        shutil.rmtree(tmp_path / "a" / path)
        shutil.copytree(tmp_path / "b" / path, tmp_path / "a" / path)
    faults = list(verify(tmp_path / "a"))
    assert len(faults) == 2
    assert (
        f"{FEATURES}: unit 0: 1 rows were made of other images than those of {LATENTS}: row 3 (class0/03.bmp)"
        in (faults[0])
    )
    assert list(verify(tmp_path / "a", groups=[LATENTS])) != []
    assert storage_main(["diff", str(tmp_path / "a" / LATENTS), str(tmp_path / "a" / FEATURES)]) == 1
    assert "rows made of other images: 3, 9" in capsys.readouterr().out
