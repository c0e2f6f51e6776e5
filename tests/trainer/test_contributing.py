"""The examples of CONTRIBUTING.md are run as they stand there."""

from __future__ import annotations

import ast
import re
import types
from pathlib import Path
from typing import get_args

import pytest
import torch

import trainer.alignment
from storage.base.errors import UserError
from tests.trainer.runs import command
from tests.trainer.test_step import SCALE, batch_of, config_of
from tests.trainer.test_transformer import SMALL, randomised
from trainer import objectives
from trainer.__main__ import main
from trainer.alignment import ALIGNMENTS
from trainer.config import presets
from trainer.config.schema import Kind
from trainer.loop.losses import losses
from trainer.models.transformer import OUTPUTS_PER_CHANNEL
from trainer.objectives import OBJECTIVES
from trainer.run.metrics import read_metrics

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def examples(heading: str) -> list[str]:
    """The blocks of Python below a heading."""
    _, section = GUIDE.read_text(encoding="utf-8").split(f"## {heading}\n")
    return re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], flags=re.DOTALL)


def run_example(heading: str) -> types.ModuleType:
    """The Python below a heading, as a module."""
    (code,) = examples(heading)
    module = types.ModuleType("example")
    exec(compile(code, f"CONTRIBUTING.md, {heading}", "exec", dont_inherit=True), module.__dict__)
    return module


def test_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "PRESETS", dict(presets.PRESETS))
    run_example("Adding a preset")
    config = presets.preset("sit-xl-2-two-encoders")
    assert config.preset == "sit-xl-2-two-encoders"
    assert [(t.features, t.block, t.weight) for t in config.targets] == [
        ("dinov2-vitb14", 8, 0.5),
        ("clip-vitl14", 16, 0.25),
    ]
    assert config.sample == presets.preset("sit-xl-2").sample


def test_an_alignment_loss(shared_tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command line. ‖a − b‖² = 2 − 2 cos for unit vectors, which a run's log shows."""
    code, line = examples("Adding an alignment loss")
    (tmp_path / "squared_distance.py").write_text(code)
    monkeypatch.setattr("trainer.alignment.__path__", [*trainer.alignment.__path__, str(tmp_path)])
    for name, spelling in ast.literal_eval(f"{{{line}}}").items():
        monkeypatch.setitem(ALIGNMENTS, name, spelling)
    argv = command(shared_tiny_store, tmp_path / "run", steps=2, **{"loss.alignment": "squared-distance"})
    assert main(argv[argv.index("train") :]) == 0
    for logged in read_metrics(tmp_path / "run"):
        assert logged["alignment_loss"] == pytest.approx(2 - 2 * logged["alignment_cosine"], rel=1e-5)
    with pytest.raises(UserError, match=r"--loss.alignment must be one of cosine, .*squared-distance, got 'l2'"):
        main(["train", "--loss.alignment", "l2"])


def test_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    example = run_example("Adding an objective")
    model, batch, config = randomised(SMALL), batch_of(SMALL, 5), config_of("sit")
    plain = losses(model, batch, SCALE, config, SMALL)
    monkeypatch.setitem(objectives.OBJECTIVES, "sit", example)  # type: ignore[arg-type]
    weighted = losses(model, batch, SCALE, config, SMALL)
    assert torch.equal(weighted.times, plain.times)
    torch.testing.assert_close(weighted.denoising, (1 - plain.times) * plain.denoising)


def test_tables_and_choices_name_the_same_things() -> None:
    assert set(OBJECTIVES) == set(OUTPUTS_PER_CHANNEL) == set(get_args(Kind))
