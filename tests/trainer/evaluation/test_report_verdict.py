"""What the report says first: which method is best, and how sure that is."""

from __future__ import annotations

import dataclasses
import html as html_module
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import betainc

from storage import open_store
from tests.trainer.evaluation.report_runs import STEPS, draw, evaluate, evaluation, make_run, plain
from tests.trainer.evaluation.test_card import WHOLE
from trainer.__main__ import main
from trainer.config.command_line import train_config
from trainer.evaluation.report.methods import equal_seeds, methods_of
from trainer.evaluation.report.page import page
from trainer.evaluation.report.reached import epochs_column
from trainer.evaluation.report.results import columns_of, in_words
from trainer.evaluation.report.run_record import RunRecord, read_runs
from trainer.evaluation.report.spread import difference, pooled, quantile, within
from trainer.evaluation.report.verdict import Verdict, verdict


def answer(records: list[RunRecord]) -> Verdict:
    return verdict(records, methods_of(records))


def test_a_difference_beyond_the_seeds_spread(make) -> None:  # type: ignore[no-untyped-def]
    said = answer(make({"repa": [20.0, 20.2, 20.4], "vanilla": [30.0, 30.2, 30.4]}))
    assert said.outcome == "clear"
    reach = stats.t.ppf(0.975, 4) * 0.2 * np.sqrt(2 / 3)
    assert said.sentence == (
        "repa is better than vanilla: FID 20.20 ± 0.20 against 30.20 ± 0.20, 10.00 lower "
        f"(95% interval {10 - reach:.2f} to {10 + reach:.2f}, of 3 seeds each), "
        "which is more than the seeds' spread of 0.200."
    )
    assert said.missing == []


def test_a_difference_within_the_seeds_spread(make) -> None:  # type: ignore[no-untyped-def]
    said = answer(make({"repa": [20.0, 24.0], "vanilla": [21.0, 25.0]}))
    assert said.outcome == "within"
    reach = stats.t.ppf(0.975, 2) * 8**0.5
    assert said.sentence == (
        "repa and vanilla cannot be told apart: FID 22.00 ± 2.83 and 23.00 ± 2.83 are 1.00 apart, and seeds alone "
        f"could make a difference of {reach:.2f} (95% interval, 2 seeds each)."
    )


def test_what_is_well_behind_is_said_although_the_first_two_are_level(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [20.0, 20.4], "half": [20.1, 20.6], "vanilla": [30.0, 30.4]})
    said = answer(records)
    assert said.outcome == "within"
    assert said.sentence.endswith(" Behind repa by more than seeds explain: vanilla (10.00).")
    assert [line.split("(")[1].split(")")[0] for line in said.how if line.startswith("The seeds' spread")] == [
        "0.283 in 2 seeds of repa, 0.354 in 2 seeds of half, 0.283 in 2 seeds of vanilla"
    ]
    html = plain(page(records, "x"))
    assert ">lowest<" in html
    assert ">best<" not in html
    assert "projection weight 0.25" in html, "what a method is stands below its name"


def test_a_difference_that_so_few_seeds_do_not_settle(make) -> None:  # type: ignore[no-untyped-def]
    said = answer(make({"repa": [20.0, 21.0], "vanilla": [22.0, 23.0]}))
    assert said.outcome == "open"
    assert "but not surely" in said.sentence
    assert "seeds alone could make a difference of 3.04 (95% interval, 2 seeds each)" in said.sentence


def test_one_seed_a_method_says_nothing_of_the_spread(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [20.0], "vanilla": [30.0]})
    said = answer(records)
    assert said.outcome == "unknown"
    assert said.sentence.startswith("repa-seed0 has the lower FID, 20.00 against 30.00 of vanilla-seed0 (10.00 lower)")
    assert "One seed each: cannot say whether that is more than luck" in said.sentence
    assert "how much seeds differ is unknown" in said.sentence
    assert not any("interval" in line and "no interval" not in line for line in said.how)
    html = plain(page(records, "x"))
    assert "one seed each: cannot say" in html
    assert "95% interval" not in html
    assert "better" not in said.sentence
    (what, line), _ = said.missing
    assert what == "repa-seed0: another seed"
    assert shlex.split(line)[3:6] == ["train", "--config", str(records[0].path / "config.yaml")]


def test_seeds_of_one_method_tell_the_spread_of_another(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [20.0, 20.1, 20.2, 20.3], "vanilla": [30.0]})
    said = answer(records)
    assert said.outcome == "clear"
    lent = "vanilla-seed0 has one seed: spread taken from the other methods' seeds"
    assert f"of 4 seeds and 1 seed; {lent})" in said.sentence
    (line,) = (line for line in said.how if line.startswith("The seeds' spread"))
    assert "taken to be the same for all methods (0.129 in 4 seeds of repa)" in line
    assert lent in line
    assert f"by the seeds; {lent.replace(chr(39), '&#x27;')}" in plain(page(records, "x"))


