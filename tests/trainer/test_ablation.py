"""Ablation files: what they say, what is refused before anything runs, and the runs they make."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.encoders.registry import describe, resolve_features
from pipeline.sources.glyphs import RESOLUTION
from storage.base.errors import UserError
from trainer.config.command_line import add_train_options, train_config
from trainer.config.saved import to_yaml
from trainer.config.tree import override
from trainer.run.checkpoint import latest_checkpoint, read_state
from trainer.run.folder import RunFolder
from trainer.study.file import AblateConfig, read_ablation
from trainer.study.runs import ablate as go_on
from trainer.study.runs import precompute_command, train_command

BASE = """
preset: sit-tiny-2
set:
  batch: 8
  device: cpu
  model: {depth: 3, width: 32, heads: 2, projector-width: 32}
  log: {every: 5, tensorboard: false}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def runs_of(folder: Path, text: str) -> dict[str, dict[str, object]]:
    ablation = read_ablation(write(folder, text), "/stores/a", folder / "runs")
    return {run.name: {"weight": run.config.loss.projection_weight, "seed": run.config.seed} for run in ablation.runs}


def test_every_combination_is_a_run(tmp_path: Path) -> None:
    text = BASE + "axes: {data.features: [a, b], loss.projection-weight: [0.25, 0.5]}\nseeds: [0, 7]"
    found = runs_of(tmp_path, text)
    assert len(found) == 8
    assert found["features-a_projection-weight-0.25_seed-7"] == {"weight": (0.25,), "seed": 7}


def test_a_run_without_alignment_is_there_once(tmp_path: Path) -> None:
    text = BASE + "axes: {data.features: [a, b], model.align_block: [1, 2], loss.projection_weight: [0, 0.5]}"
    assert list(runs_of(tmp_path, text)) == [
        "projection-weight-0_seed-0",
        "features-a_align-block-1_projection-weight-0.5_seed-0",
        "features-a_align-block-2_projection-weight-0.5_seed-0",
        "features-b_align-block-1_projection-weight-0.5_seed-0",
        "features-b_align-block-2_projection-weight-0.5_seed-0",
    ]


def test_a_class_token_that_is_not_aligned_is_varied(tmp_path: Path) -> None:
    """RiT's, of features as latents."""
    text = "preset: rit-xl-1\naxes: {loss.class_weight: [0.1, 0.2], model.align_block: [1, 2]}"
    runs = read_ablation(write(tmp_path, text), "/stores/a", tmp_path / "runs").runs
    assert [run.name for run in runs] == ["class-weight-0.1_seed-0", "class-weight-0.2_seed-0"]
    assert [run.config.loss.class_weight for run in runs] == [0.1, 0.2]


@pytest.mark.parametrize("latents", ["features/a", "features/a/"])
def test_a_run_that_chose_its_own_shift_is_the_same_run(tmp_path: Path, latents: str) -> None:
    """Presets of features as latents leave it to the run, which saves what it came to; so is a name with a slash."""
    text = f"preset: rit-xl-1\nset: {{data.latents: {latents}}}\naxes: {{loss.class_weight: [0.1]}}"
    (run,) = read_ablation(write(tmp_path, text), "/stores/a", tmp_path / "runs").runs
    run.config.run.mkdir(parents=True)
    chosen = override(run.config, {"data.latents": "features/a", "loss.time_shift": 4.9, "sample.shift": 4.9})
    RunFolder(run.config.run).config.write_text(to_yaml(chosen))
    (again,) = read_ablation(tmp_path / "study.yaml", "/stores/a", tmp_path / "runs").runs
    assert again.name == run.name
    other = text + "\nseeds: [0]\n" if latents.endswith("a") else text
    shifted = other.replace("set: {", "set: {loss.time-shift: 2.0, ")
    with pytest.raises(UserError, match=r"loss.time_shift: was 4.9, is 2.0"):
        read_ablation(write(tmp_path, shifted), "/stores/a", tmp_path / "runs")


