"""Numbers of a step on their way to the host, to be read a step later, when no one has to wait for them.

The copy goes to pinned memory behind the step's own kernels. Whoever reads the numbers of step i after launching step
i + 1 finds the device busy, and the host is never more than one step ahead of it, so that what it saves, logs and
promises to a signal is of the step it says.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """One tensor's copy to the host."""

    def __init__(self, values: Tensor) -> None:
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(values.device))

    def wait(self) -> Tensor:
        """The values, on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
