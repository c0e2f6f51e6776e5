"""What older code saved goes on under newer code, and does not change because a setting was added.

`tests/data/run-of-version-1` says how its run was made: by code whose configurations carry no version.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from pipeline.encoders.tiny import TINY_VAE
from storage.base.errors import UserError
from trainer.__main__ import main
from trainer.config import command_line, saved
from trainer.config.command_line import train_config
from trainer.config.declaring import option, section
from trainer.config.optim import OptimConfig
from trainer.config.presets import PRESETS, tiny
from trainer.config.saved import VERSION, read_config, to_yaml
from trainer.config.schema import TrainConfig
from trainer.config.tree import flatten, override
from trainer.evaluation.export.export import export
from trainer.evaluation.report.run_record import read_runs
from trainer.run.checkpoint import latest_checkpoint, load_ema_weights, read_state
from trainer.run.folder import RunFolder
from trainer.run.metrics import read_metrics
from trainer.study import file as study
from trainer.study.file import read_ablation

DATA = Path(__file__).parents[1] / "data" / "run-of-version-1"
EXPECTED = DATA / "expected"
MADE_AT = "/tmp/run-of-version-1"
MADE_ON = ("2.14.1", "AVX512", "AuthenticAMD")  # torch, its vectors, whose kernels a matrix product takes
STUDY = {
    "batch": 4,
    "steps": 6,
    "device": "cpu",
    "model.depth": 2,
    "model.width": 8,
    "model.heads": 2,
    "model.align-block": 1,
    "model.projector-width": 8,
    "log.every": 2,
    "log.tensorboard": False,
    "log.samples-every": 0,
    "checkpoint.every": 3,
    "sample.steps": 3,
    "sample.guidance": 1.5,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the run was made: a sum may round otherwise on more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the run, with a copy of its store beside it."""
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(MADE_AT, str(tmp_path)))
    return run


def the_same_command(run: Path, *more: str) -> list[str]:
    """What the run was made with."""
    options = [f"--{name}={value}" for name, value in STUDY.items()]
    return ["train", "--preset=sit-tiny-2", f"--store={run.parent / 'store'}", f"--run={run}", *options, *more]


def assert_as_before(got: object, want: object) -> None:
    """Equal: to the bit with the arithmetic that the numbers were made with, else nearly."""
    cpu = Path("/proc/cpuinfo")
    vendor = re.search(r"vendor_id\s*: (\S+)", cpu.read_text() if cpu.exists() else "")
    here = (torch.__version__.partition("+")[0], torch.backends.cpu.get_cpu_capability(), vendor and vendor[1])
    exact = {"rtol": 0.0, "atol": 0.0} if here == MADE_ON else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got, want, **exact)


def test_a_run_without_a_version_goes_on_bit_for_bit(old: Path) -> None:
    want = {line["step"]: line for line in read_metrics(DATA / "run")}
    assert "version" not in yaml.safe_load((DATA / "run" / "config.yaml").read_text())
    assert main(the_same_command(old)) == 0
    lines = {line["step"]: line for line in read_metrics(old)}
    assert list(lines) == list(want) == [2, 4, 6]
    for step, line in want.items():
        for name in ("denoising_loss", "alignment_loss", "gradient_norm", "loss_by_time"):
            assert_as_before(torch.tensor(_numbers(lines[step][name])), torch.tensor(_numbers(line[name])))
    newest = latest_checkpoint(old)
    assert newest == old / "checkpoints" / "step-0000006"
    assert_as_before(load_file(newest / "model.safetensors"), load_file(EXPECTED / "model.safetensors"))
    assert yaml.safe_load((old / "config.yaml").read_text())["version"] == VERSION
    assert read_state(newest).config["version"] == VERSION
    before, after = (flatten(read_config(run / "config.yaml").config) for run in (DATA / "run", old))
    places = {"store": after["store"], "run": after["run"]}
    assert after == {**before, **places}


def _numbers(value: float | list[float | None]) -> list[float]:
    return [number if number is not None else -1.0 for number in (value if isinstance(value, list) else [value])]


