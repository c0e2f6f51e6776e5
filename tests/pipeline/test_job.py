"""The job on real clusters, with real processes killed: whatever happens, the store ends with the same bytes.

Pictures and encoder are made up (`fakes.py`), so that a run is a few seconds; `test_precompute.py` has the real ones.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from storage.verify import verify
from tests.pipeline.clusters import OBJECT_STORE_BYTES, add, cluster, workers_of
from tests.pipeline.fakes import command, outcome_of
from tests.storage.test_store import array_files

N, SHARD_ROWS = 96, 8
N_UNITS = N // SHARD_ROWS
DEADLINE_S = 250.0


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    flags = tmp_path / "flags"
    flags.mkdir(exist_ok=True)
    return {**os.environ, "FAKE_FLAGS": str(flags), "OMP_NUM_THREADS": "1", **more}


def run(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, env=env, timeout=DEADLINE_S)


def start(arguments: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def n_receipts(store: Path) -> int:
    return len(list((store / "receipts/features/tiny-vit").glob("0*.json")))


def wait_for(condition: Any, child: subprocess.Popen[str] | None = None) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        assert child is None or child.poll() is None, child.communicate()
        time.sleep(0.01)


def finish(child: subprocess.Popen[str]) -> dict[str, Any]:
    stdout, stderr = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 0, stderr
    return outcome_of(stdout)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, joined: str) -> dict[str, bytes]:
    """The array files of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(command(folder / "store", n=N, shard_rows=SHARD_ROWS, address=joined), environment(folder))
    assert done.returncode == 0, done.stderr
    assert not list(verify(folder / "store", deep=True))
    return array_files(folder / "store")


def same(store: Path, whole: dict[str, bytes]) -> None:
    found = array_files(store)
    assert found.keys() == whole.keys()
    assert [name for name in whole if found[name] != whole[name]] == []
    assert not list(verify(store, deep=True))


@pytest.fixture(scope="module")
def joined() -> Iterator[str]:
    """The address of a one-node cluster that runs join. It has more CPUs than the machine: its work is mostly waiting.

    Flags of `-once` marks are looked for where the workers were told to, in the environment of the cluster.
    """
    with cluster(num_cpus=4) as made:
        yield made.address


