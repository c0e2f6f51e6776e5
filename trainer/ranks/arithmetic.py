"""How numbers are computed: precision, determinism, and the peak that utilisation is measured against.

Weights, gradients' reductions and the optimiser are float32 throughout; precision is that of the model's forward and
backward passes. `tf32` and `fp32` differ in matrix products and convolutions on a GPU only.

Deterministic kernels are the ones that repeat their sums in one order, so that a resumed run equals an unbroken one bit
for bit on a GPU as well: attention is left to the flash and the plain kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from storage.torch.products import product_flops as of_products
from trainer.config.schema import TrainConfig

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Dense bf16 tensor-core peak in TFLOP/s from the vendors' data sheets, by a part of the device's name; the first that
# fits counts, so longer names stand before the ones they contain.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "MI300X": 1307.0,
}


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The half-precision type of the model's arithmetic, or None for float32."""
    return AUTOCAST_DTYPES.get(precision)


def _set_float32(precision: str) -> None:
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def set_arithmetic(config: TrainConfig) -> None:
    """Switch the process to the configuration's precision and determinism; before anything runs on a GPU."""
    _set_float32(config.precision)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(config.deterministic)


@contextmanager
def model_arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Within it a model computes as `precision` says, as in training; what is made of its output stays float32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    half = autocast_dtype(precision)
    _set_float32(precision)
    try:
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s at most, dense bf16; None where the table has no entry (a CPU among others)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def product_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of a product of large matrices here, which a training step stays below; see `storage.torch.products`."""
    return of_products(device, autocast_dtype(precision) or torch.float32)
