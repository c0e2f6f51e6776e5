"""Sources at URLs give what they give from a disk, through every kind of file system."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.sources import Unreadable, open_source
from storage.base.errors import UserError
from tests.pipeline.containers import (
    WRITERS,
    tar_bytes,
)
from tests.pipeline.reading import SAMPLES, check, decode_all, read_all
from tests.storage.servers import free_port, http_server, s3_server


def copy_to(file_system: fsspec.AbstractFileSystem, data: str, url: str) -> str:
    """The container below a URL; returns what to name as DATA."""
    path = Path(data)
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    base = path.parent if path.is_file() else path
    for file in files:
        file_system.pipe_file(f"{url}/{file.relative_to(base)}", file.read_bytes())
    return f"{url}/{path.name}" if path.is_file() else url


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "edm-zip"])
def test_the_same_in_memory_through_fsspec(containers: dict[str, str], name: str) -> None:
    data = copy_to(fsspec.filesystem("memory"), containers[name], f"memory://{name}")
    check(data, SAMPLES)
    source, local = open_source(data), open_source(containers[name])
    assert source.listing().index == local.listing().index
    np.testing.assert_array_equal(decode_all(source, source.listing()), decode_all(local, local.listing()))


class OneConversation(MemoryFileSystem):
    """A server that is named in the URL, and whose connections serve the thread that made them, as FTP's do."""

    protocol = "conversation"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    hosts: ClassVar[set[str]] = set()

    def __init__(self, host: str, **options: object) -> None:
        super().__init__(**options)
        self.hosts.add(host)
        self.thread = threading.get_ident()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        path = path.removeprefix("conversation://")
        return super()._strip_protocol("/" + path.partition("/")[2] if path.startswith("host") else path)

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        return {"host": path.removeprefix("conversation://").partition("/")[0]}

    def cat_file(self, *args: Any, **kwargs: Any) -> bytes:
        assert self.thread == threading.get_ident()
        return super().cat_file(*args, **kwargs)

    def ls(self, *args: Any, **kwargs: Any) -> Any:
        assert self.thread == threading.get_ident()
        return super().ls(*args, **kwargs)


def test_a_host_in_the_url_and_a_connection_a_thread(containers: dict[str, str]) -> None:
    fsspec.register_implementation("conversation", OneConversation, clobber=True)
    data = copy_to(OneConversation("host"), containers["image-folder"], "conversation://host/sets/folder")
    listing = check(data, SAMPLES)
    assert listing.index == open_source(containers["image-folder"]).listing().index
    assert OneConversation.hosts == {"host"}


def test_a_server_that_is_not_there_is_one_line() -> None:
    data = f"ftp://127.0.0.1:{free_port()}/images"
    line = [sys.executable, "-m", "pipeline", "index", data]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    *waits, line_of_error = done.stderr.splitlines()
    assert line_of_error == (
        f"python -m pipeline index: error: cannot be reached ([Errno 111] Connection refused): {data}"
    )
    assert all(each.startswith(("loading ", "listing ")) for each in waits)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server("images") as url:
        yield url


def test_s3(containers: dict[str, str], bucket: str) -> None:
    pytest.importorskip("obstore")
    from pipeline.sources.files import RemoteFiles

    file_system = RemoteFiles(bucket).file_system
    for name in ("image-folder", "tar-of-tars", "parquet", "hdf5"):
        data = copy_to(file_system, containers[name], f"{bucket}/sets/{name}")
        source = open_source(data)
        listing = check(data, SAMPLES)
        if name == "image-folder":
            file_system.rm_file(f"{data}/{listing.index.keys[3]}")
            (lost,) = source.read_many([listing.index.locations[3]])
            assert lost == Unreadable("cannot be read: no such object")
        else:
            np.testing.assert_array_equal(
                decode_all(source, listing), decode_all(local := open_source(containers[name]), local.listing())
            )
    check(f"{bucket}/sets/parquet/train-*.parquet", SAMPLES)
    members = [("no.jpg", b""), ("no.cls", b"0"), ("b.jpg", b"B"), ("b.cls", b"1")]
    file_system.pipe_file(f"{bucket}/empty/a.tar", tar_bytes(members))
    source = open_source(f"{bucket}/empty/a.tar")
    assert read_all(source, source.listing()) == [b"", b"B"]
    with pytest.raises(UserError, match="does not exist"):
        open_source(f"{bucket}/nowhere")


def test_one_file_over_http(containers: dict[str, str]) -> None:
    pytest.importorskip("obstore")
    data = Path(containers["tar-of-tars"])
    with http_server(data.parent) as (url, _):
        check(f"{url}/{data.name}", SAMPLES)
        with pytest.raises(UserError, match="an http server cannot list files; name one"):
            open_source(url)
