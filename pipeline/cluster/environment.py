"""What must be settled before Ray is imported: that its address answers, and the environment Ray reads on import.

Ray's own failures to join take over a minute and name neither the address nor the fix, so the port is tried first.

A Ray of the run's own asks for a token that is made here and handed down in the environment, which other users of the
machine cannot read: Ray would write one into HOME, where nothing may be writable, and leave it there. Its workers run
at the user's priority: Ray would start them 15 steps below, where a busy machine never gets round to them.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
from pathlib import Path

from storage.base.errors import UserError
from storage.base.shown import shown
from storage.base.waiting import waiting

PROBE_TIMEOUT_S = 5.0
LOOPBACK = "127.0.0.1"
HERE = "local"  # as an address: a cluster of this run's own, also where RAY_ADDRESS names another
ADDRESS = re.compile(r"(ray://)?(\[(?P<v6>[\w:.%]+)\]|(?P<host>[^\s:/\[\]@]+)):(?P<port>[0-9]{1,5})")
ASK = """
import sys
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient
GcsClient(address=canonicalize_bootstrap_address(sys.argv[1])).internal_kv_get(b"", b"", timeout=10)
"""
NICENESS = "RAY_worker_niceness"
MODES = ("token", "disabled")


def is_here(address: str) -> bool:
    """Whether an address means a cluster of this run's own, on this machine."""
    return address.strip() in ("", HERE)


def prepare_ray(address: str) -> str:
    """Settle the environment for joining `address`, or for a cluster of this run's own when it is empty or "local".

    Returns the address that `ray_cluster` takes: without the blanks around it, and empty for a cluster of this run's
    own. What the user has set is left as it is. Raises UserError when nothing answers at the address, or when a
    variable that Ray reads is of no use.
    """
    address = address.strip()
    _check_mode()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a notice about CUDA_VISIBLE_DEVICES
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # the ledger handles them
    if is_here(address):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # reports are for clusters, not for a passing one
        os.environ.setdefault(NICENESS, "0")  # what is added to the user's own
        if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
            os.environ["RAY_AUTH_TOKEN"] = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
        _keep_loopback()
        return ""
    with waiting(f"looking whether the Ray cluster at {address} answers"):
        _probe(address)
        _take_mode(address)
    return address


def _take_mode(address: str) -> None:
    """Take the mode of the cluster, which Ray does not find out and a driver that joins must be in.

    `ray start` turns tokens on by itself where one lies, and the first cluster that `ray.init` starts leaves one. A
    driver without is refused with a misleading message; one with a token, joining a cluster without, sees its actors
    die unborn.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is None:
        if _has_token():
            os.environ["RAY_AUTH_MODE"] = "disabled" if _takes_anyone(address) else "token"
    elif mode == "token" and not _has_token():
        raise UserError(
            "RAY_AUTH_MODE is token and there is none: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a copy of the "
            "cluster's token file"
        )


def _check_mode() -> None:
    """Raises UserError when RAY_AUTH_MODE is none that Ray knows; an empty one counts as not set."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is None:
        return
    os.environ["RAY_AUTH_MODE"] = mode = mode.strip().lower()
    if not mode:
        del os.environ["RAY_AUTH_MODE"]
    elif mode not in MODES:
        raise UserError(f"RAY_AUTH_MODE must be {' or '.join(MODES)}, got {shown(mode)}; unset it or name one of them")


def _has_token() -> bool:
    """Whether a token lies where Ray looks for one. Raises UserError when RAY_AUTH_TOKEN_PATH names nothing to read."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        if named:
            if Path(named).read_text().strip():
                return True
            raise UserError(f"RAY_AUTH_TOKEN_PATH {shown(named)} is empty; name a copy of the cluster's token file")
        return bool(Path(os.path.expanduser("~/.ray/auth_token")).read_text().strip())
    except (OSError, UnicodeDecodeError) as error:
        if not named:
            return False
        why = getattr(error, "strerror", None) or "no text"
        raise UserError(
            f"RAY_AUTH_TOKEN_PATH {shown(named)} cannot be read ({why}); name a copy of the cluster's token file, or "
            "unset it where the cluster asks for none"
        ) from None


def _probe(address: str) -> None:
    """Try the port of a host:port address, which Ray itself would wait on for more than a minute."""
    if address == "auto":
        return
    parts = ADDRESS.fullmatch(address)
    if parts is None or not 0 < int(parts["port"]) < 2**16:
        raise UserError(
            f"RAY_ADDRESS must be auto, {HERE}, host:port or ray://host:port (an IPv6 host in brackets), got "
            f"{shown(address)!r}"
        )
    host = parts["v6"] or parts["host"]
    if host in (LOOPBACK, "localhost", "::1"):
        _keep_loopback()
    try:
        with socket.create_connection((host, int(parts["port"])), timeout=PROBE_TIMEOUT_S):
            pass
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"nothing answers at RAY_ADDRESS {shown(address)} ({error}); check the address that `ray start --head` "
            f"printed, or leave RAY_ADDRESS empty to have a cluster started for this run"
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
