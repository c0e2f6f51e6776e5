"""`python -m pipeline index DATA`: what a source found, before any GPU is used.

The report is made of the listing that `precompute` makes, so what is shown is what would be encoded. Of the images,
only the first is read.
"""

from __future__ import annotations

import numpy as np

from pipeline.decode import to_rgb
from pipeline.sources import Listing, Source
from pipeline.transforms import DecodeError
from storage.base.shown import shown

SHOWN_CLASSES, SHOWN_LEFT_OUT = 5, 10


def report(source: Source, listing: Listing) -> str:
    """Kind, images, classes, sizes, first and last sample, what was left out and what is odd; a line each."""
    index = listing.index
    labels = index.labels
    names = [shown(name) for name in index.class_names.occurring.values() if name]
    first_names = ", ".join(names[:SHOWN_CLASSES]) + (", …" if len(names) > SHOWN_CLASSES else "")
    keys = [shown(key) for key in index.keys]
    lines = [
        f"data       {source.provenance()['path']}",
        f"kind       {source.kind}",
        f"images     {len(index)}",
        f"classes    {len(names)}{': ' * bool(names)}{first_names}",
        f"labels     {_labels(labels)}",
        f"bytes      {listing.data_bytes:,} in files that hold images",
        f"sizes      {_sizes(index.table['nbytes'].to_numpy(), keys)}",
        f"first      {keys[0]}, label {labels[0]}, {_first_image(source, index.locations[0])}",
        f"last       {keys[-1]}, label {labels[-1]}",
        f"left out   {len(listing.left_out)} files that hold no image of this kind",
        *(f"           {shown(path)}" for path in listing.left_out[:SHOWN_LEFT_OUT]),
        *(["           …"] if len(listing.left_out) > SHOWN_LEFT_OUT else []),
        *(f"warning    {warning}" for warning in listing.warnings),
    ]
    return "\n".join(lines)


def _labels(labels: np.ndarray) -> str:
    given = labels[labels >= 0]
    if not len(given):
        return "none: −1 in every row"
    missing = len(labels) - len(given)
    rest = f", {missing} of {len(labels)} rows have none (−1)" if missing else ", one in every row"
    return f"{len(np.unique(given))} from {given.min()} to {given.max()}{rest}"


def _sizes(nbytes: np.ndarray, keys: list[str]) -> str:
    known = np.flatnonzero(nbytes >= 0)
    if not len(known):
        return "of single images are not known without reading them"
    small, large = (known[pick(nbytes[known])] for pick in (np.argmin, np.argmax))
    mean = nbytes[known].mean()
    return f"{nbytes[small]:,} bytes ({keys[small]}) to {nbytes[large]:,} ({keys[large]}), mean {mean:,.0f}"


def _first_image(source: Source, location: str) -> str:
    try:
        (sample,) = source.read_many([location])
        width, height = to_rgb(sample).size
    except DecodeError as error:
        return f"which cannot be decoded: {error}"
    return f"{width}×{height} pixels"
