"""How much memory there is to take: of the machine, and under the limits of the control groups that this process is in.

Cached files count as free, since the kernel lets go of them. Control groups of both versions are asked, each with those
above it; one that is not there, or has no limit, does not limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


class Version(NamedTuple):
    """Where a version of control groups says what."""

    mount: str
    limit: str
    usage: str
    cached: tuple[str, ...]  # lines of memory.stat


VERSIONS = {
    "memory": Version(
        "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
    ),
    "": Version("", "memory.max", "memory.current", ("active_file", "inactive_file")),
}


class Free(NamedTuple):
    """Bytes, and of what."""

    n_bytes: int
    of: str


def free_memory(device: torch.device, *, proc: Path = PROC, cgroups: Path = CGROUPS) -> Free:
    """Of a GPU, or the least that the machine and its control groups leave."""
    if device.type == "cuda":
        return Free(torch.cuda.mem_get_info(device)[0], "this GPU")
    return min([_of_machine(proc), *_of_control_groups(proc, cgroups)])


def _of_machine(proc: Path) -> Free:
    lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    return Free(int(lines["MemAvailable"].split()[0]) << 10, "this machine")


def _of_control_groups(proc: Path, cgroups: Path) -> Iterator[Free]:
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for name in {"memory", ""} & set(controllers.split(",")):
            version = VERSIONS[name]
            for folder in (PurePosixPath(path), *PurePosixPath(path).parents):
                try:
                    yield _left(cgroups / version.mount / str(folder).lstrip("/"), version)
                except (OSError, ValueError):  # not mounted here, or "max"
                    continue


def _left(folder: Path, version: Version) -> Free:
    limit = int((folder / version.limit).read_text())
    lines = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
    cached = sum(int(lines[name]) for name in version.cached)
    used = int((folder / version.usage).read_text())
    return Free(max(0, limit - max(0, used - cached)), f"the control group {folder}")