def test_variants_are_named_and_set(tmp_path: Path) -> None:
    text = "preset: sit-tiny-2\nvariants: {plain: {}, other: {loss.alignment: irepa, optim.lr: 0.1}}\nseeds: [0, 1]"
    runs = read_ablation(write(tmp_path, text), "/s", tmp_path).runs
    assert [run.name for run in runs] == ["plain_seed-0", "plain_seed-1", "other_seed-0", "other_seed-1"]
    assert [run.config.optim.lr for run in runs] == [2e-3, 2e-3, 0.1, 0.1]
    assert runs[2].config.targets[0].alignment.startswith("irepa:")
    with_axis = read_ablation(write(tmp_path, f"{text}\naxes: {{batch: [8, 16]}}"), "/s", tmp_path).runs
    assert [run.name for run in with_axis][:3] == [
        "plain_batch-8_seed-0",
        "plain_batch-8_seed-1",
        "plain_batch-16_seed-0",
    ]


def test_the_methods_of_the_repository_s_own_file(tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "ablations/methods.yaml"
    runs = {run.name.partition("_")[0]: run.config for run in read_ablation(file, "/s", tmp_path).runs}
    assert list(runs) == ["vanilla", "repa", "repa-stopped", "irepa", "reg"]
    assert not runs["vanilla"].aligns
    assert runs["vanilla"].data.features == ()
    assert runs["reg"].model.class_token
    assert not runs["repa-stopped"].aligns_at(100)


@pytest.mark.parametrize("name", ["demo.yaml", "methods.yaml"])
def test_the_repository_s_own_files_fit_the_demo_s_store(name: str, tmp_path: Path) -> None:
    """Which they say they run on: every features group is the demo's, or its encoder makes it at that resolution."""
    ablation = read_ablation(Path(__file__).parents[2] / "ablations" / name, "/s", tmp_path)
    assert ablation.features
    for features in filter(None, ablation.features):
        spec = resolve_features(ablation.encoders.get(features, features))
        assert spec.store_name == features
        describe(spec, resolution=RESOLUTION)


def test_sizes_and_several_targets(tmp_path: Path) -> None:
    text = "axes: {preset: [sit-s-2, sit-b-2], data.features: [[a, b], a]}\nset: {model.align-block: [3, 4]}"
    ablation = read_ablation(write(tmp_path, text.replace("a, b], a", "a, b], [b, a]")), "/s", tmp_path)
    widths = [run.config.model.width for run in ablation.runs]
    assert widths == [384, 384, 768, 768]
    assert ablation.runs[0].name == "preset-sit-s-2_features-a+b_seed-0"
    assert [target.features for target in ablation.runs[0].config.targets] == ["a", "b"]
    assert ablation.features == ["a", "b"]


def test_command_lines_say_the_same_as_the_configurations(tmp_path: Path) -> None:
    text = BASE + "axes: {loss.projection_weight: [0.25], data.features: [[a, b]]}\nseeds: [3]"
    (run,) = read_ablation(write(tmp_path, text), "/stores/a", tmp_path / "runs").runs
    command = train_command(run, gpus=1)
    assert command[1:4] == ["-m", "trainer", "train"]
    from storage.base.console import Parser

    parser = Parser()
    add_train_options(parser)
    values = vars(parser.parse_args(command[4:]))
    assert train_config(values) == run.config
    assert "--nproc-per-node" in train_command(run, gpus=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axes: {loss.projection_wait: [1]}", "no setting loss.projection_wait to vary"),
        ("variants: {a: 3}", "variants: a must be a mapping of settings"),
        ("variants: {a: {lr: 3}}", "there is no setting lr"),
        ("axes: {loss.projection_wait: [1]}", "did you mean loss.projection_weight"),
        ("axes: {loss.projection_weight: [heavy]}", "must be a number of type float, got 'heavy'"),
        ("axes: {loss.projection_weight: []}", "must be a list of values"),
        ("axes: {loss.projection_weight: 0.5}", "must be a list of values, got 0.5"),
        ("axes: {loss.projection_weight: [0.5, 0.5]}", "names 0.5 twice"),
        (
            "axes: {model.align_block: [2, 40]}",
            "run align-block-40_seed-0: --model.align-block must be a block, 1 to 28",
        ),
        ("axes: {preset: [sit-xxl-2]}", "unknown preset 'sit-xxl-2'"),
        ("axes: {seed: [1]}", "seed is not set here: write seeds: [0, 1]"),
        ("set: {store: /a}", "store is not set here: pass --store"),
        ("axis: {seed: [1]}", "unknown entry axis; did you mean axes"),
        ("axes: [a]", "axes must be a mapping"),
        (
            f"axes: {{batch: {list(range(1, 101))}}}\nseeds: {list(range(101))}",
            "make 10,100 runs, more than 10,000",
        ),
        (
            "a: &a [1, 1]\nb: &b [*a, *a]\n"
            + "\n".join(
                f"c{i}: &c{i} [*{'b' if i == 0 else f'c{i - 1}'}, *{'b' if i == 0 else f'c{i - 1}'}]" for i in range(40)
            ),
            "spells more than 100,000 values",
        ),
        ("seeds: 3", "seeds must be a list"),
        ("gpus: none", "gpus must be a number"),
        ("axes: {data.features: ['a:b', 'a-b']}", "two runs would be named features-a-b_seed-0"),
        ("- a", "must be a mapping with axes"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_does_not_exist_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_ablation(write(tmp_path, text), "/stores/a", tmp_path / "runs")
    assert message in str(caught.value)
    assert str(tmp_path / "study.yaml") in str(caught.value)


def test_features_that_are_lacking_are_asked_of_the_pipeline(shared_tiny_store: Path, tmp_path: Path) -> None:
    from storage import open_store

    text = BASE + "axes: {data.features: [tiny-vit, tiny-vit-layer2]}\nencoders: {tiny-vit-layer2: 'tiny-vit:layer=2'}"
    text += "\nprecompute: {batch: 4}"
    ablation = read_ablation(write(tmp_path, text), str(shared_tiny_store), tmp_path)
    store = open_store(shared_tiny_store)
    with pytest.raises(UserError, match="does not say what it was made of"):
        precompute_command(store, ablation, ["tiny-vit-layer2"], "")
    store.attributes["source"] = {"path": "/photos", "kind": "image-folder"}
    command = precompute_command(store, ablation, ["tiny-vit-layer2"], "")
    assert {"--data=/photos", "--source=image-folder", "--latents=none"} <= set(command)
    assert {"--features=tiny-vit:layer=2", "--batch=4", "--resolution=128", "--shard-rows=16"} <= set(command)


def test_a_run_that_is_stopped_from_outside_is_not_complete(
    shared_tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told to stop, training saves and ends with status 0, which says nothing of the steps it has left."""
    monkeypatch.setattr("trainer.study.runs._attend", lambda *args, **kwargs: 0)
    file = write(tmp_path, BASE + "axes: {loss.projection_weight: [0.5]}")
    assert go_on(AblateConfig(file=file, store=str(shared_tiny_store), out=tmp_path / "runs", ray_address="")) == 1
    said = capsys.readouterr()
    assert "0 of 1 runs are complete" in said.out
    assert "failed: projection-weight-0.5_seed-0, see" in said.err


def ablate(file: Path, store: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer", "ablate", str(file), "--store", str(store), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_done(run: Path) -> int:
    checkpoint = latest_checkpoint(run)
    return read_state(checkpoint).step if checkpoint else 0


@pytest.mark.slow  # in default: a run stopped from outside is not complete
@pytest.mark.parametrize("weights", ["0.5", pytest.param("0.5, 0", marks=pytest.mark.slow)])
def test_an_ablation_is_stopped_and_gone_on_with(
    shared_tiny_store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], weights: str
) -> None:
    text = BASE.replace("batch: 8", "batch: 8\n  steps: 30") + f"axes: {{loss.projection_weight: [{weights}]}}"
    file, out = write(tmp_path, text), tmp_path / "runs"
    names = [f"projection-weight-{weight}_seed-0" for weight in weights.split(", ")]
    first = out / names[0]
    stopped = ablate(file, shared_tiny_store, out)
    deadline_s = time.monotonic() + 120
    while not (first / "metrics.jsonl").exists() or not (first / "metrics.jsonl").stat().st_size:
        assert stopped.poll() is None, stopped.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=120)
    assert stopped.returncode == 130
    assert "interrupted" in said.splitlines()[-1]
    assert 0 < steps_done(first) < 30
    assert [path.name for path in out.iterdir()] == names[:1], "the next is not begun"
    assert go_on(AblateConfig(file=file, store=str(shared_tiny_store), out=out, ray_address="")) == 0
    assert f"{len(names)} of {len(names)} runs are complete in {out}" in capfd.readouterr().out
    assert [steps_done(out / name) for name in names] == [30] * len(names)
    assert "features: tiny-vit\n" in (first / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"was made otherwise \(batch: was 8, is 16\)"):
        read_ablation(write(tmp_path, text.replace("batch: 8", "batch: 16")), str(shared_tiny_store), out)
