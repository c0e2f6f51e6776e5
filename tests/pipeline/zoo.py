"""A zoo of odd and broken image files, a kind each, with what must become of them: these pixels, or this reason.

All are made here: by Pillow, by tifffile, or by hand where neither writes such a thing.
"""

from __future__ import annotations

import gzip
import io
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tifffile
from PIL import Image, ImageChops

EOI = b"\xff\xd9"


@dataclass(frozen=True)
class Animal:
    """`pixels` uint8 (H, W, 3) within a mean absolute error, of the first `share` of its lines; or the reason."""

    name: str
    data: bytes
    pixels: np.ndarray | None = None
    tolerance: float = 0.0
    share: float = 1.0
    reason: str = ""

    @property
    def is_good(self) -> bool:
        return self.pixels is not None


def picture(width: int = 150, height: int = 132) -> Image.Image:
    """Smooth, so that lossy formats come close, and with no symmetry that would hide a turn or swapped channels."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    channels = [200 * x + 20, 180 * y + 40 * x, 90 + 80 * np.sin(5 * x * y)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def tiff(samples: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, samples, metadata=None, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, depth: int, colour: int, lines: bytes, *, interlace: int = 0, more: bytes = b""
) -> bytes:
    """A PNG by hand: `lines` are filtered scan lines, `more` chunks before the data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    data = chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + data + chunk(b"IEND", b"")


def scan_lines(samples: np.ndarray) -> bytes:
    """Lines of a PNG, each behind filter type 0."""
    return b"".join(b"\0" + line.tobytes() for line in samples)


def adam7(pixels: np.ndarray) -> bytes:
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    return b"".join(scan_lines(pixels[y::dy, x::dx]) for y, x, dy, dx in passes)


def segments(jpeg: bytes, marker: int) -> list[tuple[int, int]]:
    """[start, end) of each segment with a marker, before the scan."""
    found, at = [], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] == marker:
            found.append((at, end))
        at = end
    return found


def without(jpeg: bytes, marker: int) -> bytes:
    for start, end in reversed(segments(jpeg, marker)):
        jpeg = jpeg[:start] + jpeg[end:]
    return jpeg


def ycck() -> tuple[bytes, np.ndarray]:
    """Inverted CMYK stored as YCbCr and K, as Photoshop does; Pillow writes CMYK, so its marker is changed."""
    negative = ImageChops.invert(picture()).convert("YCbCr")  # inverted ink is light, and YCC is of the ink
    channels = [np.asarray(each, dtype=np.uint8) for each in negative.split()]
    black = np.full_like(channels[0], 215)
    # Pillow inverts what it writes as CMYK, so this is stored as it is
    inverted = Image.merge("CMYK", [Image.fromarray(255 - each) for each in (*channels, black)])
    data = bytearray(encode(inverted, "JPEG", quality=97, subsampling=0))
    ((_, end),) = segments(bytes(data), 0xEE)
    assert data[end - 1] == 0
    data[end - 1] = 2
    return bytes(data), (rgb(picture()).astype(float) * 215 / 255).astype(np.uint8)


