"""The commands of `python -m storage`, and the options of those that look. What a command does is imported by name."""

from __future__ import annotations

from dataclasses import dataclass

from storage.base.commands import Command
from storage.base.options import argument, option
from storage.base.programs import program

PROG = program("storage")


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """`ls`: where to look."""

    root: str = argument("directory or URL")


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """`info`: of what."""

    store: str = argument("store or group", metavar="STORE|GROUP")
    json: bool = option(False, "print all of it as JSON: every field of identities and provenance, every failed sample")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """`verify`: what, and how thoroughly."""

    store: str = argument("store or group", metavar="STORE|GROUP")
    deep: bool = option(False, "read every byte: checksums, NaN and infinity")


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """`diff`: what is compared with what."""

    a: str = argument("store or group", metavar="STORE|GROUP")
    b: str = argument("another one", metavar="STORE|GROUP")


HERE = "storage.commands"
INSPECTION = "storage.inspection"
COMMANDS = {
    "ls": Command("the stores at or below a place, a line a group", f"{HERE}:ListConfig", f"{INSPECTION}:list_stores"),
    "info": Command("identity, provenance, failures, timings", f"{HERE}:InfoConfig", "storage.info:info"),
    "verify": Command(
        "check a store or a group; exit status 1 when something is wrong",
        f"{HERE}:VerifyConfig",
        f"{INSPECTION}:verify_store",
    ),
    "diff": Command(
        "identity fields and rows in which two stores or groups differ", f"{HERE}:DiffConfig", f"{INSPECTION}:diff"
    ),
    "statistics": Command(
        "mean and deviation of a group's numbers, counted where its receipts lack them",
        "storage.recount:StatisticsConfig",
        "storage.recount:statistics",
    ),
    "derive": Command(
        "a group of codes, or of principal components, from one that is stored",
        "storage.derive:DeriveConfig",
        "storage.derive:derive",
    ),
    "export": Command(
        "write a store's rows, in order, in another format", "storage.exchange:ExportConfig", "storage.exchange:export"
    ),
    "import": Command(
        "make a store of what another project has encoded", "storage.exchange:ImportConfig", "storage.exchange:bring_in"
    ),
}
