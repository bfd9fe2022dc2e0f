"""Safetensors and JSON files as found on disk: headers, shards and refusals. Needs no torch.

A checkpoint is somebody else's data. Everything is measured before it is used: sizes before reading, offsets
before mapping, names before opening. Pickles (`.ckpt`, `.bin`, `.pt`, `.pth`) can run code when loaded and
are never opened.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ritocco.errors import CheckpointError
from ritocco.shown import shown

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
FLOATS = ("F64", "F32", "F16", "BF16")
_JSON_LIMIT_BYTES = 16 << 20
_HEADER_LIMIT_BYTES = 100_000_000
_LONGEST_KEY = 400
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_CONVERT = (
    "A pickle can run code when it is opened, so ritocco never does. Convert it to safetensors where you "
    "trust it: "
    "diffusers' StableDiffusionInpaintPipeline.{read}(...).save_pretrained(NEW_FOLDER, "
    "safe_serialization=True)"
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A parameter's place in a safetensors file.

    shape: as the network wants it. part: (k, n) takes the k-th of n equal pieces along the first axis of
    what is stored (a packed q, k, v); `flatten` drops trailing axes of length 1 (a 1 x 1 convolution used as
    a matrix).
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    part: tuple[int, int] = (0, 1)
    flatten: bool = False

    def taking(self, *, part: tuple[int, int] = (0, 1), flatten: bool = False) -> StoredTensor:
        """The same tensor, of which only a part is used, or whose trailing axes of length 1 are dropped."""
        shape = self.shape
        if part[1] > 1:
            if not shape or shape[0] % part[1]:
                raise CheckpointError(
                    f"{self.file}: {self.key} has the shape {list(shape)}, not {part[1]} equal parts"
                )
            shape = (shape[0] // part[1], *shape[1:])
        if flatten:
            while len(shape) > 2 and shape[-1] == 1:
                shape = shape[:-1]
        return StoredTensor(self.file, self.key, self.dtype, shape, part, flatten)


def read_text(file: Path, *, limit_bytes: int = _JSON_LIMIT_BYTES) -> str:
    """A small UTF-8 text file. Raises CheckpointError where it is missing, too big, or not text."""
    if not file.is_file():
        raise CheckpointError(f"{file}: missing")
    try:
        if (size := file.stat().st_size) > limit_bytes:
            raise CheckpointError(f"{file}: {size} bytes, more than the {limit_bytes} such a file may have")
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({error.strerror or error})") from error
    if data.startswith(_LFS_POINTER):
        raise CheckpointError(_lfs_message(file))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def read_json(file: Path, *, limit_bytes: int = _JSON_LIMIT_BYTES) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where the file is missing, too big, not JSON, or no object."""
    return _parse_object(read_text(file, limit_bytes=limit_bytes), file)


