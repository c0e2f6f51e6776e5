"""MosaicML Streaming's shards, written by its own MDSWriter: columns row, key, label, class_name and one an array."""

from __future__ import annotations

import json
from pathlib import Path

from storage.base.errors import UserError
from storage.exchange.content import Content


def write(content: Content, out: Path) -> None:
    """Write the folder. Raises UserError when the library is not installed."""
    try:
        from streaming import MDSWriter
    except ImportError:
        raise UserError(
            "export --to mds needs mosaicml-streaming, whose pins break diffusers, so it lives in an environment of "
            "its own: run `make bench-env`, then `.venv-bench/bin/python -m storage export …`"
        ) from None
    columns = {"row": "int", "key": "str", "label": "int", "class_name": "str"}
    columns |= {c.short: f"ndarray:{c.dtype.name}:{','.join(map(str, c.shape))}" for c in content.columns}
    samples = content.index.table.select(["key", "label", "class_name"])
    with MDSWriter(out=str(out), columns=columns, hashes=["xxh64"]) as writer:
        for where, arrays in content.batches():
            about = samples.slice(where.start, where.stop - where.start).to_pylist()
            for i, (row, sample) in enumerate(zip(content.rows[where].tolist(), about, strict=True)):
                writer.write({"row": row, **sample, **{c.short: arrays[c.name][i] for c in content.columns}})
    (out / "attributes.json").write_text(json.dumps(content.attributes, indent=1, sort_keys=True))
