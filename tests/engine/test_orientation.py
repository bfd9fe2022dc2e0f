"""Which way up a file is, against Pillow's own reader, and where the tags are broken."""

from __future__ import annotations

import io
import struct
import warnings

import pytest
from PIL import Image

from ritocco.orientation import orientation_of
from ritocco.sources import Loader

XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def opened(kind: str, **options: object) -> Image.Image:
    file = io.BytesIO()
    Image.new("RGB", (6, 4)).save(file, kind, **options)
    picture = Image.open(io.BytesIO(file.getvalue()))
    picture.load()
    return picture


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_as_pillow_reads_it(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x0131] = "maker", orientation, "software"
    picture = opened(kind, exif=exif)
    assert orientation_of(picture.info) == picture.getexif()[0x0112] == orientation


def test_big_and_little_ends() -> None:
    for order, mark in (("<", b"II*\0"), (">", b"MM\0*")):
        entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, 8, 0)
        data = mark + struct.pack(f"{order}IH", 8, 1) + entry
        assert orientation_of({"exif": data}) == orientation_of({"exif": b"Exif\0\0" + data}) == 8


def test_the_xmp_packet_counts_where_exif_is_silent() -> None:
    assert orientation_of({"xmp": XMP.format(6).encode()}) == 6
    assert orientation_of({"XML:com.adobe.xmp": XMP.format(3)}) == 3
    assert orientation_of({"xmp": XMP.format(9).encode()}) == 1


@pytest.mark.parametrize(
    "data", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", "text", 7]
)
def test_broken_tags_mean_upright(data: object) -> None:
    assert orientation_of({"exif": data}) == 1


def test_thousands_of_bad_tags_say_nothing() -> None:
    entries = b"".join(struct.pack("<HHII", 0x9000 + i, 2, 1 << 20, 1 << 30) for i in range(3000))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 3000) + entries
    file = io.BytesIO()
    Image.new("RGB", (6, 4)).save(file, "PNG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Loader(allow_local=True).flat(file.getvalue(), field="input.image", ground=(0, 0, 0)) as picture:
            assert picture.size == (6, 4)
