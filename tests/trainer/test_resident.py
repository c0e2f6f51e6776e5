"""Resident data: the streamed batches bit for bit, one copy a machine that nobody leaves behind, refused by size."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import Staging, StoreError, UserError, open_store
from storage.base.console import EXIT_INTERRUPTED
from storage.codecs import CODECS, Codec
from storage.derive import derived
from tests.slow import slow_but
from tests.stores import FEATURES, LATENTS, encoded, make_store, publish_all
from tests.trainer.runs import assert_same_run, command, micro, start, start_ranks, train_on_ranks, wait_for_step
from trainer.__main__ import main
from trainer.config.data import DataConfig
from trainer.config.presets import preset
from trainer.config.tree import override
from trainer.data import resident
from trainer.data.free_memory import Free, free_memory
from trainer.data.groups import TrainingData, open_data
from trainer.data.loader import Loader
from trainer.data.resident import InRam, open_rows
from trainer.data.rows import Rows, Streamed
from trainer.loop.train import train
from trainer.ranks.world import World

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, device=CPU)
KINDS = ["ram", "gpu"]
FAILED = [0, 17, 39]
SECOND = "features/second"


def second_group(root: Path, tokens: np.ndarray, cls: np.ndarray, codec: Codec) -> None:
    """Another features group, of the same tokens in a codec, with a failed row of its own."""
    layout, identity = derived(open_store(root).group(FEATURES), SECOND, codec)
    arrays = {**encoded(tokens, codec), "cls": cls}
    with Staging(root) as staging:
        publish_all(root, layout, identity, arrays, [f"{row:05d}" for row in range(len(cls))], [*FAILED, 5], staging)


def opened(store: Path, **changes: object) -> TrainingData:
    return open_data(override(preset("sit-tiny-2"), {"store": store, **changes}))


def batches(data: TrainingData, rows: Rows | None, *, rank: int = 0, size: int = 1, start: int = 0) -> list[list[Any]]:
    """Everything that the batches of steps `start` to 8 hold, as numbers and bits."""
    with Loader(
        data, seed=3, batch=12, start=start, stop=9, rank=rank, world_size=size, device=CPU, prefetch=2, rows=rows
    ) as loader:
        return [
            [
                batch.step,
                *(bits(each) for each in (batch.rows, batch.labels, batch.moments, batch.class_tokens)),
                *(bits(part) for target in batch.targets for part in target),
            ]
            for batch in loader
        ]


def bits(tensor: torch.Tensor | None) -> tuple[Any, ...]:
    return () if tensor is None else (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes())


@pytest.mark.parametrize("n_views", [1, 2])
@pytest.mark.parametrize("spelling", CODECS)
def test_batches_are_the_streamed_ones(
    tmp_path: Path, spelling: str, n_views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All codecs, two groups and class tokens, failed rows; on any rank, from any step, gathered by three threads."""
    monkeypatch.setattr(resident, "MIN_SHARE_BYTES", 1)
    arrays = make_store(tmp_path, n_views=n_views, failed_rows=FAILED, codec=CODECS[spelling])[FEATURES]
    changes: dict[str, object] = {"data.features": ("tiny-vit",)}
    if spelling == "float16":
        second_group(tmp_path, arrays["patches"], arrays["cls"], CODECS["rotated2"])
        changes = {"data.features": ("tiny-vit", "second"), "model.align_block": (2, 3), "model.class_token": True}
    data = opened(tmp_path, **changes)
    for kind in KINDS:
        with closing(open_rows(data, DataConfig(resident=kind, threads=3), ALONE, with_targets=True)) as rows:
            for part in ({}, {"start": 5}, {"rank": 1, "size": 3}, {"rank": 2, "size": 3, "start": 7}):
                found = batches(data, rows, **part)
                assert len(found) == 9 - part.get("start", 0)
                assert found == batches(data, None, **part)
    data.close()


