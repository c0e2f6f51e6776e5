"""Joining a Ray cluster, or starting one for this run on 127.0.0.1 and stopping it at the end.

Ray's own failures to join take over a minute and name neither the address nor the fix, so the port is tried first. On a
cluster that is joined, the code reaches the workers as `py_modules`: nothing of ours needs to be installed there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

import pipeline
import storage
from storage.errors import UserError

PROBE_TIMEOUT_S = 5.0
LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def ray_cluster(address: str, *, verbose: bool) -> Iterator[None]:
    """Connect to the cluster at `address` ("auto", "host:port", "ray://host:port"), or start and stop one when empty.

    Raises UserError when nothing answers at the address.
    """
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "include_dashboard": False,
    }
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a notice about CUDA_VISIBLE_DEVICES
    if address:
        _probe(address)
        del options["include_dashboard"]
        modules = [str(Path(module.__path__[0])) for module in (pipeline, storage)]
        options |= {"address": address, "runtime_env": {"py_modules": modules}}
    else:
        # "local" starts a cluster of our own even where the machine already runs one. Two cores at least, so that an
        # encoder and a decoder can be placed side by side; usage reports are for clusters, not for a passing one.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {
            "address": "local",
            "_node_ip_address": LOOPBACK,
            "num_cpus": max(2, len(os.sched_getaffinity(0))),
        }
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the Ray cluster at {address or 'this machine'}: {str(error).splitlines()[0]}; start one with "
            "`ray start --head`, or leave RAY_ADDRESS empty to have one started for this run"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Try the port of a host:port address, which Ray itself would wait on for more than a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        if address != "auto":
            raise UserError(f"RAY_ADDRESS must be auto, host:port or ray://host:port, got {address!r}")
        return
    if host == LOOPBACK:
        # Ray otherwise rewrites a loopback address to the network card's, where a local head does not listen.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S):
            pass
    except (OSError, ValueError) as error:
        raise UserError(
            f"nothing answers at RAY_ADDRESS {address} ({error}); check the address that `ray start --head` printed, "
            "or leave RAY_ADDRESS empty to have a cluster started for this run"
        ) from None