def test_it_is_reported_and_measured(old: Path, tmp_path: Path) -> None:
    recorded = json.loads((DATA / "run" / "analysis" / "cknna.json").read_text())["points"]
    [record] = read_runs([old])
    assert record.config.model.width == 8
    assert (record.steps, record.checkpoint_step, record.summary.device) == (6, 3, "cpu")
    measured = record.measured["cknna"]
    assert measured is not None
    assert [point.cknna for point in measured.points] == [point["cknna"] for point in recorded]
    assert main(["report", str(old), "--out", str(tmp_path / "report.html")]) == 0
    assert main(["cknna", str(old), "--n=8", "--k=3", "--batch=4", "--device=cpu"]) == 0
    again = json.loads((old / "analysis" / "cknna.json").read_text())["points"]
    want = [point for point in recorded if point["step"] == 3]
    assert [point["block"] for point in again] == [point["block"] for point in want]
    assert_as_before([point["cknna"] for point in again], [point["cknna"] for point in want])


def test_images_are_drawn_from_it_and_its_weights_exported(old: Path, tmp_path: Path) -> None:
    command = ["generate", str(old), "--n=2", "--batch=2", f"--vae={TINY_VAE}", "--device=cpu"]
    assert main([*command, f"--out={tmp_path / 'images'}"]) == 0
    image, want = (
        np.asarray(Image.open(path)).astype(int)
        for path in (tmp_path / "images" / "000000.png", EXPECTED / "image-of-step-3.png")
    )
    assert abs(image - want).max() <= 1  # level, of a decoder that another library computes
    [folder] = export(old, "safetensors", tmp_path / "exported", "latest")
    weights = load_ema_weights(DATA / "run" / "checkpoints" / "step-0000003")
    torch.testing.assert_close(load_file(folder / "ema.safetensors"), weights, rtol=0, atol=0)


@dataclass(frozen=True, kw_only=True)
class LaterOptim(OptimConfig):
    """As a later version might declare it."""

    momentum: int = option(500, "steps over which the learning rate rises", before=0)
    cycle: int = option(7, "a setting whose default is what runs did before")
    period: int = option(9, "the same, free", free=True)


@dataclass(frozen=True, kw_only=True)
class LaterConfig(TrainConfig):
    """With settings that the run of version 1 does not know."""

    optim: LaterOptim = section(LaterOptim)


