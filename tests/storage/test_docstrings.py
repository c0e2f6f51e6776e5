"""The examples in the docstrings of the reading API are right, on a store of the geometry that they name."""

from __future__ import annotations

import doctest
import importlib
import pydoc
from pathlib import Path

import pytest

import storage
from storage.base.commands import imported
from tests.stores import make_store

N_CLASSES, A_CLASS = 16, 72  # `pipeline.sources.photos`
SHOWN = {  # what a reader meets, each of which has an example
    "storage": "",
    "storage.reader": "open_store Store GroupReader",
    "storage.any_array": "open_array",
    "storage.gather": "ArrayReader",
    "storage.batches": "iterate_batches",
    "storage.latents": "to_latents",
    "storage.torch.dataset": "RowDataset",
    "storage.torch.latents": "to_latents",
}


@pytest.fixture(scope="module")
def beside_a_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the examples' store lies."""
    folder = tmp_path_factory.mktemp("beside")
    make_store(folder / "stores/photos", n_rows=N_CLASSES * A_CLASS, width=128, n_classes=N_CLASSES, shard_rows=128)
    return folder


@pytest.mark.parametrize("module", SHOWN)
def test_examples_print_what_they_say(module: str, beside_a_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(beside_a_store)
    examined = importlib.import_module(module)
    found = {test.name.removeprefix(f"{module}."): test for test in doctest.DocTestFinder().find(examined, module)}
    for name in SHOWN[module].split() or [module]:
        assert found[name].examples, f"{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner()
    for test in found.values():
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_help_begins_with_how_to_read() -> None:
    text = pydoc.plaintext.document(storage)
    first = text.index("DESCRIPTION")
    places = [text.index(name, first) for name in ("open_store(", "RowDataset(", "iterate_batches(", "to_latents(")]
    assert places == sorted(places)
    assert text[first : places[-1]].count("\n") < 10
    for name in ("PACKAGE CONTENTS", "FUNCTIONS"):
        assert text.index(name) > text.index(">>> store = open_store(")
    assert "CLASSES" not in text
    assert text[: text.index("FUNCTIONS")].count("\n") < 100
    assert {"open_store", "iterate_batches", "to_latents"} <= set(storage.__all__)
    assert imported("storage.torch:RowDataset")


def test_the_demo_has_as_many_photographs() -> None:
    photos = pytest.importorskip("pipeline.sources.photos")
    assert (len(photos.CLASSES), photos.write_photos.__kwdefaults__["n_per_class"]) == (N_CLASSES, A_CLASS)