@settings(max_examples=25, deadline=None)
@given(
    given_data=st.data(), block_rows=st.integers(1, 50), kind=st.sampled_from(KINDS), n_views=st.sampled_from([1, 2])
)
def test_memory_holds_the_rows_that_did_not_fail(
    tmp_path_factory: pytest.TempPathFactory,
    given_data: st.DataObject,
    block_rows: int,
    kind: str,
    n_views: int,
) -> None:
    """Whatever is read at once, in whatever shards, and whichever rows there are."""
    n_rows, shard_rows = given_data.draw(st.integers(1, 30)), given_data.draw(st.integers(1, 12))
    failed = given_data.draw(st.sets(st.integers(0, n_rows - 1), max_size=n_rows - 1))
    root = tmp_path_factory.mktemp("s")
    stored = make_store(root, n_rows=n_rows, n_views=n_views, shard_rows=shard_rows, failed_rows=sorted(failed))
    data = opened(root)
    with pytest.MonkeyPatch.context() as patch:
        row_bytes = n_views * (8 * 16 * 16 + 64 * 24) * 2
        patch.setattr(resident, "BLOCK_BYTES", block_rows * row_bytes)
        rows = open_rows(data, DataConfig(resident=kind), ALONE, with_targets=True)
    valid = [row for row in range(n_rows) if row not in failed]
    with closing(rows):
        assert isinstance(rows, resident._Resident)
        held = {name: array.numpy() for name, array in rows._arrays.items()}
        assert held.keys() == {"moments", f"{FEATURES}/patches"}
        for name, group in (("moments", LATENTS), ("patches", FEATURES)):
            found = held["moments" if group == LATENTS else f"{group}/{name}"]
            expected = stored[group][name][valid].reshape(found.shape)
            np.testing.assert_array_equal(found, expected)
    data.close()


