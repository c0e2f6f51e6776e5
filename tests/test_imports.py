"""Who may import whom, asked of fresh processes: "no encoder in memory" is a property, not a hope."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

ENCODERS = {"ray", "diffusers", "timm", "torchvision", "PIL"}
FORBIDDEN = {  # modules that are imported by one process, and what must then not be loaded
    "storage, storage.__main__": ENCODERS | {"torch", "pipeline", "trainer"},
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
