"""Decoding every kind of file that data sets hold, and the ADM centre crop against reference vectors."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.transforms import DecodeError, center_crop, decode_rgb
from tests.examples import examples

DATA = Path(__file__).parent.parent / "data"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def gradient(width: int = 48, height: int = 32) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 5, y * 7, x + y], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("case", [0, 1, 2])
def test_the_crop_equals_the_reference_bit_for_bit(case: int) -> None:
    with np.load(DATA / "adm_crop.npz") as reference:
        image = Image.fromarray(reference[f"in/{case}"])
        np.testing.assert_array_equal(center_crop(image, int(reference[f"size/{case}"])), reference[f"out/{case}"])


@settings(max_examples=examples(60), deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.sampled_from([8, 16, 64]))
def test_a_crop_is_square_whatever_the_shape(width: int, height: int, size: int) -> None:
    crop = center_crop(Image.new("RGB", (width, height), (9, 80, 201)), size)
    assert crop.shape == (size, size, 3)
    assert crop.dtype == np.uint8
    assert (crop == (9, 80, 201)).all()


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = gradient(32, 32)
    np.testing.assert_array_equal(center_crop(image, 32), np.asarray(image))


def test_a_strip_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(DecodeError, match="too elongated: 1×20000"):
        center_crop(Image.new("RGB", (1, 20_000)), 256)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_rgb_comes_back_exactly(file_format: str) -> None:
    decoded = decode_rgb(encoded(gradient(), file_format))
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(decoded, gradient())


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_every_colour_space_come_back_as_the_picture(mode: str) -> None:
    image = gradient().convert(mode)
    decoded = decode_rgb(encoded(image, "JPEG", quality=98, subsampling=0))
    error = np.asarray(decoded, dtype=int) - np.asarray(image.convert("RGB"), dtype=int)
    assert decoded.mode == "RGB"
    assert np.abs(error).mean() < 4  # an inverted CMYK, the usual fault, is off by a hundred


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_grey_palette_and_bilevel_become_rgb(mode: str) -> None:
    image = gradient().convert(mode)
    np.testing.assert_array_equal(decode_rgb(encoded(image, "PNG")), image.convert("RGB"))


def test_transparency_is_dropped_and_not_composited() -> None:
    for image in (Image.new("RGBA", (4, 4), (10, 200, 30, 0)), Image.new("RGBA", (4, 4), (10, 200, 30, 128))):
        assert decode_rgb(encoded(image, "PNG")).getpixel((0, 0)) == (10, 200, 30)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 200, 30])
    assert decode_rgb(encoded(palette, "PNG", transparency=0)).getpixel((0, 0)) == (10, 200, 30)
    assert decode_rgb(encoded(Image.new("LA", (4, 4), (77, 0)), "PNG")).getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_samples_keep_their_high_byte(file_format: str) -> None:
    samples = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    decoded = np.asarray(decode_rgb(encoded(Image.fromarray(samples), file_format)))
    for channel in range(3):
        np.testing.assert_array_equal(decoded[..., channel], samples >> 8)


def test_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90° to see it upright"
    assert decode_rgb(encoded(gradient(48, 32), "JPEG", exif=exif)).size == (48, 32)


def test_the_bytes_decide_and_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, GREEN, BLUE)]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_rgb(animation).getpixel((0, 0)) == RED


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_an_error_and_not_half_a_picture(file_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), file_format)
    with pytest.raises(DecodeError):
        decode_rgb(data[: int(share * len(data))])


def test_what_is_no_picture_is_named() -> None:
    with pytest.raises(DecodeError, match="0 bytes"):
        decode_rgb(b"")
    with pytest.raises(DecodeError, match="not an image"):
        decode_rgb(b"<html>404 Not Found</html>")


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(DecodeError, match="DecompressionBomb"):
        decode_rgb(bomb)


@settings(max_examples=examples(150), deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), file_format=st.sampled_from(["JPEG", "PNG", "GIF"]))
def test_a_damaged_byte_gives_a_picture_or_a_decode_error(position: int, value: int, file_format: str) -> None:
    data = bytearray(encoded(gradient(), file_format))
    data[position % len(data)] = value
    with contextlib.suppress(DecodeError):  # and nothing else may come out
        assert decode_rgb(bytes(data)).mode == "RGB"