@pytest.fixture(scope="module", autouse=True)
def flags_for_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers of a joined cluster have the environment in which it was started."""
    before = os.environ.get("FAKE_FLAGS")
    os.environ["FAKE_FLAGS"] = str(tmp_path_factory.mktemp("flags"))
    yield
    if before is None:
        del os.environ["FAKE_FLAGS"]


@pytest.mark.slow  # in default: the three attempts, in test_encoder_pool.py and test_dispatch.py
@pytest.mark.timeout(600)
def test_a_unit_that_always_fails_is_given_up_and_the_others_are_done(
    joined: str, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    marks = {
        5: "decode-crash",
        SHARD_ROWS + 5: "decode-raise",
        3 * SHARD_ROWS: "encode-crash",
        5 * SHARD_ROWS + 1: "encode-raise",
        7 * SHARD_ROWS: "encode-poison",
    }
    store = tmp_path / "store"
    done = run(command(store, n=N, shard_rows=SHARD_ROWS, address=joined, marks=marks), environment(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    given_up = {int(unit): history for unit, history in outcome_of(done.stdout)["given_up"].items()}
    assert sorted(given_up) == [0, 1, 3, 5, 7]
    assert all(len(history) == 3 for history in given_up.values()), given_up
    assert all(what.startswith("decode: ") for unit in (0, 1) for what in given_up[unit])
    assert all(what.startswith("encode: ") for unit in (3, 5, 7) for what in given_up[unit])
    assert given_up[1][0] == "decode: OSError: [Errno 5] decode-raise of 000013 (on 127.0.0.1)"
    assert "CUDA error: an illegal memory access was encountered (on " in given_up[7][-1]
    assert n_receipts(store) == N_UNITS - 5
    again = run(command(store, n=N, shard_rows=SHARD_ROWS, address=joined), environment(tmp_path))
    assert again.returncode == 0, again.stderr
    assert outcome_of(again.stdout)["n_images"] == 5 * SHARD_ROWS
    same(store, whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_hangs_is_killed_and_tried_again(joined: str, tmp_path: Path, whole: dict[str, bytes]) -> None:
    store = tmp_path / "store"
    marks = {4: "decode-hang-once", 2 * SHARD_ROWS + 1: "encode-hang-once", 4 * SHARD_ROWS: "encode-crash-once"}
    config = {"unit_timeout_s": 12.0}
    done = run(
        command(store, n=N, shard_rows=SHARD_ROWS, address=joined, marks=marks, config=config), environment(tmp_path)
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert array_files(store).keys() == whole.keys()
    # The marked rows hold the mark's pixels: what is compared are the units without.
    marked = {f"/c/{row // SHARD_ROWS}/" for row in marks if marks[row].startswith("encode")}
    found = array_files(store)
    assert all(found[name] == whole[name] for name in whole if not any(unit in name for unit in marked))
    assert not list(verify(store, deep=True))


def test_an_encoder_that_cannot_be_loaded_ends_the_run(tmp_path: Path) -> None:
    done = run(command(tmp_path / "store", n=N, shard_rows=SHARD_ROWS), environment(tmp_path, FAKE_LOAD="raise"))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "fakes: error: an encoder cannot be started on a worker: OSError: no weights here (on 127.0.0.1); "
        "no other is left"
    )
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()], (
        "right weights find no store in the way"
    )


def test_too_many_broken_images_end_the_run(joined: str, tmp_path: Path) -> None:
    marks = dict.fromkeys(range(0, N, 4), "broken")
    done = run(
        command(tmp_path / "store", n=N, shard_rows=SHARD_ROWS, address=joined, marks=marks), environment(tmp_path)
    )
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    assert f"of {N} images cannot be decoded, 10 are allowed" in message
    assert "--max-failures" in message
    assert n_receipts(tmp_path / "store") < N_UNITS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_runs_on_one_root_and_a_third_of_another_identity(
    joined: str, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    store, env = tmp_path / "store", environment(tmp_path)
    arguments = command(store, n=N, shard_rows=SHARD_ROWS, address=joined, config={"encoder_cpus": 1}, read_s=0.02)
    both = [start(arguments, env) for _ in range(2)]
    wait_for(lambda: n_receipts(store) > 0)
    other = run(command(store, n=N, shard_rows=SHARD_ROWS, address=joined, width=32), env)
    assert other.returncode == 2
    assert "was made differently (width: found 24, asked for 32)" in other.stderr.strip().splitlines()[-1]
    for child in both:
        finish(child)
    same(store, whole)
    assert not [path for path in store.rglob("*") if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_only_encoding_node_leaves_and_returns(tmp_path: Path, whole: dict[str, bytes]) -> None:
    os.environ["FAKE_ENCODE_S"] = "0.1"
    try:
        with cluster(num_cpus=2) as made:
            encoding = add(made, num_cpus=1, num_gpus=1)
            store = tmp_path / "store"
            child = start(command(store, n=N, shard_rows=SHARD_ROWS, address=made.address), environment(tmp_path))
            wait_for(lambda: n_receipts(store) >= 2, child)
            made.remove_node(encoding, allow_graceful=False)
            assert n_receipts(store) < N_UNITS
            time.sleep(3)
            assert child.poll() is None
            add(made, num_cpus=1, num_gpus=1)
            outcome = finish(child)
            assert outcome["given_up"] == {}
    finally:
        del os.environ["FAKE_ENCODE_S"]
    same(store, whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_is_lost_half_way(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with cluster(num_cpus=2) as made:
        other = add(made, num_cpus=2)
        store = tmp_path / "store"
        child = start(
            command(store, n=N, shard_rows=SHARD_ROWS, address=made.address, read_s=0.05), environment(tmp_path)
        )
        wait_for(lambda: n_receipts(store) >= N_UNITS // 3, child)
        made.remove_node(other, allow_graceful=False)
        assert finish(child)["given_up"] == {}
    same(store, whole)


def kill_at_random(store: Path, env: dict[str, str], arguments: list[str], kills: int, titles: list[str]) -> None:
    """Kill the driver, a decode worker or an encoding actor, each at a random moment, until `kills` were; run again."""
    rng = random.Random(0)
    victims = [("driver", *titles)[i % 3] for i in range(kills)]
    rng.shuffle(victims)
    child = start(arguments, env)
    while victims:
        before = n_receipts(store)
        wait_for(lambda before=before, child=child: n_receipts(store) > before or child.poll() is not None)
        if child.poll() is not None:  # done, or gave up a unit that was killed three times: begin what is left again
            child.communicate()
            spoil(store, rng)
            child = start(arguments, env)
            continue
        time.sleep(rng.uniform(0, 0.3))
        if victims[-1] == "driver":
            children = psutil.Process(child.pid).children(recursive=True)
            child.kill()
            child.communicate()
            psutil.wait_procs(children, timeout=60)  # Ray's own processes end when their driver does
            child = start(arguments, env)
        else:
            found = workers_of(child.pid, victims[-1])
            if not found:
                continue
            os.kill(rng.choice(found).pid, signal.SIGKILL)
        victims.pop()
    while child.wait(timeout=DEADLINE_S) != 0:
        assert child.returncode == 1, child.communicate()
        child.communicate()
        child = start(arguments, env)
    child.communicate()


def spoil(store: Path, rng: random.Random) -> None:
    """Take away half of the receipts, so that there is work again."""
    for group in ("latents/tiny-vae", "features/tiny-vit"):
        receipts = sorted((store / "receipts" / group).glob("0*.json"))
        for path in rng.sample(receipts, len(receipts) // 2):
            path.unlink()


def kill_fakes(tmp_path: Path, whole: dict[str, bytes], kills: int, **options: Any) -> None:
    store = tmp_path / "store"
    arguments = command(store, n=N, shard_rows=SHARD_ROWS, read_s=0.03, **options)
    env = environment(tmp_path, FAKE_ENCODE_S="0.05")
    kill_at_random(store, env, arguments, kills, ["decode_unit", "NumpyEncoder"])
    same(store, whole)
    assert not [path for path in store.rglob("*") if path.name.startswith(".")]


def test_a_driver_killed_at_a_random_moment(joined: str, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """On a cluster that stays; drivers that start their own are among the twenty below."""
    kill_fakes(tmp_path, whole, 1, address=joined)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_twenty_times(tmp_path: Path, whole: dict[str, bytes]) -> None:
    kill_fakes(tmp_path, whole, 20)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_is_bounded_and_nothing_spills(tmp_path: Path) -> None:
    """Fifteen units of 12.6 MB, an encoder that is slower than the decoders, an object store that holds eight."""
    os.environ["FAKE_ENCODE_S"] = "0.3"
    try:
        with cluster(num_cpus=8) as made:
            done = run(
                command(
                    tmp_path / "store", n=256 * 15, shard_rows=256, address=made.address, config={"encoder_cpus": 1}
                ),
                environment(tmp_path),
            )
            spilled = list(Path(made.head_node.get_session_dir_path()).glob("ray_spilled_objects*/*"))
    finally:
        del os.environ["FAKE_ENCODE_S"]
    assert done.returncode == 0, done.stderr
    outcome = outcome_of(done.stdout)
    unit_bytes = 256 * 128 * 128 * 3
    assert unit_bytes <= outcome["store_peak_bytes"] <= OBJECT_STORE_BYTES / 2 + unit_bytes, json.dumps(outcome)
    assert spilled == []
