"""Presets, dotted options and YAML: what is given arrives, what is wrong is one line with status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from storage.base.console import Parser
from storage.base.errors import UserError
from storage.base.options import flag_of
from tests.slow import slow_but
from trainer.config.command_line import add_train_options, train_config
from trainer.config.presets import PRESETS, SIZES, preset
from trainer.config.saved import read_config, to_yaml
from trainer.config.schema import TrainConfig
from trainer.config.tree import flatten, free_fields, leaves, override


def parse(*argv: str) -> TrainConfig:
    parser = Parser(prog="train")
    add_train_options(parser)
    values = vars(parser.parse_args(argv))
    return train_config(values)


def run_cli(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", *argv]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def errors_in(stderr: str) -> list[str]:
    """Lines but those of waits, which a slow machine says in a log."""
    return [line for line in stderr.splitlines() if not line.startswith("loading ")]


@pytest.mark.parametrize(
    "name", slow_but(PRESETS, ("sit-tiny-2", "dit-xl-2-512", "sit-xl-2-reg", "lightningdit-xl-1", "rit-xl-1"))
)
def test_a_preset_survives_yaml(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(preset(name)), encoding="utf-8")
    assert read_config(path).config == preset(name)


def test_a_folder_that_nobody_gave_is_empty_in_what_a_run_saves(tmp_path: Path) -> None:
    """It is no cache, rather than a cache in the current folder, which `.` would say; older runs say `.`."""
    flat = yaml.safe_load(to_yaml(preset("sit-tiny-2")))
    assert flat["data"]["cache"] == flat["data"]["latent_statistics"] == ""
    for text in ("", "."):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"cache": text}}))
        assert read_config(tmp_path / "config.yaml").config.data.cache == Path()


def test_published_sizes_and_settings() -> None:
    """SiT (arXiv 2401.08740, table 1); REPA (arXiv 2410.06940, appendix): block 4 for B, block 8 for L and XL."""
    assert SIZES["b"] == (12, 768, 12, 4)
    assert SIZES["l"] == (24, 1024, 16, 8)
    assert SIZES["xl"] == (28, 1152, 16, 8)
    config = preset("sit-xl-2")
    assert (config.batch, config.ema_decay, config.loss.projection_weight) == (256, 0.9999, (0.5,))
    assert (config.optim.lr, config.optim.beta2, config.optim.weight_decay, config.optim.clip) == (1e-4, 0.999, 0, 1)
    assert (config.loss.label_dropout, config.loss.path, config.loss.time_sampling) == (0.1, "linear", "uniform")
    assert config.model.projector_width == 2048


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_name_says(name: str) -> None:
    config = preset(name)
    kind, size, patch, *rest = name.split("-")
    assert config.preset == name
    assert config.run == Path("runs") / name
    assert config.model.kind == kind
    assert config.model.patch == int(patch)
    assert config.aligns == ("vanilla" not in rest and kind not in ("lightningdit", "rit", "ditdh"))
    assert config.model.class_token == ("reg" in rest or kind == "rit")
    if size == "tiny":
        assert config.sample.steps == 50
        return
    depth, width, heads, block = SIZES[size]
    assert (config.model.depth, config.model.width, config.model.heads) == (depth, width, heads)
    assert config.model.align_block == ((8,) if kind == "rit" else (block,))
    assert config.data.resolution == (512 if "512" in rest else 256)
    assert config.sample.guidance == 1
    assert config.sample.steps == {"lightningdit": 249, "rit": 25, "ditdh": 49}.get(kind, 250)
    high = 0.85 if "reg" in rest else 0.75 if patch == "1" else 0.7
    expected = {
        "sit": ("sde", high, 0), "dit": ("ddpm", 1.0, 3), "lightningdit": ("ode", 0.9, 3), "rit": ("ode", 0.9, 0),
        "ditdh": ("ode", 1.0, 0),
    }[kind]  # fmt: skip
    assert (config.sample.sampler, config.sample.guidance_high, config.sample.guidance_channels) == expected


def test_settings_of_the_methods_after_repa() -> None:
    """REG (arXiv 2507.01467), LightningDiT (arXiv 2501.01423)."""
    config = preset("sit-xl-2-reg")
    assert (config.loss.class_weight, config.loss.projection_weight) == (0.03, (0.5,))
    assert parse("--preset", "sit-xl-2-reg", "--sample.guidance", "2.3").class_guidance == 2.3  # w_c = w, as published
    config = preset("lightningdit-xl-1")
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2, config.batch) == (2e-4, 0.9, 0.95, 1024)
    assert (config.loss.time_sampling, config.loss.direction_weight) == ("logit-normal", 1.0)
    assert (config.sample.shift, config.ema_decay) == (1 / 0.3, 0.9999)


def test_every_row_of_the_published_table_is_a_preset() -> None:
    for name in ("sit-b-2", "sit-l-2", "sit-xl-2", "dit-l-2", "dit-xl-2"):
        assert {name, f"{name}-vanilla", f"{name}-512", f"{name}-512-vanilla"} <= PRESETS.keys()


@given(lr=st.floats(1e-8, 10), weight=st.floats(0, 10), seed=st.integers(0, 2**63 - 1), qk=st.booleans())
def test_dotted_options_arrive_exactly(lr: float, weight: float, seed: int, qk: bool) -> None:
    config = parse(
        "--preset", "sit-tiny-2", "--optim.lr", repr(lr), f"--loss.projection-weight={weight!r}",
        "--seed", str(seed), "--model.qk-norm", str(qk).lower(),
    )  # fmt: skip
    want = {"optim.lr": lr, "loss.projection_weight": weight, "seed": seed, "model.qk_norm": qk}
    assert flatten(config) == {**flatten(preset("sit-tiny-2")), **want}
    assert config.aligns == (weight > 0)


def test_explicit_options_override_a_saved_config(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(override(preset("sit-b-4"), {"batch": 64, "optim.lr": 3e-4})), encoding="utf-8")
    config = parse("--config", str(path), "--batch", "32")
    assert (config.preset, config.batch, config.optim.lr) == ("sit-b-4", 32, 3e-4)
    with pytest.raises(UserError, match="--config and --preset"):
        parse("--config", str(path), "--preset", "sit-b-2")


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--batch", "0", "--batch must be at least 1, got 0"),
        ("--batch", "many", "--batch must be a number of type int"),
        ("--optim.lr", "nan", "--optim.lr must be positive and finite, got nan"),
        ("--optim.lr", "inf", "--optim.lr must be positive and finite, got inf"),
        ("--loss.label-dropout", "1.5", r"--loss.label-dropout must be in \[0, 1\], got 1.5"),
        ("--loss.path", "cubic", "--loss.path must be one of linear, cosine, got 'cubic'"),
        ("--model.heads", "5", "--model.heads must divide --model.width"),
        ("--model.align-block", "99", "--model.align-block must be a block, 1 to 28"),
        ("--model.qk-norm", "maybe", "--model.qk-norm must be true or false"),
        ("--ema-decay", "1", r"--ema-decay must be in \[0, 1\), got 1.0"),
        ("--preset", "sit-xxl-2", "did you mean sit-xl-2"),
        ("--loss.projection-weight", "0.5,x", "--loss.projection-weight must be a number of type float, got 'x'"),
        ("--model.align-block", "8,1.5", "--model.align-block must be a number of type int, got '1.5'"),
        ("--model.kind", "dit", "--sample.sampler sde cannot draw from --model.kind dit; choose ddpm"),
        ("--sample.sampler", "ddpm", "--sample.sampler ddpm cannot draw from --model.kind sit; choose sde or ode"),
        ("--sample.heun", "true", "--sample.heun true goes with --sample.sampler ode, not sde"),
        ("--sample.steps", "1", "--sample.steps must be at least 2, got 1"),
        (
            "--sample.guidance-class",
            "-2",
            "--sample.guidance-class must be at least 0, or -1 for that of --sample.guid",
        ),
        ("--loss.time-shift", "-1", "--loss.time-shift must be positive and finite, or 0, got -1"),
    ],
)
def test_a_wrong_value_is_named(option: str, value: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse(option, value)


@pytest.mark.parametrize("name", ["rit-xl-1", "lightningdit-b-1", "sit-b-2-vanilla", "ditdh-s-1"])
def test_a_shallow_model_without_alignment_need_not_say_where_it_would_be_aligned(name: str) -> None:
    options = ("--preset", name, "--model.depth", "2", "--model.context-block", "1")
    assert parse(*options).model.depth == 2
    with pytest.raises(UserError, match=r"--model\.align-block must be a block, 1 to 2"):
        parse(*options, "--loss.projection-weight", "0.5")


def test_lists_are_given_between_commas() -> None:
    config = parse(
        "--data.features", "dinov2-vitb14,clip-vitl14", "--model.align-block", "8,16",
        "--loss.projection-weight=0.5,0.25",
    )  # fmt: skip
    assert [(t.features, t.block, t.weight) for t in config.targets] == [
        ("dinov2-vitb14", 8, 0.5),
        ("clip-vitl14", 16, 0.25),
    ]
    assert parse("--data.features", "").data.features == ()


def test_the_older_name_of_logit_normal_times_means_the_same(tmp_path: Path) -> None:
    assert parse("--loss.time-sampling", "lognormal") == parse("--loss.time-sampling", "logit-normal")
    (tmp_path / "config.yaml").write_text("loss: {time_sampling: lognormal}")
    assert read_config(tmp_path / "config.yaml").config.loss.time_sampling == "logit-normal"


def test_settings_of_sit_are_refused_for_dit() -> None:
    for option in ("--loss.path=cosine", "--loss.time-sampling=logit-normal"):
        with pytest.raises(UserError, match=r"are settings of --model\.kind sit"):
            parse("--preset", "dit-xl-2", option)
    for option in ("--sample.shift=2", "--loss.time-shift=2"):
        with pytest.raises(UserError, match=rf"^{option[:-2]} 2\.0 is of flows; leave it at 1 with --model\.kind dit$"):
            parse("--preset", "dit-xl-2", option)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim: {learning_rate: 1.0}", "unknown setting optim.learning_rate"),
        ("batch: big", "batch must be of type int, got 'big'"),
        ("- 1", "must be a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_config_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_config(path)
    with pytest.raises(UserError, match=r"none\.yaml does not exist"):
        read_config(tmp_path / "none.yaml")


def test_yaml_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("optim: {lr: 1e-3}")  # YAML 1.1 calls this a string
    assert read_config(path).config.optim.lr == 1e-3


def test_every_option_has_help_and_what_is_free_is_not_what_determines_numbers() -> None:
    config = preset("sit-b-2")
    assert all(item.metadata["help"] for _, _, item in leaves(config))
    free = free_fields(config)
    assert {"steps", "log.every", "checkpoint.every", "checkpoint.keep", "run"} <= free
    assert not free & {"batch", "seed", "precision", "optim.lr", "model.depth", "loss.projection_weight"}


def test_the_whole_help_lists_every_option_and_the_short_one_what_most_runs_set() -> None:
    whole, short = run_cli("train", "--help-all"), run_cli("train", "--help")
    assert (whole.returncode, short.returncode) == (0, 0)
    options = [flag_of(name) for name, _, _ in leaves(preset("sit-b-2"))]
    assert [flag for flag in options if f"\n  {flag} " not in whole.stdout] == []
    assert "\nThe diffusion transformer:\n  --model.kind" in whole.stdout
    shown = {flag for flag in options if f"\n  {flag} " in short.stdout}
    used = {"store", "run", "preset", "steps", "batch", "seed", "device", "precision", "loss.projection-weight"}
    used |= {"data.features", "optim.lr", "checkpoint.every"}
    assert {f"--{name}" for name in used} <= shown
    assert "--help-all" in short.stdout
    imports = run_cli("import", "--help").stdout
    assert imports.startswith("usage: python -m trainer import FILE --release RELEASE [option …]\n")
    for printed in (short.stdout, imports):
        assert printed.count("\n") <= 60, "the whole has some 400 lines"


def test_what_the_short_help_leaves_out_is_an_option_all_the_same() -> None:
    done = run_cli("train", "--optim.beta1", "1.5")
    assert (done.returncode, len(errors_in(done.stderr))) == (2, 1)
    assert "--optim.beta1 must be" in done.stderr


def test_an_unknown_option_is_one_line_with_the_nearest_name() -> None:
    done = run_cli("train", "--loss.projection-wieght", "1")
    assert done.returncode == 2
    assert "--loss.projection-weight" in done.stderr
    assert len(errors_in(done.stderr)) == 1
    assert "Traceback" not in done.stderr
