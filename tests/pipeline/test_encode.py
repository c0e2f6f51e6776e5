"""The encoding actor by itself: what overlaps, what runs out of memory, what another run has done meanwhile.

Without a GPU the copies to and from it are no copies; the same test then holds the rest.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from torch import Tensor

import pipeline.encode
from pipeline.encode import CALLS_IN_HAND, Array, Block, UnitEncoder
from pipeline.encoders import registry
from pipeline.plan import create
from storage import Failure, Staging, UserError, open_store
from storage.layout import GroupLayout
from storage.receipts import read_receipt
from tests.pipeline.fakes import RESOLUTION, NumpyEncoder, Pictures, plan_of
from tests.stores import FEATURES, LATENTS

N = 12
BLOCK = Block(unit=0, failures=[], timings_s={"decode": 1.0}, paths=(LATENTS, FEATURES))


def make(
    kind: type[UnitEncoder], root: Path, staging: Staging
) -> tuple[UnitEncoder, np.ndarray, dict[str, GroupLayout]]:
    source = Pictures(N, {}, "")
    index = source.listing().index
    plan = plan_of(str(root), index, shard_rows=N)
    create(plan, source, staging)
    encoder = kind(plan.root, plan.groups, plan.digests, 8, 1, staging.run_id)
    return encoder, np.stack(list(source.read_many(index.locations))), {g.layout.path: g.layout for g in plan.groups}


def test_the_second_group_is_encoded_while_the_first_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding_features = threading.Event()
    publish_unit = pipeline.encode.publish_unit

    class Watched(NumpyEncoder):
        def encode(self, path: str, *rest: Any) -> dict[str, np.ndarray]:
            if path == FEATURES:
                encoding_features.set()
            return super().encode(path, *rest)

    def publish(root: Any, layout: GroupLayout, *rest: Any, **more: Any) -> Any:
        if layout.path == LATENTS:
            assert encoding_features.wait(60), "the features' encoding waited for the latents' publication"
        return publish_unit(root, layout, *rest, **more)

    monkeypatch.setattr(pipeline.encode, "publish_unit", publish)
    with Staging(tmp_path) as staging:
        encoder, images, _ = make(Watched, tmp_path, staging)
        encoder.encode_and_publish(images, BLOCK, 0.0)
    assert [open_store(tmp_path).group(path).failures for path in (LATENTS, FEATURES)] == [[], []]


def test_out_of_gpu_memory_halves_the_batch_and_goes_on(tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    class Small(NumpyEncoder):
        def encode(
            self, path: str, images: np.ndarray, present: np.ndarray, batch: int, first_row: int, *_: object
        ) -> dict[str, np.ndarray]:
            asked.append((path, batch))
            if path == FEATURES and batch > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().encode(path, images, present, batch, first_row)

    with Staging(tmp_path) as staging:
        encoder, images, layouts = make(Small, tmp_path, staging)
        encoder.encode_and_publish(images, BLOCK, 0.0)
    assert asked == [(LATENTS, 8), (FEATURES, 8), (FEATURES, 4), (FEATURES, 2)]
    receipts = {path: read_receipt(open_store(tmp_path).root, layout, 0) for path, layout in layouts.items()}
    assert {path: receipt.made["batch"] for path, receipt in receipts.items() if receipt} == {LATENTS: 8, FEATURES: 2}
    stages = {"decode", "hand_over", "encode", "statistics", "publish"}
    assert all(receipt is not None and set(receipt.timings_s) == stages for receipt in receipts.values())


class Slow:
    """Tokens that take a device a while: the averages of patches, rolled and unrolled."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """`patches` (B, 64, 24) and `cls` (B, 24)."""
        x = images.to(self.device).permute(0, 3, 1, 2).float() / 255
        for _ in range(50 if self.device.type == "cuda" else 1):
            x = x.roll(1, 2).roll(-1, 2)
        patches = F.avg_pool2d(x, RESOLUTION // 8).flatten(2).transpose(1, 2).repeat(1, 1, 8).half()
        return {"patches": patches, "cls": patches[:, 0].clone()}


def test_units_of_two_threads_come_out_as_they_do_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "load", lambda *_, device, **__: Slow(device))
    n_units, rows = 24, 32
    source = Pictures(n_units * rows, {}, "")
    index = source.listing().index
    images = np.stack(list(source.read_many(index.locations)))
    images.flags.writeable = False  # as they come from the object store
    with Staging(tmp_path) as staging:
        plan = plan_of(str(tmp_path), index, shard_rows=rows)
        create(plan, source, staging)
        encoder = UnitEncoder(plan.root, plan.groups, plan.digests, 8, 1, staging.run_id)
        blocks = [Block(unit=unit, failures=[], timings_s={}, paths=(FEATURES,)) for unit in range(n_units)]
        with ThreadPoolExecutor(CALLS_IN_HAND) as calls:
            parts = np.split(images, n_units)
            list(calls.map(encoder.encode_and_publish, parts, blocks, [0.0] * n_units))
    group = open_store(tmp_path).group(FEATURES)
    alone = Slow(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for start in range(0, len(images), 8):
        expected = registry.encode_images(alone, images[start : start + 8].copy())
        for name, values in expected.items():
            out = np.empty((8, *group[name].row_shape), group[name].dtype)
            group[name].read_into(range(start, start + 8), 0, out)
            np.testing.assert_array_equal(out, values)
    group.close()


class Means:
    """`patches` (B, 64, 24) and `cls` (B, 24) of the pictures' averages, and how many it was given at a time."""

    def __init__(self, spoil: int | None = None) -> None:
        self.calls: list[int] = []
        self.spoil = spoil  # this one of all

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        cls = images.float().mean((1, 2)).repeat(1, 8).half()
        if self.spoil is not None and 0 <= self.spoil - sum(self.calls) < len(images):
            cls[self.spoil - sum(self.calls), 3] = torch.inf
        self.calls.append(len(images))
        return {"patches": cls[:, None].expand(-1, 64, -1).clone(), "cls": cls}


