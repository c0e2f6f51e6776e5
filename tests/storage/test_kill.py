"""A publisher killed at any moment loses nothing, leaves nothing half-written, and is finished by the next run.

200 rounds in `make test-all`, 8 of them in `make test`: a real process publishes, gets SIGKILL at a random moment (so
also while it makes the store, a group, a shard, a receipt), and what has no receipt is done again: what has one must be
whole.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from storage import open_store
from storage.verify import verify
from tests.stores import make_store

SHAPE = {"n_rows": 64, "shard_rows": 8, "width": 512}
QUICK_ROUNDS, ROUNDS = 8, 200
PUBLISHER = """
import sys
from pathlib import Path
from tests.stores import make_store
sys.stdin.readline()
for root in sys.stdin:
    make_store(Path(root.strip()), n_rows=64, shard_rows=8, width=512)
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, dict[str, np.ndarray]], float]:
    """The bytes of every array file of an undisturbed store, its arrays, and how long publishing takes."""
    root = tmp_path_factory.mktemp("kill") / "whole"
    start_s = time.perf_counter()
    data = make_store(root, **SHAPE)
    return array_files(root), data, time.perf_counter() - start_s


def array_files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for kind in ("latents", "features")
        for path in sorted((root / kind).rglob("*"))
        if path.is_file()
    }


def kill_rounds(tmp_path: Path, whole: tuple, rounds: range) -> None:  # type: ignore[type-arg]
    expected, data, duration_s = whole
    killed_in_the_middle = 0
    for round_ in rounds:
        rng = np.random.default_rng(round_)
        root = tmp_path / f"s{round_}"
        child = subprocess.Popen(
            [sys.executable, "-c", PUBLISHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdin is not None
        child.stdin.write(f"\n{root}\n")
        child.stdin.flush()
        if round_ % 4:  # most kills fall into publishing, some into making the store or before it
            while not (root / "latents" / "tiny-vae").exists():
                time.sleep(0.001)
                assert child.poll() is None
            time.sleep(rng.uniform(0, 0.9 * duration_s))
        else:
            while not root.exists():
                time.sleep(0.0005)
                assert child.poll() is None
            time.sleep(rng.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdin.close()
        assert child.stdout is not None
        killed_in_the_middle += child.stdout.read() == ""
        child.stdout.close()
        for path in root.glob("*/*/*/c/**/*"):  # every shard under its final name is whole
            if path.is_file():
                assert path.read_bytes() == expected[str(path.relative_to(root))], f"round {round_}: {path}"
        make_store(root, **SHAPE, missing_only=True)
        assert array_files(root) == expected, f"round {round_}"
        strays = [path for path in root.rglob("*") if path.name.startswith(".") or "partial" in path.name]
        assert not strays, f"round {round_}: {strays}"
        assert list(verify(root, deep=True, n_workers=1)) == [], f"round {round_}"
        for path, arrays in data.items():
            group = open_store(root).group(path, checksums="always")
            for name, written in arrays.items():
                out = np.empty((len(written), *written.shape[2:]), written.dtype)
                group[name].read_into(np.arange(len(written)), 0, out)
                np.testing.assert_array_equal(out, written[:, 0])
            group.close()
    assert killed_in_the_middle > len(rounds) // 4  # the machine may be slower or quicker than when it was timed


def test_killed_while_publishing_then_run_again(tmp_path: Path, whole: tuple) -> None:  # type: ignore[type-arg]
    kill_rounds(tmp_path, whole, range(QUICK_ROUNDS))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_more_often(tmp_path: Path, whole: tuple) -> None:  # type: ignore[type-arg]
    kill_rounds(tmp_path, whole, range(QUICK_ROUNDS, ROUNDS))