def test_two_methods_of_one_seed_beside_one_of_several_have_their_spread_from_it(make) -> None:  # type: ignore[no-untyped-def]
    said = answer(make({"repa": [20.0], "half": [20.1], "vanilla": [28.0, 32.0]}))
    assert said.outcome == "within"
    assert "repa-seed0 and half-seed0 have one seed each: spread taken from the other methods' seeds" in said.sentence


def test_methods_of_several_seeds_each_lend_nothing(make) -> None:  # type: ignore[no-untyped-def]
    said = answer(make({"repa": [20.0, 20.2], "vanilla": [30.0, 30.2]}))
    assert "taken from the other" not in " ".join([said.sentence, *said.how])


def test_the_best_of_three_is_held_against_each_other_one(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [20.0, 20.4], "vanilla": [30.0, 30.4], "half": [25.0, 25.4]})
    said = answer(records)
    assert said.sentence.startswith("repa is the best of 3 methods, before half: FID")
    assert [ranked.method.name for ranked in said.ranking] == ["repa", "half", "vanilla"]
    behind = said.ranking[1].behind
    assert behind is not None
    assert behind.interval is not None
    reach = stats.t.ppf(1 - 0.05 / 2 / 2, 3) * behind.spread
    assert behind.interval == pytest.approx((5 - reach, 5 + reach))
    assert "more than seeds differ" in plain(page(records, "x"))


def test_nothing_evaluated_says_what_is_missing_and_the_commands(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [None], "vanilla": [None]})
    said = answer(records)
    assert said.outcome == "missing"
    assert said.sentence.startswith("Which of the 2 methods is better is not known: no images of theirs were measured")
    assert [what for what, _ in said.missing] == ["repa-seed0: not evaluated", "vanilla-seed0: not evaluated"]
    for record, (_, line) in zip(records, said.missing, strict=True):
        assert shlex.split(line)[3:5] == ["score", str(record.path)], "which draws first"
    folder = draw(records[0].path)
    assert shlex.split(answer(read_runs([tmp_path])).missing[0][1])[4] == str(folder), "images that are there are taken"


def test_one_method_evaluated_is_no_comparison(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [20.0], "vanilla": [None]})
    said = answer(records)
    assert said.outcome == "missing"
    assert "no other was measured alike" in said.sentence
    ((what, line),) = said.missing
    assert what == (
        "vanilla-seed0: not measured; how images were drawn is not known of the others, so these compare once all are "
        "drawn again"
    )
    assert "--n 512" in line
    assert "--reference /reference" in line


def test_what_was_measured_otherwise_is_no_comparison(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [20.0], "vanilla": [None]})
    fid = {"fid": {"value": 1.0, "n_generated": 64, "n_reference": 1152}}
    evaluate(records[1].path, 1.0, metrics=fid)
    said = answer(read_runs([record.path for record in records]))
    assert said.outcome == "missing"
    assert "1.00" not in said.sentence.replace("has FID 1.00", "")
    assert len(said.ranking) == 1


def test_a_single_run_and_a_single_method(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [20.0, 21.0]})
    one, both = answer(records[:1]), answer(records)
    assert one.sentence == "repa-seed0 has FID 20.00 (one seed); there is no other method to compare it with."
    assert both.sentence.startswith("repa has FID 20.50 ± 0.71 (mean and deviation of 2 seeds)")


def test_higher_is_better_where_it_is(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [None], "vanilla": [None]})
    for record, value in zip(records, (5.0, 9.0), strict=True):
        metrics = {"inception_score": {"value": value, "n_generated": 512}}
        evaluate(record.path, 0, metrics=metrics)
    said = answer(read_runs([record.path for record in records]))
    assert said.sentence.startswith("vanilla-seed0 has the higher Inception Score, 9.00 against 5.00")


