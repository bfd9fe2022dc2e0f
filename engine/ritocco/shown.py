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
    safe = "".join(
        letter if letter.isascii() and letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text[:most]
    )
    return safe if len(text) <= most else f"{safe[: most - 3]}..."


def printable(text: str) -> str:
    """As it is, but what a terminal would obey, line ends too, and names that are no UTF-8 escaped."""
    return "".join(letter if letter.isprintable() else plain(letter) for letter in text)


def said(error: Exception, most: int = 600) -> str:
    """A library's own words on one line; of long ones the middle goes, since the reason tends to be last."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > most:
        text = f"{text[: most // 3]} ... {text[-(most - most // 3 - 5) :]}"
    return printable(text)
