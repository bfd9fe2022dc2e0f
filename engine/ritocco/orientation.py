"""Which way up a decoded file is: the Orientation tag of its EXIF data, or of its XMP packet.

Pillow's own reader parses every tag and warns of each broken one; here one entry of the first directory is
looked up [Exif 2.32, 4.6.2; TIFF 6.0, section 2].
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any

_TAG = 0x0112
_SHORT = 3
_MOST_ENTRIES = 1000
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def orientation_of(info: Mapping[Any, Any]) -> int:
    """1 to 8, from a picture's `info`; 1, upright, where nothing readable says otherwise."""
    exif = info.get("exif")
    profile = info.get("Raw profile type exif")
    if exif is None and isinstance(profile, str):
        try:  # three lines of heading, then hexadecimal digits
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        except ValueError:
            exif = None
    told = _from_exif(exif) if isinstance(exif, bytes) else None
    if told is None:
        packet = info.get("xmp") or info.get("XML:com.adobe.xmp") or b""
        found = _XMP.search(packet.encode("utf-8", "replace") if isinstance(packet, str) else packet)
        told = int(found[1]) if found else 1
    return told


def _from_exif(data: bytes) -> int | None:
    data = data.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for entry in range(min(count, _MOST_ENTRIES)):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, start + 2 + 12 * entry)
            if tag == _TAG:
                return value if kind == _SHORT and 1 <= value <= 8 else None
    except struct.error:
        pass
    return None
