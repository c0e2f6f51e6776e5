"""Who may import whom, asked of fresh processes: "no encoder in memory" is a property, not a hope."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import storage

ENCODERS = {"ray", "diffusers", "timm", "torchvision", "PIL"}
LIBRARIES = {"numpy", "pydantic", "pyarrow", "zarr", "h5py", "torch"}  # of which `--help` needs none
FORBIDDEN = {  # modules that are imported by one process, and what must then not be loaded
    "storage, storage.__main__, storage.base.options": ENCODERS | LIBRARIES,
    "pipeline, pipeline.__main__": ENCODERS | LIBRARIES,
    "trainer, trainer.__main__": ENCODERS | LIBRARIES,
    "storage, storage.inspection, storage.batches": ENCODERS | {"torch", "pipeline", "trainer"},
    "pipeline, pipeline.job, pipeline.encode, pipeline.launching.tasks": {"trainer", "torch"},
    "pipeline.preview": {"trainer"},
    "trainer, trainer.loop.train, trainer.__main__, trainer.study.runs, trainer.evaluation.generate.generate, "
    "trainer.evaluation.export.export, trainer.evaluation.report.page, trainer.evaluation.probing.analyse": ENCODERS
    | {"pipeline", "torch_fidelity", "matplotlib"},
}


@pytest.mark.parametrize("modules", FORBIDDEN)
def test_a_package_loads_nothing_it_must_not(modules: str) -> None:
    code = f"import json, sys, {modules}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    loaded = set(json.loads(printed))
    assert modules.split(",")[0].split(".")[0] in loaded
    assert not loaded & FORBIDDEN[modules]


def test_storage_loads_torch_in_two_places_only() -> None:
    """In `storage.torch` and `storage.weights`, which no other module imports but in a function that needs it."""
    root = Path(storage.__path__[0])
    names = [".".join(("storage", *path.relative_to(root).with_suffix("").parts)) for path in root.rglob("*.py")]
    apart = {name for name in names if name.split(".")[1] in ("torch", "weights")}
    assert {"storage.torch.dataset", "storage.weights.tensors"} <= apart
    others = [name.removesuffix(".__init__") for name in sorted({*names} - apart) if not name.endswith("__main__")]
    assert {"storage.exchange.incoming", "storage.exchange.from_repa_e", "storage.base.waiting"} <= {*others}
    code = f"import importlib, sys\nfor name in {others}:\n    importlib.import_module(name)\n    "
    code += "assert not {'torch', 'storage.torch', 'storage.weights'} & sys.modules.keys(), name"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_module_of_storage_hides_a_name_of_the_package() -> None:
    """A name that is imported when it is asked for is no more asked for once a module of that name is loaded."""
    root = Path(storage.__path__[0])
    assert not set(storage._MODULE_OF) & {path.stem for path in root.iterdir()}
    for name in storage._MODULE_OF:
        assert getattr(storage, name) is not None
    assert set(storage.__all__) == {name for name in storage._MODULE_OF if inspect.isfunction(getattr(storage, name))}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        storage.nothing  # noqa: B018


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports that stand in functions and those for types alone are counted too."""
    root = Path(__file__).parent.parent
    paths = [path for package in ("storage", "pipeline", "trainer") for path in (root / package).rglob("*.py")]
    names = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    imports: dict[str, set[str]] = {}
    for name, path in names.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                below = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= (below & names.keys()) | ({node.module or ""} if below - names.keys() else set())
        imports[name] = imported & names.keys()
    assert len(imports["storage.batches"]) > 3
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")
