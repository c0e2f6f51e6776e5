"""Ray clusters of several nodes on 127.0.0.1, and the processes of a run on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil

from pipeline.cluster.environment import prepare_ray

OBJECT_STORE_BYTES = 100 * 2**20


@contextlib.contextmanager
def cluster(**head: Any) -> Iterator[Any]:
    """A cluster whose head has these resources; nodes are added to it by `add`."""
    prepare_ray("")  # stay on 127.0.0.1, with a token
    from ray._private.authentication_test_utils import reset_auth_token_state
    from ray.cluster_utils import Cluster

    reset_auth_token_state()  # what a test before this one made Ray read in this process, without a token
    made = Cluster()
    try:
        add(made, **head)
        yield made
    finally:
        made.shutdown()


def add(made: Any, **resources: Any) -> Any:
    """Add a node."""
    options = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False, **resources}
    return made.add_node(**options)


def workers_of(pid: int, title: str) -> list[psutil.Process]:
    """Ray's worker processes below a process that started a cluster, by their title."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(pid).children(recursive=True)
        return [process for process in below if _title(process).startswith(f"ray::{title}")]
    return []


def _title(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [""])[0]
    except psutil.Error:
        return ""
