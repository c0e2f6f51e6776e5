"""A folder of tar files in WebDataset's convention: `<row>.<array>.npy`, `<row>.cls`, `<row>.json` for every sample.

Tars of about a gigabyte, `data-000000.tar` and so on; the same store gives the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from storage.exchange.content import Content

TAR_BYTES = 1_000_000_000


def write(content: Content, out: Path) -> None:
    """Write the folder."""
    out.mkdir()
    (out / "attributes.json").write_text(json.dumps(content.attributes, indent=1, sort_keys=True))
    samples = content.index.table.select(["key", "label", "class_name"])
    tars = _Tars(out)
    try:
        for where, arrays in content.batches():
            about = samples.slice(where.start, where.stop - where.start).to_pylist()
            for i, (row, sample) in enumerate(zip(content.rows[where].tolist(), about, strict=True)):
                members = {f"{column.short}.npy": _npy(arrays[column.name][i]) for column in content.columns}
                members |= {"cls": str(sample["label"]).encode(), "json": json.dumps(sample).encode()}
                tars.add(f"{row:09d}", members)
    finally:
        tars.close()


class _Tars:
    """Tar files filled one after the other; a sample never spans two."""

    def __init__(self, out: Path) -> None:
        self._out, self._n, self._n_bytes = out, 0, TAR_BYTES
        self._open = contextlib.ExitStack()
        self._tar: tarfile.TarFile

    def add(self, name: str, members: Mapping[str, bytes]) -> None:
        if self._n_bytes >= TAR_BYTES:
            self._open.close()
            path = self._out / f"data-{self._n:06d}.tar"
            self._tar = self._open.enter_context(tarfile.open(path, "w"))  # noqa: SIM115
            self._n, self._n_bytes = self._n + 1, 0
        for extension, data in members.items():
            member = tarfile.TarInfo(f"{name}.{extension}")  # of the year 1970 and of nobody, so that the bytes repeat
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
            self._n_bytes += len(data)

    def close(self) -> None:
        self._open.close()


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()
