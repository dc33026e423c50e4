"""Pictures inside a page: a grid of samples as a PNG, encoded here in a few lines so that a report needs no library."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np


def png(pixels: np.ndarray) -> bytes:
    """A PNG file.

    Args:
        pixels: uint8 ``[H, W]`` or ``[H, W, C]`` with 1 or 3 channels.
    """
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + np.ascontiguousarray(row).tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(lines, 9)) + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def grid(images: np.ndarray, columns: int, gap: int = 1, paper: int = 255) -> np.ndarray:
    """Images ``[N, H, W, C]`` side by side, ``columns`` a row, row by row, as one image."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    out = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), paper, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        out[y : y + height, x : x + width] = image
    return out


def picture(pixels: np.ndarray, alt: str, scale: int = 1) -> str:
    """An ``<img>`` with the file inside. ``scale``: pixels of the page per pixel; small images stay crisp."""
    from html import escape

    data = base64.b64encode(png(pixels)).decode()
    height, width = pixels.shape[:2]
    return (
        f'<img class="samples" alt="{escape(alt)}" width="{width * scale}" height="{height * scale}" '
        f'src="data:image/png;base64,{data}">'
    )