def test_measures_of_another_order_and_unlike_training_are_said(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [None], "vanilla": [None]})
    for record, fid, recall in zip(records, (5.0, 9.0), (0.3, 0.6), strict=True):
        counts = {"n_generated": 512, "n_reference": 1152}
        metrics = {"fid": {"value": fid, **counts}, "recall": {"value": recall, **counts, "k": 3}}
        evaluate(record.path, 0, metrics=metrics, step=STEPS if fid == 5 else STEPS // 2)
    said = answer(read_runs([record.path for record in records]))
    others = "Other measures, whose spread is below: repa-seed0 is behind vanilla-seed0 in Recall (0.300 against 0.600)"
    assert others in said.how
    assert (
        "Not trained alike: measured after steps 300 (repa-seed0), 150 (vanilla-seed0); "
        "images seen 2,400 (repa-seed0), 1,200 (vanilla-seed0)"
    ) in said.how


def test_training_that_differs_is_named_setting_by_setting(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [1.0, 1.1], "vanilla": [2.0, 2.1]})

    def told(*changes: tuple[str, object]) -> list[str]:
        for_vanilla = [
            dataclasses.replace(record, config=train_config({**settings_of(record), **dict(changes)}))
            if record.name.startswith("vanilla")
            else record
            for record in records
        ]
        return [line for line in answer(for_vanilla).how if line.startswith("Not trained alike")]

    assert told() == [], "the methods differ in their losses alone"
    assert told(("batch", "16")) == [
        "Not trained alike: batch (images a step) 8 (repa), 16 (vanilla); images seen 2,400 (repa), 4,800 (vanilla)"
    ]
    assert told(("store", "/another")) == [
        f"Not trained alike: data (store) {records[0].config.store} (repa), /another (vanilla)"
    ]
    assert told(("model.depth", "3"), ("optim.lr", "0.5")) == [
        "Not trained alike: model.depth 4 (repa), 3 (vanilla); optim.lr 0.002 (repa), 0.5 (vanilla)"
    ]
    assert told(("steps", "900")) == ["Not trained alike: steps in all 300 (repa), 900 (vanilla)"]


def settings_of(record: RunRecord) -> dict[str, str]:
    """What `make_run` gave it."""
    config = record.config
    given = {"preset": config.preset, "store": config.store, "run": str(config.run), "seed": str(config.seed)}
    weight = record.settings["loss.projection_weight"]
    weight = weight[0] if isinstance(weight, list | tuple) else weight
    return {**given, "steps": str(config.steps), "batch": str(config.batch), "loss.projection_weight": str(weight)}


def test_runs_of_a_method_that_were_measured_at_other_steps_are_named(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [1.0, 1.1], "vanilla": [2.0]})
    evaluate(records[1].path, 1.1, step=150)
    (line,) = (
        line
        for line in answer(read_runs([record.path for record in records])).how
        if line.startswith("Not trained alike")
    )
    assert line.startswith("Not trained alike: measured after steps 300 (repa-seed0, vanilla-seed0), 150 (repa-seed1)")


# ---- epochs until an unguided FID -------------------------------------------------------------------------------


def scored(run: Path, of: dict[int, float], guidance: float | None = 1.0) -> None:
    card = {} if guidance is None else {"guidance": guidance}
    lines = [json.dumps(evaluation(fid, step=step, card=card)) + "\n" for step, fid in of.items()]
    (run / "evaluations.jsonl").write_text("".join(lines))


def epochs(records: list[RunRecord]) -> dict[str, list[str]]:
    columns = columns_of(read_runs([record.path for record in records]))
    return {
        heading: [cell.text for cell in cells] for heading, cells in columns.items() if heading.startswith("Epochs")
    }


def test_epochs_until_a_level_stand_where_several_checkpoints_were_scored(make, shared_tiny_store: Path) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [None], "vanilla": [None]})
    n_images = open_store(shared_tiny_store).n_rows
    assert epochs(records) == {}
    for record in records:
        scored(record.path, {300: 1.5})
    assert epochs(records) == {}, "one checkpoint does not say when"
    scored(records[0].path, {100: 9.0, 200: 2.0, 300: 1.5})
    assert epochs(records) == {"Epochs until unguided FID 2.00": [f"{200 * 8 / n_images:.3g}", "–"]}
    scored(records[1].path, {100: 9.0, 300: 4.0})
    assert epochs(records)["Epochs until unguided FID 2.00"][1] == "not reached"
    scored(records[0].path, {100: 9.0, 200: 3.0})  # neither reached 2: the level that both did
    reached = [f"{200 * 8 / n_images:.3g}", f"{300 * 8 / n_images:.3g}"]
    assert epochs(records) == {"Epochs until unguided FID 4.00": reached}
    scored(records[1].path, {100: 9.0, 300: 8.3})  # 100 × 8.3 is above 830 in binary
    assert list(epochs(records)) == ["Epochs until unguided FID 8.30"]


def test_epochs_are_counted_over_checkpoints_that_were_measured_alike(make) -> None:  # type: ignore[no-untyped-def]
    """And a level that fewer images, or another sampler, came to is none of theirs."""
    (run,) = make({"repa": [None]})
    lines = [(100, 9.0, 250), (200, 2.5, 250), (300, 2.2, 250), (100, 1.0, 50)]
    of_run = [evaluation(fid, step=step, card=WHOLE | {"steps": steps}) for step, fid, steps in lines]
    (run.path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in of_run))
    assert list(epochs([run])) == ["Epochs until unguided FID 2.20"]


