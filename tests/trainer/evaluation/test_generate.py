"""Generated images are the same files however the work was split, stopped and gone on with."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.encoders.tiny import TINY_VAE
from storage.base.errors import UserError
from trainer.config.presets import preset
from trainer.config.tree import override
from trainer.evaluation.generate.generate import GenerateConfig, generate, labels_of
from trainer.evaluation.generate.image_files import image_path, is_whole, n_written, read_image
from trainer.loop.train import train
from trainer.run.folder import RunFolder

N, BATCH, STEPS = 22, 4, 16  # six blocks, of which the last is not all wanted


def settings(run: Path, where: Path, **changes: object) -> GenerateConfig:
    config = GenerateConfig(run=run, n=N, out=where, steps=STEPS, batch=BATCH, vae=str(TINY_VAE), device="cpu")
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


@pytest.fixture(scope="module")
def whole(micro_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All images, drawn in one go by one process."""
    out = tmp_path_factory.mktemp("generated") / "whole"
    folder, picture = generate(settings(micro_run, out))
    assert picture == out.with_name("whole.png")
    assert n_written(folder) == N
    return folder


def ranks(n: int, run: Path, out: Path) -> subprocess.Popen[bytes]:
    """The command on n ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    options = ["--n", N, "--out", out, "--steps", STEPS, "--batch", BATCH, "--vae", TINY_VAE, "--device", "cpu"]
    command = [*torchrun, "-m", "--", "trainer", "generate", str(run), *map(str, options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """torchrun and its ranks, which it starts in sessions of their own."""
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everyone:
        one.kill()
    process.communicate()


@pytest.mark.slow  # in default: what is there stays, and the same images beside fewer and more
def test_two_processes_killed_and_three_to_go_on_write_the_same_files(
    micro_run: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "split"
    two = ranks(2, micro_run, out)
    deadline_s = time.monotonic() + 200
    while not (out.exists() and n_written(out)):
        assert two.poll() is None, two.communicate()[0].decode()
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    kill_all(two)
    n_before = n_written(out)
    assert 0 < n_before < N
    shortened = sorted(out.glob("[0-9]*.png"))[0]  # as a power cut might leave it
    shortened.write_bytes(shortened.read_bytes()[:-5])
    (out / ".000021.png.generate.0a0a.partial").write_bytes(b"half")
    kept = {path: path.stat().st_mtime_ns for path in out.glob("[0-9]*.png") if path != shortened}
    three = ranks(3, micro_run, out)
    printed = three.communicate(timeout=250)[0].decode()
    assert three.returncode == 0, printed
    assert contents(out) == contents(whole)
    assert out.with_name("split.png").read_bytes() == whole.with_name("whole.png").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "an image that was there was drawn again"


def test_fewer_images_are_the_first_ones_and_more_add_to_them(micro_run: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "some"
    generate(settings(micro_run, out, n=6))
    assert n_written(out) == 6
    generate(settings(micro_run, out, n=9))
    for i in range(9):
        assert image_path(out, i).read_bytes() == image_path(whole, i).read_bytes()


def test_adm_layout(micro_run: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    *_, packed = generate(settings(micro_run, out, n=6, format="npz"))
    first = packed.read_bytes()
    with np.load(packed, allow_pickle=False) as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.dtype == np.uint8
    assert images.shape == (6, 128, 128, 3)
    np.testing.assert_array_equal(images, np.stack([read_image(image_path(whole, i)) for i in range(6)]))
    np.testing.assert_array_equal(labels, np.arange(6) % 5)
    generate(settings(micro_run, out, n=6, format="npz"))
    assert packed.read_bytes() == first


def test_guidance_away_from_the_model_itself_is_none(micro_run: Path, tmp_path: Path) -> None:
    """The conditional output of both is the same, and so are the images; the null label is never asked."""
    unguided, _ = generate(settings(micro_run, tmp_path / "unguided", n=4, guidance=1.0))
    guided, _ = generate(settings(micro_run, tmp_path / "guided", n=4, guidance=3.0, weaker=micro_run))
    assert json.loads((guided / "settings.json").read_text())["weaker_sha256"]
    for i in range(4):
        assert (read_image(image_path(guided, i)) == read_image(image_path(unguided, i))).all()
    with pytest.raises(UserError, match=r"holds images of other settings \(.*weaker_sha256: were .*, are None\)"):
        generate(settings(micro_run, tmp_path / "guided", n=4, guidance=3.0))
    with pytest.raises(UserError, match=r"--weaker .* has nothing to guide with --guidance 1; give a scale above 1"):
        generate(settings(micro_run, tmp_path / "x", guidance=1.0, weaker=micro_run))


def test_a_weaker_model_of_another_path_is_refused(micro_run: Path, tmp_path: Path) -> None:
    """Its velocities are those of other noisy latents."""
    config = RunFolder(micro_run).read_config().config
    train(override(config, {"run": tmp_path / "cosine", "steps": 1, "loss.path": "cosine"}))
    with pytest.raises(UserError, match=r"--weaker \S+ has a path cosine, \S+ has linear; name a run like it"):
        generate(settings(micro_run, tmp_path / "x", guidance=2.0, weaker=tmp_path / "cosine"))


def test_labels() -> None:
    images = torch.arange(10_000)
    balanced = labels_of(images, 10, "balanced", 0)
    assert (balanced.bincount() == 1000).all()
    uniform = labels_of(images, 10, "uniform", 0)
    counts = uniform.bincount(minlength=10).double()
    assert len(counts) == 10
    # χ² with 9 degrees of freedom is above 27.9 once in a thousand; the draws are fixed, so this passes or never does.
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9
    assert (counts != 1000).any()
    assert torch.equal(uniform[5000:], labels_of(images[5000:], 10, "uniform", 0))
    assert not torch.equal(uniform, labels_of(images, 10, "uniform", 1))


def test_labels_are_the_preset_s_unless_named(micro_run: Path, tmp_path: Path) -> None:
    assert {preset(name).sample.labels for name in ("sit-xl-2", "dit-b-4", "sit-l-2-reg", "lightningdit-b-1")} == {
        "random"
    }
    drawn = []
    for labels in (None, "balanced", "random"):
        folder, _ = generate(settings(micro_run, tmp_path / str(labels), n=6, labels=labels))
        drawn.append([int(line) for line in (folder / "labels.txt").read_text().split()])
    assert drawn[0] == drawn[1] == [0, 1, 2, 3, 4, 0]
    assert drawn[2] == labels_of(torch.arange(6), 5, "random", 0).tolist()


def test_images_that_are_older_than_a_setting_are_added_to(micro_run: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "older"
    generate(settings(micro_run, out, n=3))
    saved = json.loads((out / "settings.json").read_text())
    younger = [name for name in saved if name in ("sample.shift", "sample.guidance_class")]
    assert len(younger) == 2
    (out / "settings.json").write_text(json.dumps({n: v for n, v in saved.items() if n not in younger}))
    generate(settings(micro_run, out, n=5))
    assert n_written(out) == 5
    assert json.loads((out / "settings.json").read_text()) == saved


def test_seeds_and_checkpoints_give_other_images(micro_run: Path, whole: Path, tmp_path: Path) -> None:
    for name, changes in {"seed": {"seed": 1}, "step": {"checkpoint": "1"}}.items():
        generate(settings(micro_run, tmp_path / name, n=1, **changes))
        assert image_path(tmp_path / name, 0).read_bytes() != image_path(whole, 0).read_bytes()


def test_a_file_that_stops_short_is_not_whole(whole: Path, tmp_path: Path) -> None:
    data = image_path(whole, 0).read_bytes()
    for name, part in {"whole": data, "short": data[:-1], "empty": b""}.items():
        (tmp_path / name).write_bytes(part)
        assert is_whole(tmp_path / name) == (name == "whole")
    assert not is_whole(tmp_path / "absent")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "other settings (seed: were 0, are 1)"),
        ({"guidance": 1.0}, "sample.guidance: were 2.5, are 1.0"),
        ({"checkpoint": "7"}, "no checkpoint of step '7'"),
        ({"checkpoint": "all"}, "images are of one"),
        ({"sampler": "ddpm"}, "cannot draw from --model.kind sit"),
        ({"n": 0}, "--n must be at least 1"),
        ({"vae": "", "out": None}, "pass --vae"),
        ({"vae": "/nowhere", "out": None, "n": 1}, "cannot be loaded"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    micro_run: Path, whole: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        generate(settings(micro_run, whole, **changes))
    assert message in str(caught.value)


def test_a_model_that_diverged_is_told_and_not_drawn(micro_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    file = run / "checkpoints" / "step-0000003" / "ema.safetensors"
    weights = load_file(file)
    save_file(weights | {"final_layer.linear.bias": weights["final_layer.linear.bias"] * torch.nan}, file)
    with pytest.raises(UserError, match=r"gives NaN or infinity for images 0 to 3; .*earlier --checkpoint"):
        generate(settings(run, tmp_path / "out", n=2))
    assert n_written(tmp_path / "out") == 0


def test_a_vae_that_is_not_there_may_be_mended_in_the_same_folder(micro_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        generate(settings(micro_run, tmp_path / "out", n=1, vae=str(tmp_path)))
    folder, _ = generate(settings(micro_run, tmp_path / "out", n=1))
    assert n_written(folder) == 1
    with pytest.raises(UserError, match="decoder: were"):
        generate(settings(micro_run, tmp_path / "out", n=1, vae=str(tmp_path)))


def test_a_folder_of_something_else_is_left_alone(micro_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="not of this command"):
        generate(settings(micro_run, tmp_path))
    with pytest.raises(UserError, match="is not a run"):
        generate(settings(tmp_path, tmp_path / "out"))


def test_decoding_and_packing_are_shown(
    micro_run: Path, tmp_path: Path, behind_bars: list[str], waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.evaluation.generate.decode.DECODE_BATCH", 2)
    generate(settings(micro_run, tmp_path / "out", n=5, steps=1, batch=4, format="npz"))
    decoding = [text for text in behind_bars if text.startswith("decoding")]
    assert decoding == [f"decoding, {n} of 4 images of this batch" for n in (0, 2)] * 2
    assert behind_bars[-1] == "pack out.npz: 5/5"
    assert [text.partition(",")[0] for text in waits] == [
        "opening the run",
        "looking which images are there",
        "loading the model and its decoder",
    ]