def _parse_object(text: str, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); get the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(value).__name__}; an object {{...}} is needed")
    return value


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Names, dtypes and shapes in a safetensors file; the tensors themselves are not read.

    Raises CheckpointError for what is missing, truncated, corrupt, a Git-LFS pointer, or a pickle by its
    name.
    """
    header, data_bytes = _split_header(file)
    tensors = {}
    spans = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if not key.isprintable() or len(key) > _LONGEST_KEY:
            raise CheckpointError(f"{file}: corrupt, the header names a tensor {shown(key)}")
        tensors[key], span = _entry(file, key, entry)
        spans.append(span)
    used_bytes = max((end for _, end in spans), default=0)
    if used_bytes > data_bytes:
        raise CheckpointError(
            f"{file}: truncated, {used_bytes - data_bytes} of {used_bytes} bytes of weights are missing; "
            "download the file again"
        )
    if not tensors:
        raise CheckpointError(f"{file}: holds no tensors")
    _refuse_gaps(file, sorted(spans), data_bytes)
    return tensors


def _split_header(file: Path) -> tuple[dict[str, Any], int]:
    if file.suffix.lower() in PICKLES:
        raise CheckpointError(pickle_message(file))
    if not file.is_file():
        raise CheckpointError(f"{file}: missing")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise CheckpointError(_lfs_message(file))
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT_BYTES):
                raise CheckpointError(
                    f"{file}: not a safetensors file, or cut short ({size} bytes; a header of {length} bytes "
                    "is announced); download the file again"
                )
            stream.seek(8)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({error.strerror or error})") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{file}: corrupt, the safetensors header is not text; download it again"
        ) from error
    return _parse_object(text, file), size - 8 - length


def _refuse_gaps(file: Path, spans: list[tuple[int, int]], data_bytes: int) -> None:
    """The tensors lie one behind the other and fill the file, as the format has it."""
    place = 0
    for begin, end in (*spans, (data_bytes, data_bytes)):
        if begin != place:
            what = "tensors lie over each other" if begin < place else "bytes that belong to no tensor"
            raise CheckpointError(f"{file}: corrupt, {what} at byte {min(begin, place)} of the weights")
        place = end


def _entry(file: Path, key: str, entry: object) -> tuple[StoredTensor, tuple[int, int]]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if all(
            isinstance(n, int) and n >= 0 for n in shape
        ):
            pass
        case _:
            raise CheckpointError(f"{file}: corrupt, the header's entry for {shown(key)} makes no sense")
    if dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{file}: {shown(key)} is stored as {shown(dtype)}, which ritocco does not read; "
            "use float32 or float16 weights"
        )
    if begin < 0 or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{file}: corrupt, {shown(key)} has the shape {shown(shape)} in {end - begin} bytes of {dtype}"
        )
    return StoredTensor(file, key, dtype, tuple(shape)), (begin, end)


def content_digest(file: Path, *, blocks: int = 64, block_bytes: int = 4096) -> str:
    """sha256 over a safetensors file's size, header and evenly spread blocks of its weights.

    Two fine-tunes of one model share the header, so the header alone would not tell them apart; reading
    gigabytes would take seconds.
    """
    digest = hashlib.sha256()
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        digest.update(size.to_bytes(8, "little") + head)
        start = 8 + int.from_bytes(head, "little")
        digest.update(stream.read(start - 8))
        for k in range(blocks):
            stream.seek(start + max(0, size - start - block_bytes) * k // max(1, blocks - 1))
            digest.update(stream.read(block_bytes))
    return digest.hexdigest()


def find_variants(folder: Path, *, root: Path, stem: str) -> dict[str, dict[str, StoredTensor]]:
    """Every complete set of weights in a diffusers sub-folder: variant ('' for the plain one) -> name ->
    tensor.

    stem: `diffusion_pytorch_model` or `model`. Sharded sets are found by their index file. Raises
    CheckpointError where there is none, where only a pickle is there, or where a file lies outside the model
    folder.
    """
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, variant, is_index in _candidates(folder, stem):
        file = inside(folder / name, root)
        found[variant] = _read_shards(file, root) if is_index else read_header(file)
    if found:
        return found
    pickles = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICKLES)
    if pickles:
        raise CheckpointError(pickle_message(pickles[0]))
    raise CheckpointError(f"{folder / (stem + '.safetensors')}: missing; download this file of the model too")


def _candidates(folder: Path, stem: str) -> Iterator[tuple[str, str, bool]]:
    """(file name, variant, is an index); an index comes after a whole file of the same variant and wins."""
    names = sorted(p.name for p in folder.iterdir() if p.name.startswith(stem + "."))
    for name in names:
        middle = name.removeprefix(stem).removesuffix(".safetensors").strip(".")
        if name.endswith(".safetensors") and "-of-" not in middle and middle.count(".") == 0:
            yield name, middle, False
    for name in names:
        rest = name.removeprefix(stem + ".safetensors.index.")
        if rest != name and rest.endswith("json"):
            yield name, rest.removesuffix("json").strip("."), True


def _read_shards(index: Path, root: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map of tensor -> file")
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, StoredTensor] = {}
    for key, name in weight_map.items():
        if not key.isprintable() or len(key) > _LONGEST_KEY:
            raise CheckpointError(f"{index}: corrupt, it names a tensor {shown(key)}")
        if not isinstance(name, str) or not _plain_name(name):
            raise CheckpointError(
                f"{index}: {shown(key)} is said to lie in {shown(name)}; "
                "a shard is the plain name of a .safetensors file beside the index"
            )
        if name not in shards:
            shards[name] = read_header(inside(index.parent / name, root))
        if key not in shards[name]:
            raise CheckpointError(
                f"{index}: {shown(key)} is said to lie in {shown(name)}, which does not hold it"
            )
        tensors[key] = shards[name][key]
    return tensors


def _plain_name(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and name == PurePosixPath(name).name == PureWindowsPath(name).name
        and name.isprintable()
    )


def inside(path: Path, root: Path) -> Path:
    """`path`, if it really lies in the model folder `root` once links are followed.

    The Hugging Face cache keeps `models--x/snapshots/<revision>/…` as links into `models--x/blobs`; that
    counts as inside. Raises CheckpointError for a link that leads elsewhere.
    """
    try:
        real, home = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself, before Python 3.13
        raise CheckpointError(f"{path}: can't be followed ({error})") from error
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path}: leads outside the model folder {root}; put the file itself there")
    return path


def pickle_message(file: Path) -> str:
    """What to tell somebody who has only a pickle."""
    whole = file.suffix.lower() == ".ckpt" or file.stem not in ("diffusion_pytorch_model", "pytorch_model")
    return f"{file}: a pickle. " + _CONVERT.format(read="from_single_file" if whole else "from_pretrained")


def _lfs_message(file: Path) -> str:
    return f"{file}: a Git-LFS pointer, not the file itself; run `git lfs pull` in the model's repository"
