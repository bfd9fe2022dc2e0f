"""A JPEG's markers, walked before its decoder sees it [ITU-T T.81, annex B].

A scan costs a decoder time for every pixel of the picture and a file eleven bytes, and Pillow joins EXIF
segments by copying; so both are counted first. The entropy-coded data are skipped, not read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FRAMES = frozenset((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
_BARE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length
_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # in entropy-coded data: no stuffing, no restart


@dataclass(frozen=True, slots=True)
class JpegOutline:
    """size: (width, height) of the largest frame header, (1, 1) where there is none. scans, exif: counts."""

    size: tuple[int, int]
    scans: int
    exif: int


def outline(data: bytes) -> JpegOutline:
    """Walk a file up to its end marker, its last whole segment, or where it stops making sense."""
    width = height = 1
    scans = exif = 0
    at = 2
    while found := _MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker == _EOI:
            break
        if marker in _BARE:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        if marker in _FRAMES and length >= 8:
            height = max(height, int.from_bytes(data[at + 3 : at + 5], "big"))
            width = max(width, int.from_bytes(data[at + 5 : at + 7], "big"))
        scans += marker == _SOS
        exif += marker == _APP1 and data[at + 2 : at + 6] == b"Exif"
        at += max(2, length)
    return JpegOutline((width, height), scans, exif)
