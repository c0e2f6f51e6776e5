"""How fast products of large matrices are: what any training step or encoder's pass stays below, so a bound on both.

    python -m storage.torch.products 8 fp32 bf16      FLOP/s of this machine by precision, as JSON; 8 cores at most

is for whoever must not load torch, or not take memory of a GPU, for one number.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import torch

GPU_SIDE, CPU_SIDE, PRODUCTS = 4096, 1024, 4
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of large square matrices here, the best of a few; float32 as torch's switches have it.

    Takes some 0.1 s, and seconds on a CPU that has no arithmetic of the dtype's width; at most 128 MB. Raises
    nothing; draws no random numbers.
    """
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    a = torch.ones(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(PRODUCTS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start_s = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start_s)
    return 2 * side**3 / min(seconds)


def machine_flops(precision: str, n_cores: int) -> float:
    """Of all GPUs of this machine, taken to be alike, or of so many cores where there is none."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    torch.set_num_threads(n_cores)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    device = torch.device("cuda" if n_gpus else "cpu")
    return max(1, n_gpus) * product_flops(device, HALF.get(precision, torch.float32))


def main(argv: Sequence[str]) -> None:
    """Print what `machine_flops` says of each precision."""
    n_cores, *precisions = argv
    print(json.dumps({precision: machine_flops(precision, int(n_cores)) for precision in precisions}))


if __name__ == "__main__":
    main(sys.argv[1:])
