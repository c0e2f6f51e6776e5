"""Six pictures of three classes, and how a source that should refuse them is asked."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.sources import LabelOptions, open_source
from storage.base.errors import UserError

N = 6


def picture(row: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), row, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(row) for row in range(N)]
NUMBERS, NAMES = [0, 1, 2] * 2, ["cat", "dog", "fox"] * 2
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def refused(data: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_source(str(data)).listing(LabelOptions(**options))
    assert "\n" not in str(error.value)
    assert str(data.parent) in str(error.value)


SECRET = (
    b"the user's own secret, sixty-four bytes of it and not one more.."  # bytes that no message and no store may hold
)
