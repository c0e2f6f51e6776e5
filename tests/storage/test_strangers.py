"""Stores that somebody else has edited: every command gives one line or a right answer, soon and in little memory.

Never a traceback, a hang, a gigabyte, or a character that the terminal obeys. `edits.py` has the edits. A share of them
is tried by `make test`, all by `make test-all`.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storage.verify
from pipeline.__main__ import main as pipeline
from pipeline.preview import open_originals, principal_components
from storage import UserError, open_array, open_store
from storage.__main__ import main
from storage.base.shown import OBEYED
from storage.batches import iterate_batches
from tests.examples import examples
from tests.slow import slow_but
from tests.storage import edits
from tests.storage.edits import STEERS, Edit
from tests.stores import FEATURES, LATENTS
from trainer.config.presets import preset
from trainer.config.tree import override
from trainer.data.groups import geometry_of, open_data

SECONDS = 20
LONGEST = 3000  # characters of a line
MORE_MEMORY = 1 << 30
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
Use = Callable[[Path], None]


def batches(root: Path) -> None:
    for checksums in ("first", "never"):
        taken = iterate_batches(root, [LATENTS, FEATURES], batch=8, seed=0, stop=3, checksums=checksums, n_threads=1)
        assert sum(len(batch["label"]) for batch in taken) == 24


def train(root: Path) -> None:
    data = open_data(override(preset("sit-tiny-2"), {"store": str(root), "data.failed_rows": "leave-out"}))
    try:
        geometry_of(override(preset("sit-tiny-2"), {"store": str(root)}), data)
    finally:
        data.close()


def pictures(root: Path) -> None:
    store = open_store(root)
    group = store.group(FEATURES)
    assert principal_components(group, np.array([0, 1, 2]), store.resolution).shape[0] == 3
    open_originals(store)(np.array([0, 1, 2]))


def export(root: Path) -> None:
    out = root.with_name("exported")
    shutil.rmtree(out, ignore_errors=True)
    main(["export", str(root), "--to", "npy", "--out", str(out), "--decode"])


def alone(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = open_array(root / FEATURES / "cls", empty="fill", n_threads=1)
        out = np.empty((4, *array.row_shape), array.dtype)
        with contextlib.suppress(IndexError):  # an array alone that says it has fewer rows is asked for one too many
            array.read_into([0, 1, 2, 9], 0, out)


def uses(good: Path) -> dict[str, Use]:
    return {
        "ls": lambda root: None if main(["ls", str(root)]) in (0,) else 1 / 0,
        "info": lambda root: None if main(["info", str(root)]) == 0 else 1 / 0,
        "verify": lambda root: None if main(["verify", str(root), "--deep"]) in (0, 1) else 1 / 0,
        "diff": lambda root: None if main(["diff", str(root), str(good)]) in (0, 1) else 1 / 0,
        "diff the other way": lambda root: None if main(["diff", str(good), str(root)]) in (0, 1) else 1 / 0,
        "export": export,
        "batches": batches,
        "status": lambda root: pipeline(["status", str(root)]),
        "preview": lambda root: pipeline(["preview", str(root), "--out", str(root.with_name("pictures"))]),
        "pictures": pictures,
        "train": train,
        "array": alone,
    }


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("strangers") / "good"
    edits.make_good(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.verify.os, "cpu_count", lambda: 1)  # `verify --deep` starts no processes
        yield root


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """A gigabyte more than there is now: what wants more fails as MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise AssertionError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answers(use: Use, root: Path) -> str:
    """What the command says: its output, or its one line. Any other exception is raised."""
    out, err = io.StringIO(), io.StringIO()
    message = ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), at_most(SECONDS), little_memory():
        try:
            use(root)
        except UserError as error:
            message = str(error)
            assert message
        except OSError as error:
            if error.errno is None:
                raise
            message = f"{error.strerror}: {error.filename!r}"
    said = out.getvalue()
    assert not [c for c in message if unicodedata.category(c) in OBEYED], message
    assert not [c for c in said if c != "\n" and unicodedata.category(c) in OBEYED], said
    assert len(message) < LONGEST, message[:300]
    return message or said


