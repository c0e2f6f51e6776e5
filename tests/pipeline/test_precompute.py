"""Stage one as a user runs it: real Ray, real encoders, real JPEG files, real processes killed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.__main__ import PROG, main
from pipeline.encoders.tiny import TINY_VAE
from pipeline.failures import FAILURES_FILE
from storage import open_store
from tests.commands import run_here
from tests.pipeline.hub import empty_cache
from tests.storage.test_store import array_files

N_CLASSES, N_PER_CLASS, N_UNITS = 4, 20, 10
OPTIONS = "--latents tiny-vae --features tiny-vit --resolution 128 --shard-rows 8".split()


def write_tree(root: Path) -> None:
    """An ImageFolder tree of JPEG files of varied sizes and modes, with one broken file in it."""
    rng = np.random.default_rng(0)
    for label in range(N_CLASSES):
        folder = root / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(N_PER_CLASS):
            size = tuple(int(n) for n in rng.integers(40, 420, 2))
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
                size, Image.Resampling.BICUBIC
            )
            mode = ("RGB", "L", "CMYK")[number % 3]
            buffer = io.BytesIO()
            coarse.convert(mode).save(buffer, "JPEG", quality=90)
            (folder / f"{number:04d}.JPEG").write_bytes(buffer.getvalue())
    (root / "n00000001" / "0007.JPEG").write_bytes(b"\xff\xd8\xff\xe0 this is no picture")
    (root / "n00000002" / "notes.txt").write_text("left out, and said so")


def command(data: Path, store: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "precompute", "--data", str(data), "--store", str(store), *OPTIONS, *more]


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **environment}, timeout=240)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_tree(root)
    return root


@pytest.fixture(scope="module")
def whole(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an uninterrupted run."""
    store = tmp_path_factory.mktemp("whole") / "store"
    done = run(command(tree, store))
    assert done.returncode == 0, done.stderr
    assert "1 files hold no image of this kind, such as n00000002/notes.txt" in done.stdout
    assert ", 1 failed (in " in done.stdout
    return store


def test_the_store_holds_every_image_and_names_the_broken_one(whole: Path, tree: Path) -> None:
    store = open_store(whole)
    assert store.n_rows == N_CLASSES * N_PER_CLASS
    assert store.index.keys == sorted(str(path.relative_to(tree)) for path in tree.glob("*/*.JPEG"))
    assert store.index.class_names == [f"n{label:08d}" for label in range(N_CLASSES)]
    for path in ("latents/tiny-vae", "features/tiny-vit"):
        group = store.group(path)
        assert [(f.key, f.row) for f in group.failures] == [("n00000001/0007.JPEG", 27)]
        assert group.failures[0].reason == "OSError: Truncated File Read"
    moments = store.group("latents/tiny-vae")["moments"]
    rows = [row for row in range(store.n_rows) if row != 27]
    out = np.empty((len(rows), *moments.row_shape), moments.dtype)
    moments.read_into(rows, 0, out)
    assert np.isfinite(out).all()
    assert (out[:, 4:] > 0).all()  # standard deviations
    assert len({image.tobytes() for image in out}) == len(rows)


def test_stored_rows_equal_the_encoders_on_the_same_pixels(whole: Path, tree: Path) -> None:
    import torch

    from pipeline.encoders import registry
    from pipeline.transforms import center_crop, decode_rgb

    store = open_store(whole)
    rows = [0, 1, 2, 50, 79]
    images = np.stack([center_crop(decode_rgb((tree / store.index.keys[row]).read_bytes()), 128) for row in rows])
    for path, spec in (
        ("latents/tiny-vae", registry.resolve_latents("tiny-vae")),
        ("features/tiny-vit", registry.resolve_features("tiny-vit")),
    ):
        group = store.group(path)
        encoder = registry.load(spec, resolution=128, device=torch.device("cpu"))
        direct = registry.encode_images(encoder, images)
        for name, expected in direct.items():
            out = np.empty(expected.shape, expected.dtype)
            group[name].read_into(rows, 0, out)
            np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), atol=4e-3, rtol=4e-3)