def encode_features(root: Path, encoder: Means, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """The second unit of N pictures, in batches of 5; its row 2 failed."""
    monkeypatch.setattr(registry, "load", lambda *_, **__: encoder)
    source = Pictures(2 * N, {}, "")
    index = source.listing().index
    with Staging(root) as staging:
        plan = plan_of(str(root), index, shard_rows=N)
        create(plan, source, staging)
        groups = [dataclasses.replace(g, spec=dataclasses.replace(g.spec, **changes)) for g in plan.groups]
        ours = UnitEncoder(plan.root, groups, plan.digests, 5, 1, staging.run_id)
        failures = [Failure(row=N + 2, key=str(N + 2), reason="broken")]
        block = Block(unit=1, failures=failures, timings_s={}, paths=(FEATURES,))
        ours.encode_and_publish(np.stack(list(source.read_many(index.locations[N:]))), block, 0.0)


def test_a_compiled_encoder_is_given_whole_batches_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another shape would compile another graph, and what it is given later would be computed otherwise."""
    encoders, found = {True: Means(), False: Means()}, {}
    for compiled, encoder in encoders.items():
        root = tmp_path / str(compiled)
        encode_features(root, encoder, monkeypatch, compiled=compiled)
        stored = zarr.open_array(root / FEATURES / "cls", mode="r")[N:, 0]
        found[compiled] = stored[[row for row in range(N) if row != 2]]
        assert found[compiled].all()
    assert encoders[True].calls == [5, 5, 5]
    assert encoders[False].calls == [5, 5, 1]
    np.testing.assert_array_equal(found[True], found[False])


def test_a_number_beyond_float16_ends_the_unit_and_its_row_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seventh of those that decoded is the unit's row 7."""
    with pytest.raises(UserError, match=rf"cls of {FEATURES}, row {N + 7}, are NaN or beyond float16"):
        encode_features(tmp_path, Means(spoil=6), monkeypatch)
    assert not list(tmp_path.glob("receipts/*/*/0*.json"))


def test_a_gpu_that_was_set_aside_and_cannot_be_seen_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"a GPU was set aside .* torch .* sees none; mend the driver"):
        UnitEncoder(tmp_path, [], {}, 8, 1, "", needs_gpu=True).ready()


