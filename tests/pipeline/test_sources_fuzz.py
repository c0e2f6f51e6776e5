"""Whatever the fields of a data set hold: a right answer or one line, never a traceback, and memory within bounds."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.sources import LabelOptions, open_source
from storage.base.errors import UserError
from storage.base.shown import shown
from storage.exchange import from_hdf5
from storage.exchange.incoming import ImportOptions
from tests.examples import examples
from tests.pipeline.containers import WRITERS, photographs, tar_bytes

MEMORY = 256 << 20
SAMPLES = photographs(2, 3)
FUZZ = settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))

texts = st.text(max_size=20) | st.sampled_from(
    ["", " 3", "3.0", "cat", "nan", "\x1b[2J", "../x", "/etc/passwd", "a.png", "-1"]
)
numbers = st.integers(-(2**70), 2**70) | st.integers(-2, 3) | st.floats()
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
options = st.builds(
    lambda column, how: LabelOptions(column="" if how == "unlabelled" else column, **({how: True} if how else {})),
    st.just("") | texts.filter(lambda text: shown(text) == text),
    st.sampled_from(["", "unlabelled", "partly_labelled", "renumber"]),
)


@contextmanager
def bounded_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def one_line(error: UserError) -> None:
    assert "\n" not in str(error)
    assert "\x1b" not in str(error)


def check(data: Path, wanted: LabelOptions) -> None:
    """A listing whose rows can be read, or one line."""
    with bounded_memory():
        try:
            source = open_source(str(data))
            listing = source.listing(wanted)
        except UserError as error:
            one_line(error)
            return
    labels = listing.index.labels
    assert labels.min() >= -1
    assert (labels >= 0).all() or wanted.unlabelled or wanted.partly_labelled
    assert not (wanted.unlabelled and (labels >= 0).any())
    n_classes = len({*labels.tolist()} - {-1})
    assert not wanted.renumber or labels.max() == n_classes - 1
    assert len(list(source.read_many(listing.index.locations))) == len(labels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


names = st.sampled_from(["a.png", "b.png", "sub/c.png", "./a.png"]) | texts


@FUZZ
@given(
    header=st.lists(st.sampled_from(["file", "label", "class_name", "fine"]) | texts, max_size=4),
    rows=st.lists(st.lists(names | texts, max_size=4), max_size=5),
    wanted=options,
)
def test_labels_csv(folder: Path, header: list[str], rows: list[list[str]], wanted: LabelOptions) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([["file", "label", *header][: max(2, len(header))], *rows])
    (folder / "labels.csv").write_bytes(text.getvalue().encode(errors="surrogatepass"))
    check(folder, wanted)


@FUZZ
@given(raw=st.binary(max_size=60), wanted=options)
def test_labels_csv_of_any_bytes(folder: Path, raw: bytes, wanted: LabelOptions) -> None:
    (folder / "labels.csv").write_bytes(b"file,label\na.png,0\n" + raw)
    check(folder, wanted)


@FUZZ
@given(content=values | st.fixed_dictionaries({"labels": st.lists(st.tuples(names, scalars) | values)}), wanted=options)
def test_dataset_json(folder: Path, content: Any, wanted: LabelOptions) -> None:
    (folder / "dataset.json").write_text(json.dumps(content))
    check(folder, wanted)


@FUZZ
@given(
    sidecars=st.lists(
        st.tuples(
            st.sampled_from(["cls", "json", "txt", "fine"]),
            st.binary(max_size=8)
            | st.builds(lambda text: text.encode(errors="replace"), texts)
            | st.builds(
                lambda label: json.dumps(label).encode(),
                st.fixed_dictionaries({}, optional={"label": values, "cls": values, "class_name": values}),
            ),
        ),
        max_size=5,
    ),
    wanted=options,
)
def test_webdataset(tmp_path: Path, sidecars: list[tuple[str, bytes]], wanted: LabelOptions) -> None:
    members = [("0.png", b"x"), ("0.cls", b"0")]
    for row, (suffix, raw) in enumerate(sidecars, 1):
        members += [(f"{row}.png", b"x"), (f"{row}.{suffix}", raw)]
    (tmp_path / "w.tar").write_bytes(tar_bytes(members))
    check(tmp_path / "w.tar", wanted)


ARROW = [
    pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.string(), pa.large_string(), pa.string_view(), pa.binary(),
    pa.bool_(), pa.null(), pa.date32(), pa.decimal128(20, 3), pa.list_(pa.int64()), pa.struct([("a", pa.int64())]),
    pa.dictionary(pa.int8(), pa.string()), pa.duration("s"), pa.map_(pa.string(), pa.int8()),
]  # fmt: skip


def array_of(kind: pa.DataType, column: list[Any]) -> pa.Array:
    """The values that the type can hold, nulls for the others."""
    items = []
    for value in column:
        try:
            items.append(pa.scalar(value, kind).as_py())
        except (pa.ArrowException, TypeError, ValueError, OverflowError, NotImplementedError):
            items.append(None)
    try:
        return pa.array(items, kind)
    except (pa.ArrowException, TypeError, ValueError):
        return pa.nulls(len(items), kind)


@FUZZ
@given(
    kind=st.sampled_from(ARROW),
    column=st.lists(values, min_size=1, max_size=6),
    name=st.sampled_from(["label", "labels", "label", "image.x"]),
    metadata=st.just(None) | values | st.fixed_dictionaries({"info": st.fixed_dictionaries({"features": values})}),
    wanted=options,
)
def test_parquet(
    tmp_path: Path, kind: pa.DataType, column: list[Any], name: str, metadata: Any, wanted: LabelOptions
) -> None:
    table = pa.table({"image": pa.array([b"x"] * len(column)), name: array_of(kind, column)})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, tmp_path / "a.parquet")
    check(tmp_path / "a.parquet", wanted)


H5_TYPES: list[Any] = [
    *["i1", "u8", "f2", "f8", ">f4", "S3", "c8", "?", "i4,S2", "(2,)i4"],
    h5py.string_dtype(),
    h5py.ref_dtype,
    h5py.vlen_dtype("i4"),
    h5py.enum_dtype({"cat": 0, "dog": 1}),
    h5py.opaque_dtype(np.dtype("M8[s]")),
]


def make_h5(path: Path, members: dict[str, tuple[Any, tuple[int, ...], bool]]) -> None:
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((3, 2, 2, 3), np.uint8)
        for name, (kind, shape, written) in members.items():
            small = bool(shape) and 0 < np.prod(shape) < 100
            dataset = file.create_dataset(name, shape, kind, chunks=shape if small and written else None)
            if small and written and dataset.dtype.kind in "iufb":
                dataset[...] = np.arange(np.prod(shape)).reshape(shape) % 2


members = st.dictionaries(
    st.sampled_from(["labels", "label", "classes", "x/y"]),
    st.tuples(
        st.sampled_from(H5_TYPES),
        st.sampled_from([(3,), (3, 1), (1, 3), (3, 3), (), (0,), (10**12,), (3, 2, 2, 3)]),
        st.booleans(),
    ),
    max_size=3,
)


@FUZZ
@given(members=members, wanted=options)
def test_hdf5(tmp_path: Path, members: dict[str, Any], wanted: LabelOptions) -> None:
    make_h5(tmp_path / "a.h5", members)
    check(tmp_path / "a.h5", wanted)


@FUZZ
@given(
    members=members,
    about=values
    | st.fixed_dictionaries(
        {
            "views": st.just(["original"]) | values,
            "resolution": st.just(128) | values,
            "decoded": st.just(False) | values,
            "identities": st.dictionaries(
                st.sampled_from(["latents/a", "../x", "images", "x"]), st.dictionaries(texts, values, max_size=2)
            ),
        }
    ),
)
def test_hdf5_that_is_imported(tmp_path: Path, members: dict[str, Any], about: Any) -> None:
    make_h5(tmp_path / "a.h5", members)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["offline_repa"] = json.dumps(about)
    for dataset in ("", "images", "labels", "x/y"):
        with bounded_memory():
            try:
                found = from_hdf5.read(tmp_path / "a.h5", ImportOptions(name="x", dataset=dataset, labels="labels"))
            except UserError as error:
                one_line(error)
            else:
                assert len(found.keys) == len(found.labels) == 3
                del found  # which holds the file open


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "labels-file"])  # HDF5's own library may crash on noise
@settings(max_examples=examples(100), deadline=None, suppress_health_check=list(HealthCheck))
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5))
def test_any_bytes_of_a_container(tmp_path: Path, kind: str, flips: list[tuple[float, int]]) -> None:
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    data = WRITERS[kind][1](tmp_path / "c", SAMPLES)
    path = min(p for p in (tmp_path / "c").iterdir() if p.suffix in (".parquet", ".tar", ".csv"))
    raw = bytearray(path.read_bytes())
    for where, byte in flips:
        raw[int(where * len(raw))] = byte
    path.write_bytes(raw)
    with bounded_memory():
        try:
            open_source(data, kind).listing()
        except UserError as error:
            one_line(error)