def test_a_second_run_reuses_everything_without_starting_ray(
    whole: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = array_files(whole)
    (whole / FAILURES_FILE).unlink()  # as a driver that was killed behind its last unit leaves it
    monkeypatch.setattr("pipeline.precompute.prepare_ray", None)  # comes before Ray
    status, out, err = run_here(main, PROG, command(tree, whole)[3:], capsys)
    assert status == 0, err
    assert out.count("reused, every unit is there") == 2
    assert ", 0 encoded now" in out
    assert array_files(whole) == before
    assert pq.read_table(whole / FAILURES_FILE)["key"].to_pylist() == ["n00000001/0007.JPEG"]


@pytest.mark.slow  # in default: the same without Ray, in test_quantise.py and trainer/test_codes.py
def test_rotated_codes_through_the_whole_of_both_stages(tmp_path: Path) -> None:
    """The built-in photographs, both views: written, verified, shown, trained from, stopped and trained on."""
    from pipeline.sources.photos import write_photos

    write_photos(tmp_path / "photos", n_per_class=2)
    store = tmp_path / "store"
    done = run(command(tmp_path / "photos", store, "--features-dtype", "rotated2", "--flip", "--shard-rows", "16"))
    assert done.returncode == 0, done.stderr
    assert "patches 64×32 uint8, scale 64×2 float16" in done.stdout
    storage = [sys.executable, "-m", "storage"]
    for arguments, words in (
        (["verify", str(store), "--deep"], ""),
        (["ls", str(store)], "rotated2"),
        (["info", str(store)], "rotated2: "),
        (["info", str(store), "--json"], '"bits": 2'),
        (["diff", str(store), str(store)], ""),
        (["export", str(store), "--to", "npy", "--out", str(tmp_path / "out"), "--decode"], "features/tiny-vit"),
    ):
        asked = run([*storage, *arguments])
        assert (asked.returncode, words in asked.stdout) == (0, True), (asked.stdout, asked.stderr)
    again = run(command(tmp_path / "photos", store, "--features-dtype", "rotated4", "--flip", "--shard-rows", "16"))
    assert again.returncode != 0
    assert "codec.bits: found 2, asked for 4" in again.stderr
    train = [
        *(sys.executable, "-m", "trainer", "train", "--preset", "sit-tiny-2", "--store", str(store)),
        *("--run", str(tmp_path / "run"), "--device", "cpu", "--batch", "8"),
    ]
    for steps in ("2", "4"):
        trained = run([*train, "--steps", steps])
        assert trained.returncode == 0, trained.stderr


@pytest.mark.slow  # in default: kills of the driver and its parts, in test_job.py
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_and_run_again_redoes_only_what_is_missing(
    whole: Path, tree: Path, tmp_path: Path, how: signal.Signals
) -> None:
    store = tmp_path / "store"
    child = subprocess.Popen(command(tree, store), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    receipts = store / "receipts/features/tiny-vit"
    deadline_s = time.monotonic() + 120
    while not list(receipts.glob("0*.json")):
        assert child.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    child.send_signal(how)
    _, stderr = child.communicate(timeout=60)
    if how != signal.SIGKILL:
        assert child.returncode == 130, stderr
        assert "Traceback" not in stderr
        assert stderr.splitlines()[-1] == (
            "python -m pipeline precompute: interrupted; what was finished is kept, the same command goes on from there"
        )
    done_before = {path.name: path.stat().st_mtime_ns for path in receipts.glob("0*.json")}
    assert 0 < len(done_before) < N_UNITS
    again = run(command(tree, store, "--json"))
    assert again.returncode == 0, again.stderr
    for name, written_ns in done_before.items():
        assert (receipts / name).stat().st_mtime_ns == written_ns
    assert json.loads(again.stdout[again.stdout.index("{") : again.stdout.rindex("}") + 1])["units_encoded"] < N_UNITS
    assert array_files(store) == array_files(whole)
    assert not [path for path in store.rglob("*") if path.name.startswith(".")]


MISTAKES = [
    (["--data", "/nowhere/at/all"], "does not exist"),
    (["--data", "EMPTY"], "holds nothing, expected one of these: image-folder"),
    (["--resolution", "256", "--features", "none", "--store", "WHOLE"], "resolution: found 128, asked for 256"),
    (["--features", "none", "--store", "WHOLE", "--shard-rows", "4"], "shard_rows: found 8, asked for 4"),
    (["--latents", "OTHER", "--features", "none", "--store", "WHOLE"], "weights_sha256: found"),
    (["--features", "clip-huge"], "unknown vision encoder 'clip-huge'; there are dinov2-vits14"),
    (["--latents", "no-such-vae"], "unknown VAE 'no-such-vae'"),
    (["--features", "dinov2-vits14", "--features-weights", "/nowhere.pth"], "weight file /nowhere.pth"),
    (["--resolution", "100"], "--resolution must be a multiple of 8"),
    (["--batch", "0"], "--batch must be at least 1"),
    (["--speed", "3"], "unknown option --speed"),
    (["--ray-address", "127.0.0.1:1"], "nothing answers at RAY_ADDRESS 127.0.0.1:1"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_line_and_status_2(
    tree: Path, whole: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    other = tmp_path / "tiny-vae"  # the built-in VAE with one byte of its weights changed
    shutil.copytree(TINY_VAE, other)
    raw = bytearray((other / "diffusion_pytorch_model.safetensors").read_bytes())
    raw[-1] ^= 1
    (other / "diffusion_pytorch_model.safetensors").write_bytes(raw)
    places = {"EMPTY": str(tmp_path / "empty"), "WHOLE": str(whole), "OTHER": str(other)}
    line = command(tree, tmp_path / "store", *(places.get(a, a) for a in arguments))
    status, _, stderr = run_here(main, PROG, line[3:], capsys)
    assert status == 2
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1, stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "dinov2-vitb14"], "weights of dinov2-vitb14 are neither in the Hugging Face cache"),
        (["--latents", "sd-vae-ft-mse"], "weights of VAE stabilityai/sd-vae-ft-mse"),
    ],
)
def test_missing_weights_say_what_to_fetch_and_where_to_put_it(
    tree: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty_cache(tmp_path / "hub", monkeypatch)
    status, out, err = run_here(main, PROG, command(tree, tmp_path / "store", *arguments)[3:], capsys)
    assert status == 2, err + out
    assert message in err
    assert "hf download" in err
    assert len(err.strip().splitlines()) == 1, err
