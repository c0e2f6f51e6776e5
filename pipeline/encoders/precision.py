"""The arithmetic of an encoder's forward pass. Weights stay float32; what is lost is measured and bounded here.

| name | multiplications | largest relative error to fp32 (root mean square) |
|---|---|---|
| `fp32` | float32; TensorFloat-32 switched off, which torch leaves on for convolutions | the reference |
| `tf32` | float32 rounded to 10 bits of mantissa (NVIDIA from Ampere on; elsewhere it is fp32) | 2e-3, like fp16's |
| `fp16` | float16, 10 bits and a range of 65,504; norms, softmax and residual stream of a ViT in float32 | 2e-3 |
| `bf16` | bfloat16, 7 bits and float32's range; as above | 2e-2 |

The bounds hold in tests/pipeline/test_precision.py for the built-in encoders, with trained weights. For comparison,
storing as float16 costs 2e-4, int8 about 1e-2.

fp32 is the default: numbers then do not depend on the device they were made on, a VAE's posterior is far narrower than
bf16's error in its mean, and a float16 overflow depends on images that no test has seen (it is an error here, never
stored). Public REPA computes latents in float32 and features under float16 autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ARITHMETIC = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Within it, torch computes as `precision` says, sums in float32 always.

    torch's switches are the process's: one encoder at a time. They are put back afterwards.
    """
    import torch

    assert precision in ARITHMETIC, precision
    matmul, tf32 = torch.backends.cuda.matmul, precision == "tf32"
    switches: list[tuple[Any, str, bool]] = [
        (matmul, "allow_tf32", tf32),
        (torch.backends.cudnn, "allow_tf32", tf32),
        (matmul, "allow_fp16_reduced_precision_reduction", False),
        (matmul, "allow_bf16_reduced_precision_reduction", False),
    ]
    before = [getattr(where, name) for where, name, _ in switches]
    for where, name, allowed in switches:
        setattr(where, name, allowed)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=precision in ("bf16", "fp16")):
            yield
    finally:
        for (where, name, _), allowed in zip(switches, before, strict=True):
            setattr(where, name, allowed)
