"""The commands that measure a run as another was: taken by the real parsers, they come to the card to be matched."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.encoders.tiny import TINY_VAE
from storage.base import commands as storage_commands
from tests.trainer.evaluation.report_runs import draw, evaluation, make_run, plain
from tests.trainer.evaluation.test_card import WHOLE
from trainer.__main__ import main
from trainer.config.tree import override
from trainer.evaluation.generate import plan as plans
from trainer.evaluation.generate.image_files import NOTED
from trainer.evaluation.options import EvaluateConfig, GenerateConfig
from trainer.evaluation.quality.card import PROTOCOL, Card, names_of
from trainer.evaluation.quality.measures import VERSION
from trainer.evaluation.quality.record import Evaluation, ImagesRecord, Metric
from trainer.evaluation.report.alike import evaluated
from trainer.evaluation.report.methods import methods_of
from trainer.evaluation.report.outcome import outcome
from trainer.evaluation.report.page import page
from trainer.evaluation.report.remeasure import Again, apart_for_good, drawing_like, evaluation_like, measure_alike
from trainer.evaluation.report.run_record import RunRecord, read_runs
from trainer.evaluation.report.verdict import verdict

NOWHERE = Evaluation(name="inception", metrics={})


def taken(line: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the commands of a line are asked for, as the real parsers have it; none of them is run."""
    configs: list[Any] = []
    real = storage_commands.imported

    def imported(spelling: str) -> Any:
        return configs.append if spelling.startswith("trainer.commands:") else real(spelling)

    with monkeypatch.context() as patched:
        patched.setattr(storage_commands, "imported", imported)
        for one in line.split(" && "):
            words = shlex.split(one)
            assert words[:3] == ["python", "-m", "trainer"]
            main(words[3:])
    return configs


def noted(config: GenerateConfig) -> Card:
    """What `generate` would write of images beside them, on whatever device it was asked for."""
    device = torch.device("cpu" if config.device == "auto" else config.device)
    return Card(**plans.plan(config, device).settings[NOTED])


def whole(drawn: Card, config: EvaluateConfig, n: int) -> Card:
    """The card of a result: what `evaluate` would add, by what it was asked for, of references that lie where named."""
    return dataclasses.replace(
        drawn,
        n_images=n,
        crop=config.resolution,
        reference=str(config.reference),
        reference_sha256=str(config.reference),
        n_reference=config.n_reference,
        extractor=config.encoder,
        extractor_sha256=f"{config.encoder}'s",
        extractor_vector=config.token,
        extractor_precision="",
        extractor_resize="299",
        resolution="64×64",
        metrics_version=VERSION,
    )


def like(card: Card, config: EvaluateConfig) -> Evaluation:
    """A line of a record with a card."""
    held_out = {"held_out": str(config.held_out or "published")} if config.encoder == "fdr6" else {}
    return Evaluation(
        name=config.encoder,
        metrics={"fid": Metric(value=1.0, n_generated=card.n_images, n_reference=config.n_reference or None)},
        encoder={"name": config.encoder, "vector": config.token, **held_out},
        generated=ImagesRecord(resolution=config.resolution),
        card=card,
        asked={"reference": str(config.reference), "n_reference": config.n_reference},
    )


def protocol(card: Card) -> dict[str, Any]:
    return {name: getattr(card, name) for name in names_of(PROTOCOL)}


def again(run: RunRecord, line: Evaluation) -> Again:
    return measure_alike(run, NOWHERE, line, evaluated(line, "fid"))


