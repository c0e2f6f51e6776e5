"""Stores in an object store and over HTTP: the same calls, the same numbers, the same errors."""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from storage import CacheConfig, StoreError, open_array, open_store
from storage.__main__ import main
from storage.roots import absolute, open_root
from storage.verify import verify
from tests.storage.servers import http_server, s3_server
from tests.stores import FEATURES, LATENTS, make_store

pytest.importorskip("obstore")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server("bucket") as url:
        yield url


@pytest.fixture
def place(bucket: str) -> str:
    return f"{bucket}/{uuid.uuid4().hex}"


def gather_all(where: str, data: dict[str, dict[str, np.ndarray]], **options: object) -> None:
    store = open_store(where)
    rows = np.random.default_rng(3).integers(0, store.n_rows, 150)
    views = np.random.default_rng(4).integers(0, store.n_views, 150)
    for path, arrays in data.items():
        group = store.group(path, **options)  # type: ignore[arg-type]
        for name, written in arrays.items():
            out = np.empty((150, *written.shape[2:]), written.dtype)
            group[name].read_into(rows, views, out)
            np.testing.assert_array_equal(out, written[rows, views])
        group.close()


def test_publish_to_s3_and_gather_from_it(place: str) -> None:
    data = make_store(place, n_rows=45, n_views=2, shard_rows=8)
    store = open_store(place)
    assert store.groups() == [LATENTS, FEATURES]
    assert store.index.labels.tolist() == [row % 5 for row in range(45)]
    gather_all(place, data, checksums="always")
    assert list(verify(place, deep=True, n_workers=2)) == []
    with pytest.raises(StoreError, match=r"has no features/clip; it has latents/tiny-vae, features/tiny-vit"):
        store.group("features/clip")


def test_remote_and_local_stores_have_the_same_files(place: str, tmp_path: Path) -> None:
    make_store(place, failed_rows=[3])
    make_store(tmp_path / "s", failed_rows=[3])
    root = open_root(place)
    sizes = root.sizes("")
    assert sizes is not None
    local = {str(path.relative_to(tmp_path / "s")): path for path in (tmp_path / "s").rglob("*") if path.is_file()}
    assert sizes.keys() == local.keys()
    for key, path in local.items():
        if not key.startswith("receipts/") or key.endswith(("store.json", "metadata.json")):  # receipts hold timings
            assert root.read(key) == path.read_bytes(), key
    make_store(place, failed_rows=[3])  # again: nothing to heal, nothing to refuse
    reader = open_store(place).group(LATENTS)["moments"]
    with pytest.raises(StoreError, match="row 3, view 0 is empty"):
        reader.read_into([3], 0, np.empty((1, *reader.row_shape), reader.dtype))


def test_damage_in_s3_is_found(place: str) -> None:
    make_store(place)
    root = open_root(place)
    key = f"{FEATURES}/patches/c/1/0/0/0"
    raw = bytearray(root.read(key))
    raw[5 * (64 * 24 * 2 + 4) + 11] ^= 16
    root.write(key, [bytes(raw)], "test")
    reader = open_store(place).group(FEATURES)["patches"]
    with pytest.raises(StoreError, match=r"s3://.*patches/c/1/0/0/0, row 21, view 0: wrong checksum"):
        reader.read_into(np.arange(40), 0, np.empty((40, *reader.row_shape), reader.dtype))
    assert [line for line in verify(place, deep=True, n_workers=1) if "row 21, view 0" in line]
    root.write(key, [bytes(raw[:-9])], "test")
    with pytest.raises(StoreError, match=r"not complete.*unit 1.*bytes"):
        open_store(place).group(FEATURES)


def _first_labels(where: str, pipe: object) -> None:
    try:
        pipe.send(open_store(where).index.labels.tolist()[:3])  # type: ignore[attr-defined]
    except StoreError as error:
        pipe.send(str(error))  # type: ignore[attr-defined]


