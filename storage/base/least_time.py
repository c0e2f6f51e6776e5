"""How long arithmetic takes at least, in words: both stages say so before work of hours starts."""

from __future__ import annotations

WORTH_SAYING_S = 60.0


def least_time(seconds: float, flops: float, what: str) -> str:
    """`at least 2.0 hours, if a step ran at the 10 TFLOP/s that …`; nothing where that is below a minute.

    `flops` is what products of large matrices reach, `what` would have to reach the same.
    """
    if seconds < WORTH_SAYING_S:
        return ""
    hours = seconds / 3600
    span = f"{hours * 60:.0f} minutes" if hours < 1 else f"{hours:,.1f} hours" if hours < 100 else f"{hours:,.0f} hours"
    rate = f"{flops / 1e12:,.0f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:,.0f} GFLOP/s"
    return f"at least {span}, if {what} ran at the {rate} that products of large matrices reach here"