OF_ODE = {"heun": st.booleans(), "end": st.floats(0, 0.5)}
OF_ALL = {
    "labels": st.sampled_from(["random", "balanced", "uniform"]),
    "seed": st.integers(0, 2**63 - 1),
    "guidance": st.floats(1, 9),
    "guidance_low": st.floats(0, 0.5),
    "guidance_high": st.floats(0.5, 1),
    "guidance_channels": st.integers(0, 4),
    "shift": st.floats(0.1, 9),
    "rounding": st.sampled_from(["round", "truncate"]),
    "precision": st.sampled_from(["auto", "fp32", "tf32", "bf16", "fp16"]),
    "device": st.sampled_from(["cpu", "cuda"]),
}
NAMED = ("repa", "repa-unguided", "reg-unguided", "lightningdit-64ep", "rae-unguided")
COUNTS = {"steps": st.integers(2, 60), "n": st.integers(1, 60_000)}
GENERATED = st.one_of(
    st.fixed_dictionaries({"sampler": st.just("sde"), **COUNTS}, optional=OF_ALL),
    st.fixed_dictionaries({"sampler": st.just("ode"), **COUNTS}, optional=OF_ALL | OF_ODE),
    st.fixed_dictionaries({"protocol": st.sampled_from(NAMED)}, optional=OF_ALL),
)
OF_MEASURING = {
    "token": st.sampled_from(["cls", "mean"]),
    "resolution": st.integers(0, 512),
    "n_reference": st.integers(0, 10_000),
}
PLACES = st.sampled_from(["/a reference.npz", "https://x.org/store"])
MEASURED = st.one_of(
    st.fixed_dictionaries(
        {"reference": PLACES, "encoder": st.sampled_from(["inception", "dinov2-vitb14"])}, optional=OF_MEASURING
    ),
    st.fixed_dictionaries(
        {"reference": PLACES, "encoder": st.just("fdr6")},
        optional=OF_MEASURING | {"held_out": st.just(Path("/held out"))},
    ),
)


