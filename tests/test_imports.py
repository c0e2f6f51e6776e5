"""Who may import whom, asked of fresh processes: "no encoder in memory" is a property, not a hope."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

ENCODERS = {"ray", "diffusers", "timm", "torchvision", "PIL"}
FORBIDDEN = {
    "storage": ENCODERS | {"torch", "pipeline", "trainer"},
    "storage.__main__": ENCODERS | {"torch", "pipeline", "trainer"},
    "pipeline": {"trainer", "torch"},
    "pipeline.job": {"trainer", "torch"},
    "pipeline.encode": {"trainer", "torch"},
    "pipeline.preview": {"trainer"},
    "pipeline.tasks": {"trainer", "torch"},
    "trainer": ENCODERS | {"pipeline"},
    "trainer.train": ENCODERS | {"pipeline"},
    "trainer.__main__": ENCODERS | {"pipeline"},
    "trainer.ablate": ENCODERS | {"pipeline"},
    "trainer.evaluation.generate": ENCODERS | {"pipeline"},
    "trainer.evaluation.export": ENCODERS | {"pipeline"},
    "trainer.evaluation.report": ENCODERS | {"pipeline", "matplotlib"},
    "trainer.evaluation.analyse": ENCODERS | {"pipeline", "torch_fidelity", "matplotlib"},
}


@pytest.mark.parametrize("module", FORBIDDEN)
def test_a_package_loads_nothing_it_must_not(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    loaded = set(json.loads(printed))
    assert module.split(".")[0] in loaded
    assert not loaded & FORBIDDEN[module]
