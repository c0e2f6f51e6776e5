"""How a cluster's CPUs, GPUs and object store are shared out between decoding and encoding. No Ray in here.

GPUs: one encoder on each, with one CPU. No GPU: one encoder a node, with half of the smallest node's CPUs. Every CPU
that is left decodes. Options overrule each of these.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.dispatch import window
from pipeline.encode import CALLS_IN_HAND
from storage.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster."""

    cpus: int
    gpus: int


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a run takes. `window`: units that are decoding, waiting or encoding at once."""

    encoders: int
    encoder_cpus: int
    encoder_gpus: int
    decoders: int
    decode_cpus: int
    window: int
    store_bytes: int  # of the object store, all nodes

    def __str__(self) -> str:
        what = "GPU" if self.encoder_gpus else f"{self.encoder_cpus} CPUs"
        return (
            f"{self.encoders} encoders of one {what} each, {self.decoders} decoders, at most {self.window} units at "
            f"once in an object store of {self.store_bytes / 1e9:.1f} GB"
        )


def cores(limits: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: its affinity, and no more than its container's quota where there is one."""
    allowed = len(os.sched_getaffinity(0))
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroups, version 2 and 1
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            quota, period = (int(word) for name in names for word in (limits / name).read_text().split())
            if quota > 0:
                allowed = min(allowed, math.ceil(quota / period))
    return allowed


def share_out(
    nodes: Sequence[Node],
    *,
    store_bytes: int,
    unit_bytes: int,
    n_units: int,
    encoders: int = 0,
    encoder_cpus: int = 0,
    decode_cpus: int = 1,
) -> Resources:
    """Resources for `n_units` units of `unit_bytes` decoded bytes; zeros mean the defaults above.

    Raises UserError when the cluster cannot hold an encoder and a decoder.
    """
    n_cpus, n_gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    able = [node for node in nodes if node.gpus or not n_gpus]
    if not able:
        raise UserError("the Ray cluster has no node with CPUs; start one with `ray start --head`")
    if n_gpus and encoders > n_gpus:
        raise UserError(
            f"each encoder takes a GPU, and the Ray cluster has {n_gpus} of them; lower --encoders {encoders}"
        )
    encoders = min(encoders or n_gpus or len([node for node in able if node.cpus > 1]) or 1, n_units)
    if not encoder_cpus:
        a_node = math.ceil(encoders / len(able))  # encoders that share a node
        smallest = min((node.cpus for node in able if node.cpus > 1), default=1)
        encoder_cpus = 1 if n_gpus else max(1, smallest // (2 * a_node))
    if encoder_cpus > max(node.cpus for node in able):
        raise UserError(f"no node of the Ray cluster has the {encoder_cpus} CPUs of an encoder; lower --encoder-cpus")
    left = n_cpus - encoders * encoder_cpus
    if left < decode_cpus:
        raise UserError(
            f"{encoders} encoders of {encoder_cpus} CPUs leave {max(left, 0)} of the cluster's {n_cpus} CPUs, and a "
            f"decoder needs {decode_cpus}; lower --encoders, --encoder-cpus or --decode-cpus"
        )
    decoders = left // decode_cpus
    return Resources(
        encoders=encoders,
        encoder_cpus=encoder_cpus,
        encoder_gpus=1 if n_gpus else 0,
        decoders=decoders,
        decode_cpus=decode_cpus,
        window=window(decoders, encoders, CALLS_IN_HAND, store_bytes, unit_bytes),
        store_bytes=store_bytes,
    )