def _read_one(reader: object, pipe: object) -> None:
    out = np.empty((1, *reader.row_shape), reader.dtype)  # type: ignore[attr-defined]
    try:
        reader.read_into([2], 0, out)  # type: ignore[attr-defined]
        pipe.send(out)  # type: ignore[attr-defined]
    except StoreError as error:
        pipe.send(str(error))  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_in_a_child_process(place: str, method: str) -> None:
    data = make_store(place)
    reader = open_store(place).group(LATENTS)["moments"]
    context = get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=_read_one, args=(reader, theirs))
    child.start()
    assert ours.poll(90)
    answer = ours.recv()
    child.join()
    if method == "spawn":
        np.testing.assert_array_equal(answer, data[LATENTS]["moments"][[2], 0])
    else:  # an object store's connection does not survive: said, and no hang
        assert "start the workers by spawn" in answer
    assert pickle.loads(pickle.dumps(open_root(place))).url == place


def test_over_http_with_retries(tmp_path: Path) -> None:
    data = make_store(tmp_path / "s", n_rows=45, n_views=2, shard_rows=8)
    with http_server(tmp_path) as (url, requests):
        gather_all(f"{url}/s", data, checksums="first")
        assert requests
        store = open_store(f"{url}/s")
        with pytest.raises(StoreError, match="cannot be listed over http; name the groups"):
            store.groups()
        with pytest.raises(StoreError, match="is read-only"):
            store.root.write("x", [b"1"], "test")
        moments = open_array(f"{url}/s/{LATENTS}/moments")
        out = np.empty((2, *moments.row_shape), moments.dtype)
        moments.read_into([44, 0], [1, 0], out)
        np.testing.assert_array_equal(out, data[LATENTS]["moments"][[44, 0], [1, 0]])
        with pytest.raises(StoreError, match=r"has no features/clip; which groups there are cannot be asked there"):
            store.group("features/clip")
        with pytest.raises(StoreError, match="does not exist"):
            open_store(f"{url}/nowhere")


def test_the_cache_keeps_what_fits_and_never_lies(tmp_path: Path) -> None:
    data = make_store(tmp_path / "s", n_rows=48, shard_rows=16)
    layout = open_store(tmp_path / "s").group(LATENTS).layout
    unit_bytes = 16 * layout.arrays[0].stored_bytes
    cache = CacheConfig(directory=tmp_path / "cache", max_bytes=2 * unit_bytes + 100)
    rows = np.random.default_rng(0).permutation(48)
    with http_server(tmp_path) as (url, requests):

        def epoch() -> int:
            before = len(requests)
            reader = open_store(f"{url}/s").group(LATENTS, cache=cache, checksums="always")["moments"]
            out = np.empty((48, *reader.row_shape), reader.dtype)
            reader.read_into(rows, 0, out)
            np.testing.assert_array_equal(out, data[LATENTS]["moments"][rows, 0])
            return len([name for name in requests[before:] if "/c/" in name])

        first = epoch()
        files = sorted((tmp_path / "cache").rglob("*.shard"))
        assert [file.name for file in files] == ["0.shard", "1.shard"]
        assert sum(file.stat().st_size for file in files) <= cache.max_bytes
        second = epoch()
        assert second < first  # two of three units came from the disk
        raw = bytearray(files[0].read_bytes())
        raw[100] ^= 1
        files[0].write_bytes(raw[:-5000])  # a damaged row and a lost end: fetched again, and right
        assert second < epoch() <= first
        assert epoch() == second


def test_mistakes_are_one_line(place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StoreError, match="does not exist; make one"):
        open_store(place)
    with pytest.raises(StoreError, match=r"a store lies in a directory or at s3://"):
        open_store("ftp://host/x")
    assert absolute("s3://bucket/x/") == "s3://bucket/x"
    make_store(place)
    assert main(["ls", place.rsplit("/", 1)[0]]) == 0
    assert "latents/tiny-vae" in capsys.readouterr().out
    assert main(["verify", place]) == 0


def test_credentials_come_from_the_usual_file(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(place)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError, match=r"no credentials; set AWS_ACCESS_KEY_ID"):
        open_store(place)
    file.write_text("[default]\naws_access_key_id = testing\naws_secret_access_key = testing\n")
    assert open_store(place).n_rows == 40


def test_a_dead_endpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setattr("storage.remote.RETRIES", {"max_retries": 0})
    with pytest.raises(StoreError, match=r"s3://bucket/x.*check the URL, the endpoint and the network"):
        open_store("s3://bucket/x")
    assert os.environ["AWS_ENDPOINT_URL"].endswith(":9")
