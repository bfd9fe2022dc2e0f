"""Reading a checkpoint's config.json: every problem is a CheckpointError that names key, value and rule.

A key that the file lacks has the default of the class that wrote it (diffusers and transformers do the
same); a key that nobody here knows is ignored, as they ignore it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ritocco.errors import CheckpointError
from ritocco.shown import shown

MAX_SIZE = 1 << 20
"""Largest channel count, width or vocabulary believed."""

MAX_COUNT = 256
"""Largest number of layers or heads believed."""

MAX_LEVELS = 8
MAX_BLOCKS = 600
"""Most blocks of a whole network: a damaged file must not keep a constructor busy."""


_LARGEST = sys.float_info.max


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """One network's config mapping. network: how error messages call it, as in `unet`."""

    network: str
    config: Mapping[str, Any]

    def error(self, key: str, rule: str) -> CheckpointError:
        """The error for a key whose value breaks a rule."""
        return CheckpointError(f"{self.network} config: {key} is {shown(self.config.get(key))}; {rule}")

    def refuse_unless(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise CheckpointError for the first key that is present with a value outside its tuple.

        Compared by type as well: 1 is not True. Lists are compared element by element, where
        a value may differ from block to block: not those that are texts.
        """
        for key, values in allowed.items():
            if key not in self.config:
                continue
            value = self.config[key]
            several = isinstance(value, (list, tuple)) and not all(isinstance(v, str) for v in values)
            elements = value if several else [value]
            if not elements or not all(any(_same(element, v) for v in values) for element in elements):
                raise self.error(key, f"supported: {', '.join(map(repr, values))}")

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "it must be true or false")
        return value

    def integer(self, key: str, default: int, *, least: int = 1, most: int = MAX_SIZE) -> int:
        """An integer between `least` and `most`."""
        value = self.config.get(key, default)
        if not _is_integer(value, least, most):
            raise self.error(key, f"it must be an integer from {least} to {most}")
        return int(value)

    def number(self, key: str, default: float) -> float:
        """A finite number, zero or above."""
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LARGEST:
            raise self.error(key, "it must be a finite number, zero or above")
        return float(value)

    def integers(
        self, key: str, default: Any, *, most: int = MAX_SIZE, count: int | None = None
    ) -> tuple[int, ...]:
        """Integers from 1 to `most`; with a `count`, one integer stands for that many equal ones."""
        value = self.config.get(key, default)
        if count is not None and _is_integer(value, 1, most):
            return (int(value),) * count
        if (
            not isinstance(value, (list, tuple))
            or not 1 <= len(value) <= MAX_LEVELS
            or not all(_is_integer(element, 1, most) for element in value)
        ):
            either = "" if count is None else "an integer or "
            raise self.error(key, f"it must be {either}a list of up to {MAX_LEVELS} integers, 1 to {most}")
        if count is not None and len(value) != count:
            raise self.error(key, f"it must have {count} entries, one for each block")
        return tuple(int(element) for element in value)

    def choices(
        self, key: str, default: Sequence[str], allowed: Sequence[str], *, count: int
    ) -> tuple[str, ...]:
        """A list of `count` names, each one of `allowed`."""
        value = self.config.get(key, default)
        if not isinstance(value, (list, tuple)):
            raise self.error(key, "it must be a list of block names")
        for element in value:
            if element not in allowed:
                raise self.error(key, f"{shown(element)} is not supported; supported: {', '.join(allowed)}")
        if len(value) != count:
            raise self.error(key, f"it must have {count} entries, one for each of block_out_channels")
        return tuple(value)

    def divides(self, key: str, parts: int, of: int) -> None:
        """Raise CheckpointError unless `of` channels split evenly into `parts`, the value of `key`."""
        if of % parts:
            raise self.error(key, f"{of} channels cannot be split into {parts} equal parts")


def _is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _same(value: Any, allowed: Any) -> bool:
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)