def check(good: Path, what: str, edit: Edit, only: Sequence[str] = ()) -> dict[str, str]:
    """What every use (or only some) says of an edited copy."""
    root = good.with_name("edited")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(good, root, symlinks=True)
    edit(root)
    said = {}
    for name, use in uses(good).items():
        if not only or name in only:
            try:
                said[name] = answers(use, root)
            except BaseException as error:
                raise AssertionError(f"{what}: {name}: {type(error).__name__}: {error}") from error
    return said


def some(good: Path, listed: Sequence[tuple[str, Edit]], n: int) -> None:
    """So many of the edits, evenly spread, each with a few of the uses in turn."""
    names = list(uses(good))
    for i, at in enumerate(np.linspace(0, len(listed) - 1, n).astype(int)):
        check(good, *listed[at], only=[names[(3 * i + j) % len(names)] for j in range(3)])


def test_nothing_edited_is_read_right(good: Path) -> None:
    said = check(good, "nothing", lambda root: None)
    assert said["ls"].count("complete") == 2
    assert "no faults (every byte read)" in said["verify"]
    assert "no difference" in said["diff"]
    assert "19 rows" in said["export"]
    assert said["status"].count("3 done, 0 missing") == 2
    assert "no VAE to decode with" in said["preview"]
    assert {said[name] for name in ("batches", "pictures", "train", "array")} == {""}


def test_some_files(good: Path) -> None:
    some(good, edits.file_edits(good), 16)


def test_some_fields(good: Path) -> None:
    some(good, edits.field_edits(good), 16)


def test_a_receipt_that_names_endless_files_is_one_line(good: Path) -> None:
    edit = edits.set_field("receipts/features/tiny-vit/00000000.json", ("shards", 0, "path"), "A" * 100_000)
    said = check(good, "a long path", edit, only=["export", "train", "verify"])
    assert "its receipt is of the files ['AAA" in said["export"]
    assert len(said["verify"]) < LONGEST


@pytest.mark.parametrize(("end", "value"), [(0, 2**31 - 1), (1, 0), (1, 7), (1, 10**15)])
def test_pictures_do_not_look_at_receipts_of_other_rows(good: Path, end: int, value: int) -> None:
    edit = edits.set_field("receipts/latents/tiny-vae/00000000.json", ("rows", end), value)
    assert check(good, f"rows.{end} = {value}", edit, only=["pictures"])["pictures"] == ""


@settings(max_examples=examples(25), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_in_any_field(good: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(edits.json_files(good)))
    place = data.draw(st.sampled_from(list(edits.places(edits.read_fields(path)))))
    value = data.draw(JSON)
    name = str(path.relative_to(good))
    only = data.draw(st.lists(st.sampled_from(list(uses(good))), min_size=2, max_size=2))
    check(good, f"{name} {place} = {value!r}", edits.set_field(name, place, value), only)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["files", "fields", "index"])
def test_every_edit(good: Path, kind: str) -> None:
    listed = {"files": edits.file_edits, "fields": edits.field_edits, "index": lambda root: edits.index_edits()}[kind](
        good
    )
    for what, edit in listed:
        check(good, what, edit)


@pytest.mark.parametrize(("what", "edit"), edits.index_edits(), ids=[what for what, _ in edits.index_edits()])
def test_another_table_in_place_of_the_index(good: Path, what: str, edit: Edit) -> None:
    said = check(good, what, edit, only=["verify", "train"])
    if what in ("index: names that steer", "index: a label -2", f"index: a label {-(2**40)}"):
        return
    if what == "index: long names":
        assert "bytes to read" in check(good, what, edit, only=["pictures"])["pictures"]
        return
    assert "index.parquet" in said["train"], said
    assert "1 fault " in said["verify"], said


def test_a_label_far_from_the_others_takes_no_memory_and_names_the_bound(good: Path) -> None:
    edit = dict(edits.index_edits())[f"index: a label {2**31 - 1}"]
    assert "label 2147483647, and 20 rows may have labels below 1,048,576" in check(good, "", edit)["train"]


@pytest.mark.parametrize("n_rows", [21, 10**7, 10**12, 10**15, 2**63])
@pytest.mark.parametrize("shard_rows", [1, 8, 2**24])
def test_rows_that_are_claimed_are_not_believed(good: Path, n_rows: int, shard_rows: int) -> None:
    said = check(good, f"{n_rows} rows", edits.claim_rows(n_rows, shard_rows), only=["ls", "verify", "train", "diff"])
    assert "index.parquet has 20 rows" in said["train"] or "n_rows" in said["train"] or "not complete" in said["train"]


