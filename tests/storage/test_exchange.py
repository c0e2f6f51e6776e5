"""Exports hold every row in order, and imports make stores that read, verify and train."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from storage import open_store
from storage.__main__ import PROG, main
from storage.base.console import EXIT_USAGE
from storage.base.errors import UserError
from storage.base.files import walk_files
from storage.codecs import CODECS
from storage.codecs.int8 import INT8
from storage.codecs.int8 import numbers as decode
from storage.diff import diff_stores
from storage.exchange import from_repa_npy
from storage.exchange.incoming import ImportOptions
from storage.verify import verify
from tests.commands import run_here
from tests.slow import slow_but
from tests.stores import FEATURES, LATENTS, make_store
from trainer.__main__ import main as train_main

FAILED = [4, 30]
KEPT = [row for row in range(40) if row not in FAILED]
Data = dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Data]:
    root = tmp_path_factory.mktemp("export") / "store"
    return root, make_store(root, n_views=2, failed_rows=FAILED, codec=INT8)


def columns(data: Data) -> dict[str, np.ndarray]:
    return {f"{path}/{name}": values[KEPT] for path, arrays in data.items() for name, values in arrays.items()}


def read_hdf5(out: Path) -> dict[str, np.ndarray]:
    with h5py.File(out) as file:
        names = [f"{path}/{name}" for path in (LATENTS, FEATURES) for name in file[path]]
        return {name: file[name][:] for name in names} | {"label": file["label"][:], "row": file["row"][:]}


def read_npy(out: Path) -> dict[str, np.ndarray]:
    found = {path.stem.replace(".", "/"): np.load(path) for path in out.glob("*.npy")}
    return found | {"label": pq.read_table(out / "index.parquet")["label"].to_numpy()}


def read_parquet(out: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(out)
    found = {name: table[name].to_numpy() for name in ("row", "label")}
    for field in table.schema:
        if "/" in field.name:
            about = {key.decode(): value.decode() for key, value in field.metadata.items()}
            cells = [np.frombuffer(cell.as_py(), about["dtype"]) for cell in table[field.name]]
            found[field.name] = np.stack(cells).reshape(len(cells), *json.loads(about["shape"]))
    return found


def read_webdataset(out: Path) -> dict[str, np.ndarray]:
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                samples.setdefault(key, {})[extension] = file.read()
    found: dict[str, list[np.ndarray]] = {}
    for key, parts in samples.items():
        found.setdefault("row", []).append(np.array(int(key)))
        found.setdefault("label", []).append(np.array(int(parts["cls"])))
        for extension, raw in parts.items():
            if extension.endswith(".npy"):
                name = extension.removesuffix(".npy").replace(".", "/")
                found.setdefault(name, []).append(np.load(io.BytesIO(raw)))
    return {name: np.stack(values) for name, values in found.items()}


READERS = {"hdf5": read_hdf5, "npy": read_npy, "parquet": read_parquet, "webdataset": read_webdataset}


@pytest.mark.parametrize("to", READERS)
def test_an_export_holds_every_row_bit_for_bit(
    made: tuple[Path, Data], to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, data = made
    out = tmp_path / "out"
    assert main(["export", str(root), "--to", to, "--out", str(out)]) == 0
    assert "left out, since their samples failed: rows 4, 30" in capsys.readouterr().out
    found = READERS[to](out)
    for name, written in columns(data).items():
        np.testing.assert_array_equal(found.pop(name), written)
    assert found.pop("row").tolist() == KEPT
    assert found.pop("label").tolist() == [row % 5 for row in KEPT]
    assert not found
    with pytest.raises(UserError, match="exists; name another --out"):
        main(["export", str(root), "--to", to, "--out", str(out)])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_decoded_features_and_a_part_of_the_rows(made: tuple[Path, Data], tmp_path: Path) -> None:
    root, data = made
    out = tmp_path / "out"
    argv = ["export", str(root), "--to", "npy", "--out", str(out), "--decode", "--rows", "2:8", "--groups", FEATURES]
    assert main(argv) == 0
    found = read_npy(out)
    numbers = decode(data[FEATURES]["patches"], data[FEATURES]["scale"], INT8, dtype=np.float16)
    np.testing.assert_array_equal(found[f"{FEATURES}/patches"], numbers[[2, 3, 5, 6, 7]])
    assert f"{FEATURES}/scale" not in found
    with pytest.raises(UserError, match="'4:5' holds no sample"):
        main(["export", str(root), "--to", "hdf5", "--out", str(tmp_path / "o2"), "--rows", "4:5"])
    for rows in ("8:2", "0:41", "x:y", "3"):
        with pytest.raises(UserError, match=r"--rows is A:B"):
            main(["export", str(root), "--to", "npy", "--out", str(tmp_path / "o2"), "--rows", rows])


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    shard = tmp_path / "s" / LATENTS / "moments/c/1/0/0/0/0"
    raw = bytearray(shard.read_bytes())
    raw[9] ^= 1
    shard.write_bytes(raw)
    for to in READERS:
        with pytest.raises(UserError, match="row 16, view 0: wrong checksum"):
            main(["export", str(tmp_path / "s"), "--to", to, "--out", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    "to", slow_but(["npy", "parquet", "webdataset"], ["npy"])
)  # HDF5's library crashes after the line was said
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(
    made: tuple[Path, Data], to: str, tmp_path: Path
) -> None:
    def allow_little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [sys.executable, "-m", "storage", "export", str(made[0]), "--to", to, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=allow_little)
    assert done.returncode == EXIT_USAGE
    assert done.stderr.strip().splitlines()[-1].endswith("out: File too large; free space or name another --out")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_mds_is_read_back_by_its_own_library(made: tuple[Path, Data], tmp_path: Path) -> None:
    python = Path(".venv-bench/bin/python")
    if not python.exists():
        pytest.skip("there is no .venv-bench with mosaicml-streaming; `make bench-env` makes it")
    root, data = made
    out = tmp_path / "out"
    subprocess.run([python, "-m", "storage", "export", str(root), "--to", "mds", "--out", str(out)], check=True)
    code = (
        "import sys, numpy as np; from streaming import StreamingDataset\n"
        "d = StreamingDataset(local=sys.argv[1], shuffle=False, batch_size=1)\n"
        "np.savez(sys.argv[2], **{k: np.stack([np.asarray(d[i][k]) for i in range(len(d))]) for k in d[0]})\n"
    )
    subprocess.run([python, "-c", code, str(out), str(tmp_path / "found.npz")], check=True)
    found = np.load(tmp_path / "found.npz")
    assert found["row"].tolist() == KEPT
    for name, written in columns(data).items():
        np.testing.assert_array_equal(found[name.replace("/", ".")], written)


def test_mds_without_its_library_says_where_it_lives(made: tuple[Path, Data], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make bench-env"):
        main(["export", str(made[0]), "--to", "mds", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_hdf5_there_and_back(tmp_path: Path) -> None:
    data = make_store(tmp_path / "s", n_views=2, codec=INT8)
    main(["export", str(tmp_path / "s"), "--to", "hdf5", "--out", str(tmp_path / "x.h5")])
    argv = ["import", str(tmp_path / "x.h5"), "--from", "hdf5", "--store", str(tmp_path / "t"), "--name", "x",
            "--shard-rows", "7"]  # fmt: skip
    assert main(argv) == 0
    assert list(verify(tmp_path / "t", deep=True, n_workers=1)) == []
    for path, arrays in data.items():
        group = open_store(tmp_path / "t").group(path)
        for name, written in arrays.items():
            out = np.empty((40, *written.shape[2:]), written.dtype)
            for view in range(2):
                group[name].read_into(np.arange(40), view, out)
                np.testing.assert_array_equal(out, written[:, view])
    lines = list(diff_stores(open_store(tmp_path / "s"), open_store(tmp_path / "t")))  # shard sizes do not matter
    # The identities of this test's stores lack what the pipeline's have and every import adds.
    assert [line.split(":")[1].strip() for line in lines] == ["index_digest", "views"] * 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").rglob("*") if path.is_file()}
    assert main(argv) == 0  # again: nothing to do
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "t").rglob("*") if path.is_file()}


def test_codes_that_are_keyed_by_the_row_keep_their_rows(tmp_path: Path) -> None:
    """All rows come back as they were; a part of them would be decoded with other keys, and is refused."""
    make_store(tmp_path / "s", n_views=2, codec=CODECS["rotated2"])
    group = open_store(tmp_path / "s").group(FEATURES)
    for name, more in {"all": [], "part": ["--rows", "2:8"], "decoded": ["--rows", "2:8", "--decode"]}.items():
        main(["export", str(tmp_path / "s"), "--to", "hdf5", "--out", str(tmp_path / f"{name}.h5"), *more])
    argv = ["--from", "hdf5", "--store", str(tmp_path / "t"), "--name", "x", "--shard-rows", "7"]
    with pytest.raises(UserError, match=r"keyed by the row, and the file has a part of the rows; export all rows"):
        main(["import", str(tmp_path / "part.h5"), *argv])
    with pytest.raises(UserError, match="was decoded, which its identity does not describe"):
        main(["import", str(tmp_path / "decoded.h5"), *argv])
    assert main(["import", str(tmp_path / "all.h5"), *argv]) == 0
    again = open_store(tmp_path / "t").group(FEATURES)
    np.testing.assert_array_equal(again.tokens(range(40), 1), group.tokens(range(40), 1))
    with h5py.File(tmp_path / "decoded.h5") as file:
        expected = group.tokens(range(2, 8), 1, dtype=np.float16)
        np.testing.assert_array_equal(file[f"{FEATURES}/patches"][:, 1], expected)
        assert sorted(file[FEATURES]) == ["cls", "patches"]
    for opened in (group, again):
        opened.close()


def test_foreign_hdf5(tmp_path: Path) -> None:
    moments = np.random.default_rng(0).standard_normal((9, 8, 16, 16)).astype("float32")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a/latents"] = moments
        file["y"] = np.arange(9) % 3
    argv = ["import", str(tmp_path / "x.h5"), "--from", "hdf5", "--store", str(tmp_path / "t"), "--name", "mine"]
    with pytest.raises(UserError, match="was not written by export"):
        main(argv)
    with pytest.raises(UserError, match="has no dataset 'z'"):
        main([*argv, "--dataset", "a/latents", "--labels", "z"])
    assert main([*argv, "--dataset", "a/latents", "--labels", "y"]) == 0
    group = open_store(tmp_path / "t").group("latents/mine")
    out = np.empty((9, 8, 16, 16), np.float16)
    group["moments"].read_into(np.arange(9), 0, out)
    np.testing.assert_array_equal(out, moments.astype(np.float16))
    assert group.identity.latent_scale_factor == 0.18215


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--labels", "words"], "labels must be whole numbers"),
        (["--labels", "halves"], "labels must be whole numbers, got 0.5"),
        (["--dataset", "text"], "must be real numbers"),
        (["--latent-scale-factor", "nan"], "must be above 0 and finite, got nan"),
        (["--latent-scale-factor", "0"], "must be above 0, got 0.0"),
        (["--name", ".hidden"], "no name begins with a dot"),
    ],
)
def test_what_is_no_label_number_or_name_is_refused(tmp_path: Path, argv: list[str], says: str) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["m"] = np.zeros((5, 8, 4, 4), "f4")
        file["y"] = np.arange(5)
        file["halves"] = np.arange(5) + 0.5
        file["words"] = np.array([b"a"] * 5)
        file["text"] = np.full((5, 8, 4, 4), b"a")
    line = ["import", str(tmp_path / "x.h5"), "--from", "hdf5", "--store", str(tmp_path / "t"), "--name", "x"]
    with pytest.raises(UserError, match=says):
        main([*line, "--dataset", "m", "--labels", "y", *argv])


def make_repa_folder(root: Path, n: int = 23) -> np.ndarray:
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((n, 8, 16, 16)).astype("float32")
    labels = []
    for i in range(n):
        name = f"{i // 10:05d}/img-mean-std-{i:08d}.npy"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, moments[i])
        labels.append([name, i % 4])
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return moments


def test_the_public_repa_folder_becomes_a_store_that_trains(tmp_path: Path) -> None:
    moments = make_repa_folder(tmp_path / "vae-sd")
    argv = ["import", str(tmp_path / "vae-sd"), "--from", "repa-npy", "--store", str(tmp_path / "t"),
            "--name", "sd-vae-ft-mse", "--resolution", "128", "--shard-rows", "8"]  # fmt: skip
    assert main(argv) == 0
    store = open_store(tmp_path / "t")
    out = np.empty((23, 8, 16, 16), np.float16)
    store.group("latents/sd-vae-ft-mse")["moments"].read_into(np.arange(23), 0, out)
    np.testing.assert_array_equal(out, moments.astype(np.float16))
    assert store.index.labels.tolist() == [i % 4 for i in range(23)]
    assert list(verify(tmp_path / "t", deep=True, n_workers=1)) == []
    train = ["train", "--store", str(tmp_path / "t"), "--preset", "sit-tiny-2", "--device", "cpu"]
    train += ["--run", str(tmp_path / "run"), "--loss.projection-weight", "0", "--steps", "2", "--batch", "4"]
    assert train_main(train) == 0


def test_links_in_a_repa_folder_are_followed(tmp_path: Path) -> None:
    """A folder that is a link, a file that is one, and a link back up, which leads nowhere new."""
    root = tmp_path / "vae-sd"
    make_repa_folder(root)
    (root / "00001").rename(tmp_path / "elsewhere")
    (root / "00001").symlink_to(tmp_path / "elsewhere")
    (root / "00002" / "img-mean-std-00000021.npy").rename(tmp_path / "one.npy")
    (root / "00002" / "img-mean-std-00000021.npy").symlink_to(tmp_path / "one.npy")
    (root / "00002" / "up").symlink_to("..")
    found = from_repa_npy.read(root, ImportOptions(name="x", resolution=128))
    assert len(found.keys) == 23
    assert sorted(walk_files(root)) == sorted([*found.keys, "dataset.json"])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: (root / "dataset.json").unlink(), "has no dataset.json"),
        (lambda root: (root / "dataset.json").write_text("[]"), 'it must be {"labels": [[file'),
        (lambda root: (root / "00001/img-mean-std-00000012.npy").unlink(), "00000012.npy is missing"),
        (
            lambda root: (root / "dataset.json").write_text(
                (root / "dataset.json").read_text().replace('00000003.npy", 3', '00000003.npy", "cat"')
            ),
            "labels must be whole numbers",
        ),
        (lambda root: np.save(root / "00001/more.npy", np.zeros(3)), "more.npy has no label"),
        (lambda root: np.save(root / "00002/img-mean-std-00000021.npy", np.zeros((4, 16, 16))), "has shape"),
        (lambda root: (root / "00000/img-mean-std-00000000.npy").write_bytes(b"x"), "is not a .npy file"),
        (
            lambda root: np.save(root / "00000/img-mean-std-00000003.npy", np.full((8, 16, 16), np.nan)),
            "00000003.npy: NaN",
        ),
    ],
)
def test_a_spoilt_repa_folder_is_one_line(
    tmp_path: Path, spoil: object, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_repa_folder(tmp_path / "vae-sd")
    spoil(tmp_path / "vae-sd")  # type: ignore[operator]
    argv = ["import", str(tmp_path / "vae-sd"), "--from", "repa-npy", "--store", str(tmp_path / "t"), "--name", "x"]
    status, _, err = run_here(main, PROG, argv, capsys)
    assert status == EXIT_USAGE
    errors = [line for line in err.splitlines() if line.startswith("python -m storage import: error: ")]
    assert len(errors) == 1
    assert says in errors[0]


def test_lightningdit_files_become_two_views(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "latents"
    source.mkdir()
    parts = []
    for shard, n in enumerate((5, 9, 3)):
        part = {
            "latents": rng.standard_normal((n, 32, 16, 16)).astype("float32"),
            "latents_flip": rng.standard_normal((n, 32, 16, 16)).astype("float32"),
            "labels": rng.integers(0, 4, n),
        }
        save_file(part, source / f"latents_rank00_shard{shard:03d}.safetensors")
        parts.append(part)
    argv = ["import", str(source), "--from", "lightningdit", "--store", str(tmp_path / "t"), "--name", "vavae",
            "--shard-rows", "4"]  # fmt: skip
    assert main(argv) == 0
    group = open_store(tmp_path / "t").group("latents/vavae")
    out = np.empty((17, 64, 16, 16), np.float16)
    for view, name in enumerate(("latents", "latents_flip")):
        group["moments"].read_into(np.arange(17), view, out)
        written = np.concatenate([part[name] for part in parts]).astype(np.float16)
        np.testing.assert_array_equal(out[:, :32], written)
        assert not out[:, 32:].any()
    labels = np.concatenate([part["labels"] for part in parts]).tolist()
    assert open_store(tmp_path / "t").index.labels.tolist() == labels
    save_file({"latents": parts[0]["latents"]}, source / "zz.safetensors")
    with pytest.raises(UserError, match="has no tensor 'labels'"):
        main(["import", str(source), "--from", "lightningdit", "--store", str(tmp_path / "u"), "--name", "x"])
