"""The zoo of odd and broken images: decoded as said or failed as said, alone, by the unit and in a store."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import PrecomputeConfig
from pipeline.decode import decode_unit
from pipeline.precompute import precompute
from pipeline.preview import open_originals
from pipeline.sources import open_source
from pipeline.transforms import DecodeError, center_crop, decode_rgb
from storage import open_store
from tests.pipeline.containers import Labelled, write_image_folder, write_parquet
from tests.pipeline.zoo import ZOO, Animal, agrees, fails_as_it_should
from tests.storage.test_store import array_files

RESOLUTION = 128
# ImageNet has a PNG named .JPEG; here everything is
SAMPLES = sorted(Labelled(animal.name.split("-")[0], f"{animal.name}.JPEG", animal.data) for animal in ZOO)
BY_NAME = {animal.name: animal for animal in ZOO}
GOOD = [animal for animal in ZOO if animal.is_good]


def animal_of(key: str) -> Animal:
    return BY_NAME[Path(key).stem]


def test_the_zoo_has_many_kinds() -> None:
    assert len(BY_NAME) == len(ZOO) >= 40
    assert len({animal.data for animal in ZOO}) == len(ZOO)
    assert min(len(GOOD), len(ZOO) - len(GOOD)) >= 30


@pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.name)
def test_each_is_decoded_as_said_or_fails_as_said(
    animal: Animal, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    if animal.is_good:
        decoded = decode_rgb(animal.data)
        assert decoded.mode == "RGB"
        assert agrees(animal, np.asarray(decoded)), animal.name
    else:
        with pytest.raises(DecodeError) as error:
            center_crop(decode_rgb(animal.data), RESOLUTION)
        assert fails_as_it_should(animal, str(error.value)), str(error.value)
        assert "\n" not in str(error.value)
    assert not list(recwarn)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("name", ["jpeg-plain", "png-plain", "gif-animated", "webp-lossy", "tiff-lzw", "jp2-lossless"])
def test_cut_anywhere_it_fails_or_is_the_whole_picture(name: str) -> None:
    animal = BY_NAME[name]
    for length in np.linspace(0, len(animal.data) - 1, 60).astype(int):
        try:
            decoded = np.asarray(decode_rgb(animal.data[:length]))
        except DecodeError:
            continue
        assert agrees(animal, decoded), length


def test_a_unit_of_the_whole_zoo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = open_source(write_image_folder(tmp_path / "zoo", SAMPLES))
    index = source.listing().index
    images, (failures, *_) = decode_unit(source, 1000, index.keys, index.locations, RESOLUTION)
    assert images.shape == (len(ZOO), RESOLUTION, RESOLUTION, 3)
    failed = {failure.row - 1000: failure for failure in failures}
    assert len(index) - len(failed) == len(GOOD)
    for row, key in enumerate(index.keys):
        animal = animal_of(key)
        if animal.is_good:
            assert row not in failed, failed[row]
            exact = center_crop(Image.fromarray(np.asarray(decode_rgb(animal.data))), RESOLUTION)
            np.testing.assert_array_equal(images[row], exact)
        else:
            assert failed[row].key == key
            assert fails_as_it_should(animal, failed[row].reason)
            assert not images[row].any()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow  # in default: every animal decoded, from a folder and from Parquet
def test_a_store_of_the_whole_zoo_and_the_same_from_parquet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stores = []
    for name, write in (("folder", write_image_folder), ("parquet", write_parquet)):
        config = PrecomputeConfig(
            data=write(tmp_path / name, SAMPLES),
            store=str(tmp_path / f"store-{name}"),
            latents="tiny-vae",
            features="none",
            resolution=RESOLUTION,
            shard_rows=16,
            max_failures=1.0,
        )
        summary = precompute(config)
        assert summary.images == len(ZOO)
        assert summary.images_failed == len(ZOO) - len(GOOD)
        assert not summary.units_given_up
        stores.append(open_store(config.store))
    assert "Traceback" not in capfd.readouterr().err
    folder, parquet = stores
    group = folder.group("latents/tiny-vae")
    assert {(Path(f.key).stem, f.row) for f in group.failures} == {
        (animal_of(key).name, row) for row, key in enumerate(folder.index.keys) if not animal_of(key).is_good
    }
    for failure in group.failures:
        assert fails_as_it_should(animal_of(failure.key), failure.reason)
    moments = group["moments"]
    good = [row for row in range(folder.n_rows) if animal_of(folder.index.keys[row]).is_good]
    out = np.empty((len(good), *moments.row_shape), moments.dtype)
    moments.read_into(good, 0, out)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(
        open_originals(parquet)(np.array(good[::9])),  # preview reopens what the store was made of
        [center_crop(decode_rgb(animal_of(folder.index.keys[row]).data), RESOLUTION) for row in good[::9]],
    )
    assert [f.reason for f in parquet.group("latents/tiny-vae").failures] == [f.reason for f in group.failures]
    arrays = {
        name: {path: data for path, data in array_files(tmp_path / f"store-{name}").items() if "/c/" in str(path)}
        for name in ("folder", "parquet")
    }
    assert len(arrays["folder"]) == folder.group("latents/tiny-vae").layout.store.n_units
    assert arrays["folder"] == arrays["parquet"]
