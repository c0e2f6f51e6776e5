"""The encoding actor by itself: what overlaps, what runs out of memory, what another run has done meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipeline.encode
from pipeline.encode import Block, UnitEncoder
from pipeline.plan import create
from storage import Staging, open_store
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
        def encode(self, path: str, images: np.ndarray, present: np.ndarray, batch: int) -> dict[str, np.ndarray]:
            asked.append((path, batch))
            if path == FEATURES and batch > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().encode(path, images, present, batch)

    with Staging(tmp_path) as staging:
        encoder, images, layouts = make(Small, tmp_path, staging)
        encoder.encode_and_publish(images, BLOCK, 0.0)
    assert asked == [(LATENTS, 8), (FEATURES, 8), (FEATURES, 4), (FEATURES, 2)]
    receipts = {path: read_receipt(open_store(tmp_path).root, layout, 0) for path, layout in layouts.items()}
    assert {path: receipt.made["batch"] for path, receipt in receipts.items() if receipt} == {LATENTS: 8, FEATURES: 2}
    stages = {"decode", "hand_over", "encode", "statistics", "publish"}
    assert all(receipt is not None and set(receipt.timings_s) == stages for receipt in receipts.values())


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
