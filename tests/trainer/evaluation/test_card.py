"""Cards: two that differ in one setting are never side by side without it, and what is not known says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.base.errors import UserError
from storage.feature_file import write_feature_file
from storage.identity import VectorsIdentity
from tests.commands import run_here
from trainer.__main__ import main
from trainer.evaluation.generate.image_files import SETTINGS_FILE
from trainer.evaluation.quality.card import DRAWN, PROTOCOL, Card, differences, names_of, unknown_to_both, words_of
from trainer.evaluation.quality.compare import compared, load, text
from trainer.evaluation.quality.departures import departures_of
from trainer.evaluation.quality.description import Description
from trainer.evaluation.quality.epochs import epochs_until
from trainer.evaluation.quality.evaluate import evaluate
from trainer.evaluation.quality.record import Evaluation, Metric, read_record

VIT = VectorsIdentity(name="vit", encoder="test", weights_sha256="0", vector="cls", preprocessing="x/255")
WHOLE: dict[str, Any] = {
    "run": "/runs/a", "step": 400_000, "checkpoint_sha256": "c", "images_by": "x", "weights": "ema",
    "ema_decay": 0.9999, "labels": "random", "classes": 1000, "seed": 0, "sampler": "euler-maruyama",
    "equation": "sde", "steps": 250,
    "calls": 250, "guided_calls": 0, "last_step_from": 0.04, "times_end": 0.0, "shift": 1.0, "guidance": 1.0,
    "guidance_low": 0.0, "guidance_high": 1.0, "guidance_channels": 0, "guidance_by": "nothing", "weaker_sha256": "",
    "guidance_class": 0.0, "guidance_class_low": 0.0, "guidance_class_high": 1.0, "class_noise": "",
    "precision": "tf32 on cuda", "decoder": "vae", "decoder_sha256": "d", "rounding": "truncate", "images": "/i",
    "images_format": "npz", "n_images": 50_000, "resolution": "256×256", "crop": 0, "reference": "/adm.npz",
    "reference_sha256": "r", "references_sha256": (), "n_reference": 0, "divisors": (), "divisors_of": "",
    "extractor": "inception", "extractor_sha256": "e",
    "extractor_vector": "pool_3", "extractor_resize": "299", "extractor_precision": "", "metrics_version": 2,
    "project_version": "0.1.0", "protocol": "", "departures": None,
}  # fmt: skip


def other(value: Any) -> Any:
    if isinstance(value, tuple):
        return (*value, "another")
    return f"not {value}, no more" if isinstance(value, str) else value + 1


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def result(folder: Path, name: str, **changes: Any) -> Path:
    card = Card(**{**WHOLE, **changes})
    line = {"name": "inception", "step": card.step, "metrics": {"fid": {"value": 8.3}}, "card": card.plain()}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(line))
    return path


@pytest.mark.parametrize("field", names_of(PROTOCOL))
def test_two_cards_that_differ_in_one_setting_are_never_side_by_side_without_it(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = other(WHOLE[field])
    a, b = result(tmp_path, "a"), result(tmp_path, "b", **{field: changed})
    assert differences(load(a).card, load(b).card) == [(field, WHOLE[field], changed)]
    status, out, _ = run_here(main, "python -m trainer", ["compare", a, b], capsys)
    assert status == 1
    assert "not measured alike" in out
    assert any(line.split()[:1] == [field] for line in out.splitlines()), out
    assert words_of(field) in out
    status, out, _ = run_here(main, "python -m trainer", ["compare", a, b, "--json"], capsys)
    assert status == 1
    assert json.loads(out)["differences"] == [{"field": field, "a": plain(WHOLE[field]), "b": plain(changed)}]
    assert json.loads(out)["alike"] is False


@pytest.mark.parametrize("field", ["labels", "decoder_sha256", "n_images"])
def test_what_one_or_both_do_not_know_is_named(field: str, tmp_path: Path) -> None:
    a, b, c = result(tmp_path, "a"), result(tmp_path, "b", **{field: None}), result(tmp_path, "c", **{field: None})
    assert differences(load(a).card, load(b).card) == [(field, WHOLE[field], None)]
    assert "known of one only" in text(load(a), load(b))
    assert unknown_to_both(load(b).card, load(c).card) == [field]
    assert f"known of neither, and so perhaps different: {field}" in text(load(b), load(c))
    assert not compared(load(b), load(c))["alike"]


def test_what_is_known_of_neither_is_named_of_samples_of_other_programs_too(tmp_path: Path) -> None:
    drawn = dict.fromkeys(DRAWN)
    a, b = load(result(tmp_path, "a", **drawn)), load(result(tmp_path, "b", **drawn))
    (line,) = [line for line in text(a, b).splitlines() if line.startswith("known of neither")]
    assert line == f"known of neither, and so perhaps different: {', '.join(DRAWN)}"
    assert compared(a, b)["unknown"] == DRAWN
    of_spaces = dict.fromkeys(("divisors", "divisors_of", "references_sha256")) | {"extractor": "fdr6"}
    a, b = load(result(tmp_path, "a", **of_spaces)), load(result(tmp_path, "b", **of_spaces))
    assert "known of neither, and so perhaps different: references_sha256, divisors, divisors_of" in text(a, b)
    of_one_space = of_spaces | {"extractor": "inception"}  # of before there were these fields, which do not apply to it
    assert compared(load(result(tmp_path, "a", **of_one_space)), load(result(tmp_path, "b")))["alike"]


def test_results_alike_are_told_so_whatever_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject = {"run": "/runs/b", "step": 7, "checkpoint_sha256": "z", "images": "/j", "reference": "/elsewhere/adm.npz"}
    a, b = result(tmp_path, "a"), result(tmp_path, "b", **subject)
    status, out, _ = run_here(main, "python -m trainer", ["compare", a, b], capsys)
    assert status == 0
    assert "measured alike" in out
    assert "a, step 400,000" in out
    assert "b, step 7" in out
    (tmp_path / "old.json").write_text(json.dumps({"name": "inception", "metrics": {"fid": {"value": 1.0}}}))
    shown = text(load(a), load(tmp_path / "old.json"))
    assert "old: samples of another program, or of before cards; how they were drawn is unknown" in shown
    assert "unknown" in shown
    status, _, err = run_here(main, "python -m trainer", ["compare", a, tmp_path / "nowhere.json"], capsys)
    assert status == 2
    assert "does not exist; name a JSON file that `evaluate` wrote, its folder, or a run" in err
    with pytest.raises(UserError, match="holds 3 results"):
        load(tmp_path)
    assert load(tmp_path, "b").card.step == 7
    (tmp_path / "later.json").write_text(json.dumps({"name": "x", "metrics": {}, "card": {"version": 2}}))
    with pytest.raises(UserError, match="version"):
        load(tmp_path / "later.json")


def test_every_field_has_words_a_kind_and_null_as_its_default() -> None:
    assert set(WHOLE) == {each.name for each in dataclasses.fields(Card)} - {"version"}
    for each in dataclasses.fields(Card):
        if each.name != "version":
            assert each.default is None
            assert each.metadata["kind"] in ("subject", "protocol", "note")
            assert each.metadata["words"]
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    assert not [name for name in WHOLE if f"`{name}`" not in page], "docs/evaluation.md lacks fields"


def measured(tmp_path: Path, n: int = 60, run: Path | None = None, **options: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for name, rows in (("generated", n), ("reference", 80)):
        features = rng.standard_normal((rows, 5)).astype(np.float32)
        path = str(tmp_path / "drawn") if name == "generated" else "reference"
        record = {"path": path, "n": rows, "kind": "folder", "resolution": 0, "size": [256, 128], "digest": name}
        write_feature_file(tmp_path / f"{name}.npz", {"features": features}, VIT, record)
    files = (tmp_path / "generated.npz", tmp_path / "reference.npz")
    return evaluate(*files, Description(encoder="vit"), out=tmp_path / "out", run=run, **options)


def test_samples_of_another_program_have_a_card_of_what_was_measured_alone(tmp_path: Path) -> None:
    card = Card(**measured(tmp_path)["card"])
    assert card.of_another_program
    assert {"labels", "steps", "rounding", "decoder_sha256", "guidance", "seed"} <= set(card.unknown)
    assert (card.n_images, card.n_reference, card.extractor, card.resolution, card.crop) == (
        60,
        80,
        "vit",
        "128×256",
        0,
    )
    assert (card.reference_sha256, card.extractor_resize, card.metrics_version) == ("reference", "x/255", 2)
    assert (card.protocol, card.departures) == (None, None)


AS_PUBLISHED = WHOLE | {
    "protocol": "repa-unguided", "decoder": "/models/sd-vae-ft-ema", "reference": "/x/VIRTUAL_imagenet256_labeled.npz",
    "extractor_sha256": "6726825d" + "0" * 56, "extractor_resize": "TensorFlow 1 bilinear to 299, (x-128)/128",
}  # fmt: skip
NOT_FIXED = (  # what a protocol leaves to whoever draws, what is not known of a release, what does not apply to REPA's
    "seed", "weaker_sha256", "decoder_sha256", "reference_sha256", "references_sha256", "divisors", "divisors_of",
    "guidance_class", "guidance_class_low", "guidance_class_high",
)  # fmt: skip


@pytest.mark.parametrize("field", [*names_of(PROTOCOL), "decoder", "reference"])
def test_no_setting_of_a_protocol_is_changed_unnoticed(field: str) -> None:
    card = Card(**AS_PUBLISHED)
    assert departures_of(card) == ()
    for value in (other(AS_PUBLISHED[field]), None):
        named = {each.partition(":")[0] for each in departures_of(dataclasses.replace(card, **{field: value})) or ()}
        assert field in NOT_FIXED or field in named, value
        assert named <= {field}


@pytest.mark.parametrize(
    ("changes", "departures"),
    [
        ({"extractor_sha256": "0" * 64}, ["extractor_sha256: 000000000000…, not 6726825d…"]),
        ({"resolution": "512×512", "crop": 128}, ["resolution: 512×512, not 256×256", "crop: 128, not 0"]),
        ({"ema_decay": 0.9}, ["ema_decay: 0.9, not 0.9999"]),
        ({"metrics_version": 1}, ["metrics_version: 1, not 2"]),
        ({"n_reference": 10_000}, ["n_reference: 10000, not 0"]),
        ({"classes": 10}, ["classes: 10, not 1000"]),
        ({"calls": 499}, ["calls: 499, not 250"]),  # which no setting accounts for
        ({"steps": 4, "calls": 4}, ["steps: 4, not 250"]),  # of which the calls follow
    ],
)
def test_departures_are_told_once_and_in_words(changes: dict[str, Any], departures: list[str]) -> None:
    assert list(departures_of(Card(**AS_PUBLISHED | changes)) or ()) == departures


OF_CLASS = {"class_noise": "own", "guidance_class": 2.3, "guidance_class_low": 0.0, "guidance_class_high": 0.85}
REG = AS_PUBLISHED | OF_CLASS | {
    "protocol": "reg", "guidance": 2.3, "guidance_high": 0.85, "guidance_by": "null label", "guided_calls": 211,
}  # fmt: skip
RIT = AS_PUBLISHED | OF_CLASS | {
    "protocol": "rit", "labels": "balanced", "sampler": "heun", "equation": "ode", "steps": 25, "calls": 49,
    "guided_calls": 32, "shift": 24**0.5, "last_step_from": 24**0.5 / 25 / (1 + (24**0.5 - 1) / 25), "guidance": 3.7,
    "guidance_low": 0.02, "guidance_high": 0.9, "guidance_by": "null label", "guidance_class": 3.7,
    "guidance_class_low": 0.02, "guidance_class_high": 0.9, "class_noise": "mean", "precision": "fp32 on cuda",
    "rounding": "round", "decoder": "/x/RAE-dinov2-wReg-small-ViTXL-n08", "reference": "/x/imagenet256_stats.npz",
}  # fmt: skip


@pytest.mark.parametrize(
    ("card", "changes", "departures"),
    [
        (REG, {}, []),
        (REG, {"class_noise": "mean"}, ["class_noise: mean, not own"]),
        (REG, {"guidance_class_low": 0.1}, ["guidance_class_low: 0.1, not 0"]),
        (REG, {"guidance_class_high": 0.3}, ["guidance_class_high: 0.3, not 0.85"]),
        (REG, {"guidance_class": 1.0}, ["guidance_class: 1, not 2.3"]),
        (RIT, {}, []),
        (RIT, {"class_noise": "own"}, ["class_noise: own, not mean"]),
        (RIT, {"shift": 1.0}, ["shift: 1, not 4.89898"]),
        (RIT, {"sampler": "euler"}, ["sampler: euler, not heun"]),
        (RIT, {"labels": "random"}, ["labels: random, not balanced"]),
        (RIT, {"decoder": "nyu-visionx/RAE-dinov2-wReg-small-ViTXL-n08"}, []),
        (RIT, {"decoder": "/x/RAE-dinov2-wReg-base-ViTXL-n08"}, [
            "decoder: /x/RAE-dinov2-wReg-base-ViTXL-n08, not nyu-visionx/RAE-dinov2-wReg-small-ViTXL-n08"]),
        (RIT, {"reference": "/x/VIRTUAL_imagenet256_labeled.npz"}, [
            "reference: VIRTUAL_imagenet256_labeled.npz, not imagenet256_stats.npz"]),
    ],
)  # fmt: skip
def test_departures_of_models_with_a_class_token(
    card: dict[str, Any], changes: dict[str, Any], departures: list[str]
) -> None:
    assert list(departures_of(Card(**card | changes)) or ()) == departures


def test_departures_stand_in_the_result(tmp_path: Path) -> None:
    (tmp_path / "drawn").mkdir()
    noted = {name: value for name, value in AS_PUBLISHED.items() if name != "departures"} | {"labels": "balanced"}
    (tmp_path / "drawn" / SETTINGS_FILE).write_text(json.dumps({"card": noted}))
    assert measured(tmp_path)["card"]["departures"] == [
        "labels: balanced, not random",
        "n_images: 60, not 50000",
        "resolution: 128×256, not 256×256",
        "extractor: vit, not inception",
        "reference: reference, not VIRTUAL_imagenet256_labeled.npz",
    ]
    guided = measured(tmp_path, protocol="repa")["card"]["departures"]
    assert {"guidance: 1, not 1.8", "guidance_high: 1, not 0.7", "guidance_by: nothing, not null label"} <= set(guided)
    with pytest.raises(UserError, match="--protocol nope is not known"):
        measured(tmp_path, protocol="nope")


def test_a_run_s_record_has_the_cards_and_older_lines_are_read(tmp_path: Path, micro_run: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "latest", "checkpoints"):
        (run / name).symlink_to(micro_run / name)
    (run / "evaluations.jsonl").write_text(json.dumps({"name": "vit", "metrics": {"fd": {"value": 1.0}}}) + "\n")
    found = measured(tmp_path, run=run)
    old, new = read_record(run)
    assert old.card == Card()
    assert new.card.plain() == json.loads(json.dumps(found["card"]))
    assert new.metrics["fd"].interval == pytest.approx(tuple(found["metrics"]["fd"]["interval"]))
    assert load(run).card == new.card
    with pytest.raises(UserError, match=r"has no result by inception; measure it with `python -m trainer score"):
        load(run, "inception")


def test_epochs_until_an_unguided_fid_of_two() -> None:
    def line(step: int | None, fid: float, **card: Any) -> Evaluation:
        return Evaluation(name="inception", step=step, metrics={"fid": Metric(value=fid)}, card=Card(**card))

    lines = [
        line(400_000, 1.9, guidance=1.8),
        line(100_000, 1.0),  # nothing says that it is unguided
        line(None, 1.0, guidance=1.0),
        line(4_000_000, 1.7, guidance=1.0),
        line(2_000_000, 1.99, guidance=1.0),
        line(1_000_000, 2.4, guidance=1.0),
    ]
    found = epochs_until(lines, batch=256, n_images=1_281_167)
    assert found is not None
    assert (found.step, found.fid) == (2_000_000, 1.99)
    assert found.epochs == pytest.approx(2_000_000 * 256 / 1_281_167)
    assert epochs_until(lines[:3], batch=256, n_images=1_281_167) is None
