"""Which pictures of a folder are painted, with which mask and which words."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ritocco.errors import RequestError
from ritocco.schema import PredictionInput
from ritocco.shown import shown

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
"""Of the files that are taken for pictures; what they are is seen when they are opened. TIFF is not read
(`ritocco.sources`), and so it is among those that failed, not passed over.
"""
NAME = "name"
"""The column of a table that tells which picture a row is about: a file's name, or its stem."""
COLUMNS = tuple(name for name in PredictionInput.model_fields if name not in ("image", "mask"))
_WORDS = ("prompt", "negative_prompt", "scheduler")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A picture to paint. name: its stem, which its outputs are called by. given: inputs beside the two."""

    name: str
    image: Path
    mask: Path
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bad:
    """A picture that can't be painted, and why."""

    name: str
    image: Path
    error: str

    @classmethod
    def of(cls, pair: Pair, error: str) -> Bad:
        """One that could have been."""
        return cls(name=pair.name, image=pair.image, error=error)


def pairs(
    images: Path, masks: Path, given: Mapping[str, Any], table: Mapping[str, Mapping[str, Any]] | None
) -> tuple[list[Pair], list[Bad], list[str]]:
    """The pictures of a folder, by name, with their masks; those that can't be painted; and warnings.

    masks: a folder, whose files are paired by stem, or one file for all. given: inputs for all. table: of
    `read_table`; what a row says goes before. Folders inside are not looked into, nor names with a dot first.
    Raises RequestError where a folder is none, or holds no picture.
    """
    found = _by_stem(images, "images")
    held = {} if masks.is_file() else _by_stem(masks, "masks")
    rows = dict(table or {})
    made: list[Pair] = []
    bad: list[Bad] = []
    for stem, files in sorted(found.items(), key=lambda item: _natural(item[0])):
        image, mask = files[0], [masks] if masks.is_file() else held.pop(stem, [])
        row, error = _row_of(image, rows)
        if len(files) > 1:
            error = f"{_names(files)} have one stem, and so one output; rename one"
        elif not mask:
            error = f"no mask: {str(masks)!r} has no file of the stem {stem!r}"
        elif len(mask) > 1:
            error = f"{_names(mask)} are both masks of it; remove one"
        elif not error and table is not None and not row and not given.get("prompt"):
            error = "the table has no row for it, and there is no --prompt"
        if error:
            bad.append(Bad(name=stem, image=image, error=error))
        else:
            made.append(Pair(name=stem, image=image, mask=mask[0], given={**given, **row}))
    warnings = []
    if held:
        warnings.append(f"{len(held)} masks have no picture: {_some(held)}")
    if rows:
        warnings.append(f"{len(rows)} rows of the table have no picture: {_some(rows)}")
    return made, bad, warnings


def read_table(file: Path) -> dict[str, dict[str, Any]]:
    """Inputs by picture from a CSV file in UTF-8: a column `name`, any of COLUMNS; empty cells say nothing.

    Raises RequestError, which names the file, the line and the rule.
    """
    said = f"--prompts is {str(file)!r}"
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            _check_columns(columns, said)
            reader.fieldnames = columns
            rows: dict[str, dict[str, Any]] = {}
            for row in reader:
                line = f"{said}, line {reader.line_num}"
                if None in row:
                    raise RequestError(f"{line}: more cells than columns; quote commas", field="prompts")
                name = (row.pop(NAME) or "").strip()
                if not name or name in rows:
                    what = f"the name {name!r} comes twice" if name else f"no {NAME}"
                    raise RequestError(f"{line}: {what}", field="prompts")
                rows[name] = {key: _value(key, text) for key, text in row.items() if text}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(
            f"{said}, which can't be read as CSV in UTF-8: {error}", field="prompts"
        ) from error
    return rows


def _check_columns(columns: list[str], said: str) -> None:
    unknown = [name for name in columns if name not in (NAME, *COLUMNS)]
    twice = {name for name in columns if columns.count(name) > 1}
    if NAME not in columns or unknown or twice:
        why = f"unknown: {shown(unknown[0])}" if unknown else f"twice: {_some(twice)}" if twice else "no name"
        rule = f"the first line names columns: {NAME}, and any of {', '.join(COLUMNS)}"
        raise RequestError(f"{said}; {rule} ({why})", field="prompts")


def _value(column: str, text: str) -> Any:
    """A cell as the schema wants it; what is no number or truth stays text, for the schema to refuse."""
    if column in _WORDS:
        return text
    try:
        return json.loads(text.strip().lower())
    except (ValueError, RecursionError):
        return text


def _row_of(image: Path, rows: dict[str, Mapping[str, Any]]) -> tuple[Mapping[str, Any], str]:
    """Taken out of `rows`; and what is wrong, where a stem and a name speak of the same picture."""
    found = [rows.pop(name) for name in dict.fromkeys((image.name, image.stem)) if name in rows]
    if len(found) > 1:
        return {}, f"the table has rows for {image.name!r} and for {image.stem!r}; remove one"
    return (found[0] if found else {}), ""


def _by_stem(folder: Path, option: str) -> dict[str, list[Path]]:
    try:
        # A link to nothing is a picture that can't be read, not one that is not there.
        files = [
            path
            for path in folder.iterdir()
            if path.suffix.lower() in SUFFIXES
            and (path.is_file() or (path.is_symlink() and not path.exists()))
        ]
    except OSError as error:
        why = f"--{option} is {str(folder)!r}, which is no folder that can be read"
        raise RequestError(f"{why}: {error.strerror}", field=option) from error
    found: dict[str, list[Path]] = {}
    for path in sorted(files):
        if not path.name.startswith("."):
            found.setdefault(path.stem, []).append(path)
    if not found:
        kinds = ", ".join(sorted(SUFFIXES))
        raise RequestError(f"--{option} is {str(folder)!r}, which holds no picture ({kinds})", field=option)
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """2 before 10."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), part) if part.isdecimal() and part.isascii() else (-1, part) for part in parts]


def _names(files: Iterable[Path]) -> str:
    return " and ".join(repr(path.name) for path in files)


def _some(names: Iterable[str]) -> str:
    held = sorted(names, key=_natural)
    return ", ".join(map(shown, held[:5])) + (", …" if len(held) > 5 else "")