def jpegs() -> list[Animal]:
    image = picture()
    pixels, grey = rgb(image), rgb(image.convert("L"))
    plain = encode(image, "JPEG", quality=95, subsampling=0)
    progressive = encode(image, "JPEG", quality=95, progressive=True)
    half_progressive = progressive[: len(progressive) // 2]
    cmyk = encode(image.convert("CMYK"), "JPEG", quality=95, subsampling=0)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90° to see it upright"
    rotated = encode(image, "JPEG", quality=95, exif=exif)
    broken_exif = plain[:2] + b"\xff\xe1\x00\x14Exif\0\0MM\0\x2a\xff\xff\xff\xff\0\1" + plain[2:]
    scan = plain.index(b"\xff\xda")
    half = (scan + len(plain)) // 2
    red = Image.new("RGB", image.size, (200, 30, 30))
    ycck_data, ycck_pixels = ycck()
    return [
        Animal("jpeg-plain", plain, pixels, 2),
        Animal("jpeg-progressive", progressive, pixels, 2),
        Animal("jpeg-grey", encode(image.convert("L"), "JPEG", quality=95), grey, 2),
        Animal("jpeg-cmyk-adobe", cmyk, pixels, 3),
        Animal("jpeg-cmyk-no-adobe-marker", without(cmyk, 0xEE), pixels, 3),
        Animal("jpeg-ycck", ycck_data, ycck_pixels, 3),
        Animal("jpeg-stored-as-rgb", encode(image, "JPEG", quality=95, keep_rgb=True), pixels, 2),
        Animal("jpeg-no-jfif-marker", without(plain, 0xE0), pixels, 2),
        Animal("jpeg-exif-rotated", rotated, pixels, 2),
        Animal("jpeg-broken-exif", broken_exif, pixels, 2),
        Animal("jpeg-broken-icc", encode(image, "JPEG", quality=95, icc_profile=b"no profile"), pixels, 2),
        Animal("jpeg-garbage-after-end", plain + bytes(range(256)) * 9, pixels, 2),
        Animal("jpeg-another-after-end", plain + encode(red, "JPEG"), pixels, 2),
        Animal("jpeg-restart-markers", encode(image, "JPEG", quality=95, restart_marker_rows=1), pixels, 2),
        Animal("jpeg-mpo-of-two", encode(image, "MPO", quality=95, save_all=True, append_images=[red]), pixels, 2),
        Animal("jpeg-cut-and-closed", plain[:half] + EOI, pixels, 3, share=0.3),
        Animal("jpeg-second-half-zeros", plain[:half] + bytes(len(plain) - half - 2) + EOI, pixels, 3, share=0.3),
        Animal("jpeg-no-end-marker", plain[:-2], reason=r"OSError: image file is truncated"),
        Animal("jpeg-cut-in-scan", plain[:half], reason=r"OSError: image file is truncated"),
        Animal("jpeg-progressive-cut", half_progressive, reason=r"OSError: image file is truncated"),
        Animal("jpeg-cut-in-tables", plain[: scan // 2], reason=r"OSError: Truncated File Read"),
        Animal("jpeg-only-headers", plain[: scan + 14], reason=r"OSError: image file is truncated"),
        Animal("jpeg-only-start", plain[:4], reason=r"not an image"),
        Animal("jpeg-garbage-before", b"\r\n" + plain, reason=r"not an image"),
        Animal("jpeg-tables-lost", without(plain, 0xDB), reason=r"OSError: broken data stream"),
        Animal("jpeg-zeros", bytes(len(plain)), reason=r"not an image"),
        Animal("jpeg-gzipped", gzip.compress(plain), reason=r"not an image"),
    ]


def pngs() -> list[Animal]:
    image = picture()
    pixels, grey = rgb(image), np.asarray(image.convert("L"))
    width, height = image.size
    clear = image.copy()
    clear.putalpha(Image.fromarray(grey))
    palette = image.quantize(200)
    bits = image.convert("1")
    sixteen = (grey.astype(np.uint16) << 8) | 77
    sixteen_rgb = ((pixels.astype(np.uint16) << 8) | 77).astype(">u2")
    plain = encode(image, "PNG")
    idat = plain.index(b"IDAT")
    wrong_crc = bytearray(encode(image, "PNG", dpi=(72, 72)))
    wrong_crc[wrong_crc.index(b"pHYs") + 13] ^= 255
    frames = [Image.new("RGB", image.size, colour) for colour in ((9, 9, 9), (255, 0, 0))]
    two_bits = np.packbits(np.unpackbits((grey >> 6).reshape(-1, 1), axis=1)[:, 6:].reshape(height, -1), axis=1)
    colours = bytes([0, 0, 0, 90, 0, 0, 0, 180, 0, 0, 0, 250])
    flipped_idat = bytearray(plain)
    flipped_idat[idat + 40] ^= 255
    return [
        Animal("png-plain", plain, pixels),
        Animal("png-alpha", encode(clear, "PNG"), pixels),
        Animal("png-grey-alpha", encode(clear.convert("LA"), "PNG"), rgb(image.convert("L"))),
        Animal("png-palette", encode(palette, "PNG"), rgb(palette)),
        Animal("png-palette-one-clear", encode(palette, "PNG", transparency=7), rgb(palette)),
        Animal("png-palette-alpha", encode(palette, "PNG", transparency=bytes(range(200))), rgb(palette)),
        Animal("png-palette-2-bits", png(width, height, 2, 3, scan_lines(two_bits), more=chunk(b"PLTE", colours)),
               np.frombuffer(colours, np.uint8).reshape(4, 3)[grey >> 6]),
        Animal("png-bilevel", encode(bits, "PNG"), rgb(bits)),
        Animal("png-16-bit-grey", encode(Image.fromarray(sixteen), "PNG"), np.stack([grey] * 3, axis=-1)),
        Animal("png-16-bit-rgb", png(width, height, 16, 2, scan_lines(sixteen_rgb)), pixels),
        Animal("png-interlaced", png(width, height, 8, 2, adam7(pixels), interlace=1), pixels),
        Animal("png-colour-key", encode(image, "PNG", transparency=(20, 0, 90)), pixels),
        Animal("png-animated", encode(image, "PNG", save_all=True, append_images=frames), pixels),
        Animal("png-no-end-chunk", plain[:-12], pixels),
        Animal("png-wrong-crc-of-a-note", bytes(wrong_crc), reason=r"not an image"),
        Animal("png-wrong-crc-of-data", bytes(flipped_idat), reason=r"OSError: broken data stream"),
        Animal("png-cut", plain[: idat + 200], reason=r"OSError: image file is truncated"),
        Animal("png-only-header", plain[:40], reason=r"not an image"),
        Animal("png-text-bomb", png(8, 8, 8, 0, bytes(72), more=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**24)))),
               reason=r"ValueError: Decompressed data too large"),
        Animal("png-bomb", png(30_000, 30_000, 8, 2, b""), reason=r"DecompressionBombError"),
        Animal("png-nearly-a-bomb", png(10_000, 10_000, 1, 0, b""), reason=r"OSError: image file is truncated"),
        Animal("png-no-pixels", png(0, 0, 8, 2, b""), reason=r"not an image"),
        Animal("png-strip", encode(Image.new("L", (1, 20_000)), "PNG"), reason=r"too elongated: 1×20000"),
    ]  # fmt: skip


