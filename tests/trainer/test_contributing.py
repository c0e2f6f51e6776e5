"""The examples of CONTRIBUTING.md are run as they stand there."""

from __future__ import annotations

import dataclasses
import re
import types
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from tests.trainer.test_step import SCALE, batch_of, config_of
from tests.trainer.test_transformer import SMALL, randomised
from trainer import objectives
from trainer.alignment.cosine import ALIGNMENTS
from trainer.config import presets
from trainer.config.schema import Kind, LossConfig
from trainer.loop.losses import losses
from trainer.models.transformer import OUTPUTS_PER_CHANNEL
from trainer.objectives import OBJECTIVES

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def run_example(heading: str) -> types.ModuleType:
    """The Python below a heading, as a module."""
    _, section = GUIDE.read_text(encoding="utf-8").split(f"## {heading}\n")
    (code,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], flags=re.DOTALL)
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


def test_an_alignment_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """‖a − b‖² = 2 − 2 cos for unit vectors, so a step with it shows twice one plus the cosine's."""
    monkeypatch.setattr("trainer.alignment.cosine.ALIGNMENTS", dict(ALIGNMENTS))
    example = run_example("Adding an alignment loss")
    model, batch, config = randomised(SMALL), batch_of(SMALL, 3), config_of("sit")
    cosine = losses(model, batch, SCALE, config, SMALL.n_classes).alignments
    monkeypatch.setattr("trainer.loop.losses.ALIGNMENTS", example.ALIGNMENTS)
    changed = dataclasses.replace(config.loss, alignment="squared-distance")  # type: ignore[arg-type]
    distance = losses(model, batch, SCALE, dataclasses.replace(config, loss=changed), SMALL.n_classes).alignments
    torch.testing.assert_close(distance, 2 + 2 * cosine)


def test_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    example = run_example("Adding an objective")
    model, batch, config = randomised(SMALL), batch_of(SMALL, 5), config_of("sit")
    plain = losses(model, batch, SCALE, config, SMALL.n_classes)
    monkeypatch.setitem(objectives.OBJECTIVES, "sit", example)  # type: ignore[arg-type]
    weighted = losses(model, batch, SCALE, config, SMALL.n_classes)
    assert torch.equal(weighted.times, plain.times)
    torch.testing.assert_close(weighted.denoising, (1 - plain.times) * plain.denoising)


def test_tables_and_choices_name_the_same_things() -> None:
    assert set(OBJECTIVES) == set(OUTPUTS_PER_CHANNEL) == set(get_args(Kind))
    assert set(ALIGNMENTS) == set(get_args(get_type_hints(LossConfig)["alignment"]))
