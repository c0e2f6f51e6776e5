"""The ranks of one machine, and memory that they share.

Ranks find each other by what they say of where they run, not by a launcher's variables: the kernel's boot, the name
space of process numbers (a container's), the user. Ranks in different containers do not see each other and count as
machines of their own.

Shared memory has no name (memfd): its first rank makes it, the others map it through that process's open file. The
kernel frees it when the last process that maps it has ended, however that ended; nothing is ever left in /dev/shm,
whose size does not limit it either.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from storage.base.errors import UserError
from trainer.ranks.world import World

BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The ranks that can share this machine's memory."""

    world: World
    ranks: tuple[int, ...]  # in order, this one among them

    @property
    def place(self) -> int:
        """Of this rank among them."""
        return self.ranks.index(self.world.rank)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the machine."""
        return self.place == 0

    def shared_memory(self, sizes_bytes: Sequence[int]) -> list[mmap.mmap]:
        """Blocks of zeros, the same for all ranks of the machine; freed when nobody maps them. Every rank calls this.

        Raises UserError on every rank where one of them cannot be had.
        """
        own = [os.memfd_create("resident", os.MFD_CLOEXEC) for _ in sizes_bytes]
        try:
            named = torch.tensor([[os.getpid(), *own]], dtype=torch.int64, device=self.world.device)
            pid, *of_first = self.world.gather(named)[self.ranks[0]].tolist()
            failure = None
            try:
                for fd, size in zip(own, sizes_bytes, strict=True):
                    os.ftruncate(fd, size if self.is_first else 0)
            except OSError as error:
                failure = UserError(f"{sum(sizes_bytes):,} bytes of memory cannot be had ({error.strerror}); use fewer")
            self.world.end_together(failure, "another rank got no memory, and says why")
            blocks = []
            try:
                for fd, size in zip(of_first, sizes_bytes, strict=True):
                    opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
                    try:
                        blocks.append(mmap.mmap(opened, size))
                    finally:
                        os.close(opened)
            except OSError as error:
                failure = UserError(
                    f"rank {self.world.rank} cannot map the memory of rank {self.ranks[0]} ({error.strerror}); let the "
                    "ranks of a machine run as one user under one limit of memory"
                )
            self.world.end_together(failure, "another rank cannot map what its machine shares, and says why")
            return blocks
        finally:
            for fd in own:
                os.close(fd)


def machine_of(world: World) -> Machine:
    """Which ranks share this one's machine. Every rank calls this."""
    where = f"{BOOT.read_text()} {os.readlink('/proc/self/ns/pid')} {os.geteuid()}"
    number = int.from_bytes(hashlib.sha256(where.encode()).digest()[:7], "little")
    numbers = world.gather(torch.tensor([number], dtype=torch.int64, device=world.device)).tolist()
    return Machine(world=world, ranks=tuple(rank for rank, other in enumerate(numbers) if other == number))
