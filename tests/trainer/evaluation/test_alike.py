"""Only what was measured alike is in one chart or column; the rest is named, with the command that measures it so."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.evaluation.report_runs import STEPS, evaluation, make_run, plain, protocol
from trainer.__main__ import main
from trainer.evaluation.probing.analyse import key_idea
from trainer.evaluation.report.curves import figures
from trainer.evaluation.report.methods import methods_of
from trainer.evaluation.report.page import page, write_report
from trainer.evaluation.report.results import columns_of, not_compared
from trainer.evaluation.report.results import runs_table as table_of
from trainer.evaluation.report.run_record import RunRecord, read_runs

MEASURES = ("probe", "cknna")


@pytest.fixture
def runs(shared_tiny_store: Path, tmp_path: Path) -> list[Path]:
    """Three runs, measured alike."""
    return [make_run(tmp_path, shared_tiny_store, seed, 0.5, measured=True) for seed in (1, 2, 3)]


def change(run: Path, measure: str, *, without: str = "", t: float = 0.5, blocks: int = 4, **changes: Any) -> None:
    points = [{"step": STEPS, "t": t, "block": b, measure: 0.1 * b} for b in range(1, blocks + 1)]
    fields = {"points": points, **protocol(measure, **changes)}
    fields.pop(without, None)
    (run / "analysis" / f"{measure}.json").write_text(json.dumps(fields))


def notes(records: list[RunRecord], title: str) -> dict[str, list[str]]:
    """How each chart with a title was measured, and the names of its runs."""
    drawn = [each for each in figures(records, methods_of(records)) if each.title == f"{title} over depth"]
    return {each.note: [line.label for line in each.charts["block", "logged"].lines] for each in drawn}


def curves(records: list[RunRecord], title: str) -> list[list[str]]:
    """Names of the runs in each chart with a title."""
    return list(notes(records, title).values())


def runs_table(records: list[RunRecord]) -> str:
    return plain(table_of(records, methods_of(records)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n": 600}, "number of samples 600, not 1000"),
        ({"k": 5}, "k 5, not 10"),
        ({"seed": 1}, "seed 1, not"),
        ({"weights": "raw"}, "weights raw, not ema"),
        ({"rows": "b" * 64}, "samples are others"),
        ({"features": {"path": "features/other", "identity_digest": "f" * 64}}, "features other, not tiny-vit"),
        (
            {"features": {"path": "features/tiny-vit", "identity_digest": "e" * 64}},
            "identity of the features are others",
        ),
        ({"t": 0.25}, "t 0.25, not 0.5"),
        ({"blocks": 2}, r"blocks (1, 2), not all"),
        ({"without": "n"}, "number of samples not known"),
        ({"without": "weights"}, "weights not known"),
        ({"without": "k"}, "k not known"),
        ({"features": {"path": "features/tiny-vit"}}, "identity of the features not known"),
        ({"rows": None, "store": None}, "samples not known"),
    ],
    ids=str,
)
def test_what_was_measured_otherwise_is_in_no_chart_or_column_with_the_others(
    runs: list[Path], changes: dict[str, Any], said: str
) -> None:
    change(runs[2], "cknna", **changes)
    records = read_runs(runs)
    assert curves(records, "CKNNA") == [["run-1", "run-2"]]
    assert curves(records, "Linear probe") == [["run-1", "run-2", "run-3"]]
    table = runs_table(records)
    assert "0.4" in table
    assert "0.430<small>" not in table
    ((what, line),) = not_compared(records)
    assert what.startswith("run-3: CKNNA 0.")
    assert said in what
    asked = "--n 1000 --weights ema --k 10 --features tiny-vit --times 0.5"
    assert line == f"python -m trainer cknna {shlex.quote(str(runs[2]))} {asked}"
    assert said in page(records, "x").replace("&#x27;", "'")


def test_of_a_probe_its_own_settings_count_and_not_the_features(runs: list[Path]) -> None:
    change(runs[1], "probe", features={"path": "features/other", "identity_digest": "e" * 64}, k=3)
    assert curves(read_runs(runs), "Linear probe") == [["run-1", "run-2", "run-3"]]
    change(runs[1], "probe", c=0.1)
    records = read_runs(runs)
    assert curves(records, "Linear probe") == [["run-1", "run-3"]]
    assert "C 0.1, not 1.0" in not_compared(records)[0][0]


def test_two_ways_of_two_runs_each_have_a_chart_and_a_column_each(
    runs: list[Path], shared_tiny_store: Path, tmp_path: Path
) -> None:
    runs.append(make_run(tmp_path, shared_tiny_store, 4, 0.5, measured=True))
    for run in runs[2:]:
        change(run, "cknna", n=600, rows="b" * 64)
    records = read_runs(runs)
    assert sorted(curves(records, "CKNNA")) == [["run-1", "run-2"], ["run-3", "run-4"]]
    assert notes(records, "CKNNA").keys() == {f"{n} samples, k = 10, t = 0.5, with tiny-vit" for n in ("1,000", "600")}
    table = runs_table(records)
    assert "CKNNA [number of samples" in table
    assert len(not_compared(records)) == 2


def test_what_is_not_known_is_alike_to_nothing(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Not even to what is not known of another run."""
    for run in runs:
        (run / "analysis" / "cknna.json").write_text(
            json.dumps({"points": [{"step": STEPS, "t": 0.5, "block": 2, "cknna": 0.3}], "n": 600})
        )
    records = read_runs(runs)
    assert [len(lines) for lines in curves(records, "CKNNA")] == [1]
    assert len(not_compared(records)) == 2
    write_report(runs, runs[0] / "page.html", "")
    assert "2 measurements were made otherwise" in capsys.readouterr().err