LATER = {"optim.momentum": 1000, "optim.cycle": 8, "optim.period": 10}
BEFORE = {"optim.momentum": 0, "optim.cycle": 7, "optim.period": 9}


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer with these settings, which a preset of it sets too."""

    def preset() -> TrainConfig:
        made = tiny("sit-tiny-2", "sit")
        values = {name: getattr(made, name) for name in TrainConfig.__dataclass_fields__ if name != "optim"}
        return override(LaterConfig(**values), {"optim.lr": made.optim.lr, **LATER})

    monkeypatch.setitem(PRESETS, "sit-tiny-2", preset)
    for module in (saved, command_line, study):
        monkeypatch.setattr(module, "TrainConfig", LaterConfig)


def of_later(config: TrainConfig) -> dict[str, object]:
    return {name: value for name, value in flatten(config).items() if name in LATER}


@pytest.mark.usefixtures("later")
def test_a_setting_added_later_leaves_old_runs_as_they_were(old: Path, tmp_path: Path) -> None:
    assert of_later(train_config({"preset": "sit-tiny-2"})) == LATER
    assert main(the_same_command(old, "--steps=5")) == 0
    assert main(the_same_command(old)) == 0, "and again, from what the newer code saved"
    assert_as_before(
        load_file(old / "checkpoints" / "step-0000006" / "model.safetensors"),
        load_file(EXPECTED / "model.safetensors"),
    )
    assert of_later(RunFolder(old).read_config().config) == BEFORE
    [record] = read_runs([old])
    assert {name: record.settings[name] for name in ("optim.momentum", "optim.cycle")} == {
        "optim.momentum": 0,
        "optim.cycle": 7,
    }
    fresh = tmp_path / "fresh"
    assert main(the_same_command(fresh, f"--store={old.parent / 'store'}", "--steps=1")) == 0
    assert of_later(RunFolder(fresh).read_config().config) == LATER


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("name", ["optim.momentum", "optim.cycle"])
def test_what_is_given_explicitly_is_a_change(old: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    option = f"--{name}={LATER[name]}"
    with pytest.raises(UserError, match=rf"was made otherwise \({name}: was {BEFORE[name]}, is {LATER[name]}\)"):
        main(the_same_command(old, option))
    assert main(the_same_command(old, option, "--resume-with-changes")) == 0
    assert of_later(RunFolder(old).read_config().config) == {**BEFORE, name: LATER[name]}
    assert main(the_same_command(old, option)) == 0, "which is what the run is now"


@pytest.mark.usefixtures("later")
def test_an_ablation_takes_an_old_run_for_its_own(old: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(old, out / "seed-0")
    file, store = tmp_path / "study.yaml", str(tmp_path / "store")
    file.write_text(yaml.safe_dump({"preset": "sit-tiny-2", "set": STUDY, "seeds": [0]}))
    [run] = read_ablation(file, store, out).runs
    assert run.steps_done == 3
    file.write_text(yaml.safe_dump({"preset": "sit-tiny-2", "set": {**STUDY, "optim.momentum": 1000}}))
    with pytest.raises(UserError, match=r"made otherwise \(optim.momentum: was 0, is 1000\)"):
        read_ablation(file, store, out)


def test_latents_of_a_run_before_the_check_of_deviations_stay_accepted(old: Path) -> None:
    """Whatever the preset says today; asked for, the check is made, and kept."""
    assert "latent_deviation" not in (old / "config.yaml").read_text()
    assert train_config({"preset": "sit-tiny-2"}).data.latent_deviation == "refuse"

    def kept() -> tuple[str, bool]:
        saved = RunFolder(old).read_config()
        return saved.config.data.latent_deviation, "data.latent_deviation" in saved.absent

    assert kept() == ("accept", True)
    assert main(the_same_command(old, "--steps=4")) == 0
    assert kept() == ("accept", True)
    assert main(the_same_command(old, "--steps=5", "--data.latent-deviation=refuse")) == 0
    assert kept() == ("refuse", False)


def test_what_this_code_does_not_know_is_refused_in_one_line(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = old / "config.yaml", old / "checkpoints" / "step-0000003" / "state.json"
    text, raw = config.read_text(), json.loads(state.read_text())

    def refused(says: str) -> None:
        with pytest.raises(UserError, match=says) as error:
            read_runs([old]) if config.read_text() != text else main(the_same_command(old))
        assert "\n" not in str(error.value)

    for version in (VERSION + 1, 0, -3):
        says = rf"version {version} is not for this code, which reads up to {VERSION}; use the code that saved"
        config.write_text(f"version: {version}\n{text}")
        refused(rf"config\.yaml: {says}")
        config.write_text(text)
        state.write_text(json.dumps({**raw, "config": {"version": version, **raw["config"]}}))
        refused(rf"checkpoint .*step-0000003: {says}")
    config.write_text(f"version: soon\n{text}")
    refused("version must be of type int, got 'soon'")
    config.write_text(text.replace("optim:\n", "optim:\n  momentum: 1000\n"))
    refused(
        r"config\.yaml: unknown setting optim\.momentum \(correct its name, or use the code that saved it, or newer"
    )
    config.write_text(text)
    state.write_text(json.dumps({**raw, "config": {**raw["config"], "optim.momentum": 1000}}))
    refused(r"checkpoint .*: unknown setting optim\.momentum")


def test_a_config_survives_a_round_trip_with_its_version(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    config = tiny("sit-tiny-2", "sit")
    path.write_text(to_yaml(config))
    assert path.read_text().startswith(f"version: {VERSION}\n")
    assert read_config(path) == saved.SavedConfig(config=config, absent=frozenset())
