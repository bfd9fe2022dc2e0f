"""Any picture's source -> an upright PIL image with 8 bits per channel.

A source is an http(s) URL or a data URI and, in the library, also a path, bytes, an open file, a PIL image or
a NumPy array. Encoded pictures are PNG, JPEG, WebP, GIF or BMP (first frame only). TIFF and the rest
are left out: their decoders are large, with a history of holes, and seldom needed here. Bytes and pixels
are counted before anything is decoded, by caps of our own; Pillow's global settings are not changed.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ritocco.backends.host_memory import give_back_freed_memory
from ritocco.errors import RequestError
from ritocco.fetch import MAX_BYTES, Fetcher, redacted
from ritocco.jpeg import JpegOutline, outline
from ritocco.orientation import orientation_of
from ritocco.pixel_budget import PixelBudget
from ritocco.strips import from_16_bits, on_colour

MAX_PIXELS = 64 * 1024 * 1024
MAX_SIDE = 1 << 16  # resizing keeps a table of the source's side
MAX_SCANS = 64  # of a progressive JPEG, each of which costs time for every pixel; files have about ten
MAX_EXIF_SEGMENTS = 16
MAX_ESCAPES = 1 << 20  # of a data URI that is not base64

_FORMATS: tuple[tuple[str, Callable[[bytes], bool], Callable[[io.BytesIO], Image.Image]], ...] = (
    ("PNG", lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"), PngImageFile),
    ("JPEG", lambda data: data.startswith(b"\xff\xd8\xff"), JpegImageFile),
    ("WebP", lambda data: data.startswith(b"RIFF") and data[8:12] == b"WEBP", WebPImageFile),
    ("GIF", lambda data: data.startswith((b"GIF87a", b"GIF89a")), GifImageFile),
    ("BMP", lambda data: data.startswith(b"BM"), BmpImageFile),
)
FORMATS = tuple(name for name, _, _ in _FORMATS)
"""Of encoded pictures that are read."""
# Of all threads together: a pixel takes up to 10 bytes while it is open, 16 as WebP.
_OPEN = PixelBudget(MAX_PIXELS)
_LARGE_PIXELS = 1 << 22
_REMOTE = ("http://", "https:/", "data:")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Loader:
    """How sources are opened.

    allow_local: paths, bytes, open files, PIL images and arrays too, not only http(s) URLs and data URIs.
    fetcher: opens the URLs; None makes one from the environment when a URL comes along.
    max_bytes: most bytes of an encoded picture. max_pixels: most pixels of any picture, width x height.
    """

    allow_local: bool = False
    fetcher: Fetcher | None = None
    max_bytes: int = MAX_BYTES
    max_pixels: int = MAX_PIXELS

    @contextmanager
    def flat(
        self, source: Any, *, field: str, ground: tuple[int, int, int], mode: str = "RGB"
    ) -> Iterator[Image.Image]:
        """The picture upright, its transparent parts laid on the colour `ground`, within the block.

        All threads together have at most `MAX_PIXELS` open. field: `input.image` or `input.mask`.
        mode: RGB or L. Raises RequestError, which names field, value and rule; FetchError for a URL.
        """
        with ExitStack() as room:
            picture = self._load(source, field, room)
            try:
                picture = on_colour(picture, ground, mode)
            # A palette or transparency that fits no picture; Pillow raises any class.
            except Exception as error:
                why = f"can't be read as colours ({_first_line(error)})"
                raise RequestError(f"{field}: {describe(source)} {why}", field=field) from error
            yield picture
            del picture

    def _load(self, source: Any, field: str, room: ExitStack) -> Image.Image:
        """Upright, with 8 bits per channel. room: what it takes of the budget is held there."""
        try:
            if isinstance(source, str) and source.strip()[:7].lower().startswith(_REMOTE):
                return self._decode(self._remote(source.strip(), field), room)
            if not self.allow_local:
                raise _Unusable("is not allowed here; image and mask are http(s) URLs or data URIs")
            if isinstance(source, np.ndarray):
                return _from_array(source, self.max_pixels)
            if isinstance(source, Image.Image):
                self._check_size(source.size)
                return self._opened(source)
            return self._decode(_read_local(source, self.max_bytes), room)
        except _Unusable as why:
            raise RequestError(f"{field}: {describe(source)} {why}", field=field) from why.__cause__

    def _remote(self, source: str, field: str) -> bytes:
        if source[:5].lower() == "data:":
            return _from_data_uri(source, self.max_bytes)
        fetcher = self.fetcher or Fetcher.from_environment(max_bytes=self.max_bytes)
        return fetcher.get(source, field=field)

    def _decode(self, data: bytes, room: ExitStack) -> Image.Image:
        if not data:
            raise _Unusable("is empty")
        if len(data) > self.max_bytes:
            raise _Unusable(f"has {len(data)} bytes; at most {self.max_bytes} are read")
        found = next(((name, opener) for name, accepts, opener in _FORMATS if accepts(data)), None)
        if found is None:
            raise _Unusable(f"is none of the formats that are read: {', '.join(FORMATS)}")
        name, opener = found
        announced = _announced_size(data)
        self._check_size(announced)
        if name == "JPEG":
            self._check_jpeg(outline(data))
        if name == "WebP":  # whose decoder takes its memory before a pixel is asked for
            _take(room, announced)
        try:
            # The decoder's own class: Image.open would first judge the size by a global limit, and warn.
            picture = opener(io.BytesIO(data))
        except Exception as error:  # decoders raise nearly every class on hostile bytes
            raise _Unusable(f"is a damaged {name} file ({_first_line(error)})") from error
        self._check_size(picture.size)
        if name != "WebP":
            _take(room, picture.size)
        # PNG tells its orientation after its pixels, so the tag is looked up once they are decoded.
        try:
            return self._opened(picture, f"a damaged or truncated {name} file", orientation_of)
        except _Unusable:
            picture.close()  # the error's traceback still has it
            raise

    def _opened(
        self,
        picture: Image.Image,
        blame: str = "an image that can't be read",
        orientation: Callable[[Mapping[Any, Any]], int] | None = None,
    ) -> Image.Image:
        try:
            picture.load()
            tag = _own_orientation(picture) if orientation is None else orientation(picture.info)
            turn = _UPRIGHT.get(tag)
            return _eight_bits(picture if turn is None else picture.transpose(turn))
        except _Unusable:
            raise
        except Exception as error:  # decoders raise nearly every class on hostile bytes
            raise _Unusable(f"is {blame} ({_first_line(error)})") from error

    def _check_jpeg(self, found: JpegOutline) -> None:
        self._check_size(found.size)
        if found.scans > MAX_SCANS:
            raise _Unusable(f"is a JPEG of {found.scans} scans; at most {MAX_SCANS} are read")
        if found.exif > MAX_EXIF_SEGMENTS:
            raise _Unusable(f"has {found.exif} EXIF segments; at most {MAX_EXIF_SEGMENTS} are read")

    def _check_size(self, size: tuple[int, int]) -> None:
        _check_size(size, self.max_pixels)


class _Unusable(Exception):  # noqa: N818 - a step on the way to RequestError, which adds field and value
    """Why a source is refused; `Loader.load` turns it into RequestError."""


def describe(source: Any) -> str:
    """A source in a few words, for messages: never its content, never a URL's query."""
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            head = source.partition(",")[0].partition(";")[0]
            return f"the data URI {head[: 30 if ',' in source else 5]!a}..."
        return repr(redacted(source)) if "://" in source else ascii(source[:100])
    if isinstance(source, os.PathLike):
        return ascii(os.fspath(source))
    if isinstance(source, np.ndarray):
        return f"the array {source.shape} {source.dtype}"
    if isinstance(source, Image.Image):
        return f"the {source.mode} image of {source.width}x{source.height} pixels"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"the content of {len(source)} bytes"
    return f"the {type(source).__name__}"