@pytest.fixture
def opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is opened for a plan, which takes longer than the plan."""
    monkeypatch.setattr(plans, "open_run", functools.cache(plans.open_run))
    monkeypatch.setattr(plans, "_sha256", functools.cache(plans._sha256))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawing=GENERATED, measuring=MEASURED)
def test_a_command_comes_to_the_card_that_it_is_to_match(
    micro_run: Path,
    opened_once: None,
    monkeypatch: pytest.MonkeyPatch,
    drawing: dict[str, Any],
    measuring: dict[str, Any],
) -> None:
    """Whatever the run that it is for would have drawn by itself."""
    (run,) = read_runs([micro_run])
    asked = GenerateConfig(run=micro_run, out=micro_run / "samples-none", vae=str(TINY_VAE), **drawing)
    measured = EvaluateConfig(images=Path("/i"), **measuring)
    wanted = whole(noted(asked), measured, asked.n)
    line = like(wanted, measured)
    before = dataclasses.replace(NOWHERE, card=Card(decoder=str(TINY_VAE)))
    found = measure_alike(run, before, line, evaluated(line, "fid"))
    assert found.note == ""
    generate, evaluate = taken(found.command, monkeypatch)
    assert evaluate.images == generate.out
    assert evaluate.run == micro_run
    assert protocol(whole(noted(generate), evaluate, generate.n)) == protocol(wanted)
    assert like(wanted, evaluate).encoder == line.encoder, "held-out images, and the vector"


@pytest.fixture
def run(shared_tiny_store: Path, tmp_path: Path) -> RunRecord:
    """A run that was not measured."""
    (record,) = read_runs([make_run(tmp_path, shared_tiny_store, 1, 0.5, measured=False)])
    return record


def of(run: RunRecord, **changes: Any) -> Card:
    """A card that images of the run may have."""
    own = {"ema_decay": run.config.ema_decay, "classes": 5, "n_images": 12, "metrics_version": VERSION}
    return Card(**{**WHOLE, "n_reference": 100, **own, **changes})


def line_of(card: Card) -> Evaluation:
    return like(card, EvaluateConfig(images=Path("/i"), reference="/r.npz"))


def test_images_that_are_drawn_alike_are_measured_and_not_drawn_again(run: RunRecord) -> None:
    card = of(run)
    folder = draw(run.path, card=dataclasses.replace(card, step=run.checkpoint_step).plain())
    (drawn,) = read_runs([run.path])
    assert again(drawn, line_of(card)).command.startswith(f"python -m trainer evaluate {folder} --reference /r.npz")
    for other in ({"guidance": 1.8, "guided_calls": 250, "guidance_by": "null label"}, {"n_images": 13}, {"seed": 1}):
        assert again(drawn, line_of(of(run, **other))).command.startswith("python -m trainer generate"), other


def test_a_decoder_is_of_the_run_s_latents(run: RunRecord) -> None:
    """That of other latents would decode noise, and it would be recorded."""
    card = of(run, decoder="/vae/a", seed=7)
    same, other, unknown = (line_of(of(run, decoder=decoder)) for decoder in ("/vae/a", "/vae/b", None))
    assert "--vae /vae/a" in measure_alike(run, same, line_of(card), evaluated(line_of(card), "fid")).command
    found = measure_alike(run, other, line_of(card), evaluated(line_of(card), "fid"))
    assert (found.command, found.note) == ("", "cannot be measured alike: decoder /vae/b, not /vae/a")
    assert "--vae" not in measure_alike(run, unknown, line_of(card), evaluated(line_of(card), "fid")).command


def test_a_step_that_is_gone_is_named_and_not_taken_for_the_newest(run: RunRecord) -> None:
    """The measured step where its checkpoint is left; else the newest, which is another number."""
    other = dataclasses.replace(run, checkpoint_step=run.checkpoint_step + 100)
    card = line_of(of(run))

    def found(step: int | None) -> Again:
        line = dataclasses.replace(NOWHERE, step=step)
        return measure_alike(other, line, card, evaluated(card, "fid"))

    for step in (None, other.checkpoint_step):
        assert "--checkpoint" not in found(step).command
        assert found(step).note == ""
    assert f"--checkpoint {run.checkpoint_step}" in found(run.checkpoint_step).command
    assert found(run.checkpoint_step).note == ""
    gone = found(7)
    assert "--checkpoint" not in gone.command
    assert gone.note == f"its checkpoint of step 7 is gone, so this is of step {other.checkpoint_step:,}"
    none_left = dataclasses.replace(other, checkpoint_step=0)
    found_none = measure_alike(none_left, dataclasses.replace(NOWHERE, step=7), card, evaluated(card, "fid"))
    assert found_none.command == ""
    assert found_none.note == "cannot be measured alike: the checkpoint of step 7 is gone, and no other is left"


def test_a_measurement_is_asked_for_as_the_other_was(run: RunRecord) -> None:
    """Named weights, the number of draws, and held-out images by where they lie, not as they were typed."""
    card = of(run)
    asked = {"reference": "/r.npz", "n_reference": 0, "weights": "/w/inception.pth", "resamples": 0, "held_out": None}
    line = dataclasses.replace(line_of(card), asked=asked)
    found = evaluation_like(run, "/i", line, evaluated(line, "fid"))
    assert (found.weights, found.resamples, found.held_out) == (Path("/w/inception.pth"), 0, None)
    encoder = {"name": "fdr6", "held_out": "here"}
    six = dataclasses.replace(line, encoder=encoder, asked=asked | {"weights": None, "held_out": "/abs/here"})
    assert evaluation_like(run, "/i", six, evaluated(line, "fid")).held_out == Path("/abs/here")


def test_a_class_token_is_guided_as_the_card_says(run: RunRecord) -> None:
    config = override(run.config, {"model.class_token": True, "sample.guidance_class_low": 0.9})
    reg = dataclasses.replace(run, config=config)
    guided = {"guidance": 2.3, "guidance_low": 0.1, "guidance_high": 0.7, "guidance_by": "null label"}
    guided |= {"class_noise": "own", "guided_calls": None}
    for of_class in ((1.5, 0.0, 0.5), (0.0, 0.0, 1.0), (2.3, 0.1, 0.7)):
        names = ("guidance_class", "guidance_class_low", "guidance_class_high")
        card = of(run, **guided, **dict(zip(names, of_class, strict=True)))
        assert apart_for_good(reg, card) == []
        asked = drawing_like(reg, NOWHERE, card, 12)
        assert tuple(getattr(asked, name) for name in names) == of_class


@pytest.mark.parametrize("guidance", [1.0, 1.8])
@pytest.mark.parametrize("class_token", [False, True])
def test_a_method_s_own_is_no_other_way_of_measuring(run: RunRecord, guidance: float, class_token: bool) -> None:
    """A run with a class token is drawn as one without was, and the other way round; neither average's decay counts."""
    config = override(run.config, {"model.class_token": class_token})
    guided = {"guidance": guidance, "guided_calls": None, "ema_decay": 0.5}
    if guidance > 1:
        guided |= {"guidance_low": 0.1, "guidance_high": 0.7, "guidance_by": "null label"}
    if not class_token:
        guided |= {"class_noise": "own"}
        of_class = (guidance, 0.1, 0.7) if guidance > 1 else (0.0, 0.0, 1.0)
        names = ("guidance_class", "guidance_class_low", "guidance_class_high")
        guided |= dict(zip(names, of_class, strict=True))
    assert apart_for_good(dataclasses.replace(run, config=config), of(run, **guided)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": 1000}, "classes 5, not 1,000"),
        ({"weights": "model"}, "weights ema, not model"),
        ({"class_noise": "mean"}, "class noise none, not mean"),
        ({"labels": "given"}, "labels balanced, not given"),
        ({"sampler": "ddpm", "equation": "chain"}, "--sample.sampler ddpm cannot draw from --model.kind sit"),
        ({"metrics_version": VERSION - 1}, f"metrics version {VERSION}, not {VERSION - 1}, by which the other"),
        ({"steps": 10**12}, "steps 1000000000000"),
        ({"shift": 0.5, "times_end": -1.0, "sampler": "euler"}, "cannot be measured alike"),
        ({"guidance": 0.3}, "guidance"),
        ({"precision": "tf32 on a dream"}, "cannot be measured alike"),
    ],
    ids=str,
)
def test_what_is_the_run_s_own_is_named_and_no_command_is_given(
    run: RunRecord, changes: dict[str, Any], said: str
) -> None:
    found = again(run, line_of(of(run, **changes)))
    assert found.command == ""
    assert said in found.note
    assert found.note.startswith("cannot be measured alike: ")


