"""`precompute --dry-run`: a plan without weights, and a time that says what it is based on, or that it is unknown."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from pipeline.__main__ import main
from pipeline.encoders import registry
from pipeline.encoders.catalogue import VAES, VISION
from pipeline.encoders.weights import MissingWeightsError
from pipeline.estimate import HOW_TO_KNOW, MIN_UNITS, estimate, in_words, pace, said_before
from pipeline.least_time import bound, gflop, machine_flops, operations
from pipeline.plan import Plan
from storage import UserError, open_store
from storage.codecs import stored_arrays
from storage.index import make_index
from storage.roots import open_root
from storage.torch import products
from tests.pipeline.fakes import Pictures, plan_of
from tests.pipeline.hub import empty_cache
from tests.pipeline.test_what_the_user_sees import ENCODERS, partly, write_pictures
from tests.stores import FEATURES, LATENTS


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub's cache with nothing in it, and a hub that must not be asked."""
    empty_cache(tmp_path / "hub", monkeypatch)


def dry(tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    if not (tmp_path / "data").exists():
        write_pictures(tmp_path / "data")
    store = tmp_path / "store"
    assert main(["precompute", "--data", str(tmp_path / "data"), "--store", str(store), *options, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_dry_run_needs_no_weights_and_fetches_none(
    tmp_path: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    real = huggingface_hub.hf_hub_download

    def from_the_cache_alone(*arguments: object, **options: object) -> object:
        assert options.get("local_files_only"), "the hub was asked"
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", from_the_cache_alone)
    monkeypatch.setattr("pipeline.least_time.machine_flops", lambda precisions: dict.fromkeys(precisions, 1e10))
    shown = dry(tmp_path, capsys, "--features", "dinov2-vitb14,mocov3-vits16", "--shard-rows", "2")
    assert "latents/sd-vae-ft-mse  moments 8×32×32 float16  16404 bytes an image  5 units to encode" in shown
    assert "features/dinov2-vitb14  cls 768 float16, patches 256×768 float16" in shown
    assert "hf download stabilityai/sd-vae-ft-mse" in shown
    assert "mocov3-vits16 are on no hub" in shown
    assert "unknown    without the weights: their SHA-256" in shown
    assert HOW_TO_KNOW in shown
    assert "sd-vae-ft-mse 273, features/dinov2-vitb14 46.3" in shown
    # 10 images of 273 + 46.3 + 12.3 GFLOP at 10 GFLOP/s
    assert "time       at least 6 minutes, if encoders ran at the 10 GFLOP/s that products of large matrices" in shown
    assert f"unknown    how much longer: this store has no {MIN_UNITS} units" in shown
    assert not (tmp_path / "store").exists()


def test_a_run_without_weights_is_refused_as_before(tmp_path: Path, no_weights: None) -> None:
    write_pictures(tmp_path / "data")
    with pytest.raises(UserError, match="neither in the Hugging Face cache nor can they be fetched"):
        main(["precompute", "--data", str(tmp_path / "data"), "--store", str(tmp_path / "store")])


def test_a_weight_file_that_is_named_and_not_there_is_a_mistake_in_a_dry_run_too(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data")
    line = ["precompute", "--data", str(tmp_path / "data"), "--store", str(tmp_path / "store"), "--dry-run"]
    with pytest.raises(UserError, match="weight file /nowhere of dinov2-vitb14 does not exist"):
        main([*line, "--latents", "none", "--features-weights", "/nowhere"])


def test_what_only_the_weights_know_of_shapes_is_an_error(tmp_path: Path, no_weights: None) -> None:
    write_pictures(tmp_path / "data")
    line = ["precompute", "--data", str(tmp_path / "data"), "--store", str(tmp_path / "store"), "--dry-run"]
    with pytest.raises(MissingWeightsError, match="someone/vae"):
        main([*line, "--latents", "someone/vae", "--features", "none"])


@pytest.mark.parametrize("name", [*VAES, *VISION])
def test_every_encoder_that_has_a_name_has_shapes_without_weights(name: str) -> None:
    resolve = registry.resolve_latents if name in VAES else registry.resolve_features
    spec = resolve(name)
    if spec.family == "tiny_vit":  # whose weights lie here
        return
    known = registry.outline(spec, resolution=256)
    assert known is not None
    assert known.weights_sha256 is None
    arrays = stored_arrays(known)
    if name in VAES:
        assert arrays["moments"][1][0] == VAES[name].channels * (2 if VAES[name].posterior else 1)
    else:
        assert arrays["patches"][1] == (256, VISION[name].width)


def test_without_weights_all_that_is_known_is_what_the_weights_say_too(tmp_path: Path) -> None:
    spec = registry.resolve_latents("tiny-vae")
    known, described = registry.outline(spec, resolution=128), registry.describe(spec, resolution=128)
    assert known is not None
    stored = described.plain()
    assert {name: stored[name] for name in known.plain()} == known.plain()
    assert "weights_sha256" in stored.keys() - known.plain().keys()


def test_a_group_that_is_there_is_taken_for_one_of_these_weights(
    tmp_path: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made with weights that were at hand then; what the catalogue knows is held against it all the same."""
    from pipeline.plan import create, make_plan
    from pipeline.sources import open_source
    from storage import Staging

    write_pictures(tmp_path / "data")
    source, store = open_source(str(tmp_path / "data")), tmp_path / "store"
    from pipeline.config import PrecomputeConfig

    config = PrecomputeConfig(
        data=str(tmp_path / "data"), store=str(store), latents="tiny-vae", features="none", resolution=128, shard_rows=4
    )
    with Staging(store) as staging:
        create(make_plan(config, source, source.listing().index, open_root(store)), source, staging)
    before = open_store(store).group_layout(LATENTS)[1]["identity_digest"]

    def gone(*_: object, **__: object) -> Path:
        raise MissingWeightsError("weights of tiny-vae are gone")

    monkeypatch.setattr("pipeline.encoders.vae.find_directory", gone)
    dry_config = dataclasses.replace(config, dry_run=True)
    plan = make_plan(dry_config, source, source.listing().index, open_root(store))
    assert plan.digests[LATENTS] == before
    assert plan.groups[0].lacks == "weights of tiny-vae are gone"
    other = dataclasses.replace(dry_config, precision="bf16")
    with pytest.raises(UserError, match=r"arithmetic: found .*, asked for"):
        make_plan(other, source, source.listing().index, open_root(store))


def plan_lines(shown: str) -> list[str]:
    """The lines that say what is planned, without the disk's free bytes: others write to it meanwhile."""
    return [re.sub(r", \d+\.\d\d GB free", "", line) for line in shown.splitlines()[:8]]


def test_the_command_that_comes_next_is_the_run_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = dry(tmp_path, capsys, *ENCODERS, "--flip", "--max-failures", "0.5")
    words = shlex.split(shown.strip().splitlines()[-1].removeprefix("next: "))
    assert words[:4] == ["python", "-m", "pipeline", "precompute"]
    assert "--dry-run" not in words
    assert main([*words[3:], "--dry-run"]) == 0
    again = capsys.readouterr().out
    assert plan_lines(again) == plan_lines(shown)


def test_json_ends_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = dry(tmp_path, capsys, *ENCODERS, "--json")
    found = json.loads(shown[shown.index("\n{") :])
    assert found["estimate"]["n_images"] == 10
    assert found["estimate"]["seconds"] is None


def test_the_time_is_that_of_earlier_units(tmp_path: Path) -> None:
    partly(tmp_path, range(4))
    source = Pictures(40, {}, "")
    plan = plan_of(str(tmp_path), source.listing().index, shard_rows=8)
    found = estimate(plan, source)
    paces = [pace(plan, group) for group in plan.groups]
    assert all(each is not None and each.n_units == 4 for each in paces)
    slowest = min(each.images_per_s for each in paces if each is not None)
    assert found.seconds == pytest.approx(8 / slowest)  # both groups were encoded by one run: together
    assert f"for {8} images" in found.lines[0]
    assert "4 units of run" in found.lines[1]
    assert "starting Ray" in found.lines[2]


def test_groups_of_two_runs_take_the_sum(tmp_path: Path) -> None:
    partly(tmp_path, range(4))
    source = Pictures(40, {}, "")
    plan = plan_of(str(tmp_path), source.listing().index, shard_rows=8)
    together = estimate(plan, source).seconds
    for unit in range(4):  # a later run's
        path = tmp_path / "receipts" / FEATURES / f"{unit:08d}.json"
        rewritten(path, run="another")
    paces = [pace(plan, group) for group in plan.groups]
    found = estimate(plan, source).seconds
    assert found == pytest.approx(sum(8 / each.images_per_s for each in paces if each is not None))
    assert together is not None
    assert found is not None
    assert found > together


def rewritten(path: Path, **made: object) -> None:
    """A receipt with another `made`, sealed anew."""
    from storage.receipts import read_receipt, write_receipt

    root = path.parents[3]
    layout, _ = open_store(root).group_layout(FEATURES)
    receipt = read_receipt(open_root(root), layout, int(path.stem))
    assert receipt is not None
    changed = dataclasses.replace(receipt, made={**receipt.made, **made})  # type: ignore[typeddict-item]
    path.unlink()
    write_receipt(open_root(root), layout, changed, "test")


def test_too_few_units_leave_the_time_unknown_and_decoding_is_measured(tmp_path: Path) -> None:
    partly(tmp_path, range(MIN_UNITS - 1))
    source = Pictures(40, {20: "broken"}, "", read_s=0.01)
    found = estimate(plan_of(str(tmp_path), source.listing().index, shard_rows=8), source)
    assert found.seconds is None
    text = "\n".join(found.lines)
    assert f"no {MIN_UNITS} units that one run made of {LATENTS}, {FEATURES}" in text
    rate = float(text.partition("decoding   ")[2].split(" ")[0])
    assert 0 < rate < 100  # a hundredth of a second is in each read
    assert "of which 1 failed" in text


def test_images_that_are_gone_leave_decoding_unknown_too(tmp_path: Path) -> None:
    class Gone(Pictures):
        def read_many(self, locations: object) -> object:  # type: ignore[override]
            raise OSError(5, "the server is gone")

    source = Gone(40, {}, "")
    found = estimate(plan_of(str(tmp_path), source.listing().index, shard_rows=8), source)
    assert "decoding   not measured: [Errno 5] the server is gone" in found.lines


def test_a_whole_store_takes_no_time(tmp_path: Path) -> None:
    partly(tmp_path, range(5))
    source = Pictures(40, {}, "")
    found = estimate(plan_of(str(tmp_path), source.listing().index, shard_rows=8), source)
    assert (found.n_images, found.seconds) == (0, 0.0)


def test_operations_are_the_catalogues(tmp_path: Path) -> None:
    plan = plan_of(str(tmp_path), Pictures(8, {}, "").listing().index, shard_rows=8)
    latents, features = plan.groups
    assert gflop(latents, 512) == 4 * gflop(latents, 256) == 4 * VAES["tiny-vae"].gflop_256
    assert gflop(features, 128) == VISION["tiny-vit"].gflop(128)


def big_plan(tmp_path: Path, units: range = range(0)) -> Plan:
    """500,000 images of 128 px, of which some units of 100,000 are done: 0.75 GFLOP and the ViT's each."""
    return dataclasses.replace(
        plan_of(str(tmp_path), make_index(KEYS, [0] * N, [""] * N, KEYS, [0] * N), shard_rows=100_000),
        missing={unit: (LATENTS, FEATURES) if unit else (FEATURES,) for unit in range(5) if unit not in units},
    )


N = 500_000
KEYS = [f"{row:06d}" for row in range(N)]


def test_a_bound_is_of_what_is_missing_in_each_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = big_plan(tmp_path, range(4, 5))
    latents, features = plan.groups
    halved = dataclasses.replace(features, spec=dataclasses.replace(features.spec, precision="bf16"))
    plan = dataclasses.replace(plan, groups=(latents, halved))
    flop = {"fp32": 3e5 * 0.75e9, "bf16": 4e5 * VISION["tiny-vit"].gflop(128) * 1e9}
    assert operations(plan) == pytest.approx(flop)
    rates = {"fp32": 1e10, "bf16": 1e12}
    monkeypatch.setattr("pipeline.least_time.machine_flops", lambda precisions: rates)
    seconds, words = bound(plan, "local")
    assert seconds == pytest.approx(flop["fp32"] / 1e10 + flop["bf16"] / 1e12)
    assert words.startswith("at least 6.3 hours, if encoders ran at the ")
    unknown = dataclasses.replace(latents.spec, store_name="somebody-s")
    plan = dataclasses.replace(plan, groups=(dataclasses.replace(latents, spec=unknown), features))
    monkeypatch.setattr("pipeline.least_time.machine_flops", lambda precisions: {"fp32": 1e6})
    assert bound(plan, "")[1].endswith("; without latents/tiny-vae, whose operations the catalogue does not count")


def test_what_another_machine_computes_is_not_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("pipeline.least_time.machine_flops")
    seconds, words = bound(big_plan(tmp_path), "ray://head:10001")
    assert seconds is None
    assert re.match(r"not known: \d+ TFLOP are to be computed on the Ray cluster at ray://head:10001, whose ", words)
    assert said_before(big_plan(tmp_path), "auto")[0].startswith("time       not known: ")
    few = plan_of(str(tmp_path), Pictures(40, {}, "").listing().index, shard_rows=8)
    assert bound(few, "") == (None, ""), "too little to measure for"


def test_a_long_run_says_so_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.least_time.machine_flops", lambda precisions: {"fp32": 1e7})
    (line,) = said_before(big_plan(tmp_path), "")
    assert re.match(r"time       at least 1\d,\d{3} hours, if encoders ran at the 0 GFLOP/s that products of ", line)
    monkeypatch.setattr("pipeline.least_time.machine_flops", lambda precisions: None)
    assert said_before(big_plan(tmp_path), "") == ()


def test_earlier_units_tell_the_time_of_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("pipeline.least_time.machine_flops")
    partly(tmp_path, range(4))
    plan = plan_of(str(tmp_path), Pictures(40, {}, "").listing().index, shard_rows=8)
    assert said_before(plan, "") == (), "below a minute"
    monkeypatch.setattr("pipeline.estimate.rate", lambda units: 0.01)
    lines = said_before(plan, "")
    assert lines[0] == "time       13 minutes or so for 8 images"
    assert lines[1].startswith("based on   earlier units of this store")


@pytest.mark.slow  # in default: what that process prints
def test_this_machine_is_measured_in_a_process_of_its_own() -> None:
    found = machine_flops(["fp32", "bf16"])
    assert found is not None
    assert all(1e8 < found[precision] < 1e17 for precision in ("fp32", "bf16"))


def test_a_machine_prints_how_fast_it_multiplies_in_each_precision(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        products, "product_flops", lambda device, dtype: float(torch.get_num_threads() * dtype.itemsize)
    )
    before = torch.get_num_threads()
    products.main(["1", "fp32", "bf16"])
    torch.set_num_threads(before)
    n = max(1, torch.cuda.device_count())
    assert json.loads(capsys.readouterr().out) == {"fp32": 4.0 * n, "bf16": 2.0 * n}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "less than a second"),
        (40, "40 s"),
        (90, "1.5 minutes"),
        (3600 * 3.14, "3.1 hours"),
        (86400 * 12.4, "12 days"),
    ],
)
def test_spans_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