def test_a_file_that_names_no_samples_is_known_by_its_store_and_features(runs: list[Path]) -> None:
    for run in runs[:2]:
        change(run, "cknna", rows=None)
    assert curves(read_runs(runs), "CKNNA") == [["run-1", "run-2"]]


def test_a_common_time_is_chosen_where_there_is_one(runs: list[Path]) -> None:
    for run, times in zip(runs, ((0.25, 0.5), (0.5, 0.75), (0.5,)), strict=True):
        points = [{"step": STEPS, "t": t, "block": b, "cknna": 0.5 + abs(t - 0.5)} for t in times for b in range(1, 5)]
        (run / "analysis" / "cknna.json").write_text(json.dumps({"points": points, **protocol("cknna")}))
    assert curves(read_runs(runs), "CKNNA") == [["run-1", "run-2", "run-3"]]
    (alone,) = notes(read_runs(runs[1:2]), "CKNNA")
    assert "t = 0.75" in alone


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": {"fid": {"value": 1.0, "n_generated": 256, "n_reference": 1152}}}, "images 256, not 512"),
        ({"metrics": {"fid": {"value": 1.0, "n_generated": 512, "n_reference": 600}}}, "its images 600, not 1152"),
        ({"metrics": {"fid": {"value": 1.0}}}, "number of images not known"),
        ({"reference": {"path": "/reference", "digest": "e" * 64, "n_failed": 0}}, "reference is another"),
        ({"reference": {}}, "reference not known"),
        ({"encoder": {"name": "inception", "weights_sha256": "2"}}, "encoder is another"),
        ({"encoder": {}}, "encoder not known"),
        ({"generated": {"path": "/samples", "n": 512, "resolution": 128}}, "resolution 128, not 0"),
    ],
    ids=str,
)
def test_evaluations_of_other_counts_references_and_encoders_are_kept_apart(
    runs: list[Path], changes: dict[str, Any], said: str
) -> None:
    (runs[2] / "evaluations.jsonl").write_text(json.dumps(evaluation(1.0, **changes)) + "\n")
    records = read_runs(runs)
    assert ">1.00<" not in runs_table(records)
    ((what, line),) = not_compared(records)
    assert said in what
    assert "--reference /reference" in line
    assert f"--run {runs[2]}" in line


