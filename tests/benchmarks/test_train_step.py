"""The training-step benchmark runs from end to end, counts what it should, and makes room when the memory is short."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import flops, step_worker, train_step
from benchmarks.methods import method
from benchmarks.online import ENCODERS
from benchmarks.public_repa import PublicStep
from benchmarks.random_store import count_places, features_path, write
from benchmarks.step_worker import Ours, Request, Step, Task, Timer
from benchmarks.train_step import Case, Row, parse, ratio, widths_of
from storage.base.errors import UserError
from trainer.config.presets import preset
from trainer.config.tree import override

CPU = torch.device("cpu")
WIDTHS = (384, 768)


@pytest.mark.slow
def test_the_smallest_setting_gives_a_whole_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        f"--device cpu --presets sit-tiny-2,sit-tiny-2:stopped --batches 1 --compile no --encoder dinov2-vits14 "
        f"--rounds 1 --seconds 0.01 --rows 8 --dtype int8 --directory {tmp_path} --out {tmp_path}/out"
    )
    assert train_step.main(options.split()) == 0
    table = (tmp_path / "out" / "train_step.md").read_text()
    assert table in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "sit-tiny-2" in line]
    whole, stopped = ("sit-tiny-2, 1", "sit-tiny-2:stopped, 1")
    assert [row[:2] for row in rows] == [
        *([whole, variant] for variant in ("store", "ceiling", "online")),
        *([stopped, variant] for variant in ("store", "ceiling")),
    ]
    assert all(float(row[2]) > 0 and float(row[7]) > 0 for row in rows)
    assert rows[0][7] == rows[3][7] == "1.000"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize(
    ("name", "encoder", "online", "with_vae"),
    [
        ("sit-b-2", "dinov2-vitb14", 1.3, 3.1),
        pytest.param("sit-xl-2", "dinov2-vitb14", 1.06, 1.4, marks=pytest.mark.slow),
        pytest.param("sit-b-2", "dinov2-vitg14", 5.0, 6.9, marks=pytest.mark.slow),
        pytest.param("sit-xl-2", "dinov2-vitg14", 1.8, 2.2, marks=pytest.mark.slow),
    ],
)
def test_ratios_of_flops_are_the_design_s(name: str, encoder: str, online: float, with_vae: float) -> None:
    case = Case(preset=name, batch=32, args=parse(["--encoder", encoder]))
    assert case.arithmetic("store") == case.arithmetic("ceiling") == 1
    assert case.arithmetic("online") == case.arithmetic("public") == pytest.approx(online, rel=0.03)
    assert case.arithmetic("online+vae") == pytest.approx(with_vae, rel=0.03)


SMALL = {"model.depth": 1, "model.width": 32, "model.heads": 2, "model.align_block": (1,), "precision": "fp32",
         "model.context_block": 1}  # fmt: skip
SMALL_HEAD = {"model.head_width": 768, "model.head_depth": 1}


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("sit-xl-2", ["store", "ceiling", "online"]),
        ("sit-xl-2:irepa", ["store", "ceiling", "online"]),
        ("sit-xl-2:irepa-1", ["store", "ceiling", "online"]),
        ("sit-xl-2:stopped", ["store", "ceiling"]),
        ("sit-xl-2-vanilla", ["store", "ceiling"]),
        ("sit-xl-2-reg", ["store", "ceiling", "online"]),
        ("sit-xl-1", ["store", "ceiling", "online"]),
        ("lightningdit-xl-1", ["store", "ceiling"]),
        ("rit-xl-1", ["store", "ceiling", "online"]),
        ("ditdh-xl-1", ["store", "ceiling", "online"]),
    ],
)
def test_every_method_takes_steps_from_a_store(
    name: str, variants: list[str], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_steps(name, variants, variants[:1], store, monkeypatch)


def test_a_model_that_learns_tokens_has_those_of_its_own_encoder_in_the_store() -> None:
    args = parse(["--presets", "sit-xl-2,rit-xl-1,ditdh-xl-1", "--encoder", "dinov2-vitb14"])
    assert widths_of(args) == [768, 384]
    groups = {name: Case(preset=name, batch=2, args=args).features for name in args.presets}
    of_b, of_s = "features/random", "features/random-384"
    assert groups == {"sit-xl-2": of_b, "rit-xl-1": of_s, "ditdh-xl-1": of_b}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sit-xl-2-reg", "rit-xl-1", "ditdh-xl-1"])
def test_steps_are_taken_with_tokens_from_an_encoder(name: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a class token, or learnt."""
    variants = ["store", "ceiling", "online"]
    take_steps(name, variants, variants, store, monkeypatch)