def _take(room: ExitStack, size: tuple[int, int]) -> None:
    pixels = size[0] * size[1]
    room.enter_context(_OPEN.hold(pixels))
    if pixels >= _LARGE_PIXELS:
        room.callback(give_back_freed_memory)  # of which the C library keeps a part for every thread


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise _Unusable(f"has {width}x{height} pixels; both sides must be at least 1")
    if max(width, height) > MAX_SIDE:
        raise _Unusable(f"has {width}x{height} pixels; at most {MAX_SIDE} on a side are read")
    if width * height > max_pixels:
        raise _Unusable(f"has {width}x{height} pixels; at most {max_pixels} in all are read")


def _announced_size(data: bytes) -> tuple[int, int]:
    """The size in the header of PNG, WebP and GIF, whose decoders act on it at once; else (1, 1)."""
    try:
        if data[12:16] == b"IHDR":
            width, height = struct.unpack(">II", data[16:24])
            return width, height
        if data[:4] == b"RIFF":
            kind = data[12:16]
            if kind == b"VP8X":
                return (
                    int.from_bytes(data[24:27], "little") + 1,
                    int.from_bytes(data[27:30], "little") + 1,
                )
            if kind == b"VP8L":
                bits = int.from_bytes(data[21:25], "little")
                return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
            across, down = struct.unpack("<HH", data[26:30])
            return across & 0x3FFF, down & 0x3FFF
        if data[:3] == b"GIF":
            return _gif_size(data)
    except (struct.error, IndexError) as error:
        raise _Unusable("ends within its header") from error
    return 1, 1


def _gif_size(data: bytes) -> tuple[int, int]:
    """The larger of a GIF's screen and its first frame, to which Pillow enlarges the screen."""
    width, height = struct.unpack("<HH", data[6:10])
    position = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    while data[position] != 0x2C:
        if data[position] == 0x3B:
            return width, height
        if data[position] == 0x21:
            position += 2
            while data[position]:
                position += data[position] + 1
        position += 1
    left, top, across, down = struct.unpack("<4H", data[position + 1 : position + 9])
    return max(width, left + across), max(height, top + down)


