"""Training on a Ray cluster: Ray Train places the ranks and joins them, and each runs the trainer's own command.

    python -m pipeline launch --workers 8 -- train --store /stores/in256 --preset sit-xl-2 --run /shared/runs/xl

The trainer knows nothing of Ray, and nothing here imports the trainer: a worker imports it by name. What a worker needs
besides is a file system that all machines share, at the same path, for the run; relative paths are taken from the
directory that this command was called in. A run that is lost with its machine is started again up to `--restarts`
times, and goes on from its newest checkpoint.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.base.console import EXIT_OK
from storage.base.errors import UserError

TRAINER = "trainer"
TIMEOUT_S = 3600  # that ranks wait for each other, as torchrun's do


def launch(arguments: Sequence[str], *, address: str, workers: int, cpus: int, restarts: int, scratch: Path) -> int:
    """Run `python -m trainer ARGUMENTS` on so many ranks; returns the exit status.

    `scratch` is a folder that all machines share, for Ray Train's own records. Raises UserError for what a rank was
    told wrongly, or when the cluster has not got what the ranks need.
    """
    from pipeline.cluster.environment import prepare_ray

    if not arguments:
        raise UserError("nothing to launch; end the command with -- train --store ROOT --run FOLDER")
    address = prepare_ray(address)
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline.cluster.connection import ray_cluster

    with ray_cluster(address, verbose=True, packages=(TRAINER,)):
        available = ray.cluster_resources()
        use_gpu = available.get("GPU", 0) > 0
        for kind, needed in (("CPU", workers * cpus), ("GPU", workers if use_gpu else 0)):
            if available.get(kind, 0) < needed:
                raise UserError(
                    f"{workers} workers need {needed} {kind}s and the cluster has {available.get(kind, 0):g}; "
                    "lower --workers"
                )
        trainer = TorchTrainer(
            work,
            train_loop_config={"arguments": list(arguments), "directory": str(Path.cwd())},
            torch_config=TorchConfig(timeout_s=TIMEOUT_S),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus}),
            run_config=RunConfig(
                storage_path=str(scratch.absolute()), failure_config=FailureConfig(max_failures=restarts)
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            mistake = _user_error(error)
            if mistake is None:
                raise
            raise mistake from None
    return EXIT_OK


def work(config: dict[str, Any]) -> None:
    """One rank, in the environment that Ray Train has made as torchrun would. Raises what the command raises."""
    os.chdir(config["directory"])
    status = importlib.import_module(f"{TRAINER}.__main__").main(config["arguments"])
    if status != EXIT_OK:
        raise RuntimeError(f"the trainer ended with status {status}")


def _user_error(error: Exception) -> UserError | None:
    """The mistake of the user's among the failures of ranks, if that is what it was."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return UserError(str(cause))
            cause = getattr(cause, "cause", None) or cause.__cause__
    return None
