"""Denoising loss of images over times, held out or trained on, with the same noise at every step of every run.

    python -m benchmarks.effect.heldout_loss RUN --store HELDOUT --step 1000 --out FILE.json [--n 542]

The model's averaged weights are given the image's own class. Posterior draws and noise are keyed by (0, row), times are
the middles of tenths, so that the mean over them estimates the loss under uniform t. A model that denoises the class
token too is given it under noise of the same t; the loss is that of the latents, as of every other model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from pipeline.images import spread
from storage import open_store
from storage.base.files import write_atomic
from trainer.data.loader import Batch
from trainer.loop import random_keys
from trainer.loop.losses import sample_latents
from trainer.models.reg import join, split
from trainer.objectives import OBJECTIVES
from trainer.ranks.arithmetic import model_arithmetic
from trainer.ranks.world import device_named
from trainer.run.opened import OpenRun, checkpoints_of, load_model, open_run

TIMES = tuple(round(0.05 + 0.1 * i, 2) for i in range(10))
SEED = 0
BATCH = 64


@torch.inference_mode()
def heldout_loss(
    run: OpenRun, checkpoint: Path, store_path: str, device: torch.device, n: int = 0
) -> dict[float, float]:
    """t → mean loss of the rows of a store that has the run's latents, or of `n` evenly spread (0: all)."""
    store = open_store(store_path)
    latents = store.group(run.data.latents.path, expect=None)
    rows = np.setdiff1d(np.arange(store.n_rows), latents.failed_rows)
    rows = rows[spread(len(rows), n)]
    labels = store.classes.labels
    geometry = run.geometry
    features = store.group(run.data.features[0].path, expect=None) if geometry.class_width else None
    model = load_model(run, checkpoint, "ema", device)
    objective, config = OBJECTIVES[run.config.model.kind], run.config.loss
    sums = dict.fromkeys(TIMES, 0.0)
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        stored = np.empty((len(part), *latents["moments"].row_shape), dtype=latents["moments"].dtype)
        latents["moments"].read_into(part, 0, stored)
        index = torch.from_numpy(part).to(device)
        batch = Batch(
            step=0, rows=index, labels=index, moments=torch.from_numpy(stored).to(device), targets=(), stall_s=0.0
        )
        x = sample_latents(batch, run.scale, SEED)
        noise = random_keys.normal(SEED, "noise", 0, index, x.shape[1:])
        if features is not None:
            class_tokens = torch.from_numpy(features.gather(part, 0, ["cls"])["cls"]).to(device)
            x = join(x, class_tokens.float())
            noise = join(noise, random_keys.normal(SEED, "class-noise", 0, index, (geometry.class_width,)))
        y = torch.from_numpy(labels[part].astype(np.int64)).to(device)
        for t in TIMES:
            times = objective.model_times(torch.full((len(x),), t, device=device))
            x_t = objective.perturb(x, noise, times, config)
            with model_arithmetic("fp32", device):
                output, _ = model(x_t, times, y, with_projections=False)
            output, image, drawn, x_t = (split(state, geometry)[0] for state in (output, x, noise, x_t))
            sums[t] += objective.denoising_loss(output, image, drawn, x_t, times, config).sum().item()
    for group in (latents, features):
        if group is not None:
            group.close()
    return {t: total / len(rows) for t, total in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--store", required=True)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--n", type=int, default=0, help="at most so many of the store's images, evenly spread")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    run = open_run(args.run)
    checkpoint = checkpoints_of(args.run, str(args.step))[0]
    found = heldout_loss(run, checkpoint, args.store, device_named(args.device), args.n)
    run.data.close()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"mean": sum(found.values()) / len(found), "by_t": found}
    write_atomic(args.out, json.dumps(record, indent=1).encode(), "heldout_loss")


if __name__ == "__main__":
    main()
