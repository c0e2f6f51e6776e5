"""What the report compares where runs were drawn or measured otherwise: like with like, and every difference named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.evaluation.report_runs import evaluate, evaluation, plain
from tests.trainer.evaluation.test_card import WHOLE
from trainer.evaluation.report.methods import methods_of
from trainer.evaluation.report.outcome import outcome
from trainer.evaluation.report.page import page
from trainer.evaluation.report.results import columns_of, in_words
from trainer.evaluation.report.run_record import RunRecord, read_runs
from trainer.evaluation.report.verdict import Verdict, verdict

UNGUIDED = WHOLE | {"checkpoint_sha256": None, "run": None, "n_images": 512, "n_reference": 1152}
GUIDED = UNGUIDED | {"guidance": 1.8, "guidance_high": 0.7, "guidance_by": "null label", "guided_calls": 172}
GUIDED_APART = (
    "guided calls 172, not 0, guidance 1.8, not 1, guidance high 0.7, not 1, guidance by null label, not nothing"
)
UNGUIDED_APART = (
    "guided calls 0, not 172, guidance 1, not 1.8, guidance high 1, not 0.7, guidance by nothing, not null label"
)


def answer(records: list[RunRecord]) -> Verdict:
    return verdict(records, methods_of(records))


def record(run: Path, *lines: tuple[float, dict[str, Any]], **changes: Any) -> None:
    """Write what was measured of a run: values and their cards, in the order in which they were."""
    of_run = [evaluation(value, card=card, **changes) for value, card in lines]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in of_run))


def again(records: list[RunRecord]) -> list[RunRecord]:
    return read_runs([record.path for record in records])


def column(records: list[RunRecord], start: str) -> dict[str, list[str]]:
    return {
        head: [cell.text for cell in cells] for head, cells in columns_of(records).items() if head.startswith(start)
    }


@pytest.mark.parametrize("same_order", [True, False])
def test_results_of_two_protocols_are_compared_each_with_its_like_whatever_their_order(
    make,  # type: ignore[no-untyped-def]
    same_order: bool,
) -> None:
    records = make({"repa": [None], "vanilla": [None]})
    record(records[0].path, (8.0, UNGUIDED), (1.9, GUIDED))
    record(records[1].path, *[(9.0, UNGUIDED), (2.5, GUIDED)][:: 1 if same_order else -1])
    records = again(records)
    said = answer(records)
    assert said.outcome == "unknown", "of one seed each"
    assert said.sentence.startswith("repa-seed0 has the lower FID, 1.90 against 2.50 of vanilla-seed0")
    assert f"repa-seed0 is ahead of vanilla-seed0 in FID [{UNGUIDED_APART}] (8.00 against 9.00)" in said.how[-1]
    assert "drawn by euler-maruyama, 250 steps, guidance 1.8, from 0 to 0.7" in said.how[0]
    assert column(records, "FID") == {"FID": ["1.90", "2.50"], f"FID [{UNGUIDED_APART}]": ["8.00", "9.00"]}
    html = plain(page(records, "x", real=False))
    assert all(f">{value}<" in html for value in ("1.90", "2.50", "8.00", "9.00"))


def test_the_verdict_is_on_the_way_that_most_methods_have(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [None], "vanilla": [None]})
    record(records[0].path, (8.0, UNGUIDED), (1.9, GUIDED))
    record(records[1].path, (9.0, UNGUIDED))
    said = answer(again(records))
    assert said.sentence.startswith("repa-seed0 has the lower FID, 8.00 against 9.00")
    assert column(again(records), "FID") == {"FID": ["8.00", "9.00"], f"FID [{GUIDED_APART}]": ["1.90", "–"]}


def test_of_one_run_every_protocol_has_a_column(make) -> None:  # type: ignore[no-untyped-def]
    (run,) = make({"repa": [None]})
    record(run.path, (8.0, UNGUIDED), (1.9, GUIDED))
    assert sorted(text for (text,) in column(again([run]), "FID").values()) == ["1.90", "8.00"]


def test_cards_that_differ_are_not_compared_and_all_that_differs_is_named(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [None], "vanilla": [None]})
    other = {name: f"not {UNGUIDED[name]}" for name in ("labels", "sampler", "equation", "precision", "rounding")}
    other |= {"seed": 7, "steps": 9, "calls": 9}
    record(records[0].path, (5.0, UNGUIDED | other))
    record(records[1].path, (6.0, UNGUIDED))
    records = again(records)
    said = answer(records)
    assert said.outcome == "missing"
    assert len(said.ranking) == 1
    told = " ".join(line for line in said.how if line.startswith("Left out, not measured alike"))
    assert "repa-seed0 has 5.00" in told or "vanilla-seed0 has 6.00" in told
    for name in other:
        assert f"{name} " in told
        assert f"{name} " in said.sentence
    assert "6 more" not in told
    html = plain(page(records, "x", real=False))
    assert ("behind" in html.lower()) is False


def test_a_third_method_that_was_drawn_otherwise_is_not_ranked_with_the_others(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [20.0, 20.2], "vanilla": [30.0, 30.2], "half": [None, None]})
    for run in records:
        values = [line.metrics["fid"].value for line in run.evaluations]
        record(run.path, *((value, UNGUIDED) for value in values), *((4.0, GUIDED),) * (not values))
    said = answer(again(records))
    assert said.outcome == "clear"
    assert [ranked.method.name for ranked in said.ranking] == ["repa", "vanilla"]
    assert f"Left out, not measured alike: half has 4.00 ± 0.00: {GUIDED_APART}" in said.how


def test_other_measures_are_compared_where_they_were_measured_alike_and_not_elsewhere(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [None], "vanilla": [None]})
    for run, value, card in zip(records, (100.0, 150.0), (GUIDED, UNGUIDED), strict=True):
        metrics = {"fd": {"value": value, "n_generated": 512, "n_reference": 1152}}
        fd = evaluation(0, name="dinov2", metrics=metrics, card=card)
        lines = [evaluation(value / 10, card=UNGUIDED), fd]
        (run.path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = answer(again(records))
    assert said.sentence.startswith("repa-seed0 has the lower FID, 10.00 against 15.00")
    assert not any("dinov2" in line for line in said.how)
    html = plain(page(again(records), "x", real=False))
    assert "100.0 against 150.0" not in html


def test_what_no_card_says_is_named_with_every_comparison(make) -> None:  # type: ignore[no-untyped-def]
    """Where `compare` says that it is known of neither."""
    records = make({"repa": [None], "vanilla": [None]})
    for run, value in zip(records, (5.0, 6.0), strict=True):
        record(run.path, (value, UNGUIDED | {"labels": None, "decoder_sha256": None}))
    said = answer(again(records))
    assert said.outcome == "unknown"
    assert said.doubt == "labels, decoder sha256"
    assert "Known of none of them, and so perhaps different: labels, decoder sha256" in said.how
    assert in_words(again(records))["FID"].endswith("and so perhaps different: labels, decoder sha256")
    rows, _ = outcome(again(records), records[0].path / "config.yaml")
    assert "perhaps unlike  labels, decoder sha256" in rows
    for cards, doubt in (({}, "how images were drawn, resolution, metrics version"), (UNGUIDED, "")):
        for run, value in zip(records, (5.0, 6.0), strict=True):
            record(run.path, (value, cards))
        assert answer(again(records)).doubt == doubt


def test_a_card_that_differs_in_what_changes_no_number_does_not_stand_in_the_way(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [None], "vanilla": [None]})
    for record, value in zip(records, (1.0, 2.0), strict=True):
        evaluate(record.path, value, card={"labels": "random", "images": str(record.path), "reference": f"/{value}"})
    said = answer(read_runs([record.path for record in records]))
    assert said.outcome == "unknown"
    assert not any(line.startswith("Left out") for line in said.how)


def test_a_mean_over_six_spaces_has_a_name_and_decides(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [None], "vanilla": [None]})
    for run, value in zip(records, (3.0, 5.0), strict=True):
        metrics = {"fdr6": {"value": value, "n_generated": 512, "n_reference": 1152}}
        line = evaluation(0, name="fdr6", metrics=metrics, card=UNGUIDED | {"extractor": "fdr6"})
        (run.path / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    said = answer(again(records))
    assert said.sentence.startswith("repa-seed0 has the lower FDr⁶, 3.00 against 5.00 of vanilla-seed0")
    assert in_words(again(records))["FDr⁶"].endswith("the mean over six networks' features; lower is better")


@pytest.mark.parametrize(
    ("of_run", "is_alike"),
    [
        ("d" * 64, True),  # the same images, however their path was typed
        ("e" * 64, False),
        (None, False),  # a record without digest, of which the path is all that is known
    ],
)
def test_held_out_images_are_those_that_lay_there_and_not_a_path(make, of_run: str | None, is_alike: bool) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [None], "vanilla": [None]})
    for run, path, digest in zip(records, ("held", "./held"), ("d" * 64 if of_run else None, of_run), strict=True):
        metrics = {"fdr6": {"value": 3.0, "n_generated": 512, "n_reference": 1152}}
        card = UNGUIDED | {"extractor": "fdr6", "divisors_of": digest}
        line = evaluation(0, name="fdr6", encoder={"name": "fdr6", "held_out": path}, metrics=metrics, card=card)
        (run.path / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    assert (answer(again(records)).outcome != "missing") is is_alike


def test_what_is_a_method_s_own_is_compared_and_named(make) -> None:  # type: ignore[no-untyped-def]
    """A class token that goes with the image, and the average's decay; one that starts from elsewhere parts them."""
    records = make({"repa": [None], "vanilla": [None]})
    of_class = {"guidance_class": 1.8, "guidance_class_low": 0.0, "guidance_class_high": 0.7, "class_noise": "own"}
    record(records[0].path, (5.0, GUIDED | of_class | {"ema_decay": 0.5}))
    record(records[1].path, (6.0, GUIDED))
    said = answer(again(records))
    assert said.outcome == "unknown", "one seed each"
    assert len(said.ranking) == 2
    (own,) = [line for line in said.how if line.startswith("Of the methods' own, and not the same: ")]
    for text in ("ema decay 0.5, ", "guidance class 1.8, 0", "class noise own, none"):
        assert text in own
    for other in ({"class_noise": "mean"}, {"guidance_class": 1.5}, {"guidance_class_high": 0.5}):
        record(records[0].path, (5.0, GUIDED | of_class | other))
        assert len(answer(again(records)).ranking) == 1
