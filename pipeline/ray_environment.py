"""What must be settled before Ray is imported: that its address answers, and the environment Ray reads on import.

Ray's own failures to join take over a minute and name neither the address nor the fix, so the port is tried first.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from storage.errors import UserError

PROBE_TIMEOUT_S = 5.0
LOOPBACK = "127.0.0.1"
TOKEN_SOURCES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def prepare_ray(address: str) -> None:
    """Settle the environment for joining `address`, or for a cluster of this run's own when it is empty.

    What the user has set is left as it is. Raises UserError when nothing answers at the address.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a notice about CUDA_VISIBLE_DEVICES
    if not address:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # reports are for clusters, not for a passing one
        _keep_loopback()
        return
    token_file = Path.home() / ".ray" / "auth_token"
    if token_file.exists() or any(name in os.environ for name in TOKEN_SOURCES):
        # `ray start` turns token authentication on by itself where a token lies; a driver that joins does not.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    _probe(address)


def _probe(address: str) -> None:
    """Try the port of a host:port address, which Ray itself would wait on for more than a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        if address != "auto":
            raise UserError(f"RAY_ADDRESS must be auto, host:port or ray://host:port, got {address!r}")
        return
    if host == LOOPBACK:
        _keep_loopback()
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S):
            pass
    except (OSError, ValueError) as error:
        raise UserError(
            f"nothing answers at RAY_ADDRESS {address} ({error}); check the address that `ray start --head` printed, "
            "or leave RAY_ADDRESS empty to have a cluster started for this run"
        ) from None


def _keep_loopback() -> None:
    """Ray otherwise rewrites a loopback address to the network card's: unreachable for one, open to all for another."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
