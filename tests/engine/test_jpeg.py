"""The walk over a JPEG's markers, against files of Pillow's and files made to cost time."""

from __future__ import annotations

import io
import re

import pytest
from PIL import Image

from ritocco import RequestError
from ritocco.jpeg import JpegOutline, outline
from ritocco.sources import MAX_EXIF_SEGMENTS, MAX_SCANS, Loader


def jpeg(width: int = 40, height: int = 24, **options: object) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 60).convert("RGB").save(file, "JPEG", **options)
    return file.getvalue()


def refused(data: bytes) -> str:
    with (
        pytest.raises(RequestError) as caught,
        Loader(allow_local=True).flat(data, field="input.image", ground=(0, 0, 0)),
    ):
        pass
    return str(caught.value)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [10, 95])
def test_outline_of_real_files(progressive: bool, quality: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    found = outline(jpeg(progressive=progressive, quality=quality, exif=exif, restart_marker_blocks=1))
    assert (found.size, found.exif) == ((40, 24), 1)
    assert found.scans == (10 if progressive else 1)


def test_markers_in_a_segment_are_not_counted() -> None:
    plain = jpeg()
    note = b"\xff\xda\xff\xe1Exif" * 50
    inside = plain[:2] + b"\xff\xfe" + (len(note) + 2).to_bytes(2, "big") + note + plain[2:]
    assert outline(inside) == outline(plain) == JpegOutline((40, 24), 1, 0)


def test_many_scans_are_refused_before_they_are_decoded() -> None:
    whole = jpeg(4000, 4000, progressive=True, quality=30)
    bomb = whole[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x10\x00" * 20_000 + whole[-2:]
    assert re.search(rf"JPEG of \d+ scans; at most {MAX_SCANS}", refused(bomb))


def test_many_exif_segments_are_refused() -> None:
    plain = jpeg()
    segment = b"\xff\xe1\x00\x12Exif\0\0" + b"0123456789"
    assert f"at most {MAX_EXIF_SEGMENTS}" in refused(plain[:2] + segment * 100_000 + plain[2:])


def test_a_size_is_refused_from_its_header() -> None:
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xff\xff\xff"
    assert "65535x65535 pixels" in refused(bytes(data))


@pytest.mark.parametrize("end", [2, 3, 4, 20, 170, 400])
def test_cut_files_have_an_outline_too(end: int) -> None:
    assert outline(jpeg()[:end]).scans <= 1
