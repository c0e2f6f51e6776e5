"""Stage one in one process, where Ray cannot be imported, makes the store that it makes on Ray."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import without_ray
from pipeline.sources.photos import write_photos
from storage.base.errors import UserError

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


@pytest.mark.parametrize("words", [["--encoders", "2"], ["--dry-run"], ["--ray-address", "head:6379", "--verbose"]])
def test_what_is_of_ray_is_refused(words: list[str], tmp_path: Path) -> None:
    flags = ", ".join(word for word in words if word.startswith("--"))
    with pytest.raises(UserError, match=f"^{re.escape(flags)}: of Ray"):
        without_ray.main(["precompute", "--data", str(tmp_path), "--store", str(tmp_path / "s"), *words])
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_store_is_the_one_made_on_ray(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", n_per_class=3, split="train")
    next((tmp_path / "photos").rglob("*.JPEG")).write_bytes(b"not an image")
    options = [
        "precompute", f"--data={tmp_path}/photos", "--latents=tiny-vae", "--features=tiny-vit", "--resolution=128",
        "--shard-rows=8", "--flip",
    ]  # fmt: skip
    run("-c", RUN, *options, f"--store={tmp_path}/here")
    assert "0 encoded now" in run("-c", RUN, *options, f"--store={tmp_path}/here")
    run("-m", "pipeline", *options, f"--store={tmp_path}/on-ray")
    run("-m", "storage", "verify", "--deep", f"{tmp_path}/here")
    run("-m", "storage", "diff", f"{tmp_path}/here", f"{tmp_path}/on-ray")
