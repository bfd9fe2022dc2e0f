"""Pictures of every kind and every malice, and the promise that black pixels come back untouched."""

from __future__ import annotations

import base64
import contextlib
import io
import pathlib
import socket
import struct
import urllib.parse
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ritocco.errors import FetchError, NonFiniteError, RequestError
from ritocco.images import (
    Inputs,
    data_uri,
    encode,
    load_inputs,
    paste_back,
    seam_distance,
)
from ritocco.pixels import from_model, mask_to_latent, masked_to_model, to_model
from ritocco.sources import Loader

Array = npt.NDArray[Any]
RNG = np.random.default_rng(3)
PHOTO: Array = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)
LEFT: Array = np.zeros((48, 64), dtype=np.uint8)
LEFT[:, :32] = 255


def load(image: Any = PHOTO, mask: Any = LEFT, **keywords: Any) -> Inputs:
    chosen: dict[str, Any] = {"width": 64, "height": 48, "allow_local": True, **keywords}
    return load_inputs(image, mask, **chosen)


def saved(picture: Image.Image | Array, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def refused(source: Any, field: str = "image", **keywords: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RequestError) as caught:
            load(**{field: source}, **keywords)
    assert caught.value.field == f"input.{field}"
    assert str(caught.value).startswith(f"input.{field}: ")
    assert len(str(caught.value)) < 400
    return str(caught.value)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size, with next to no content."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    "source",
    [
        lambda path: str(path),
        lambda path: path,
        lambda path: path.read_bytes(),
        lambda path: bytearray(path.read_bytes()),
        lambda path: memoryview(path.read_bytes()),
        lambda path: io.BytesIO(path.read_bytes()),
        lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        lambda path: "DATA:;BASE64," + base64.encodebytes(path.read_bytes()).decode().rstrip("=\n"),
        lambda path: "data:," + urllib.parse.quote(path.read_bytes()),
        lambda path: "data:text/html;base64," + urllib.parse.quote(base64.b64encode(path.read_bytes())),
        lambda path: Image.open(path),
        lambda path: PHOTO,
        lambda path: PHOTO[::-1][::-1],
        lambda path: np.asfortranarray(PHOTO),
        lambda path: PHOTO.astype(np.uint16) * 257,
        lambda path: PHOTO.astype(">u2") * 257,
        lambda path: PHOTO / 255.0,
        lambda path: (PHOTO / 255.0).astype(np.float16).astype(np.float64),
    ],
)
def test_every_kind_of_source(source: Callable[[pathlib.Path], Any], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(saved(PHOTO))
    given_source = source(path)
    pixels = load(given_source).pixels
    if isinstance(given_source, Image.Image):
        given_source.close()
    tolerance = 1 if isinstance(given_source, np.ndarray) and given_source.dtype.kind == "f" else 0
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - PHOTO).max() <= tolerance


def test_an_open_file_can_be_read_twice(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(b"junk" + saved(PHOTO))
    with path.open("rb") as file:
        file.seek(4)
        assert np.array_equal(load(file).pixels, PHOTO)
        assert np.array_equal(load(file).pixels, PHOTO)
    with path.open("r", encoding="latin-1") as text:
        assert "mode 'rb'" in refused(text)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("L", (8, 8), 77), (77, 77, 77)),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (8, 8), (100, 100, 100, 51)), (224, 224, 224)),
        (Image.new("LA", (8, 8), (9, 0)), (255, 255, 255)),
        (Image.new("LA", (8, 8), (9, 255)), (9, 9, 9)),
        (Image.new("CMYK", (8, 8), (255, 0, 0, 0)), (0, 255, 255)),
        (Image.new("I;16", (8, 8), 257 * 99), (99, 99, 99)),
        (Image.new("I;16B", (8, 8), 257 * 99), (99, 99, 99)),
        (Image.new("RGB", (8, 8), (1, 2, 3)).quantize(4), (1, 2, 3)),
        (Image.new("HSV", (8, 8), (0, 255, 255)), (255, 0, 0)),
    ],
)
def test_modes(picture: Image.Image, expected: tuple[int, int, int]) -> None:
    assert (load(picture).pixels == np.array(expected)).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_transparency(kind: str) -> None:
    picture = Image.new("P", (64, 48), 0)
    picture.putpalette([200, 0, 0, 255, 255, 255])
    picture.paste(1, (32, 0, 64, 48))
    opaque, holed = saved(picture, kind), saved(picture, kind, transparency=1)
    assert (load(opaque).pixels[:, :32] == (200, 0, 0)).all()
    assert load(PHOTO, opaque).mask[:, 32:].all()
    assert not load(PHOTO, holed).mask.any()
    assert (load(saved(picture, kind, transparency=0)).pixels == 255).all()