def tiffs() -> list[Animal]:
    image = picture()
    pixels, grey = rgb(image), np.asarray(image.convert("L"))
    sixteen = (grey.astype(np.uint16) << 8) | 77
    clear = image.copy()
    clear.putalpha(200)
    grey_rgb = np.stack([grey] * 3, axis=-1)
    big = encode(image, "TIFF")
    return [
        Animal("tiff-lzw", encode(image, "TIFF", compression="tiff_lzw"), pixels),
        Animal("tiff-jpeg", encode(image, "TIFF", compression="jpeg", quality=95), pixels, 3),
        Animal("tiff-fax", encode(image.convert("1"), "TIFF", compression="group4"), rgb(image.convert("1"))),
        Animal("tiff-alpha", encode(clear, "TIFF"), pixels),
        Animal("tiff-cmyk", encode(image.convert("CMYK"), "TIFF"), pixels, 1),
        Animal("tiff-lab", encode(image.convert("LAB"), "TIFF"), pixels, 3),
        Animal("tiff-ycbcr", encode(image.convert("YCbCr"), "TIFF"), pixels, 2),
        Animal("tiff-two-pages", encode(image, "TIFF", save_all=True, append_images=[image.rotate(180)]), pixels),
        Animal("tiff-16-bit", tiff(sixteen), grey_rgb),
        Animal("tiff-16-bit-big-endian", tiff(sixteen, byteorder=">"), grey_rgb),
        Animal("tiff-16-bit-rgb", tiff((pixels.astype(np.uint16) << 8) | 77, photometric="rgb"), pixels),
        Animal("tiff-white-is-zero", tiff(255 - grey, photometric="miniswhite"), grey_rgb),
        Animal("tiff-planes", tiff(np.moveaxis(pixels, 2, 0), photometric="rgb", planarconfig="separate"), pixels),
        Animal("tiff-float", tiff(grey.astype(np.float32) / 255), reason=r"floating-point samples \(TIFF\)"),
        Animal("tiff-32-bit", tiff(grey.astype(np.int32) << 20), reason=r"32-bit samples \(TIFF\)"),
        Animal("tiff-cut", big[: len(big) // 2], reason=r"OSError: image file is truncated"),
    ]


def iptc(data: bytes) -> bytes:
    """An IPTC file around another, which Pillow's plugin opens whatever it is."""

    def field(record: int, number: int, body: bytes) -> bytes:
        return struct.pack(">BBBHI", 0x1C, record, number, 0x8400, len(body)) + body

    size = struct.pack(">I", 8)
    one_layer, jpeg = bytes([1, 0]), bytes([5])
    fields = field(3, 60, one_layer) + field(3, 20, size) + field(3, 30, size) + field(3, 120, jpeg)
    return fields + field(8, 10, data)


def others() -> list[Animal]:
    image = picture()
    pixels, grey = rgb(image), np.asarray(image.convert("L"))
    palette = image.quantize(200)
    clear = image.copy()
    clear.putalpha(Image.fromarray(grey))
    red = Image.new("RGB", image.size, (200, 30, 30))
    bmp = bytearray(encode(image, "BMP"))
    upside_down = bytes(bmp[:22]) + struct.pack("<i", -image.height) + bytes(bmp[26:])
    pgm = b"P5 %d %d 65535\n" % image.size + ((grey.astype(np.uint16) << 8) | 77).astype(">u2").tobytes()
    ascii_ppm = b"P3 # a comment\n%d %d 255\n" % image.size + " ".join(map(str, pixels.ravel())).encode()
    small, eps = encode(image, "GIF"), encode(image, "EPS")
    webp = encode(image, "WEBP", quality=90)
    bits = image.convert("1")
    icon = image.resize((64, 64))
    return [
        Animal("gif-animated", encode(palette, "GIF", save_all=True, append_images=[red]), rgb(palette)),
        Animal("gif-transparent", encode(palette, "GIF", transparency=3), rgb(palette)),
        Animal("gif-cut", small[: len(small) // 2], reason=r"OSError: image file is truncated"),
        Animal("webp-lossy", webp, pixels, 3),
        Animal("webp-alpha", encode(clear, "WEBP", lossless=True, exact=True), pixels),
        Animal("webp-animated", encode(image, "WEBP", save_all=True, append_images=[red], lossless=True), pixels),
        Animal("webp-cut", webp[: len(webp) // 2], reason=r"OSError: could not create decoder object"),
        Animal("avif-plain", encode(image, "AVIF", quality=90), pixels, 3),
        Animal("jp2-lossless", encode(image, "JPEG2000"), pixels),
        Animal("jp2-cut", encode(image, "JPEG2000")[:3000], reason=r"OSError: broken data stream"),
        Animal("bmp-plain", bytes(bmp), pixels),
        Animal("bmp-top-down", upside_down, pixels[::-1]),
        Animal("bmp-cut", bytes(bmp[:9000]), reason=r"OSError: image file is truncated"),
        Animal(
            "ico-largest",
            encode(icon, "ICO", sizes=[(16, 16), (64, 64)]),
            rgb(icon),
        ),
        Animal("ppm-binary", encode(image, "PPM"), pixels),
        Animal("ppm-ascii", ascii_ppm, pixels),
        Animal("pgm-16-bit", pgm, np.stack([grey] * 3, axis=-1)),
        Animal("pbm-bilevel", encode(bits, "PPM"), rgb(bits)),
        Animal("tga-run-length", encode(image, "TGA", compression="tga_rle"), pixels),
        Animal("qoi-plain", encode(image, "QOI"), pixels),
        Animal("sgi-plain", encode(image, "SGI"), pixels),
        Animal("pcx-palette", encode(palette, "PCX"), rgb(palette)),
        Animal("spider-float", encode(image.convert("F"), "SPIDER"), reason=r"not an image"),
        Animal("eps-program", eps, reason=r"EPS is a program that would be run"),
        Animal(
            "eps-with-preview",
            b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(eps)) + bytes(20) + eps,
            reason=r"EPS is",
        ),
        Animal("eps-after-a-space", b" " + eps, reason=r"not an image"),
        Animal("eps-in-iptc", iptc(eps), reason=r"not an image"),
        Animal("wmf-drawing", b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(4) + bytes(90), reason=r"not an image"),
        Animal("fits-table", b"SIMPLE  =                    T" + bytes(3000), reason=r"not an image"),
        Animal("pdf-page", encode(image, "PDF"), reason=r"not an image"),
        Animal("svg-drawing", b'<svg xmlns="http://www.w3.org/2000/svg"/>', reason=r"not an image"),
        Animal("hdf5-no-loader", b"\x89HDF\r\n\x1a\n" + bytes(2000), reason=r"not an image"),
        Animal("text-empty", b"", reason=r"empty file \(0 bytes\)"),
        Animal("text-one-byte", b"\xff", reason=r"not an image"),
        Animal("text-html", b"<!DOCTYPE html><title>404 Not Found</title>", reason=r"not an image.*DOCTY"),
        Animal("text-lfs-pointer", b"version https://git-lfs.github.com/spec/v1\n", reason=r"not an image"),
        Animal("text-noise", np.random.default_rng(0).bytes(5000), reason=r"not an image"),
    ]


CAGES: tuple[Callable[[], list[Animal]], ...] = (jpegs, pngs, tiffs, others)
ZOO = [animal for cage in CAGES for animal in cage()]


def agrees(animal: Animal, decoded: np.ndarray) -> bool:
    """Whether decoded pixels are those expected, exactly where the tolerance is 0."""
    assert animal.pixels is not None
    if decoded.shape != animal.pixels.shape:
        return False
    lines = int(len(decoded) * animal.share)
    error = np.abs(decoded[:lines].astype(int) - animal.pixels[:lines].astype(int))
    return bool(error.max() == 0 if animal.tolerance == 0 else error.mean() <= animal.tolerance)


def fails_as_it_should(animal: Animal, reason: str) -> bool:
    return bool(animal.reason and re.match(animal.reason, reason))
