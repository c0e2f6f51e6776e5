"""Servers on 127.0.0.1 for the tests of remote stores: S3 (moto's own server process) and plain HTTP with ranges."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """The URL of the one bucket of a fresh S3 server, to which the environment leads meanwhile."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT"), timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, "the S3 server ended"
                time.sleep(0.1)
        else:
            raise AssertionError("the S3 server did not answer within 30 s")
        credentials = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**credentials, "AWS_ENDPOINT_URL": endpoint}.items():
                patch.setenv(name, value)
            yield f"s3://{bucket}"
    finally:
        server.terminate()
        server.wait()


class _Ranges(SimpleHTTPRequestHandler):
    """Files with single byte ranges; the first request of every third range fails, so that retries are seen to work."""

    protocol_version = "HTTP/1.1"
    requests: list[str] = []  # noqa: RUF012
    stumbled: set[str] = set()  # noqa: RUF012

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        start, stop = int(wanted[1]), int(wanted[2]) + 1
        name = f"{self.path} {start}"
        if start % 3 == 0 and name not in self.stumbled:
            self.stumbled.add(name)
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.requests.append(name)
        body = path.read_bytes()
        part = body[start:stop]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.end_headers()
        self.wfile.write(part)


@contextmanager
def http_server(directory: Path) -> Iterator[tuple[str, list[str]]]:
    """(the URL of a directory, the list of range requests answered so far)."""

    class Handler(_Ranges):
        requests: list[str] = []  # noqa: RUF012
        stumbled: set[str] = set()  # noqa: RUF012

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(directory), **kwargs)  # type: ignore[arg-type]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", Handler.requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
