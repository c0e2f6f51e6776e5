"""`python -m storage export` and `import`: numbers to other formats, and other projects' numbers to a store.

Every writer is one file with `write(content, out)`, every reader one file with `read(source, options) -> Incoming`; the
tables below are the only place that names them all. What is exported is published whole or not at all.
"""

from __future__ import annotations

import argparse
import importlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from storage.base.console import EXIT_OK, progress_bar, say
from storage.base.errors import UserError
from storage.exchange.content import make_content
from storage.exchange.incoming import ImportOptions, import_store
from storage.reader import open_store

SHOWN = 20  # rows left out
EXPORTS = {"hdf5": "to_hdf5", "webdataset": "to_webdataset", "mds": "to_mds", "npy": "to_npy", "parquet": "to_parquet"}
IMPORTS = {"hdf5": "from_hdf5", "repa-npy": "from_repa_npy", "lightningdit": "from_lightningdit"}


def add_commands(commands: Any) -> None:
    """Add `export` and `import` to the sub-commands of a parser."""
    export = commands.add_parser("export", help="write a store's rows, in order, in another format")
    export.add_argument("store", metavar="STORE")
    export.add_argument("--to", required=True, choices=EXPORTS)
    export.add_argument("--out", required=True, type=Path, help="file (hdf5, parquet) or folder to make")
    export.add_argument(
        "--groups", nargs="+", default=[], metavar="GROUP", help="latents/NAME features/NAME (default all)"
    )
    export.add_argument("--rows", default=":", metavar="A:B", help="rows A to B-1 (default all)")
    export.add_argument("--decode", action="store_true", help="write int8 features as float16 numbers")
    bring = commands.add_parser("import", help="make a store of what another project has encoded")
    bring.add_argument("source", type=Path, help="HDF5 file, vae-sd folder of the REPA code, or LightningDiT folder")
    bring.add_argument("--from", required=True, choices=IMPORTS, dest="format")
    bring.add_argument("--store", required=True, help="store to make or to go on with")
    bring.add_argument("--name", required=True, help="what to call the encoder: the group is latents/NAME")
    bring.add_argument("--resolution", type=int, default=256, help="pixels a side of the encoded images (default 256)")
    bring.add_argument("--shard-rows", type=int, default=512)
    bring.add_argument(
        "--latent-scale-factor", type=float, help="default 0.18215 for repa-npy and hdf5, 1 for lightningdit"
    )
    bring.add_argument(
        "--dataset", default="", help="hdf5: the dataset of moments (N, [V,] 2C, h, w) in a foreign file"
    )
    bring.add_argument("--labels", default="", help="hdf5: the dataset of labels (N,) in a foreign file")


def run(args: argparse.Namespace) -> int:
    """Run a parsed `export` or `import`; returns the exit status."""
    if args.command == "export":
        export_store(args.store, args.to, args.out, groups=args.groups, rows=args.rows, decode=args.decode)
    else:
        options = ImportOptions(
            name=args.name,
            resolution=args.resolution,
            shard_rows=args.shard_rows,
            latent_scale_factor=args.latent_scale_factor,
            dataset=args.dataset,
            labels=args.labels,
        )
        read = importlib.import_module(f"storage.exchange.{IMPORTS[args.format]}").read
        import_store(args.store, read(args.source, options), options)
    return EXIT_OK


def export_store(
    store: str | os.PathLike[str], to: str, out: Path, *, groups: list[str], rows: str = ":", decode: bool = False
) -> None:
    """Write rows of a store's groups to `out` in the format `to`. Raises UserError when `out` exists."""
    out = out.absolute()
    if out.exists():
        raise UserError(f"{out} exists; name another --out, or remove it")
    content = make_content(open_store(store), groups, rows, decode)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        with progress_bar(len(content.rows), unit="row", description=f"export to {to}") as bar:
            content.progress = bar.update
            importlib.import_module(f"storage.exchange.{EXPORTS[to]}").write(content, temporary)
        os.replace(temporary, out)
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(f"cannot write {out}: {os.strerror(error.errno)}; free space or name another --out") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
    say(f"{out}: {len(content.rows)} rows of {', '.join(group.path for group in content.groups)}")
    if content.left_out:
        shown, more = content.left_out[:SHOWN], len(content.left_out) - SHOWN
        rows = ", ".join(map(str, shown)) + (f" and {more} more" if more > 0 else "")
        say(f"left out, since their samples failed: rows {rows}")
