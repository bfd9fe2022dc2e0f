"""Strangers' values in messages: on one line, in ASCII, not endless, whatever they are."""

from __future__ import annotations

import reprlib

_MOST_CHARACTERS = 120
_repr = reprlib.Repr()
_repr.maxlevel = 3
_repr.maxdict = _repr.maxlist = _repr.maxtuple = _repr.maxset = 8
_repr.maxstring = _repr.maxlong = _repr.maxother = 60


def shown(value: object) -> str:
    """The value as Python writes it, cut where it is long or deep; `<type>` where it can't be written."""
    try:
        text = _repr.repr(value)
    except Exception:  # a number of ten thousand digits, a __repr__ that raises
        text = f"<{type(value).__name__}>"
    return plain(text, _MOST_CHARACTERS)


def plain(text: str, most: int = 80) -> str:
    """A name without quotes: what is not printable ASCII escaped, at most `most` characters."""
    safe = ascii(text[:most])[1:-1]
    return safe if len(text) <= most else f"{safe[: most - 3]}..."