def test_an_index_of_a_few_bytes_that_claims_many_rows_is_refused_at_once(good: Path) -> None:
    """Runs of equal labels and names take no bytes, so the file's own footer is no witness."""

    def edit(root: Path) -> None:
        n = 10_000_000
        same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), ["x"])
        table = {"key": same, "label": np.zeros(n, np.int64), "class_name": same, "location": same}
        pq.write_table(pa.table({**table, "nbytes": np.zeros(n, np.int64)}), root / "index.parquet", row_group_size=n)
        edits.claim_rows(n)(root)

    assert "says that it has 10000000 rows" in check(good, "", edit, only=["ls", "train"])["train"]


def test_names_cannot_steer_the_terminal(good: Path) -> None:
    """In identity, provenance, failures, source, groups' names; `answers` looks at each character of what is said."""

    def edit(root: Path) -> None:
        for path in edits.json_files(root):
            fields = edits.read_fields(path)
            if path.name == "00000000.json":
                fields["failed"][0] |= {"key": f"key{STEERS}", "reason": f"reason{STEERS}"}
                fields["timings_s"] = {f"stage{STEERS}": 1.0}
                fields["made"] = {"run": STEERS}
            elif "identity" in fields.get("attributes", {}):
                fields["attributes"]["identity"] |= {"encoder": f"net{STEERS}", STEERS: STEERS}
                fields["attributes"]["provenance"] = {"decoder": STEERS, STEERS: STEERS}
            elif "source" in fields.get("attributes", {}):
                fields["attributes"]["source"] = {"kind": "image-folder", "path": STEERS}
            edits.write_fields(path, fields)
        edits.reseal(root)
        receipt = root / "receipts" / FEATURES / "metadata.json"
        fields = edits.read_fields(receipt)
        fields["files"] = {name.replace("tiny-vit", f"f{STEERS}"): sha for name, sha in fields["files"].items()}
        edits.write_fields(receipt, fields)
        (root / FEATURES).rename(root / f"features/f{STEERS}")
        (root / "receipts" / FEATURES).rename(root / f"receipts/features/f{STEERS}")

    said = check(good, "names", edit)
    escaped = r"\x1b]0;owned\x07\x1b[2J\u202e\u2028"
    assert f"net{escaped}" in said["ls"]
    assert f"features/f{escaped}" in said["ls"]
    assert f"key{escaped}: reason{escaped}" in said["status"]


def test_a_receipt_opens_no_file_outside_its_group(good: Path) -> None:
    def edit(root: Path) -> None:
        path = root / "receipts" / FEATURES / "metadata.json"
        fields = edits.read_fields(path)
        fields["files"][f"{FEATURES}/../../../secret/zarr.json"] = "0" * 64
        edits.write_fields(path, fields)

    said = check(good, "", edit)
    assert "it speaks of 'features/tiny-vit/../../../secret/zarr.json'" in said["train"]
    assert "secret/zarr.json" in said["verify"]


@pytest.mark.parametrize("edit", slow_but(["a pipe", "rows"], ["rows"]))
def test_the_command_itself(good: Path, edit: str) -> None:
    """One line and status 2, or faults and status 1, in a process that may have a gigabyte more than it starts with."""
    root = good.with_name("edited")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(good, root)
    if edit == "rows":
        edits.claim_rows(10**15)(root)
    else:
        edits.FILE_EDITS[edit](root / "zarr.json")
    code = (
        "import resource, os, sys; from storage.base.console import run_command; "
        "from storage.__main__ import main, PROG; "
        "n = int(open('/proc/self/statm').read().split()[0]) * os.sysconf('SC_PAGE_SIZE'); "
        f"resource.setrlimit(resource.RLIMIT_AS, (n + {MORE_MEMORY},) * 2); run_command(main, PROG)"
    )
    for argv, wanted in ((["info", root], 2), (["verify", root], 1)):
        command = [sys.executable, "-c", code, *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == wanted, done
        assert "Traceback" not in done.stderr
        assert len((done.stderr if wanted == 2 else done.stdout).splitlines()) <= 3
