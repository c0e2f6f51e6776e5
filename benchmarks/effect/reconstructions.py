"""What a run's decoder makes of the very latents that the run learns: images of rows of its store, in training order.

    python -m benchmarks.effect.reconstructions RUN --n 2000 --out FOLDER

The distance of these to real images is the decoder's part of what a model's images are measured at: a model that drew
the latents perfectly would be left with it. Cost: a forward pass of the decoder an image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from trainer.data.loader import Loader
from trainer.evaluation.generate.decode import decode_latents, decoder_of, load_decoder, to_decode
from trainer.evaluation.generate.image_files import image_path, write_image
from trainer.loop.losses import sample_latents
from trainer.ranks.world import device_named
from trainer.run.opened import OpenRun, open_run

SEED = 0
BATCH = 8


def write_reconstructions(run: OpenRun, n: int, out: Path, device: torch.device) -> None:
    """Write `n` images below `out`. Raises UserError where there is no decoder."""
    data, where = run.data, decoder_of(run.data, run.config)
    decoder = load_decoder(where, device, of=data)
    with Loader(
        data, seed=SEED, batch=BATCH, start=0, stop=-(-n // BATCH), rank=0, world_size=1, device=device, prefetch=1,
        with_targets=False,
    ) as loader:  # fmt: skip
        for batch in loader:
            latents = to_decode(sample_latents(batch, run.scale, SEED), run.scale, data)
            first = batch.step * BATCH
            for i, pixels in enumerate(decode_latents(latents, decoder)[: n - first], start=first):
                write_image(image_path(out, i), pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--n", type=int, required=True, help="images")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    run = open_run(args.run)
    write_reconstructions(run, args.n, args.out, device_named(args.device))
    run.data.close()


if __name__ == "__main__":
    main()
