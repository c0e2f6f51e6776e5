"""The notebooks of docs/examples run, cell by cell in a process of their own, beside a small store and runs on it.

Jupyter is not needed for that: a notebook is JSON, and its code cells are Python. What their outputs would be is not
committed, so that a change of a cell is a change of its lines.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.demo import FEATURES as FEATURES_OF_DEMO
from storage.derive import derive_group
from tests.stores import FEATURES, make_store
from tests.trainer.runs import micro
from trainer.loop.train import train

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
NOTEBOOKS = {path.stem: json.loads(path.read_text()) for path in sorted(EXAMPLES.glob("*.ipynb"))}
RUN = """
import ast, json, sys

cells, names = json.load(open(sys.argv[1])), {"__name__": "__main__"}
for source in cells:
    *body, last = ast.parse(source).body
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    mode = ast.Interactive([last]) if isinstance(last, ast.Expr) else ast.Module([last], [])  # as Jupyter shows it
    exec(compile(mode, "cell", "single" if isinstance(last, ast.Expr) else "exec"), names)
"""


def code(notebook: dict[str, Any]) -> list[str]:
    """Code cells, which read the features of the store of the tests in place of the demo's."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [cell.replace(f'"features/{FEATURES_OF_DEMO}"', f'"{FEATURES}"') for cell in cells]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as this repository is after `make demo`, as far as the notebooks look."""
    root = tmp_path_factory.mktemp("repository")
    store = root / "runs/demo/store"
    make_store(store, n_rows=96)
    train(micro(store, root / "runs/demo/repa"))
    train(micro(store, root / "runs/demo/vanilla", **{"loss.projection_weight": (0.0,)}))
    derive_group(store, FEATURES.removeprefix("features/"), "rotated1", n_workers=1)
    (root / "docs").mkdir()
    shutil.copytree(EXAMPLES, root / "docs/examples")
    return root


def printed(cells: list[str], demo: Path, tmp_path: Path) -> str:
    """What the cells print and show."""
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", RUN, str(tmp_path / "cells.json")]
    done = subprocess.run(line, cwd=demo / "docs/examples", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_valid_and_hold_no_outputs(name: str) -> None:
    """nbformat 4.5: every cell has an id of its own; lines are kept as a list."""
    notebook = NOTEBOOKS[name]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", each) for each in ids)
    for cell in notebook["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        assert isinstance(cell["source"], list)
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
            assert (cell["execution_count"], cell["outputs"]) == (None, [])
        assert cell.keys() == keys
    assert notebook["cells"][0]["cell_type"] == "markdown"


def test_look_into_a_store(demo: Path, tmp_path: Path) -> None:
    text = printed(code(NOTEBOOKS["look-into-a-store"]), demo, tmp_path)
    assert "<Store ../../runs/demo/store: 96 rows, 1 view, 128 px; latents/tiny-vae, " in text
    assert "<GroupReader features/tiny-vit: 96 rows, 1 view; cls 24 float16, patches 64×24 float16>" in text
    assert "no sample failed" in text
    deviation, difference = re.search(r"deviation (\S+); a draw differs from the mean by (\S+)\n", text).groups()  # type: ignore[union-attr]
    assert float(deviation) == pytest.approx(0.5, abs=0.05)  # of standard normal numbers, by the identity's factor
    assert float(difference) > 0.1


LENGTHS = """
directions = targets(next(iter(loader)))
print("lengths", directions.norm(dim=-1).std().item(), directions.shape)
"""


def lengths_vary(text: str) -> float:
    found = re.search(r"^lengths (\S+) torch.Size\(\[16, 64, 24\]\)", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_a_loop_of_one_s_own(demo: Path, tmp_path: Path) -> None:
    cells = code(NOTEBOOKS["your-own-loop"])
    assert "trainer" not in " ".join(cells)
    text = printed([*cells, LENGTHS], demo, tmp_path)
    losses = [float(loss) for loss in re.findall(r"^step +\d+  denoising (\S+)", text, re.MULTILINE)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert lengths_vary(text) < 1e-3


def test_its_targets_of_codes_are_not_normalised_again(demo: Path, tmp_path: Path) -> None:
    first, *others, _ = code(NOTEBOOKS["your-own-loop"])
    coded = first.replace(f'"{FEATURES}"', f'"{FEATURES}-rotated1"')
    assert coded != first
    assert lengths_vary(printed([coded, *others, LENGTHS], demo, tmp_path)) > 0.02


def test_compare_runs(demo: Path, tmp_path: Path) -> None:
    text = printed(code(NOTEBOOKS["compare-runs"]), demo, tmp_path)
    assert "loss.projection_weight: repa (0.5,), vanilla (0.0,)" in text
    assert len(re.findall(r"^\w+ +6 steps  denoising \d", text, re.MULTILINE)) == 2
    assert "seed" not in text
