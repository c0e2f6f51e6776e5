"""Installed scripts, in a folder whose own trainer.py, storage.py and pipeline.py must not be taken for ours."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.__main__ import main as pipeline_main
from pipeline.next_step import train_commands
from storage.base import programs
from storage.base.errors import UserError
from tests.commands import run_here
from tests.stores import make_groups, make_store
from tests.trainer.evaluation.report_runs import draw, evaluate, make_run
from trainer.evaluation.generate.outcome import evaluation_of
from trainer.evaluation.report import results
from trainer.evaluation.report.methods import methods_of
from trainer.evaluation.report.outcome import outcome
from trainer.evaluation.report.page import page
from trainer.evaluation.report.run_record import read_runs
from trainer.evaluation.report.verdict import verdict

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
PACKAGES = ("storage", "pipeline", "trainer")
MINE = 'import sys\nprint("the user\'s own file ran", file=sys.stderr)\nraise SystemExit(77)\n'
INSTALLED = """#!{python}
import sys
from {module} import {function}
if __name__ == "__main__":
    sys.exit({function}())
"""  # as pip writes one


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of pyproject.toml, whose Python finds this checkout."""
    folder = tmp_path_factory.mktemp("bin")
    for name, target in SCRIPTS.items():
        module, _, function = target.partition(":")
        path = folder / name
        path.write_text(INSTALLED.format(python=sys.executable, module=module, function=function))
        path.chmod(0o755)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Somebody's own project."""
    for package in PACKAGES:
        (tmp_path / f"{package}.py").write_text(MINE)
    return tmp_path


def run(folder: Path, program: Path | str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "RAY_ADDRESS")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [str(program), *map(str, arguments)]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


def pictures(folder: Path, n: int) -> Path:
    rng = np.random.default_rng(n)
    folder.mkdir()
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_each_package_has_a_script_of_its_name() -> None:
    assert {f"repa-{package}": f"{package}.__main__:script" for package in PACKAGES} == SCRIPTS


def test_what_stands_in_the_way_of_python_m_does_not_of_a_script(scripts: Path, folder: Path) -> None:
    assert run(folder, sys.executable, "-m", "trainer", "--help").returncode == 77
    for package in PACKAGES:
        done = run(folder, scripts / f"repa-{package}", "--help")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: repa-{package} ")


def test_messages_name_commands_that_work_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "run `python -m storage verify --deep` once, not python -m storages or .venv/bin/python -m pip"
    monkeypatch.setattr(sys, "argv", ["/x/trainer/__main__.py"])
    assert programs.as_called(text) == text
    assert programs.as_called("`make train RUN=…`") == "`make train RUN=…`"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/repa-trainer"])
    assert programs.as_called(text) == text.replace("python -m storage verify", "repa-storage verify")
    of_make = "it first (make train STORE=… RUN='a b'), or `make precompute` or `make precompute DATA=…`; make one"
    assert programs.as_called(of_make) == (
        "it first (repa-trainer train --store … --run 'a b'), or `repa-pipeline precompute` or "
        "`repa-pipeline precompute --data …`; make one"
    )
    assert {programs.package_named(programs.program("trainer")), programs.package_named("python -m trainer")} == {
        "trainer"
    }

    def fail(_: object) -> int:
        raise UserError(text)

    assert run_here(fail, "repa-trainer", [], capsys)[2] == f"repa-trainer: error: {programs.as_called(text)}\n"


TAKEN_BY = ("UserError", "StoreError", "option", "argument", "required", "command", "Command")  # through `as_called`


def test_no_command_to_run_is_spelled_out_in_what_is_printed() -> None:
    """But in errors and help texts, which are printed as this program was called; docstrings may have any."""
    found = []
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        source = path.read_text()
        if path.name == "export.py":  # a model's card, for whoever reads it elsewhere
            continue
        if not programs.MODULE.search(source):
            continue
        tree = ast.parse(source)
        kept = {id(text) for call in ast.walk(tree) if _is_taken(call) for text in ast.walk(call)}
        kept |= {id(each.value) for each in ast.walk(tree) if isinstance(each, ast.Expr)}  # docstrings
        for text in ast.walk(tree):
            said = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
            if programs.MODULE.search(said) and id(text) not in kept:
                found.append(f"{path.relative_to(ROOT)}:{text.lineno}")
    assert found == []


