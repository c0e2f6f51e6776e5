"""`python -m storage export` and `import`: numbers to other formats, and other projects' numbers to a store.

Every writer is one file with `write(content, out)`, every reader one file with `read(source, options) -> Incoming`; the
tables below are the only place that names them all. What is exported is published whole or not at all.
"""

from __future__ import annotations

import importlib
import os
import secrets
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from storage.base.console import progress_bar, say
from storage.base.ending import command, rows, say_next
from storage.base.errors import UserError
from storage.base.options import argument, one_of, option, required
from storage.base.waiting import waiting
from storage.exchange.content import make_content
from storage.exchange.incoming import ImportOptions, import_store
from storage.reader import open_store
from storage.space import size

SHOWN = 20  # rows left out
EXPORTS = {"hdf5": "to_hdf5", "webdataset": "to_webdataset", "mds": "to_mds", "npy": "to_npy", "parquet": "to_parquet"}
LOOK_AT = {  # commands that look into what was written, with nothing but what `make` installs
    "hdf5": "python -c 'import h5py, sys; h5py.File(sys.argv[1]).visititems(print)' {}",
    "parquet": "python -c 'import pyarrow.parquet as pq, sys; print(pq.read_schema(sys.argv[1]))' {}",
    "npy": "ls -l {}",
    "webdataset": "tar --list --verbose --file {}/data-000000.tar | head",
    "mds": "python -m json.tool {}/index.json",
}
IMPORTS = {
    "hdf5": "from_hdf5", "repa-npy": "from_repa_npy", "lightningdit": "from_lightningdit", "repa-e": "from_repa_e"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`export`: which rows of which groups become what."""

    store: str = argument("store root or URL")
    to: str = required(f"format: {', '.join(EXPORTS)}")
    out: Path = required("file (hdf5, parquet) or folder to make")
    groups: tuple[str, ...] = option((), "latents/NAME features/NAME (default all)", spaced=True, metavar="GROUP")
    rows: str = option(":", "rows A to B-1 (default all)", metavar="A:B")
    decode: bool = option(False, "write features that are in codes as float16 numbers, which cannot be imported again")

    def __post_init__(self) -> None:
        one_of("--to", self.to, EXPORTS)


@dataclass(frozen=True, kw_only=True)
class ImportConfig(ImportOptions):
    """`import`: what becomes a group of which store."""

    source: Path = argument("HDF5 file, vae-sd folder of the REPA code, LightningDiT folder, or REPA-E's NAME.h5")
    format: str = required(f"what SOURCE is: {', '.join(IMPORTS)}", flag="--from")
    store: str = required("store to make or to continue")

    def __post_init__(self) -> None:
        one_of("--from", self.format, IMPORTS)
        super().__post_init__()


def export(config: ExportConfig) -> None:
    """Write rows in another format."""
    export_store(
        config.store, config.to, config.out, groups=list(config.groups), rows=config.rows, decode=config.decode
    )
    files = [path for path in config.out.rglob("*") if path.is_file()] if config.out.is_dir() else [config.out]
    n_bytes = sum(path.stat().st_size for path in files)
    say(*rows({"format": config.to, "files": f"{len(files)}, {size(n_bytes)}"}).splitlines())
    say_next(LOOK_AT[config.to].format(shlex.quote(str(config.out))))


def bring_in(config: ImportConfig) -> None:
    """Make a group of another project's numbers."""
    with waiting(f"reading what {config.source} holds"):
        read = importlib.import_module(f"storage.exchange.{IMPORTS[config.format]}").read
        incoming = read(config.source, config)
    import_store(config.store, incoming, config)
    say_next(command("storage", "verify", config.store, "--deep"), command("storage", "ls", config.store))


def export_store(
    store: str | os.PathLike[str], to: str, out: Path, *, groups: list[str], rows: str = ":", decode: bool = False
) -> None:
    """Write rows of a store's groups to `out` in the format `to`. Raises UserError when `out` exists."""
    out = out.absolute()
    if out.exists():
        raise UserError(f"{out} exists; name another --out, or remove it")
    with waiting("opening the store"):
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
