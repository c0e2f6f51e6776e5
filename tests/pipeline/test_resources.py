"""How resources are shared out on the machines that people have."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cluster.resources import Node, Resources, cores, share_out
from storage.base.errors import UserError

UNIT_BYTES = 512 * 256 * 256 * 3  # 100.7 MB
GB = 10**9


def shared(nodes: list[Node], store_gb: float, n_units: int = 2503, **options: int) -> Resources:
    return share_out(nodes, store_bytes=int(store_gb * GB), unit_bytes=UNIT_BYTES, n_units=n_units, **options)


@pytest.mark.parametrize(
    ("nodes", "store_gb", "encoders", "encoder_cpus", "encoder_gpus", "decoders", "window"),
    [
        ([Node(cpus=2, gpus=0)], 2, 1, 1, 0, 1, 3),  # the smallest machine
        ([Node(cpus=8, gpus=0)], 5, 1, 4, 0, 4, 6),  # a laptop
        ([Node(cpus=8, gpus=1)], 5, 1, 1, 1, 7, 9),
        ([Node(cpus=96, gpus=8)], 600, 8, 1, 1, 88, 104),
        ([Node(cpus=96, gpus=8)], 10, 8, 1, 1, 88, 49),  # a small object store
        ([Node(cpus=96, gpus=8)] * 16, 9600, 128, 1, 1, 1408, 1664),
        ([Node(cpus=64, gpus=0)] * 16, 4800, 16, 32, 0, 512, 544),  # no encoder is larger than a node
        ([Node(cpus=16, gpus=4), *[Node(cpus=64, gpus=0)] * 2], 600, 4, 1, 1, 140, 148),  # CPU nodes beside a GPU node
        ([Node(cpus=1, gpus=0)] * 3, 600, 1, 1, 0, 2, 4),
    ],
)
def test_defaults(
    nodes: list[Node],
    store_gb: float,
    encoders: int,
    encoder_cpus: int,
    encoder_gpus: int,
    decoders: int,
    window: int,
) -> None:
    found = shared(nodes, store_gb)
    assert (found.encoders, found.encoder_cpus, found.encoder_gpus) == (encoders, encoder_cpus, encoder_gpus)
    assert (found.decoders, found.window) == (decoders, window)
    assert found.window * UNIT_BYTES <= store_gb * GB / 2


def test_options_overrule_and_units_limit() -> None:
    node = [Node(cpus=96, gpus=8)]
    assert shared(node, 600, n_units=3).encoders == 3
    found = shared(node, 600, encoders=4, encoder_cpus=2, decode_cpus=4)
    assert (found.encoders, found.decoders) == (4, 22)


@pytest.mark.parametrize(
    ("nodes", "options", "says"),
    [
        ([], {}, "no node with CPUs"),
        ([Node(cpus=1, gpus=1)], {}, "leave 0 of the cluster's 1 CPUs"),
        ([Node(cpus=8, gpus=0)] * 4, {"encoder_cpus": 9}, "no node of the Ray cluster has the 9 CPUs"),
        ([Node(cpus=4, gpus=0)], {"decode_cpus": 3}, "a decoder needs 3"),
        ([Node(cpus=96, gpus=8)], {"encoders": 16}, "each encoder takes a GPU, and the Ray cluster has 8 of them"),
    ],
)
def test_a_cluster_that_is_too_small_is_named(nodes: list[Node], options: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        shared(nodes, 10, **options)


@pytest.mark.parametrize(
    ("files", "n"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "350000 100000\n"}, 4),
        ({"cpu.max": "25600000 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_a_containers_quota_counts(
    files: dict[str, str], n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores(tmp_path) == n