def test_the_last_evaluation_of_a_way_counts(runs: list[Path]) -> None:
    lines = [evaluation(5.0), evaluation(6.0), evaluation(1.0, reference={"path": "/other", "digest": "9"})]
    (runs[2] / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = {name: [cell.text for cell in cells] for name, cells in columns_of(read_runs(runs)).items()}
    assert columns["FID"] == ["29.00", "28.00", "6.00"]
    assert columns["FID [reference is another]"] == ["–", "–", "1.00"], "which nothing is to be measured for"
    assert not_compared(read_runs(runs)) == []


def test_commands_can_be_pasted_whatever_the_run_is_called(runs: list[Path], tmp_path: Path) -> None:
    odd = Path(shutil.move(runs[2], tmp_path / "a run; rm -rf $HOME"))
    change(odd, "cknna", n=600)
    ((_, line),) = not_compared(read_runs([*runs[:2], odd]))
    assert shlex.split(line)[4] == str(odd)


def swept(runs: list[Path]) -> list[dict[str, Any]]:
    """What a sweep measured of each run, as `analyse` has it."""
    point = {"step": STEPS, "t": 0.5, "block": 1, "cknna": 0.1, "probe": 0.2}
    return [{"name": run.name, "aligned_blocks": [1], "points": [point], "features": {"path": "f"}} for run in runs]


def test_the_papers_figure_has_only_distances_that_compare(runs: list[Path]) -> None:
    (runs[2] / "evaluations.jsonl").write_text(
        json.dumps(evaluation(1.0, reference={"path": "/other", "digest": "9"})) + "\n"
    )
    *_, panel = key_idea(swept(runs), [record.evaluations for record in read_runs(runs)], 0.5)
    assert [series.label.split()[0] for series in panel.series] == ["run-1", "run-2"]
    assert "1 measured otherwise" in panel.note


def test_the_papers_figure_has_one_protocol_and_names_what_no_card_says(runs: list[Path]) -> None:
    for run, guidance in zip(runs, (1.0, 1.0, 1.8), strict=True):
        line = evaluation(1.0, card={"guidance": guidance, "sampler": "heun"})
        (run / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    *_, panel = key_idea(swept(runs), [record.evaluations for record in read_runs(runs)], 0.5)
    assert [series.label.split()[0] for series in panel.series] == ["run-1", "run-2"]
    assert "1 measured otherwise" in panel.note
    note = panel.note.replace("\n", " ")
    assert "known of none, and so perhaps different: weights, labels" in note
    assert "guidance," not in note
    assert max(map(len, panel.note.splitlines())) <= 60


def test_distances_in_two_encoders_features_stand_on_axes_of_their_own(runs: list[Path]) -> None:
    for run in runs:
        lines = [json.dumps(evaluation(value, name=name)) for name, value in (("near", 0.7), ("far", 228.0))]
        (run / "evaluations.jsonl").write_text("\n".join(lines) + "\n")
    *_, far, near = key_idea(swept(runs), [record.evaluations for record in read_runs(runs)], 0.5)
    assert (far.y_label, near.y_label) == ("Fréchet distance, far", "Fréchet distance, near")
    assert {y for series in far.series for y in series.y} == {228.0}
    assert {y for series in near.series for y in series.y} == {0.7}


def test_what_the_commands_write_is_known_and_alike(micro_run: Path, tmp_path: Path) -> None:
    """And another number of samples is not."""
    copies = [Path(shutil.copytree(micro_run, tmp_path / name)) for name in ("a", "b", "c")]
    for copy, n in zip(copies, ("30", "30", "20"), strict=True):
        for measure in MEASURES:
            assert main([measure, str(copy), "--k", "5", "--n", n, "--device", "cpu", "--blocks", "all"]) == 0
    records = read_runs(copies)
    for title in ("CKNNA", "Linear probe"):
        assert curves(records, title) == [["a", "b"]]
    for what, line in not_compared(records):
        assert "number of samples 20, not 30" in what
        assert main([*shlex.split(line)[3:], "--device", "cpu"]) == 0
    assert not_compared(read_runs(copies)) == []
