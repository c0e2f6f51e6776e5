"""A run's folder is data, whoever made it: its readers give a right answer or one line, never a traceback or a hang."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.base.errors import UserError
from tests.archives import write_npz
from tests.examples import examples
from tests.trainer.evaluation.report_runs import Structure, make_run, parsed
from trainer.config.saved import read_config
from trainer.evaluation.generate.image_files import step_drawn_at
from trainer.evaluation.quality.description import Description
from trainer.evaluation.quality.evaluate import evaluate
from trainer.evaluation.report.page import page, write_report
from trainer.evaluation.report.run_record import read_runs
from trainer.run.checkpoint import latest_checkpoint, read_state
from trainer.run.metrics import MetricsLog, read_metrics
from trainer.run.opened import checkpoints_of, load_model, open_run
from trainer.study.file import read_ablation

STATE = "checkpoints/step-0000300/state.json"
JSONS = ("metrics.jsonl", "summary.json", "analysis/probe.json", "analysis/cknna.json", "evaluations.jsonl", STATE)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 10**15, 2**31 - 1, 10**400, 1e308, -1e308, 5e-324, float("nan"), float("inf")])
    | st.floats()
    | st.text()
    | st.sampled_from(
        ["</script><script>", "\x1b]0;owned\x07", "\u202e", "\ud800", "../../etc/passwd", "<!--stores-->"]
    )
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)
FUZZ = settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def plain(shared_tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything, and few lines."""
    run = make_run(tmp_path_factory.mktemp("strange"), shared_tiny_store, 1, 0.5, measured=True)
    lines = (run / "metrics.jsonl").read_text().splitlines()[:3]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for picture in run.glob("*.png"):
        picture.unlink()
    return run


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value may be put, in a tree of lists and mappings."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at, *(place for key, value in inner for place in places(value, (*at, key)))]