def test_the_report_s_commands_are_those_of_the_script(
    monkeypatch: pytest.MonkeyPatch, shared_tiny_store: Path, tmp_path: Path
) -> None:
    """In a folder with a trainer.py of the user's own, `python -m trainer` would run that."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/repa-trainer"])
    for seed, weight in ((1, 0.5), (2, 0.5), (1, 0.0), (3, 0.0)):
        make_run(tmp_path, shared_tiny_store, seed, weight, measured=weight > 0, name=f"run-{weight}-{seed}")
    change = tmp_path / "run-0.5-2" / "analysis" / "cknna.json"
    change.write_text(change.read_text().replace('"n": 1000', '"n": 600'))
    draw(tmp_path / "run-0.0-3")
    evaluate(tmp_path / "run-0.0-1", 40.0)
    records = read_runs([tmp_path])
    nothing = [dataclasses.replace(record, evaluations=[], drawn=[], picture=None) for record in records]
    commands = [command for _, command in results.not_compared(records)]
    for of in (records, records[:2], nothing, [records[0], records[2]]):
        commands += [command for _, command in verdict(of, methods_of(of)).missing]
        commands.append(outcome(of, tmp_path / "run-0.5-1" / "config.yaml")[1])
    commands += [evaluation_of(record.path, record.path / "samples") for record in records]
    ours = [command for command in commands if not command.startswith("python -m http.server")]
    assert {command.split()[1] for command in ours} >= {"cknna", "generate", "evaluate", "score", "train"}
    assert all(part.startswith("repa-trainer ") for command in ours for part in command.split(" && "))
    assert "python -m trainer" not in page(nothing, "x", real=False)
    assert "<code>repa-trainer generate RUN --n 64</code>" in page(nothing, "x", real=False)


def test_what_follows_precompute_needs_no_makefile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = tmp_path / "a store"
    make_groups(store, 384, {"latents/a": {"n": 4, "side": 48}, "features/b": {"n": 24, "side": 12}})
    assert train_commands(str(store)) == [
        f"make train STORE={shlex.quote(str(store))} PRESET=sit-tiny-2 ARGS='--model.patch 4'"
    ]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/repa-pipeline"])
    (line,) = train_commands(str(store))
    assert shlex.split(line) == [
        "repa-trainer", "train", "--store", str(store), "--preset", "sit-tiny-2", "--model.patch", "4"
    ]  # fmt: skip


def test_help_names_commands_that_work_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/repa-pipeline"])
    for words in (["--help"], ["precompute", "--help"]):
        with pytest.raises(SystemExit):
            pipeline_main(words)
        shown = " ".join(capsys.readouterr().out.split())
        assert "`python -m" not in shown
    assert "`repa-pipeline encoders` lists them" in shown


def _is_taken(node: ast.AST) -> bool:
    """Whether the texts of a call are printed as this program was called."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in TAKEN_BY


def test_workers_of_storage_are_ours(scripts: Path, folder: Path) -> None:
    make_store(folder / "store")
    done = run(folder, scripts / "repa-storage", "derive", "store", "tiny-vit", "--codec=rotated2", "--workers=2")
    assert done.returncode == 0, done.stderr
    assert (folder / "store/features/tiny-vit-rotated2").is_dir()


@pytest.mark.slow
def test_evaluate_describes_with_our_pipeline(scripts: Path, folder: Path) -> None:
    images, reference = pictures(folder / "images", 8), pictures(folder / "reference", 9)
    line = ["evaluate", images, "--reference", reference, "--encoder=tiny-vit", "--resolution=128", "--device=cpu"]
    done = run(folder, scripts / "repa-trainer", *line)
    assert done.returncode == 0, done.stderr
    assert "8 images by tiny-vit" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ray_address", ["", "local"])
def test_an_ablation_trains_with_our_trainer(ray_address: str, scripts: Path, folder: Path) -> None:
    make_store(folder / "store")
    tiny = {"device": "cpu", "batch": 4, "steps": 2, "log.tensorboard": False, "model.depth": 2, "model.width": 32}
    tiny |= {"model.heads": 2, "model.align_block": [1], "model.projector_width": 32}
    (folder / "a.yaml").write_text(json.dumps({"preset": "sit-tiny-2", "set": tiny, "seeds": [0]}))
    line = ["ablate", "a.yaml", "--store", folder / "store", "--out", folder / "out", f"--ray-address={ray_address}"]
    done = run(folder, scripts / "repa-trainer", *line)
    assert done.returncode == 0, done.stderr
    assert f"next: repa-trainer report {folder / 'out'}" in done.stdout


@pytest.mark.slow
def test_ray_s_workers_are_ours(scripts: Path, folder: Path) -> None:
    """Of a cluster that is started here, which looks in the current directory by itself."""
    data = pictures(folder / "images", 4)
    line = ["precompute", "--data", data, "--store", "store", "--latents=tiny-vae", "--unlabelled"]
    done = run(folder, scripts / "repa-pipeline", *line, "--features=none", "--resolution=128")
    assert done.returncode == 0, done.stderr
    assert "next: repa-storage ls" in done.stdout


@pytest.mark.slow
def test_a_wheel_has_the_scripts_and_says_that_it_is_typed(tmp_path: Path) -> None:
    """What pip would install; where setuptools cannot be had, the test is skipped."""
    tree = tmp_path / "tree"
    tree.mkdir()
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if name.startswith((*(f"{package}/" for package in PACKAGES), "pyproject.toml", "README.md", "LICENSE")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    line = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(tree)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    if "setuptools" in done.stderr:
        pytest.skip("no wheel can be built: setuptools cannot be had from here")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    for name, target in SCRIPTS.items():
        assert f"{name} = {target}" in entry_points
