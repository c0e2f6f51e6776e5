"""Stage one in one process, where Ray cannot be imported, makes the store that it makes on Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.sources.photos import write_photos

RUN = """
import sys
sys.modules["ray"] = None
from benchmarks.without_ray import main
sys.exit(main(sys.argv[1:]))
"""


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_store_is_the_one_made_on_ray(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", n_per_class=3, split="train")
    options = [
        "precompute", f"--data={tmp_path}/photos", "--latents=tiny-vae", "--features=tiny-vit", "--resolution=128",
        "--shard-rows=8", "--flip",
    ]  # fmt: skip
    run("-c", RUN, *options, f"--store={tmp_path}/here")
    assert "to write   0.0 MB" in run("-c", RUN, *options, f"--store={tmp_path}/here")
    run("-m", "pipeline", *options, f"--store={tmp_path}/on-ray")
    run("-m", "storage", "verify", "--deep", f"{tmp_path}/here")
    run("-m", "storage", "diff", f"{tmp_path}/here", f"{tmp_path}/on-ray")