def test_a_unit_that_finds_no_room_beside_another_waits_for_its_turn(tmp_path: Path) -> None:
    busy, uploads = threading.Lock(), []

    class Tight(NumpyEncoder):
        def upload(self, images: np.ndarray) -> Array:
            uploads.append(busy.locked())
            if busy.locked():
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return images

        def encode(self, *arguments: Any) -> Mapping[str, Array]:
            with busy:
                time.sleep(0.3)
                return super().encode(*arguments)

    with Staging(tmp_path) as staging:
        encoder, images, layouts = make(Tight, tmp_path, staging)
        blocks = [Block(unit=0, failures=[], timings_s={}, paths=(path,)) for path in layouts]
        with ThreadPoolExecutor(CALLS_IN_HAND) as calls:
            first = calls.submit(encoder.encode_and_publish, images, blocks[0], 0.0)
            while not busy.locked():
                time.sleep(0.01)
            calls.submit(encoder.encode_and_publish, images, blocks[1], 0.0).result()
            first.result()
    assert uploads == [False, True, False]
    assert all(read_receipt(open_store(tmp_path).root, layout, 0) for layout in layouts.values())


def test_one_image_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    class Never(NumpyEncoder):
        def encode(self, *_: Any) -> dict[str, np.ndarray]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with Staging(tmp_path) as staging:
        encoder, images, _ = make(Never, tmp_path, staging)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            encoder.encode_and_publish(images, BLOCK, 0.0)


def test_what_another_run_published_meanwhile_is_left_alone(tmp_path: Path) -> None:
    class Never(NumpyEncoder):
        def encode(self, *_: Any) -> dict[str, np.ndarray]:
            raise AssertionError("encoded again")

    with Staging(tmp_path) as staging:
        encoder, images, _ = make(NumpyEncoder, tmp_path, staging)
        encoder.encode_and_publish(images, BLOCK, 0.0)
        late, _, _ = make(Never, tmp_path, staging)
        assert late.encode_and_publish(images, BLOCK, 0.0) == 0.0
    assert images.shape == (N, RESOLUTION, RESOLUTION, 3)


def test_the_share_of_a_unit_grows_by_batches_and_is_gone_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    class Watched(Slow):
        def encode(self, images: Tensor) -> dict[str, Tensor]:
            seen.append(encoder.shares()[0])
            return super().encode(images)

    monkeypatch.setattr(registry, "load", lambda *_, device, **__: Watched(device))
    with Staging(tmp_path) as staging:
        encoder, images, _ = make(UnitEncoder, tmp_path, staging)
        encoder.encode_and_publish(images, dataclasses.replace(BLOCK, paths=(FEATURES,)), 0.0)
    assert seen == [0, 8 / N], "batches of 8 of N images"
    assert encoder.shares() == {}


def test_groups_share_a_unit_and_a_failure_leaves_no_share(tmp_path: Path) -> None:
    seen: list[float] = []

    class Halves(NumpyEncoder):
        def encode(self, path: str, *rest: Any) -> dict[str, np.ndarray]:
            for share in (0.5, 1.0):
                rest[-1](share)
                seen.append(self.shares()[0])
            if path == FEATURES and len(seen) == 4:
                raise OSError(5, "Input/output error")
            return super().encode(path, *rest)

    with Staging(tmp_path) as staging:
        encoder, images, _ = make(Halves, tmp_path, staging)
        with pytest.raises(OSError, match="Input/output"):
            encoder.encode_and_publish(images, BLOCK, 0.0)
        assert encoder.shares() == {}
    assert seen == [0.25, 0.5, 0.75, 1.0]
