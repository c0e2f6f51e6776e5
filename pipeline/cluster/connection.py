"""Joining a Ray cluster, or starting one for this run on 127.0.0.1 and stopping it at the end.

On a cluster that is joined, the code reaches the workers as `py_modules`: nothing of ours needs to be installed there.
`environment.prepare_ray` comes before this file is imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.job_config import JobConfig

import pipeline
import storage
from pipeline.cluster.environment import LOOPBACK
from pipeline.cluster.folder import ray_folder
from pipeline.cluster.resources import cores
from storage.base.errors import UserError
from storage.base.waiting import waiting

SHARED_MEMORY = "/dev/shm"


@contextlib.contextmanager
def ray_cluster(address: str, *, verbose: bool, packages: Sequence[str] = ()) -> Iterator[None]:
    """Connect to the cluster at `address` ("auto", "host:port", "ray://host:port"), or start and stop one when empty.

    `packages` reach the workers of a cluster that is joined beside our own two, and are not imported here.
    Raises UserError when nothing answers at the address, or when Ray cannot work on this machine.
    """
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "include_dashboard": False,
    }
    if not verbose:
        _silence_raylets()
    if not address.startswith("ray://"):  # where Ray adds no directory
        options["job_config"] = LooksWhereWeDo()
    with contextlib.ExitStack() as stack:
        if address:
            del options["include_dashboard"]
            modules = [str(Path(module.__path__[0])) for module in (pipeline, storage)]
            modules += [_location(package) for package in packages]
            options |= {"address": address, "runtime_env": {"py_modules": modules}}
            failed = f"cannot join the Ray cluster at {address}"
            fix = "start one with `ray start --head`, or leave RAY_ADDRESS empty to have one started for this run"
        else:
            # "local" starts a cluster of our own even where the machine already runs one. Two cores at least, so that
            # an encoder and a decoder can be placed side by side.
            folder = stack.enter_context(ray_folder())
            options |= {
                "address": "local",
                "_node_ip_address": LOOPBACK,
                "_temp_dir": folder,
                "num_cpus": max(2, cores()),
            }
            if not os.access(SHARED_MEMORY, os.W_OK | os.X_OK):  # Ray would wait for a raylet that cannot start
                print(f"{SHARED_MEMORY} cannot be written: decoded units pass through {folder}", file=sys.stderr)
                os.makedirs(folder, exist_ok=True)
                options["_plasma_directory"] = folder
            failed = "Ray cannot be started on this machine"
            fix = "set RAY_TMPDIR to a folder, and look there for its logs"
        stack.callback(ray.shutdown)  # what it has started before it failed, too
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            with waiting(f"joining the Ray cluster at {address}" if address else "starting Ray"):
                ray.init(**options)
        except Exception as error:  # Ray raises it as such where a process of its own does not come up
            raise UserError(f"{failed}: {' '.join(str(error).split())[:400]}; {fix}") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has set its own, which ends the process wherever that is
        yield


class LooksWhereWeDo(JobConfig):
    """Workers look for modules where this process does.

    Ray has them look in the current directory first, where a `storage.py` of the user's own would be taken for ours. It
    has no public switch for that but a `working_dir`, which would be sent to every machine.
    """

    def _serialize(self) -> str:
        here = {str(Path(place or ".").resolve()) for place in sys.path}
        named = getattr(self, "_py_driver_sys_path", [])
        named[:] = [place for place in named if str(Path(place).resolve()) in here]
        return super()._serialize()


def _location(package: str) -> str:
    """The folder of a package that lies beside this one."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    assert spec.submodule_search_locations is not None, package
    return spec.submodule_search_locations[0]


def _silence_raylets() -> None:
    """Drop what raylets push to every driver's stdout, such as a worker's death: the ledger tells what matters of it.

    `log_to_driver` does not cover these, and Ray has no public switch for them.
    """
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None
