"""What must be settled before Ray is imported: that its address answers, and the environment Ray reads on import.

Ray's own failures to join take over a minute and name neither the address nor the fix, so the port is tried first.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from storage.errors import UserError

PROBE_TIMEOUT_S = 5.0
LOOPBACK = "127.0.0.1"
ASK = """
import sys
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient
GcsClient(address=canonicalize_bootstrap_address(sys.argv[1])).internal_kv_get(b"", b"", timeout=10)
"""
TOKEN_SOURCES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def prepare_ray(address: str) -> None:
    """Settle the environment for joining `address`, or for a cluster of this run's own when it is empty.

    What the user has set is left as it is. Raises UserError when nothing answers at the address.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a notice about CUDA_VISIBLE_DEVICES
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # the ledger handles them
    if not address:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # reports are for clusters, not for a passing one
        _keep_loopback()
        return
    _probe(address)
    token_file = Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_MODE" not in os.environ and (token_file.exists() or any(name in os.environ for name in TOKEN_SOURCES)):
        # A driver that joins must be in the cluster's mode, which Ray does not find out: `ray start` turns tokens on by
        # itself where one lies, and the first cluster that `ray.init` starts leaves one. A driver without is refused
        # with a misleading message; one with a token, joining a cluster without, sees its actors die unborn.
        os.environ["RAY_AUTH_MODE"] = "disabled" if _takes_anyone(address) else "token"


def _probe(address: str) -> None:
    """Try the port of a host:port address, which Ray itself would wait on for more than a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        if address != "auto":
            raise UserError(f"RAY_ADDRESS must be auto, host:port or ray://host:port, got {address!r}")
        return
    if host in (LOOPBACK, "localhost"):
        _keep_loopback()
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S):
            pass
    except (OSError, ValueError) as error:
        raise UserError(
            f"nothing answers at RAY_ADDRESS {address} ({error}); check the address that `ray start --head` printed, "
            "or leave RAY_ADDRESS empty to have a cluster started for this run"
        ) from None


def _takes_anyone(address: str) -> bool:
    """Whether the cluster answers a caller who has no token. In a process of its own: Ray reads the mode on import."""
    if address.startswith("ray://"):
        return False
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    asked = subprocess.run([sys.executable, "-c", ASK, address], env=environment, capture_output=True)
    return asked.returncode == 0


def _keep_loopback() -> None:
    """Ray otherwise rewrites a loopback address to the network card's: unreachable for one, open to all for another."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