def edited(tree: Any, at: tuple[Any, ...], edit: Callable[[Any, Any], None]) -> Any:
    tree = copy.deepcopy(tree)
    within = tree
    for key in at[:-1]:
        within = within[key]
    edit(within, at[-1])
    return tree


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one value removed or replaced."""
    at = draw(st.sampled_from(places(tree)))
    if not at:
        return draw(VALUES)
    if draw(st.integers(0, 4)) == 0:
        return edited(tree, at, lambda within, key: within.pop(key))
    value = draw(VALUES)
    return edited(tree, at, lambda within, key: within.__setitem__(key, value))


def one_line_or(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except UserError as error:
        said = str(error)
    assert said.strip()
    assert "\n" not in said
    return None


def requires_whole(html: str | None) -> None:
    if html is not None:
        html.encode()
        found = Structure()
        found.feed(html)
        assert not found.open
        assert html.count("<script") == html.count("</script>")
        assert "\x1b" not in html
        assert "\u202e" not in html


@pytest.mark.parametrize("name", JSONS)
def test_a_value_of_any_kind_anywhere(plain: Path, name: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(plain, tmp_path / "run"))
    path = run / name
    *before, last = path.read_text().splitlines() if name.endswith("jsonl") else [path.read_text()]

    @FUZZ
    @given(changed(json.loads(last)))
    def check(tree: Any) -> None:
        path.write_text("\n".join([*before, json.dumps(tree)]) + "\n")
        requires_whole(one_line_or(lambda: page(read_runs([run, plain]), "x")))
        one_line_or(lambda: read_metrics(run))
        one_line_or(lambda: checkpoints_of(run, "all"))

    check()


@pytest.mark.parametrize("name", [*JSONS, "config.yaml", "latest"])
@FUZZ
@given(data=st.data())
def test_bytes_of_any_kind_anywhere(plain: Path, name: str, tmp_path: Path, data: st.DataObject) -> None:
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(plain, run)
    raw = (run / name).read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    new = data.draw(st.binary(max_size=8) | st.sampled_from([b"[" * 100_000, b"9" * 5000, b"&a [*a, *a]", b"\0" * 50]))
    (run / name).write_bytes(raw[:start] + new + raw[start + data.draw(st.integers(0, 40)) :])
    requires_whole(one_line_or(lambda: page(read_runs([run]), "x")))
    one_line_or(lambda: latest_checkpoint(run))


@pytest.mark.parametrize("name", ["config.yaml", "ablation.yaml"])
def test_settings_of_any_kind(plain: Path, name: str, tmp_path: Path, shared_tiny_store: Path) -> None:
    run = Path(shutil.copytree(plain, tmp_path / "run"))
    tree: Any = yaml.safe_load((run / "config.yaml").read_text())
    if name == "ablation.yaml":
        axes = {"model.align-block": [1, 2], "loss.projection-weight": [0, 0.5]}
        tree = {"preset": "sit-tiny-2", "set": {"steps": 4}, "axes": axes, "seeds": [0, 1], "gpus": 1}
        tree |= {"encoders": {"a": "b"}, "precompute": {"batch": 3}}

    @FUZZ
    @given(changed(tree))
    def check(tree: Any) -> None:
        try:
            (run / name).write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        except UnicodeEncodeError:  # half a character
            return
        if name == "config.yaml":
            requires_whole(one_line_or(lambda: page(read_runs([run, plain]), "x")))
            one_line_or(lambda: read_config(run / name))
        else:
            one_line_or(lambda: read_ablation(run / name, str(shared_tiny_store), tmp_path / "out"))

    check()


@pytest.mark.parametrize("what", ["pipe", "device", "folder", "large"])
@pytest.mark.parametrize("name", [*JSONS, "config.yaml", "latest", "settings.json"])
def test_what_is_no_file_is_refused_at_once(plain: Path, name: str, what: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(plain, tmp_path / "run"))
    path = run / name
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(100 << 30)
    with pytest.raises(UserError) as refused:
        step_drawn_at(run) if name == "settings.json" else page(read_runs([run]), "x")
    assert "\n" not in str(refused.value)


def test_names_and_texts_are_escaped_for_html_and_terminal(plain: Path, tmp_path: Path) -> None:
    odd = "<img src=x onerror=alert(1)>&\"'\u202e\x1b[31m"
    run = Path(shutil.copytree(plain, tmp_path / odd))
    strange = os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff<b>")
    shutil.copytree(plain, strange)
    for measure in ("cknna", "probe"):
        path = run / "analysis" / f"{measure}.json"
        fields = json.loads(path.read_text())
        path.write_text(json.dumps({**fields, "weights": odd, "features": {"path": odd, "identity_digest": odd}}))
    record = json.loads((run / "evaluations.jsonl").read_text())
    metrics = {odd: record["metrics"]["fid"], "Run": record["metrics"]["fid"]}
    (run / "evaluations.jsonl").write_text(json.dumps({**record, "name": odd, "metrics": metrics}) + "\n")
    (run / "summary.json").write_text(json.dumps({"device": odd}))
    (run / f"samples-{odd.replace('/', '')}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (out,) = write_report([run, Path(strange), plain], tmp_path / "page.html", odd)
    found = parsed(out)
    html = out.read_text(encoding="utf-8")
    assert "<img src=x" not in html
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert "onerror=alert(1)" in found.text
    assert "not shown" in found.text


def test_a_model_larger_than_its_file_takes_no_memory(micro_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(micro_run, tmp_path / "run"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("depth: 3", "depth: 1000000000").replace("width: 32", "width: 65536"))
    opened = open_run(run)
    opened.data.close()
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    with pytest.raises(UserError, match=r"ema\.safetensors cannot be loaded into the model"):
        load_model(opened, checkpoint, "ema", None)  # type: ignore[arg-type]


def test_a_checkpoint_is_named_and_not_a_path(micro_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(micro_run, tmp_path / "run"))
    (run / "checkpoints" / "step-x").mkdir()
    assert len(checkpoints_of(run, "all")) == 3
    for name in ("../checkpoints/step-0000003", "", "step-0000003/.", "\x1b[31m", "x" * 5000):
        (run / "latest").write_text(name)
        with pytest.raises(UserError) as refused:
            latest_checkpoint(run)
        assert "\x1b" not in str(refused.value)
    (run / "latest").write_text("step-0000003\n")
    assert read_state(run / "checkpoints" / "step-0000003").step == 3


def test_a_kill_cuts_the_last_line_and_no_other_is_lost_unsaid(plain: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(plain, tmp_path / "run"))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines)[:-20])
    assert len(read_metrics(run)) == 2
    (run / "metrics.jsonl").write_text("".join([lines[0], lines[1][:-20] + "\n", lines[2]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged"):
        read_metrics(run)
    config = dataclasses.replace(read_config(run / "config.yaml").config, run=run)
    with pytest.raises(UserError, match="line 2 is damaged"):
        MetricsLog(config, from_step=100)


def test_a_feature_file_declares_what_it_holds(tmp_path: Path) -> None:
    """And its encoder's name is no path."""
    write_npz(
        tmp_path / "huge.npz", features=("<f4", (10**9, 10**6)), identity=("<U1000000000", ()), images=("<U9", ())
    )
    write_npz(tmp_path / "bomb.npz", data=bytes(66 << 20), features=("<f4", (66 << 8, 1 << 10)), identity=("<U1", ()),
              images=("<U1", ()))  # fmt: skip
    write_npz(tmp_path / "objects.npz", features=("|O", (1,)), identity=("|O", ()), images=("|O", ()))
    for name in ("huge", "bomb", "objects"):
        with pytest.raises(UserError) as refused:
            evaluate(tmp_path / f"{name}.npz", tmp_path / f"{name}.npz", Description(encoder="vit"))
        assert "\n" not in str(refused.value)