def test_what_is_to_be_filled_in_or_cannot_be_known_is_said(run: RunRecord) -> None:
    weaker = of(run, guidance=1.5, guidance_by="weaker model", weaker_sha256="a" * 64, guided_calls=250)
    found = again(run, line_of(weaker))
    assert "--weaker WEAKER_RUN" in found.command
    assert found.note == f"WEAKER_RUN is the run whose averaged weights have the SHA-256 {'a' * 64}"
    unknown = again(run, line_of(of(run, labels=None, decoder_sha256=None)))
    assert unknown.note == "labels is not known of the others, so these compare once all are drawn again"
    assert "--labels" not in unknown.command


def test_a_page_has_what_cannot_be_measured_alike_without_a_command(shared_tiny_store: Path, tmp_path: Path) -> None:
    for seed, classes in ((1, 5), (2, 1000)):
        made = make_run(tmp_path, shared_tiny_store, seed, 0.5 * seed, measured=False)
        (record,) = read_runs([made])
        line = evaluation(3.0, card=of(record, classes=classes).plain())
        (made / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    records = read_runs([tmp_path])
    ((what, command),) = verdict(records, methods_of(records)).missing
    assert "measured otherwise; cannot be measured alike: classes" in what
    assert command == ""
    html = plain(page(records, "x", real=False))
    assert "cannot be measured alike: classes" in html
    assert "<code></code>" not in html
    _, following = outcome(records, tmp_path / "run-1" / "config.yaml")
    assert following.startswith("python -m http.server")
