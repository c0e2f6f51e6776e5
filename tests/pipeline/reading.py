"""Reading a source of the sample photographs back, as the job does."""

from __future__ import annotations

import pickle

import numpy as np

from pipeline.decode import decode_unit
from pipeline.sources import Listing, Source, open_source
from tests.pipeline.containers import (
    Labelled,
    classes,
    label_of,
    photographs,
)

RESOLUTION = 32
SAMPLES = photographs(4, 15)


def read_all(source: Source, listing: Listing) -> list[object]:
    return list(source.read_many(listing.index.locations))


def decode_all(source: Source, listing: Listing, unit_rows: int = 23) -> np.ndarray:
    """Unit by unit, as the job does, through a pickled source."""
    units = []
    for start in range(0, len(listing.index), unit_rows):
        samples = listing.index.slice(range(start, min(start + unit_rows, len(listing.index))))
        sent = pickle.loads(pickle.dumps(source))
        images, (failures, *_) = decode_unit(sent, start, samples.keys, samples.locations, RESOLUTION)
        assert not failures
        units.append(images)
    return np.concatenate(units)


def check(data: str, samples: list[Labelled], kind: str = "auto") -> Listing:
    source = open_source(data, kind)
    listing = source.listing()
    assert [bytes(sample) for sample in read_all(source, listing)] == [sample.data for sample in samples]
    assert listing.index.labels.tolist() == [label_of(sample, samples) for sample in samples]
    assert listing.index.class_names == classes(samples)
    assert len(set(listing.index.keys)) == len(samples)
    assert listing.left_out == listing.warnings == ()
    assert listing.data_bytes >= sum(len(sample.data) for sample in samples)
    return listing
