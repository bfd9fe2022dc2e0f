"""What can still be read of a row that a disk or another program damaged: it takes no other one with it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

_UNKNOWN = "1970-01-01T00:00:00.000Z"
_LATEST = 9000  # years are added to it


def columns(row: Any) -> dict[str, Any]:
    """Of a row, by name; bytes in the place of a text become as much of a text as they are."""
    return {
        name: value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        for name, value in dict(row).items()
    }


def parsed(text: str, kind: type) -> Any:
    """What a stored text of JSON holds, which is ASCII as we write it; None where it is damaged."""
    try:
        held = json.loads(text) if text.isascii() else None
    except (ValueError, RecursionError):
        return None
    return held if isinstance(held, kind) else None


def moment(text: str) -> str:
    """A stored time in UTC; where it is damaged, the begin of 1970."""
    try:
        held = datetime.fromisoformat(text)
    except ValueError:
        return _UNKNOWN
    return text if held.tzinfo == UTC and held.year <= _LATEST else _UNKNOWN
