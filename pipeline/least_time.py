"""How long a run's encoding takes at least, where the machine that runs the command is the one that encodes.

The operations that the catalogue counts, over what products of large matrices reach here: no weights, no image and no
encoder are needed. Decoding, memory and kernels that do not reach that rate make it longer; that it takes thousands of
hours at least is known before they are spent all the same.

Cost: a process that loads torch, some seconds; none where the operations are few.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

from pipeline.cluster.environment import is_here
from pipeline.cluster.resources import cores
from pipeline.encoders.catalogue import VAES
from pipeline.plan import GroupPlan, Plan
from storage.base.least_time import least_time
from storage.base.waiting import waiting

GFLOP_PIXELS = 256  # that the catalogue's counts of autoencoders are of
FEW_FLOP = 3e12  # a minute on one core
LONGEST_S = 120.0  # of measuring


def gflop(group: GroupPlan, resolution: int) -> float:
    """10⁹ operations of an encoder's forward pass of one view; 0 where the catalogue does not say."""
    if group.spec.vision is not None:
        return group.spec.vision.gflop(resolution)
    known = VAES.get(group.spec.store_name) if group.spec.kind == "latents" else None
    return 0.0 if known is None else known.gflop_256 * (resolution / GFLOP_PIXELS) ** 2


def operations(plan: Plan) -> dict[str, float]:
    """FLOP of what a plan lacks, by the precision that its encoders compute in; what is not counted is left out."""
    flop: dict[str, float] = {}
    for group in plan.groups:
        rows = sum(len(plan.layout.unit_rows(u)) for u, paths in plan.missing.items() if group.layout.path in paths)
        of_group = rows * plan.layout.n_views * gflop(group, plan.layout.resolution) * 1e9
        if of_group:
            flop[group.spec.precision] = flop.get(group.spec.precision, 0.0) + of_group
    return flop


def bound(plan: Plan, address: str) -> tuple[float | None, str]:
    """(seconds at least, the same in words) of encoding what is missing on the cluster at an address.

    None where that is not known; no words where there is too little to do for any to be due.
    """
    flop = operations(plan)
    total = sum(flop.values())
    if total < FEW_FLOP:
        return None, ""
    if not is_here(address):
        return None, (
            f"not known: {total / 1e12:,.0f} TFLOP are to be computed on the Ray cluster at {address}, whose speed is "
            "not measured from here"
        )
    with waiting("measuring how fast this machine multiplies matrices"):
        rates = machine_flops(list(flop))
    if rates is None:
        return None, ""
    seconds = sum(n / rates[precision] for precision, n in flop.items())
    words = least_time(seconds, total / seconds, "encoders")
    paths = {path for of_unit in plan.missing.values() for path in of_unit}
    left_out = [
        each.layout.path
        for each in plan.groups
        if each.layout.path in paths and not gflop(each, plan.layout.resolution)
    ]
    if words and left_out:
        words += f"; without {', '.join(left_out)}, whose operations the catalogue does not count"
    return seconds, words


def machine_flops(precisions: Sequence[str]) -> Mapping[str, float] | None:
    """FLOP/s of this machine's GPUs, or of its cores, in each precision; None where they cannot be measured."""
    command = [sys.executable, "-m", "storage.torch.products", str(cores()), *precisions]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S)
        return {name: float(value) for name, value in json.loads(done.stdout).items()}
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
