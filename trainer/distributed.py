"""Ranks: who this process is under `torchrun`, and the few collectives needed. One process is a world of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from storage.errors import UserError


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all ranks, and the device it trains on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks of a tensor of equal shape everywhere."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; every rank must ask at the same place."""
        if self.size == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world_of_ranks(device: str) -> Iterator[World]:
    """The world that torchrun's environment describes; `device` is auto, cpu or cuda. Raises UserError."""
    rank, size, local = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for and torch sees no GPU; pass --device cpu or mend the driver")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda:
        if local >= torch.cuda.device_count():
            raise UserError(
                f"rank {local} of this machine has no GPU of its own ({torch.cuda.device_count()} there); lower GPUS"
            )
        torch.cuda.set_device(local)
    if size > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo")
    try:
        yield World(rank=rank, size=size, device=torch.device("cuda", local) if use_cuda else torch.device("cpu"))
    finally:
        if size > 1:
            dist.destroy_process_group()


_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