def test_grey_and_rgb_with_a_transparent_colour() -> None:
    picture = Image.new("L", (64, 48), 255)
    assert not load(PHOTO, saved(picture, transparency=255)).mask.any()
    coloured = Image.new("RGB", (64, 48), (9, 8, 7))
    assert (load(saved(coloured, transparency=(9, 8, 7))).pixels == 255).all()


def test_16_bit_files_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    pixels = load(saved(ramp)).pixels[..., 0]
    assert np.abs(pixels - ramp / 257.0).max() <= 0.51
    assert np.array_equal(load(PHOTO, saved(ramp)).mask, ramp >= 32768)


def test_16_bit_grey_keeps_its_transparent_level() -> None:
    """Pillow writes no such file; the chunk is put in by hand."""
    levels = np.full((48, 64), 65535, np.uint16)
    levels[:, 32:] = 65534
    png = saved(levels)
    place = png.index(b"IDAT") - 4
    chunk = b"tRNS" + b"\xff\xff"
    marked = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    data = png[:place] + marked + png[place:]
    mask = load(PHOTO, data).mask
    assert not mask[:, :32].any()
    assert mask[:, 32:].all()


def test_cmyk_jpeg() -> None:
    cyan = Image.new("CMYK", (64, 48), (255, 0, 0, 0))
    assert np.abs(load(saved(cyan, "JPEG")).pixels.astype(int) - (0, 255, 255)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    red, blue = (Image.new("RGB", (64, 48), colour) for colour in ("red", "blue"))
    data = saved(red, kind, save_all=True, append_images=[blue])
    assert np.abs(load(data).pixels.astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_of_image_and_mask(orientation: int, kind: str) -> None:
    upright = np.zeros((48, 64, 3), dtype=np.uint8)
    upright[:16, :24] = 255  # a corner that no turn or flip leaves in place
    undo = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    data = saved(np.ascontiguousarray(undo[orientation]), kind, exif=exif, **lossless)
    loaded = load(data, data)
    assert np.abs(loaded.pixels.astype(int) - upright).max() <= 3
    assert np.array_equal(loaded.mask, upright[..., 0] == 255)
    assert np.array_equal(load(Image.open(io.BytesIO(data)), data).mask, loaded.mask)


def test_broken_exif_is_no_reason_to_refuse() -> None:
    data = saved(PHOTO, "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert np.array_equal(load(data).pixels, PHOTO)


def test_mask_is_cut_at_half_and_noise_does_not_count() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(4, 0).repeat(4, 1)
    assert np.array_equal(load(mask=levels, width=64, height=64).mask, levels >= 128)
    haze = np.where(RNG.random((480, 640)) < 0.4, 255, RNG.integers(60, 128, (480, 640))).astype(np.uint8)
    shrunk = load(mask=haze, image=haze).mask  # 40 % white: the mean level is above one half
    assert shrunk.mean() < 0.2
    assert haze.mean() > 128
    assert np.array_equal(load(mask=np.array([[0.4999, 0.5]])).mask[0, [0, -1]], [False, True])


@pytest.mark.parametrize("colour", [(255, 255, 255, 0), (255, 255, 255, 127), (0, 0, 0, 255), (0, 0, 0, 0)])
def test_transparent_parts_of_a_mask_keep(colour: tuple[int, int, int, int]) -> None:
    mask = Image.new("RGBA", (64, 48), colour)
    loaded = load(mask=mask)
    assert not loaded.mask.any()
    assert any("all black" in note for note in loaded.notes)
    mask.paste((255, 255, 255, 255), (0, 0, 32, 48))
    assert np.array_equal(load(mask=mask).mask, LEFT == 255)


def test_mask_of_another_size_is_stretched_with_a_warning() -> None:
    small = LEFT[::4, ::2]
    loaded = load(mask=small)
    assert np.array_equal(loaded.mask, LEFT == 255)
    assert loaded.notes == (
        "Warning: the mask has 32x12 pixels and the image 64x48; the mask is stretched over it",
    )
    assert load(mask=np.zeros((3, 3), dtype=bool)).mask.shape == (48, 64)


def test_a_pixel_is_white_where_half_of_its_area_is() -> None:
    fine = np.zeros((96, 128), dtype=np.uint8)
    fine[0::2, 0:64] = 255  # half of every 2x2 block
    fine[0::2, 64::2] = 255  # a quarter
    assert np.array_equal(load(image=fine, mask=fine).mask, LEFT == 255)


def test_white_and_thin_masks_are_noted() -> None:
    assert load().notes == ()
    assert "all white" in load(mask=np.ones((48, 64), dtype=bool)).notes[0]
    thin = np.zeros((48, 64), dtype=bool)
    thin[3, 3] = True
    assert "too thin" in load(mask=thin).notes[0]


def test_resizing_is_that_of_diffusers() -> None:
    processors = pytest.importorskip("diffusers.image_processor")
    processor = processors.VaeImageProcessor(vae_scale_factor=8)
    expected = processor.preprocess(Image.fromarray(PHOTO), height=128, width=192).numpy()
    pixels = load(width=192, height=128).pixels
    assert pixels.shape == (128, 192, 3)
    assert np.array_equal(to_model(pixels), expected)


def test_network_arrays_are_those_of_diffusers() -> None:
    torch = pytest.importorskip("torch")
    pixels, mask = PHOTO, RNG.random((48, 64)) < 0.5
    model = to_model(pixels)
    assert model.shape == (1, 3, 48, 64)
    assert model.dtype == np.float32
    soft = torch.from_numpy(mask.astype(np.float32))[None, None]
    assert np.array_equal(masked_to_model(pixels, mask), (torch.from_numpy(model) * (soft < 0.5)).numpy())
    nearest = torch.nn.functional.interpolate(soft, size=(6, 8)).numpy()
    assert np.array_equal(mask_to_latent(mask), nearest)
    assert mask_to_latent(mask).dtype == np.float32


def test_decoded_pixels_are_rounded_as_diffusers_does() -> None:
    processors = pytest.importorskip("diffusers.image_processor")
    torch = pytest.importorskip("torch")
    decoded = RNG.normal(0, 0.8, (2, 3, 8, 16)).astype(np.float32)
    expected = processors.VaeImageProcessor().postprocess(torch.from_numpy(decoded), output_type="pil")
    assert np.array_equal(from_model(decoded), np.stack([np.asarray(one) for one in expected]))
    assert np.array_equal(from_model(to_model(PHOTO))[0], PHOTO)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_decoded_nan_is_an_error(bad: float) -> None:
    decoded = np.zeros((1, 3, 8, 8), dtype=np.float32)
    decoded[0, 1, 2, 3] = bad
    with pytest.raises(NonFiniteError):
        from_model(decoded)


@pytest.mark.parametrize("feather", [0.0, 0.3, 1.0, 5.0, 200.0])
def test_kept_pixels_are_bit_identical(feather: float) -> None:
    mask = RNG.random((48, 64)) < 0.3
    mask[10:40, 10:50] = True
    generated = RNG.integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    pasted = paste_back(generated, PHOTO, mask, feather)
    assert pasted.shape == generated.shape
    assert pasted.dtype == np.uint8
    for one, raw in zip(pasted, generated, strict=True):
        assert one[~mask].tobytes() == PHOTO[~mask].tobytes()
        if feather <= 0.5:
            assert one[mask].tobytes() == raw[mask].tobytes()
        assert np.array_equal(paste_back(raw, PHOTO, mask, feather), one)


def test_kept_pixels_survive_the_png_file() -> None:
    loaded = load(saved(PHOTO), width=128, height=64)
    pasted = paste_back(np.zeros_like(loaded.pixels), loaded.pixels, loaded.mask)
    reopened = np.asarray(Image.open(io.BytesIO(encode(pasted))))
    assert reopened[~loaded.mask].tobytes() == loaded.pixels[~loaded.mask].tobytes()


def test_feather_is_a_ramp_on_the_white_side() -> None:
    mask = np.zeros((3, 20), dtype=bool)
    mask[:, 8:] = True
    pasted = paste_back(np.full((3, 20, 3), 200, np.uint8), np.zeros((3, 20, 3), np.uint8), mask, 4.0)
    assert (
        pasted[1, :, 0].tolist() == [0] * 8 + [25, 75, 125, 175] + [200] * 8
    )  # no ramp at the picture's edge
    everything = np.ones((3, 20), dtype=bool)
    assert (paste_back(pasted, np.zeros_like(pasted), everything, 4.0) == pasted).all()


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 24), st.integers(1, 24), st.floats(0, 1), st.floats(0.5, 40), st.integers(0, 2**32 - 1))
def test_seam_distance_is_exact(height: int, width: int, share: float, limit: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    rows, columns = np.mgrid[:height, :width]
    black = np.argwhere(~mask)
    expected = np.full((height, width), np.inf)
    for y, x in black:
        expected = np.minimum(expected, np.hypot(rows - y, columns - x))
    found = seam_distance(mask, limit)
    near = expected <= limit
    assert np.allclose(found[near], expected[near], atol=1e-5)
    assert (found[~near] >= limit).all()


def test_files_are_what_they_say() -> None:
    smooth = np.asarray(Image.fromarray(PHOTO[:3, :4]).resize((64, 48), Image.Resampling.BICUBIC))
    for name, kind, most in (("png", "PNG", 0), ("jpg", "JPEG", 8), ("webp", "WEBP", 24)):
        data = encode(smooth, name)
        with Image.open(io.BytesIO(data)) as reopened:
            assert reopened.format == kind
            assert np.abs(np.asarray(reopened).astype(int) - smooth).max() <= most
        uri = data_uri(data, name)
        assert uri.startswith(f"data:image/{'jpeg' if name == 'jpg' else name};base64,")
        assert np.array_equal(load(uri, allow_local=False, mask=uri).pixels, load(data).pixels)
    with pytest.raises(RequestError, match="output_format is 'gif'"):
        encode(PHOTO, "gif")


def palette_png(transparency: bytes) -> bytes:
    """8 x 8 pixels of the first of 256 colours."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = {
        b"IHDR": struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0),
        b"PLTE": bytes(768),
        b"tRNS": transparency,
        b"IDAT": zlib.compress(bytes(9 * 8)),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts.items())


def with_transparency(mode: str, value: object) -> Image.Image:
    picture = Image.new(mode, (8, 8))
    picture.info["transparency"] = value
    return picture


@pytest.mark.parametrize("field", ["image", "mask"])
@pytest.mark.parametrize(
    ("source", "why"),
    [
        (palette_png(b"\1" * 300), "can't be read as colours"),
        (with_transparency("RGB", "garbage"), "can't be read as colours"),
        (with_transparency("L", b"abc"), "can't be read as colours"),
        (with_transparency("P", 999), "can't be read as colours"),
        (b"", "is empty"),
        (b"\x00" * 100, "none of the formats"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "none of the formats"),
        (b"<!DOCTYPE html><html></html>", "none of the formats"),
        (b"%PDF-1.7", "none of the formats"),
        (saved(PHOTO, "TIFF"), "none of the formats"),
        (saved(PHOTO, "ICO"), "none of the formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of the formats"),
        (saved(PHOTO)[:-2000], "truncated"),
        (saved(PHOTO, "JPEG")[:-300], "truncated"),
        (saved(PHOTO, "WEBP")[:-300], "damaged"),
        (saved(PHOTO, "GIF")[:-500], "truncated"),
        (saved(PHOTO, "JPEG")[:400], "damaged JPEG"),
        (saved(PHOTO, "GIF")[:300], "ends within its header"),
        (saved(PHOTO)[:20], "ends within its header"),
        (saved(PHOTO, "BMP")[:500], "truncated"),
        (b"\x89PNG\r\n\x1a\n", "damaged PNG"),
        (b"\xff\xd8\xff", "damaged JPEG"),
        (b"GIF89a", "ends within its header"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "ends within its header"),
        (b"BM", "damaged BMP"),
        (b"\x89PNG\r\n\x1a\n" + saved(PHOTO, "JPEG"), "damaged PNG"),
        (png_header(0, 5), "pixels; both sides must be at least 1"),
        (png_header(100_000, 100_000), "has 100000x100000 pixels; at most"),
        (png_header(10_000, 10_000), "has 10000x10000 pixels; at most"),
        (png_header(2**31 - 1, 2**31 - 1), "pixels; at most"),
        (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";", "has 65535x65535"),
        (b"GIF89a" + struct.pack("<HHBBBB4HB", 1, 1, 0, 0, 0, 0x2C, 0, 0, 12000, 9000, 0), "has 12000x9000"),
        (b"RIFF\x40\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x00\x00\x00\x00" + b"\xff" * 6, "16777216x16777216"),
        (b"RIFF\x40\x00\x00\x00WEBPVP8L\x0a\x00\x00\x00\x2f\xff\xff\xff\x0f" + b"\0" * 30, "16384x16384"),
    ],
)
def test_hostile_bytes(field: str, source: bytes | Image.Image, why: str) -> None:
    assert why in refused(source, field)


def test_hostile_bytes_behind_a_data_uri_are_refused_alike() -> None:
    uri = "data:image/png;base64," + base64.b64encode(png_header(30_000, 30_000)).decode()
    message = refused(uri, allow_local=False)
    assert "has 30000x30000 pixels" in message
    assert uri not in message


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data(), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]))
def test_damaged_files_are_loaded_or_refused(data: st.DataObject, kind: str) -> None:
    content = bytearray(saved(PHOTO, kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(8, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RequestError):
        assert load(bytes(content), max_pixels=1_000_000).pixels.shape == (48, 64, 3)


def test_own_caps_and_untouched_global_settings() -> None:
    before = Image.MAX_IMAGE_PIXELS
    assert f"at most {48 * 64 - 1} in all" in refused(saved(PHOTO), max_pixels=48 * 64 - 1)
    assert "pixels; at most" in refused(PHOTO, max_pixels=100)
    assert "pixels; at most" in refused(Image.new("L", (64, 48)), max_pixels=100)
    assert "at most 100 are read" in refused(saved(PHOTO), max_bytes=100)
    assert "at most 100 are read" in refused(io.BytesIO(saved(PHOTO)), max_bytes=100)
    assert "at most 100 are read" in refused("data:," + "A" * 101, max_bytes=100)
    assert "at most 100 bytes" in refused("data:," + "A" * 1000, max_bytes=100)
    assert np.array_equal(load(saved(PHOTO), max_pixels=48 * 64).pixels, PHOTO)
    assert before == Image.MAX_IMAGE_PIXELS


def test_files_are_capped_and_must_be_files(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(saved(PHOTO))
    assert "at most 100 are read" in refused(path, max_bytes=100)
    assert "does not exist" in refused(tmp_path / "none.png")
    assert "is not a file" in refused(tmp_path)
    assert "is not a file" in refused("/dev/zero" if pathlib.Path("/dev/zero").exists() else str(tmp_path))
    assert "input.image" in refused("a\0b")
    assert "input.image" in refused("x" * 100_000)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (np.zeros((4, 4), dtype=np.int64), "dtype other than"),
        (np.zeros((4, 4), dtype=np.int8), "dtype other than"),
        (np.zeros((4, 4), dtype=np.uint32), "dtype other than"),
        (np.zeros((4, 4), dtype=complex), "dtype other than"),
        (np.zeros((4, 4), dtype=object), "dtype other than"),
        (np.zeros((4, 4, 2), dtype=np.uint8), "shape other than"),
        (np.zeros((3, 4, 4), dtype=np.uint8)[:, :, :2], "shape other than"),
        (np.zeros((1, 4, 4, 3), dtype=np.uint8), "shape other than"),
        (np.zeros(4, dtype=np.uint8), "shape other than"),
        (np.zeros((0, 4), dtype=np.uint8), "both sides must be at least 1"),
        (np.full((4, 4), np.nan), "NaN or infinity"),
        (np.full((4, 4), np.inf, dtype=np.float16), "NaN or infinity"),
        (np.full((4, 4), -0.01), "0 (black) to 1 (white)"),
        (np.full((4, 4), 255.0), "holds 255 to 255"),
        (Image.new("I", (4, 4)), "whose white is not defined"),
        (Image.new("F", (4, 4)), "whose white is not defined"),
        (Image.new("L", (0, 4)), "both sides must be at least 1"),
        (5, "is no image"),
        (None, "is no image"),
        ([[0, 1]], "is no image"),
        ("file:///etc/passwd", "scheme that is not fetched"),
        ("s3://bucket/key.png", "scheme that is not fetched"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,A", "not valid base64"),
        ("data:,", "is empty"),
        ("", "is an empty path"),
        (" ", "is an empty path"),
    ],
)
def test_sources_that_are_refused(source: Any, why: str) -> None:
    assert why in refused(source)


def test_a_closed_picture_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(saved(PHOTO))
    picture = Image.open(path)
    picture.close()
    assert "can't be read" in refused(picture)


def test_local_sources_are_refused_where_not_allowed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(saved(PHOTO))
    good = data_uri(saved(PHOTO))
    for source in (
        str(path),
        path,
        path.read_bytes(),
        PHOTO,
        Image.fromarray(PHOTO),
        io.BytesIO(b"x"),
        f"file://{path}",
    ):
        assert "is not allowed here" in refused(source, mask=good, allow_local=False)


def test_sources_are_not_changed() -> None:
    picture, array = Image.fromarray(PHOTO.copy()), PHOTO.copy()
    loaded = load(picture, array)
    loaded.pixels[:] = 0
    assert np.array_equal(np.asarray(picture), PHOTO)
    assert np.array_equal(array, PHOTO)


def test_no_socket_opens_without_a_url(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    def forbidden(*args: object, **keywords: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    path = tmp_path / "photo.png"
    path.write_bytes(saved(PHOTO))
    for source in (path, str(path), data_uri(saved(PHOTO)), saved(PHOTO), PHOTO, Image.fromarray(PHOTO)):
        assert np.array_equal(load(source, source).pixels, PHOTO)


def test_urls_go_through_the_fetcher() -> None:
    class Fake:
        asked: list[tuple[str, str]] = []  # noqa: RUF012 - one test, one instance

        def get(self, url: str, *, field: str) -> bytes:
            self.asked.append((url, field))
            return saved(PHOTO)

    fake: Any = Fake()
    loaded = load("HTTPS://example.org/a?b", "http://example.org/m", fetcher=fake, allow_local=False)
    assert np.array_equal(loaded.pixels, PHOTO)
    assert fake.asked == [("HTTPS://example.org/a?b", "input.image"), ("http://example.org/m", "input.mask")]
    with pytest.raises(FetchError, match="not a public address") as caught:
        load("http://127.0.0.1/a.png?token=secret")
    assert caught.value.field == "input.image"
    assert "secret" not in str(caught.value)


def test_messages_about_urls_keep_secrets() -> None:
    class Fake:
        def get(self, url: str, *, field: str) -> bytes:
            return b"<html>"

    fake: Any = Fake()
    message = refused("https://example.org/a.png?token=topsecret", fetcher=fake)
    assert "https://example.org/a.png" in message
    assert "topsecret" not in message


def test_the_loader_alone() -> None:
    with Loader(allow_local=True).flat(PHOTO, field="input.image", ground=(0, 0, 0)) as picture:
        assert (picture.size, picture.mode) == ((64, 48), "RGB")


@pytest.mark.parametrize("size", [(70_000, 1), (1, 70_000)])
@pytest.mark.parametrize("field", ["image", "mask"])
def test_sides_are_capped_too(size: tuple[int, int], field: str) -> None:
    assert "65536 on a side" in refused(saved(Image.new("1", size)), field)
    assert "65536 on a side" in refused(np.zeros(size, np.uint8), field)


def test_a_data_uri_of_escapes_is_refused() -> None:
    assert "percent-encoded" in refused("data:image/png," + "%41" * 1_100_000)


def test_an_open_file_needs_only_read() -> None:
    class Stream:
        def __init__(self) -> None:
            self.rest = io.BytesIO(saved(PHOTO))

        def read(self, size: int) -> bytes:
            return self.rest.read(min(size, 1000))

    assert np.array_equal(load(Stream()).pixels, PHOTO)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), ZeroDivisionError()])
def test_an_open_file_may_raise_anything(error: Exception) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise error

    assert "can't be read" in refused(Broken())
