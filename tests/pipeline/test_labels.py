"""Labels are numbers however they are spelled, names in order, or refused with the line and the option that decides."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.__main__ import main
from pipeline.sources import LabelOptions, Listing, open_source
from pipeline.sources.listing import make_listing
from storage.base.console import EXIT_OK
from storage.base.errors import UserError
from storage.index import FREE_LABELS, ClassNames, far_apart
from tests.pipeline.containers import class_tar, classes, photographs, tar_bytes, write_image_folder
from tests.stores import make_store
from trainer.config.presets import preset
from trainer.config.schema import TrainConfig
from trainer.config.tree import override
from trainer.data.groups import geometry_of, open_data

SAMPLES = photographs(3, 4)
RENUMBER = LabelOptions(renumber=True)


def listing_of(
    labels: Sequence[Any], options: LabelOptions | None = None, names: dict[Any, str] | None = None
) -> Listing:
    keys = [f"key{row}" for row in range(len(labels))]
    return make_listing(
        keys=keys,
        labels=labels,
        class_names=names or {},
        locations=keys,
        nbytes=[1] * len(keys),
        data_bytes=1,
        wanted=options or LabelOptions(),
        looked_in="column 'label'",
    )


def labels_of(labels: Sequence[Any], options: LabelOptions | None = None, **more: Any) -> list[int]:
    numbers: list[int] = listing_of(labels, options, **more).index.labels.tolist()
    return numbers


SPELLINGS = [
    "{}",
    " {}",
    "{}\t",
    "+{}",
    "{}.",
    "{}.0",
    "{}.000",
    "0{}",
    "{}e0",
    "\ufeff{}",
    "\u00a0{}\u200b",
]


@settings(deadline=None)
@given(
    numbers=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    data=st.data(),
)
def test_numerals_are_numbers_however_they_are_spelled(numbers: list[int], data: st.DataObject) -> None:
    spelled: list[Any] = []
    for number in numbers:
        other = [
            number,
            float(number),
            Decimal(number),
            np.int16(number),
            str(number).encode(),
            str(number).translate({48 + digit: 0x660 + digit for digit in range(10)}),  # Arabic-Indic digits
        ]
        spelled.append(data.draw(st.sampled_from([*(spelling.format(number) for spelling in SPELLINGS), *other])))
    assert labels_of(spelled) == numbers
    again = labels_of(spelled, RENUMBER)
    assert again == [sorted(set(numbers)).index(number) for number in numbers]


@settings(deadline=None)
@given(words=st.lists(st.text("abc ", min_size=1).filter(str.strip), min_size=1, max_size=30))
def test_names_are_numbered_in_sorted_order_without_the_spaces_around_them(words: list[str]) -> None:
    trimmed = [word.strip() for word in words]
    names = sorted(set(trimmed))
    listing = listing_of(words)
    assert listing.index.labels.tolist() == [names.index(word) for word in trimmed]
    assert listing.index.class_names == names


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["0", "1", "unknown"],
            r"key2: label 'unknown' is a name \(1 of these\), and 2 other labels are numbers, such as 0",
        ),
        (["cat", "dog", "7"], r"key2: label 7 is a number \(1 of these\), and 2 other labels are names, such as 'cat'"),
        ([0, 1.5], "key1: label 1.5: a label is a whole number"),
        ([0, -2], "key1: label -2: a label is a whole number"),
        ([0, 2**64 - 1], "key1: label 18446744073709551615: a label is a whole number from 0 to 2,147,483,647"),
        ([0, "1" + "0" * 30], "whole number"),
        ([0, "1e999"], "key1: label inf: a label is a whole number"),
        ([0, [1]], r"key1: label \[1\] is a list, not one number or name"),
        ([0, {"a": 1}], "is a dict"),
        ([0, b"caf\xe9"], r"key1: label b'caf\\xe9' is not UTF-8"),
        (
            [0, 300_000_000],
            "labels are far apart: 2 occur and the largest is 300,000,000.*pass --renumber-labels .* 0 to 1",
        ),
        ([0, 1, ""], "1 of 3 images have no label, first key2; .*--partly-labelled.*--unlabelled"),
        ([0, None, float("nan"), -1], "3 of 4 images have no label, first key1"),
        (
            ["", None],
            "no image has a label: column 'label'; name what holds the labels with --label-column NAME, or pass",
        ),
        ([-1, -1], "no image has a label"),
    ],
)
def test_what_would_be_a_guess_is_refused_in_one_line(labels: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        listing_of(labels)
    assert "\n" not in str(error.value)


def test_one_option_numbers_anew_whatever_was_refused() -> None:
    assert labels_of([5, 300_000_000, 5], RENUMBER) == [0, 1, 0]
    assert labels_of(["cat", "10", "2", 1.5, -3, "ant"], RENUMBER) == [5, 3, 2, 1, 0, 4]
    assert labels_of([2**64 - 1, 0], RENUMBER) == [1, 0]
    listing = listing_of([5, 300_000_000], RENUMBER, {5: "ant"})
    assert listing.index.class_names == ["ant", "300000000"]
    assert listing.warnings == ("labels were numbered anew, 0 to 1: 0 was 5, 1 was 300000000",)
    with pytest.raises(UserError, match="no number that could be ordered"):
        listing_of([0, float("inf")], RENUMBER)


def test_labels_that_are_wanted_away_are_not_looked_at() -> None:
    listing = listing_of([[1], {}, "x"], LabelOptions(unlabelled=True), {0: "cat"})
    assert listing.index.labels.tolist() == [-1, -1, -1]
    assert listing.index.class_names == []
    assert listing.warnings == ("no image has a label (−1 in all 3 rows), as --unlabelled asks",)
    assert labels_of([1, None], LabelOptions(partly_labelled=True)) == [1, -1]
    with pytest.raises(UserError, match="--unlabelled stores no label"):
        LabelOptions(unlabelled=True, renumber=True)


def test_folders_that_are_numerals_are_said_to_be_in_the_order_of_text(tmp_path: Path) -> None:
    for number in (0, 1, 2, 10):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a.png").write_bytes(b"")
    listing = open_source(str(tmp_path)).listing()
    assert listing.index.labels.tolist() == [0, 1, 2, 3]
    assert listing.index.class_names == ["0", "1", "10", "2"]
    assert [w for w in listing.warnings if "not in the order of their values: label 2 is 10, label 3 is 2" in w]
    listing = open_source(str(tmp_path)).listing(RENUMBER)
    assert listing.index.class_names == ["0", "1", "2", "10"]
    assert listing.index.labels.tolist() == [0, 1, 3, 2]  # rows stay where they were


@pytest.mark.parametrize("names", [["1,000", "2,000", "10,000"], ["'10'", "'9'"], ["2024/10", "2024/9"]])
def test_numbers_in_other_dress_are_not_ordered_as_text_unsaid(names: list[str]) -> None:
    assert any("not in the order of their values" in warning for warning in listing_of(names).warnings)


@pytest.mark.parametrize(
    "names",
    [
        ["class1", "class2", "class10"],
        ["a 9 b", "a 10 b"],
        ["v1.10", "v1.9"],
        ["0_cat", "10_bee", "2_fox"],
        ["1st", "2nd", "10th"],
    ],
)
def test_numbers_within_names_are_not_ordered_as_text_unsaid(names: list[str]) -> None:
    (warning,) = listing_of(names).warnings
    assert "are in the order of texts, not of the numbers in them" in warning
    assert not listing_of(["n01", "n02", "n12"]).warnings
    assert not listing_of(["n01440764", "n01443537", "n02123045"]).warnings
    given = dict(enumerate(names[::-1]))  # numbers that the data gives are nobody's order of texts
    assert not listing_of([*given], names=given).warnings
    assert not listing_of(names, names=given).warnings


def test_names_that_look_alike_are_said() -> None:
    (warning,) = listing_of(["cafe\u0301", "café", "tea"]).warnings
    assert warning.startswith("1 classes have names that differ only in case, spaces or Unicode form")
    assert "'Cat' and 'cat'" in listing_of(["cat", "Cat", "dog"]).warnings[0]
    assert listing_of([0, 1], names={0: "crane", 1: "crane"}).warnings == ()  # as two of ImageNet's


def test_a_list_of_class_names_numbers_the_names_that_it_has() -> None:
    listed = {0: "dog", 1: "cat", 2: "ant"}
    listing = listing_of(["cat", "dog"], names=listed)
    assert listing.index.labels.tolist() == [1, 0]
    assert listing.index.class_names == ["dog", "cat"]
    wnids = listing_of(["n02", "n01"], names={0: "tench", 1: "goldfish"})  # in their sorted order, as ImageNet's lists
    assert wnids.index.class_names == ["tench", "goldfish"]
    assert wnids.index.labels.tolist() == [1, 0]
    with pytest.raises(UserError, match="'cow' is not in the list of class names"):
        listing_of(["cat", "cow"], names=listed)
    with pytest.raises(UserError, match="labels are 2 names, such as 'x', and the list of class names has 3 others"):
        listing_of(["x", "y"], names=listed)
    with pytest.raises(UserError, match="'cat' stands twice in"):
        listing_of(["cat"], names={0: "cat", 1: "cat"})


def test_class_names_are_cut_at_line_ends_only(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\na.png,0\nb.png,1\n")
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"")
    (tmp_path / "classes.txt").write_bytes("one\u2028and a half\r\ntwo\x0bwords\r\n\r\n".encode())
    assert open_source(str(tmp_path)).listing().index.class_names == ["one\u2028and a half", "two\x0bwords"]


@pytest.mark.parametrize("largest", [300_000_000, 2**31 - 1])
def test_memory_goes_with_the_labels_that_occur(largest: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="far apart"):
            listing_of([0, largest])
        names = ClassNames({0: "cat", largest: "dog"})
        assert (len(names), names[0], names[1], names[-1]) == (largest + 1, "cat", "", "dog")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_far_apart_is_a_table_that_is_nearly_empty() -> None:
    assert not far_apart(FREE_LABELS - 1, 1)  # a few of ImageNet-21k's classes keep their numbers
    assert not far_apart(203_093, 81_313)  # Google Landmarks
    assert far_apart(300_000_000, 2)


def test_a_model_of_labels_far_apart_is_refused_before_it_is_made(tmp_path: Path) -> None:
    make_store(tmp_path / "s", label=100_000)
    config: TrainConfig = override(preset("sit-tiny-2"), {"store": str(tmp_path / "s"), "run": tmp_path / "r"})
    data = open_data(config)
    with pytest.raises(UserError, match=r"1 labels occur and the largest is 100,000; .*--renumber-labels"):
        geometry_of(config, data)
    assert geometry_of(override(config, {"model.classes": 100_001}), data).n_classes == 100_001
    data.close()


def test_a_folder_without_labels_is_stored_so_when_the_user_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for sample in SAMPLES:
        (tmp_path / sample.name).write_bytes(sample.data)
    with pytest.raises(UserError, match="nothing that labels them; sort them into a folder a class"):
        main(["index", str(tmp_path)])
    assert main(["index", str(tmp_path), "--unlabelled"]) == EXIT_OK
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert (lines["kind"], lines["images"]) == ("flat-folder", "12")
    assert lines["labels"] == "none: −1 in every row"
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(UserError, match=r"names no image; label some, or pass --unlabelled"):
        main(["index", str(tmp_path)])
    assert len(open_source(str(tmp_path)).listing(LabelOptions(unlabelled=True)).index) == 12


def test_kinds_whose_labels_are_folders_take_no_column(tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "tree", SAMPLES)
    with pytest.raises(UserError, match="--label-column fine: labels of this kind of data stand in no column"):
        open_source(data).listing(LabelOptions(column="fine"))
    assert open_source(data).listing(LabelOptions(unlabelled=True)).index.labels.tolist() == [-1] * 12


def test_shards_with_all_pictures_first_are_not_taken_for_class_tars(tmp_path: Path) -> None:
    pictures = [(f"{row:03d}.png", b"x") for row in range(70)]
    labels = [(f"{row:03d}.cls", b"1") for row in range(70)]
    for shard in "ab":
        (tmp_path / f"{shard}.tar").write_bytes(tar_bytes(pictures + labels))
    assert open_source(str(tmp_path)).kind == "class-tars"
    with pytest.raises(UserError, match=r"holds labels of its images \(000.cls\).*--source webdataset"):
        open_source(str(tmp_path)).listing()
    with pytest.raises(UserError, match=r"000.cls in a.tar is not adjacent to its image 000.png"):
        open_source(str(tmp_path), "webdataset").listing()
    (tmp_path / "c").mkdir()
    for name in classes(SAMPLES):
        (tmp_path / "c" / f"{name}.tar").write_bytes(class_tar(name, SAMPLES))
    assert open_source(str(tmp_path / "c")).listing().index.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_zips_without_labels_or_with_some(tmp_path: Path) -> None:
    path = tmp_path / "z.zip"

    def write(names: Sequence[str], table: str | None) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")
            if table is not None:
                archive.writestr("dataset.json", table)

    unlabelled = LabelOptions(unlabelled=True)
    write(["a.png", "b.png"], None)
    assert open_source(str(path)).listing(unlabelled).index.labels.tolist() == [-1, -1]
    write(["a.png", "b.png"], '{"labels": null}')
    with pytest.raises(UserError, match=r"no image has a label: dataset.json in z.zip in DATA has none"):
        open_source(str(path)).listing()
    assert open_source(str(path)).listing(unlabelled).index.labels.tolist() == [-1, -1]
    write(["a.png", "b.png"], '{"labels": [["a.png", "3.0"], ["../../etc/passwd", 4]]}')
    with pytest.raises(UserError, match=r"'../../etc/passwd' leads out of the folder"):
        open_source(str(path)).listing()
    write(["a.png", "b.png"], '{"labels": [["a.png", "3.0"]]}')
    with pytest.raises(UserError, match=r"1 of 2 images have no label, first b.png"):
        open_source(str(path)).listing()
    write(["a.png"], '{"labels": [["a.png", "3.0"]]}')
    assert open_source(str(path)).listing().index.labels.tolist() == [3]