def take_steps(name: str, variants: list[str], taken: list[str], store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the methods' own settings in a small model; at full size a CPU would take minutes."""
    small = SMALL | (SMALL_HEAD if name.startswith("ditdh") else {})
    monkeypatch.setattr(step_worker, "method", lambda name: override(method(name), small))
    monkeypatch.setattr(step_worker, "WARM_UP_STEPS", 1)
    case = Case(preset=name, batch=2, args=parse(["--encoder", "dinov2-vits14", "--device", "cpu", "--compile", "no"]))
    assert [row.variant for row in case.rows()] == variants
    features = features_path(ENCODERS[case.encoder][1], WIDTHS)
    ours = Ours(
        Task(preset=name, batch=2, store=str(store), encoder=case.encoder, device="cpu", features=features), CPU
    )
    for variant in taken:
        found = Timer(ours, 2, CPU).answer(Request(variant=variant, compiled=False, seconds=1e-9))
        assert found["images_per_s"] > 0
    ours.data.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of eight rows, for vision encoders of these widths."""
    root = tmp_path_factory.mktemp("random") / "store"
    write(root, 8, WIDTHS, "float16")
    for width in WIDTHS:
        count_places(root, features_path(width, WIDTHS))
    return root


def test_the_table_of_the_methods_page_is_what_the_script_prints() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert f"\n\n{flops.lines()}\n\n" in page


def test_a_ratio_is_the_median_of_those_within_a_round() -> None:
    def rounds(*rates: float) -> list[dict[str, Any]]:
        return [{"images_per_s": rate} for rate in rates]

    measured = {
        Row(variant="store", compiled=True): rounds(10, 20, 60),
        Row(variant="store", compiled=False): rounds(5, 9, 20),
        Row(variant="ceiling", compiled=False): rounds(10, 10, 10),
        Row(variant="public", compiled=False): rounds(5, 5, 20),
        Row(variant="online", compiled=True): [],
    }
    assert ratio(Row(variant="ceiling", compiled=False), measured) == "0.900"
    assert ratio(Row(variant="public", compiled=False), measured) == "3.000"  # the better of ours
    assert ratio(Row(variant="store", compiled=True), measured) == "1.000"


class Hungry:
    """Needs four micro-batches, and for ever more memory with `never`."""

    def __init__(self, never: bool = False) -> None:
        self.asked: list[int] = []
        self.never = never

    @contextlib.contextmanager
    def steps(self, request: Request, micro_batches: int) -> Iterator[tuple[Iterator[Any], Step]]:
        self.asked.append(micro_batches)
        if self.never or micro_batches < 4:
            raise torch.OutOfMemoryError("too large")
        yield iter(range(1000)), lambda batch: 0.25


def test_a_step_that_does_not_fit_is_taken_in_parts() -> None:
    hungry = Hungry()
    timer = Timer(hungry, 32, CPU)  # type: ignore[arg-type]
    timer.answer(Request(variant="store", compiled=True, seconds=0))
    found = timer.answer(Request(variant="store", compiled=True, seconds=1e-9))
    assert hungry.asked == [1, 2, 4, 4]
    assert found["micro_batches"] == 4
    assert found["images_per_s"] > 0
    never = Timer(Hungry(never=True), 12, CPU)  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError):
        never.answer(Request(variant="store", compiled=True, seconds=0))
    assert never.trainer.asked == [1, 2, 4]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--rows 511", "--rows must be two batches at least, 512, got 511"),
        ("--presets sit-b-3", r"unknown preset 'sit-b-3'; did you mean .*sit-b-2"),
        ("--presets sit-b-2:haste", r"there is no change 'haste', but irepa, irepa-1, stopped"),
        ("--rounds 0", "--rounds and --batches must be at least 1, got 0 and 32"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(options: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(options.split())


def test_a_folder_that_is_no_clone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no train.py and models/sit.py; clone REPA"):
        PublicStep(tmp_path, preset("sit-b-2").model, "dinov2-vitb14", 1000, CPU)
