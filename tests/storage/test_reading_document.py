"""The examples of docs/reading.md run as they are printed; the store is another, with features of another name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from storage.derive import derive_group
from storage.principal import Request
from tests.stores import make_store

PAGE = Path(__file__).parents[2] / "docs" / "reading.md"
PLACE = "runs/demo/store"
EXAMPLES = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "storage" in block]
# What each example names, looked at afterwards.
AFTERWARDS = {
    "RowDataset": "assert (moments.shape, labels.shape, patches.shape[0]) == ((64, 8, 16, 16), (64,), 64); "
    "assert z.shape == (64, 4, 16, 16)",
    "rotated2": "assert directions.shape == (2, 64, 24); assert abs(lengths / 5 - 1).max() < 0.9",
    "basis_of": "assert nearest.shape == (2, 64, 24)",
    "iterate_batches": "assert (moments.shape, patches.shape[0]) == ((64, 8, 16, 16), 64)",
}


def test_every_way_to_read_has_an_example() -> None:
    for name in AFTERWARDS:
        assert [block for block in EXAMPLES if name in block], name


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example{i}" for i in range(len(EXAMPLES))])
def test_an_example_runs_as_printed(tmp_path: Path, example: str) -> None:
    assert PLACE in example
    make_store(tmp_path / "store", n_rows=128)
    if "pca8" in example:
        wanted = Request(components=8, sample_rows=128, seed=0, standardised=False)
        derive_group(tmp_path / "store", "tiny-vit", components=wanted, n_workers=1)
    if "rotated2" in example:
        derive_group(tmp_path / "store", "tiny-vit", "rotated2", n_workers=1)
    script = tmp_path / "example.py"
    checks = [check for name, check in AFTERWARDS.items() if name in example]
    here = example.replace(PLACE, str(tmp_path / "store")).replace("glyph-vit", "tiny-vit")
    script.write_text("\n".join([here, *checks, ""]))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "print(" in example:
        assert done.stdout
