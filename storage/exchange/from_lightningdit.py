"""LightningDiT's folders of safetensors: `latents`, `latents_flip` (n, C, h, w) and `labels` (n,) in every file.

Their latents are single draws or means, without a standard deviation, so they become moments whose std is 0, and both
views are stored; their trainer takes either by a coin. It subtracts a mean and divides by a std a channel, from the
file latents_stats.pt in the same folder, and multiplies by a factor (`latent_multiplier`, here --latent-scale-factor, 1
unless said). A store keeps the numbers as they are, and its identity the statistics. Where the file is missing their
trainer would make one of 10,000 latents; a run measures all of them instead (`--data.latent-normalisation channel`).
"""

from __future__ import annotations

import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from storage.base.boundary import open_regular
from storage.base.errors import UserError
from storage.exchange.incoming import (
    ImportOptions,
    Incoming,
    latents_alone,
    require_folder,
    whole_labels,
)

VIEWS = {"original": "latents", "hflip": "latents_flip"}
STATISTICS = "latents_stats.pt"


def read(source: Path, options: ImportOptions) -> Incoming:
    """Describe the folder: its files in the order of their names. Raises UserError for another or a damaged one."""
    require_folder(source, "folder of .safetensors files")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise UserError(f"{source} has no .safetensors file; name the folder that the extraction wrote")
    labels: list[int] = []
    counts = []
    shape: tuple[int, ...] = ()
    for path in files:
        os.close(open_regular(path))  # nothing that would be waited for
        try:
            with safe_open(path, framework="numpy") as file:
                missing = {*VIEWS.values(), "labels"} - set(file.keys())
                if missing:
                    raise UserError(
                        f"{path} has no tensor {sorted(missing)[0]!r}; it is not one of LightningDiT's files"
                    )
                of_file = file.get_tensor("labels").reshape(-1)
                shapes = [tuple(file.get_slice(name).get_shape()) for name in VIEWS.values()]
        except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path} is not a safetensors file of numbers ({first})") from error
        shape = shape or shapes[0][1:]
        if shapes[0] != shapes[1] or shapes[0] != (len(of_file), *shape) or len(shape) != 3:
            raise UserError(f"{path}: latents {shapes[0]}, flipped {shapes[1]} and {len(of_file)} labels do not agree")
        labels += whole_labels(of_file, path)
        counts.append(len(of_file))
    ends = list(accumulate(counts))

    def rows(wanted: range) -> dict[str, np.ndarray]:
        moments = np.zeros((len(wanted), 2, 2 * shape[0], *shape[1:]), np.float32)
        row = wanted.start
        while row < wanted.stop:
            i = bisect_right(ends, row)
            first = ends[i] - counts[i]
            stop = min(wanted.stop, ends[i])
            with safe_open(files[i], framework="numpy") as file:
                for view, name in enumerate(VIEWS.values()):
                    part = file.get_slice(name)[row - first : stop - first]
                    moments[row - wanted.start : stop - wanted.start, view, : shape[0]] = part
            row = stop
        return {"moments": moments}

    return latents_alone(
        source,
        options,
        kind="lightningdit",
        what="LightningDiT's safetensors",
        files=((path.name, path.stat().st_size) for path in files),
        keys=[f"{path.stem}/{i:06d}" for path, count in zip(files, counts, strict=True) for i in range(count)],
        labels=labels,
        views=tuple(VIEWS),
        shape=(2 * shape[0], *shape[1:]),
        rows=rows,
        scale=1.0,
        beside=source / STATISTICS,
    )
