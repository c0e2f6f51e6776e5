"""The arithmetic of an encoder's forward pass. Weights stay float32; what is lost is measured and bounded here.

| name | multiplications | largest relative error to fp32 (root mean square) |
|---|---|---|
| `fp32` | float32; TensorFloat-32 switched off, which torch leaves on for convolutions | the reference |
| `tf32` | float32 rounded to 10 bits of mantissa (NVIDIA from Ampere on; elsewhere it is fp32) | 2e-3, like fp16's |
| `fp16` | float16, 10 bits and a range of 65,504; norms, softmax and residual stream of a ViT in float32 | 2e-3 |
| `bf16` | bfloat16, 7 bits and float32's range; as above | 2e-2 |

The bounds hold in tests/pipeline/test_precision.py for the built-in encoders, whose weights are trained: on a CPU fp16
errs by 4e-4, bf16 by 4e-3. At full size with random weights, also on a CPU: DINOv2-B's patch tokens by 9e-4 and 7e-3
(cosine at least 0.999999 and 0.99996), the SD-VAE's means by 1.4e-3 and 1.1e-2. Storing as float16 costs 2e-4.

fp32 is the default. Its numbers depend least on the device. A VAE's posterior is narrow: on the built-in one, the error
in the mean is 0.03 of the standard deviation with fp16 and 0.4 with bf16, which is noise of its own. And whether
float16 overflows depends on images that no test has seen (it is an error here, never stored). Public REPA computes
latents in float32, and features under whatever autocast it trains with.
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
