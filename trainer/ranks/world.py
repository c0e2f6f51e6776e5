"""Ranks: who this process is under `torchrun`, and the few collectives needed. One process is a world of one.

    torchrun --standalone --nproc-per-node 8 -m -- trainer train …                            one machine
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
             -m -- trainer train …                                                            the same line on each

Machines share the folder of the run. Whatever else starts the ranks sets the same variables (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT) or has joined them in a process group already, which is then used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from storage.base.errors import UserError

# The main rank alone writes checkpoints, to file systems that may be slow, while the others wait.
TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all ranks, and the device it trains on. Every rank must call the same collectives."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks of a tensor of equal shape everywhere; the host does not wait for it."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def max(self, value: float) -> float:
        """The largest of the ranks' numbers, once every rank has come here."""
        if self.size == 1:
            return value
        on_device = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(on_device, op=dist.ReduceOp.MAX)
        return on_device.item()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, once every rank has come here."""
        return self.max(float(flag)) > 0

    def end_together(self, failure: Exception | None, message: str) -> None:
        """Raise this rank's failure, or what the others are told of it: none goes on, or waits for one that is gone."""
        if self.any(failure is not None):
            raise failure or UserError(message)

    def gather(self, values: Tensor) -> Tensor:
        """Tensors of equal shape, one after another in the order of ranks."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)


def device_named(device: str) -> torch.device:
    """What auto, cpu or cuda means on this machine. Raises UserError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for and torch sees no GPU; pass --device cpu or mend the driver")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def require_gpu_of_resident(device: str, resident: str) -> None:
    """Raise UserError for data that is to lie in a GPU's memory, of a run that has none."""
    if resident == "gpu" and device_named(device).type != "cuda":
        raise UserError(
            "--data.resident gpu needs a GPU, and the run's device is the CPU; pass --data.resident ram, or mend the "
            "driver or --device"
        )


@contextmanager
def world_of_ranks(device: str) -> Iterator[World]:
    """The world that the environment describes; `device` is auto, cpu or cuda. Raises UserError."""
    rank, size, local = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT)
    use_cuda = device_named(device).type == "cuda"
    if use_cuda:
        if local >= torch.cuda.device_count():
            raise UserError(
                f"rank {local} of this machine has no GPU of its own ({torch.cuda.device_count()} there); lower GPUS"
            )
        torch.cuda.set_device(local)
    mine = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    joins = size > 1 and not dist.is_initialized()
    if dist.is_initialized() and dist.get_backend() == "nccl" and not use_cuda:
        raise UserError("the ranks were joined for GPUs, which --device cpu leaves idle; leave it out")
    if joins:
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=TIMEOUT, device_id=mine if use_cuda else None)
    try:
        yield World(rank=rank, size=size, device=mine)
    finally:
        if joins:
            dist.destroy_process_group()


_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