def test_what_two_records_do_not_say_is_not_taken_for_the_same(make) -> None:  # type: ignore[no-untyped-def]
    """Distances of an unknown extractor have no level that two runs share."""
    records = make({"repa": [None], "vanilla": [None]})
    for run, last in zip(records, (4.0, 9.0), strict=True):
        of_run = [evaluation(fid, step=step, card=WHOLE, encoder={}) for step, fid in ((100, 20.0), (200, last))]
        (run.path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in of_run))
    assert epochs(records) == {
        "Epochs until unguided FID 4.00": [epochs(records[:1])["Epochs until unguided FID 4.00"][0], "–"]
    }


def test_guided_images_and_unknown_ones_do_not_count_as_unguided(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [None]})
    for guidance in (1.8, None):
        scored(records[0].path, {100: 1.0, 200: 0.5}, guidance)
        assert epochs(records) == {}


def test_images_of_the_data_set_are_those_of_the_summary_where_it_says_so(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [None]})
    scored(records[0].path, {100: 9.0, 200: 2.0})
    (record,) = read_runs([records[0].path])
    summary = dataclasses.replace(record.summary, samples=400)
    ((_, cells),) = [epochs_column([dataclasses.replace(record, summary=summary)])]
    assert cells[0].text == f"{200 * 8 / 400:.3g}"
    assert cells[0].note == "FID 2.00 after 200 steps; 2 checkpoints scored"


def test_every_number_is_explained(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [None], "vanilla": [None]})
    for record in records:
        scored(record.path, {100: 9.0, 200: 2.0})
    records = read_runs([record.path for record in records])
    assert in_words(records).keys() == columns_of(records).keys()
    html = plain(page(records, "x"))
    for text in in_words(records).values():
        assert html_module.escape(text) in html


def test_names_are_escaped_in_the_sentence(make) -> None:  # type: ignore[no-untyped-def]
    odd = "<script>x</script>\u202e"
    records = make({"repa": [20.0], "vanilla": [30.0]})
    records = [dataclasses.replace(record, name=f"{odd}{i}") for i, record in enumerate(records)]
    html = page(records, "x")
    assert "<script>x" not in html
    assert "\u202e" not in html
    assert "&lt;script&gt;x&lt;/script&gt;\\u202e0 has the lower FID" in html


def test_the_commands_of_the_sentence_are_commands(make, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    for _, line in answer(make({"repa": [20.0], "vanilla": [30.0]})).missing:
        with pytest.raises(SystemExit) as ended:
            main([*shlex.split(line)[3:], "--help"])
        assert ended.value.code == 0


# ---- grouping, statistics ---------------------------------------------------------------------------------------


def test_runs_that_differ_in_the_seed_alone_are_a_method(make) -> None:  # type: ignore[no-untyped-def]
    records = make({"repa": [1.0, 2.0], "vanilla": [3.0, 4.0], "half": [5.0]})
    methods = methods_of(records)
    assert [(method.name, len(method.runs)) for method in methods] == [("half-seed0", 1), ("repa", 2), ("vanilla", 2)]
    assert sorted(run for method in methods for run in method.runs) == list(range(5))
    repa, vanilla = methods[1:]
    assert equal_seeds(records, repa, vanilla) == list(zip(repa.runs, vanilla.runs, strict=True))


def test_methods_are_named_by_their_settings_where_names_share_nothing(shared_tiny_store: Path, tmp_path: Path) -> None:
    for name, seed, weight in (("x", 0, 0.5), ("y", 1, 0.5), ("z", 0, 0.0)):
        make_run(tmp_path, shared_tiny_store, seed, weight, measured=False, name=name)
    assert [method.name for method in methods_of(read_runs([tmp_path]))] == ["0.5", "0.0"]


@given(st.floats(0, 50), st.integers(1, 60))
def test_students_t(t: float, freedom: int) -> None:
    assert within(t, freedom) == pytest.approx(betainc(0.5, freedom / 2, t**2 / (freedom + t**2)), abs=1e-12)
    assert quantile(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_the_interval_is_that_of_a_t_test_with_pooled_variance() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(3, 1, 5).tolist(), rng.normal(1, 1, 4).tolist()
    reference = stats.ttest_ind(a, b).confidence_interval(0.95)
    found = difference(a, b, [a, b])
    assert found.interval == pytest.approx((reference.low, reference.high))
    assert pooled([[1.0], [2.0]]) is None
    assert difference([1.0], [2.0], [[1.0], [2.0]]).interval is None


def test_a_record_with_a_damaged_interval_is_refused(make) -> None:  # type: ignore[no-untyped-def]
    (record,) = make({"repa": [1.0]})
    metrics = {"fid": {"value": 1.0, "interval": [1.0]}}
    (record.path / "evaluations.jsonl").write_text(json.dumps(evaluation(1.0, metrics=metrics)) + "\n")
    with pytest.raises(Exception, match=r"evaluations\.jsonl line 1"):
        read_runs([record.path])