def test_nothing_that_is_not_used_is_held(tmp_path: Path) -> None:
    make_store(tmp_path)
    data = opened(tmp_path)
    for kind in KINDS:
        rows = open_rows(data, DataConfig(resident=kind), ALONE, with_targets=True)
        assert isinstance(rows, resident._Resident)
        rows.keep(data.readers(with_targets=False))
        assert rows._arrays.keys() == {"moments"}
        rows.close()
        assert not rows._arrays
    assert isinstance(open_rows(data, DataConfig(), ALONE, with_targets=True), Streamed)
    data.close()


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused_with_the_sizes(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path, failed_rows=FAILED)
    data = opened(tmp_path)
    needed = 37 * (8 * 16 * 16 + 64 * 24) * 2
    read: list[object] = []
    monkeypatch.setattr(resident._Stored, "read", lambda *arguments: read.append(arguments))
    monkeypatch.setattr(resident, "free_memory", lambda device: Free(needed, "this machine"))
    said = (
        rf"--data.resident {kind} takes 0\.3 MB for 37 samples \(moments 0\.2 MB, {FEATURES}/patches 0\.1 MB\), and "
        r"this machine has 0\.3 MB free, of which 90% may be taken; leave --data\.resident at stream, or"
    )
    with pytest.raises(UserError, match=said):
        open_rows(data, DataConfig(resident=kind), ALONE, with_targets=True)
    assert not read
    monkeypatch.setattr(resident, "free_memory", lambda device: Free(-(-needed * 10 // 9), "this machine"))
    open_rows(data, DataConfig(resident=kind), ALONE, with_targets=True).close()
    assert read
    data.close()


def cgroup(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


GB = 1 << 30


def test_free_memory_is_what_the_tightest_limit_leaves(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemAvailable:   {50 << 20} kB\n")
    (proc / "self" / "cgroup").write_text("0::/jobs/mine\n")
    two = tmp_path / "two"
    assert free_memory(CPU, proc=proc, cgroups=two) == Free(50 * GB, "this machine")
    stat = f"anon {GB}\nfile {6 * GB}\nactive_file {2 * GB}\ninactive_file {3 * GB}\nshmem {GB}\n"
    cgroup(two / "jobs" / "mine", memory__max="max\n", memory__current=f"{7 * GB}\n", memory__stat=stat)
    assert free_memory(CPU, proc=proc, cgroups=two) == Free(50 * GB, "this machine")
    cgroup(two / "jobs", memory__max=f"{20 * GB}\n", memory__current=f"{9 * GB}\n", memory__stat=stat)
    assert free_memory(CPU, proc=proc, cgroups=two) == Free(16 * GB, f"the control group {two / 'jobs'}")
    (proc / "self" / "cgroup").write_text("9:cpu,cpuacct:/\n4:memory,hugetlb:/elsewhere/mine\n0::/\n")
    one, stat = tmp_path / "one", f"total_active_file {GB}\ntotal_inactive_file 0\n"
    limits = {"memory__limit_in_bytes": f"{8 * GB}\n", "memory__usage_in_bytes": f"{3 * GB}\n"}
    cgroup(one / "memory", **limits, memory__stat=stat)  # a container sees its own as the root
    assert free_memory(CPU, proc=proc, cgroups=one) == Free(6 * GB, f"the control group {one / 'memory'}")
    cgroup(one / "memory", memory__limit_in_bytes=f"{GB}\n")  # lowered below what is used
    assert free_memory(CPU, proc=proc, cgroups=one).n_bytes == 0


def damage(store: Path, array: str, unit: int) -> None:
    shard = next(path for path in (store / array / "c" / str(unit)).rglob("0") if path.is_file())
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 1
    shard.write_bytes(raw)


@pytest.mark.parametrize("kind", KINDS)
def test_checksums_are_compared_while_reading(tmp_path: Path, kind: str) -> None:
    make_store(tmp_path)
    damage(tmp_path, f"{LATENTS}/moments", 1)
    data = opened(tmp_path)
    with pytest.raises(StoreError, match=r"row 16, view 0: wrong checksum"):
        open_rows(data, DataConfig(resident=kind), ALONE, with_targets=True)
    data.close()


STOPS = {"steps": 9, "loss.stop_alignment_at": 5}  # in the middle, and with the alignment the features are let go


@pytest.mark.slow
def test_by_the_command_a_run_equals_the_streamed_one(tmp_path: Path) -> None:
    make_store(tmp_path / "s", n_views=2, failed_rows=FAILED)
    for kind in ("stream", "ram"):
        process = start(command(tmp_path / "s", tmp_path / kind, **STOPS, **{"data.resident": kind}))
        _, said = process.communicate(timeout=250)
        assert process.returncode == 0, said
        assert ("read into memory: 100%" in said) == (kind != "stream")
    assert_same_run(tmp_path / "stream", tmp_path / "ram")


def test_memory_of_a_gpu_without_one_is_refused(tmp_path: Path) -> None:
    """By the command, before the store is opened; `train` itself takes the CPU for a device, as the tests here do."""
    options = command(tmp_path / "s", tmp_path / "run", **{"data.resident": "gpu"})[3:]
    with pytest.raises(UserError, match=r"^--data\.resident gpu needs a GPU, .*; pass --data\.resident ram, or mend"):
        main(options)


def test_any_kind_resumes_any_other(tmp_path: Path) -> None:
    make_store(tmp_path / "s", n_views=2, failed_rows=FAILED)
    for run, kinds in {"stream": ["stream"], "gpu": ["gpu"], "mixed": ["stream", "ram", "gpu"]}.items():
        for kind, steps in zip(kinds, [9] if len(kinds) == 1 else [3, 4, 9], strict=True):
            train(micro(tmp_path / "s", tmp_path / run, **{**STOPS, "steps": steps, "data.resident": kind}))
    for run in ("gpu", "mixed"):
        assert_same_run(tmp_path / "stream", tmp_path / run)


def test_a_run_that_is_over_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "s")
    train(micro(tmp_path / "s", tmp_path / "run"))
    monkeypatch.setattr("trainer.loop.train.open_rows", None)
    assert train(micro(tmp_path / "s", tmp_path / "run", **{"data.resident": "ram"}))["steps_now"] == 0


@pytest.mark.slow
def test_ranks_train_as_streamed_and_fail_together(tmp_path: Path) -> None:
    """Three ranks: parts of unequal length, and a device that gets more than it reads."""
    make_store(tmp_path / "s", n_views=2, failed_rows=FAILED)
    make_store(tmp_path / "damaged")
    damage(tmp_path / "damaged", f"{FEATURES}/patches", 2)  # rows 32 to 39, which the last rank reads
    plans: list[dict[str, Any]] = [
        {"store": tmp_path / "s", "run": tmp_path / kind, "batch": 12, "data.resident": kind}
        for kind in ("stream", *KINDS)
    ]
    plans += [
        {"store": tmp_path / "damaged", "run": tmp_path / f"damaged-{kind}", "batch": 12, "data.resident": kind}
        for kind in KINDS
    ]
    said = train_on_ranks(3, plans)
    for kind in KINDS:
        assert_same_run(tmp_path / "stream", tmp_path / kind)
    assert [each[:3] for each in said] == [[""] * 3] * 3
    for i in (3, 4):
        assert sum("wrong checksum" in rank[i] for rank in said) == 1
        assert sum("could not read its part of the data, and says why" in rank[i] for rank in said) == 2


def shared_maps(pid: int) -> set[tuple[str, int]]:
    """Inode and bytes of what a process maps of resident memory."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    found = [re.match(r"(\w+)-(\w+) \S+ \w+ \S+ (\d+)\s+/memfd:resident", line) for line in maps]
    return {(each[3], int(each[2], 16) - int(each[1], 16)) for each in found if each}


def test_ranks_map_one_copy_that_has_no_name_and_ends_with_them(tmp_path: Path) -> None:
    make_store(tmp_path / "s", n_rows=200)
    before = set(os.listdir("/dev/shm"))
    argv = command(tmp_path / "s", tmp_path / "run", steps=10**6, **{"data.resident": "ram"})
    ranks = start_ranks(argv)
    wait_for_step(ranks[0], tmp_path / "run", 2)
    maps = [shared_maps(rank.pid) for rank in ranks]
    assert maps[0] == maps[1]
    assert sorted(n_bytes for _, n_bytes in maps[0]) == [200 * 64 * 24 * 2, 200 * 8 * 16 * 16 * 2]
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "resident" in name}
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    for rank in ranks:
        rank.communicate(timeout=60)
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "resident" in name}
    everywhere = [path.name for path in Path("/proc").iterdir() if path.name.isdecimal()]
    inodes = {inode for inode, _ in maps[0]}
    assert not [pid for pid in everywhere if inodes & mapped_anywhere(pid)]


def mapped_anywhere(pid: str) -> set[str]:
    try:
        return {inode for inode, _ in shared_maps(int(pid))}
    except OSError:  # it has ended, or is somebody else's
        return set()


SLOW = """
import time
from trainer.data import resident
read = resident._Stored.read
def slowly(self, *arguments):
    print("reading", flush=True)
    time.sleep(0.2)
    read(self, *arguments)
resident._Stored.read, resident.BLOCK_BYTES = slowly, 1
from trainer.ranks import world
world.require_gpu_of_resident = lambda *asked: None  # the CPU stands for the device here
import sys
from storage.base.console import run_command
from trainer.__main__ import main
run_command(main, "python -m trainer", sys.argv[1:])
"""


@pytest.mark.parametrize("kind", slow_but(KINDS, ["ram"]))
@pytest.mark.parametrize("number", slow_but([signal.SIGINT, signal.SIGTERM], [signal.SIGTERM]))
def test_a_signal_while_reading_ends_the_run_at_once(
    shared_tiny_store: Path, tmp_path: Path, kind: str, number: signal.Signals
) -> None:
    options = command(shared_tiny_store, tmp_path / "run", **{"data.resident": kind})[3:]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline() not in ("reading\n", ""):
        pass
    process.send_signal(number)
    out, said = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED, said
    assert "Traceback" not in said
    assert "the same command goes on from there" in said
    assert out.count("reading") < 20  # of 40


def test_threads_end_with_the_rows(shared_tiny_store: Path) -> None:
    data = opened(shared_tiny_store)
    rows = open_rows(data, DataConfig(resident="ram", threads=2), ALONE, with_targets=True)
    assert isinstance(rows, InRam)
    assert batches(data, rows) == batches(data, None)
    rows.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        rows._threads._pool.submit(lambda: None)
    data.close()
