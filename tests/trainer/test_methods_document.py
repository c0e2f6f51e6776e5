"""The table of presets in docs/methods.md has their values, and every setting in which they differ."""

from __future__ import annotations

import shlex
from pathlib import Path

from storage.base.options import flag_of, options_of, spelled
from trainer.config.command_line import train_config
from trainer.config.presets import preset
from trainer.config.schema import TrainConfig
from trainer.config.tree import flatten
from trainer.run.published import settings_of

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
NAMES = {option.flag: option.name for option in options_of(TrainConfig)}
SAID_ELSEWHERE = {"run", "preset", "model.kind", "model.patch", "model.class_token", "loss.alignment"}
OF_CLASS_TOKENS = ("loss.class_weight", "sample.guidance_class")


def rows() -> dict[str, list[str]]:
    """Heading → cells of the table of presets, without its marks of code."""
    _, _, table = PAGE.read_text(encoding="utf-8").partition("\n| setting |")
    lines = [line.strip("|").split(" | ") for line in table.partition("\n\n")[0].splitlines()]
    return {first.strip(" `"): [cell.strip(" `") for cell in cells] for first, *cells in lines[2:]}


def config_of(words: str) -> TrainConfig:
    """The configuration of `PRESET` and, behind it, options."""
    name, *options = shlex.split(words.replace("`", ""))
    given = {NAMES[flag]: text for flag, text in zip(options[::2], options[1::2], strict=True)}
    return train_config({"preset": name, **given})


def cell(config: TrainConfig, name: str) -> str:
    """How the table spells a setting."""
    if name in OF_CLASS_TOKENS and not config.model.class_token:
        return "–"
    value = flatten(config)[name]
    if name == "sample.shift":
        return f"{value:.3g}"
    return f"{value:g}" if isinstance(value, float) else spelled(value)


def test_the_table_of_presets_is_what_they_lock() -> None:
    table = rows()
    configs = [config_of(words) for words in table["preset"]]
    for flag in (heading for heading in table if heading.startswith("--")):
        assert table[flag] == [cell(config, NAMES[flag]) for config in configs], flag
    flat = [flatten(config) for config in configs]
    differing = {name for name in flat[0] if len({spelled(each[name]) for each in flat}) > 1}
    assert {flag_of(name) for name in (differing - SAID_ELSEWHERE) | set(OF_CLASS_TOKENS)} <= table.keys()
    assert {(config.optim.clip, config.ema_decay, config.loss.label_dropout) for config in configs} == {
        (1, 0.9999, 0.1)
    }
    assert all(cells and len(cells) == len(configs) for cells in table.values())


def test_the_published_lambda_of_irepa_is_that_of_an_imported_checkpoint() -> None:
    config = config_of(rows()["preset"][1])
    assert config.loss.projection_weight == settings_of("irepa", {}, aligned=True)["loss.projection_weight"]
    assert config.loss.alignment == ("irepa:gamma=0.6:kernel=3:projector_kind=conv",)


def test_lightningdit_of_800_epochs_is_said_as_options() -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    options = text.partition("those of 800 are `")[2].partition("`")[0]
    config = config_of(f"lightningdit-xl-1 {options}")
    assert round(config.steps * config.batch / 1_281_167) == 799
    assert (config.sample.guidance, config.sample.guidance_high) == (6.7, 0.875)
    assert preset("lightningdit-xl-1").sample.guidance_high == 0.9