def _from_data_uri(uri: str, max_bytes: int) -> bytes:
    """A data URI's bytes [RFC 2397]; the media type is not believed. Base64 may be wrapped and unpadded."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise _Unusable("has no comma between type and content")
    if len(body) > 3 * max_bytes:  # a percent-encoded byte has three characters
        raise _Unusable(f"has {len(body)} characters; at most {max_bytes} bytes are read")
    plain_text = head.rpartition(";")[2].strip().lower() != "base64"
    if plain_text and body.count("%") > MAX_ESCAPES:
        raise _Unusable(f"has more than {MAX_ESCAPES} percent-encoded bytes; use base64")
    data = unquote_to_bytes(body.encode("utf-8", errors="replace"))
    if plain_text:
        return data
    data = b"".join(data.split()).rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise _Unusable(f"is not valid base64 ({error})") from error


def decode_data_uri(uri: str, max_bytes: int = MAX_BYTES) -> tuple[str, bytes]:
    """Media type and bytes of a data URI. Raises RequestError."""
    try:
        return uri[5:].partition(",")[0].partition(";")[0], _from_data_uri(uri, max_bytes)
    except _Unusable as why:
        raise RequestError(f"{describe(uri)} {why}") from why.__cause__


def _read_local(source: Any, max_bytes: int) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str) and "://" in source:
        raise _Unusable("has a scheme that is not fetched; URLs are http, https or data")
    if isinstance(source, str | os.PathLike):
        try:
            path = Path(os.fsdecode(source))
            if not os.fsdecode(source).strip():
                raise _Unusable("is an empty path")
            if not path.is_file():
                raise _Unusable("is not a file" if path.exists() else "does not exist")
            with path.open("rb") as file:
                return file.read(max_bytes + 1)
        except (OSError, ValueError) as error:
            raise _Unusable(f"can't be read ({_first_line(error)})") from error
    if hasattr(source, "read"):
        return _read_open_file(source, max_bytes)
    raise _Unusable("is no image; use a path, URL, data URI, bytes, open file, PIL image or NumPy array")


def _read_open_file(file: Any, max_bytes: int) -> bytes:
    """From where the file stands to its end; the position is put back, so that a file can be passed twice."""
    try:
        seekable = getattr(file, "seekable", None)
        start = file.tell() if seekable is not None and seekable() else None
        data = bytearray()
        while len(data) <= max_bytes and (part := file.read(max_bytes + 1 - len(data))):
            data += part
        if start is not None:
            file.seek(start)
    except TypeError as error:
        raise _Unusable("is open for text, or gives no bytes; open it with mode 'rb'") from error
    except Exception as error:  # the file is the caller's object and may raise anything
        raise _Unusable(f"can't be read ({_first_line(error)})") from error
    return bytes(data)


def _from_array(array: npt.NDArray[Any], max_pixels: int) -> Image.Image:
    """[H,W] or [H,W,1|3|4]; bool, uint8 (0..255), uint16 (0..65535) or float (0..1)."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise _Unusable("has a shape other than [H,W], [H,W,1], [H,W,3] and [H,W,4]")
    _check_size((array.shape[1], array.shape[0]), max_pixels)
    kind, bits = array.dtype.kind, array.dtype.itemsize * 8
    if kind == "b":
        levels = array.astype(np.uint8) * np.uint8(255)
    elif kind == "u" and bits == 8:
        levels = array
    elif kind == "u" and bits == 16:
        levels = from_16_bits(array)
    elif kind == "f":
        if not np.isfinite(array).all():
            raise _Unusable("holds NaN or infinity; floats are 0 to 1")
        if array.min() < 0 or array.max() > 1:
            raise _Unusable(f"holds {array.min():g} to {array.max():g}; floats are 0 (black) to 1 (white)")
        levels = np.rint(array.astype(np.float64) * 255.0).astype(np.uint8)
    else:
        raise _Unusable("has a dtype other than bool, uint8, uint16 and float (0 to 1)")
    return Image.fromarray(np.ascontiguousarray(levels[..., 0] if levels.shape[2:] == (1,) else levels))


def _own_orientation(picture: Image.Image) -> int:
    """Of a picture that the caller made, whose tags may exist in memory only."""
    try:
        orientation = picture.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a picture with broken EXIF is still a picture, and upright as far as anyone can tell
        orientation = 1
    return orientation if isinstance(orientation, int) else 1


def _eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        levels, clear = np.asarray(picture), picture.info.get("transparency")
        grey = Image.fromarray(from_16_bits(levels))
        if not isinstance(clear, int):
            return grey
        opaque = np.where(levels == clear, np.uint8(0), np.uint8(255))
        return Image.merge("LA", (grey, Image.fromarray(opaque)))
    if picture.mode in ("I", "F"):
        raise _Unusable("has a mode whose white is not defined; convert it to L, or pass an array")
    return picture


def _first_line(error: BaseException) -> str:
    return ascii((str(error) or type(error).__name__).splitlines()[0][:120])[1:-1]
