"""Bytes as people write and read them."""

from __future__ import annotations

import math
import numbers
import re

from ritocco.errors import RequestError
from ritocco.shown import shown

_DECIMAL = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS = _DECIMAL | {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_budget(budget: float | str, name: str = "memory_budget") -> int:
    """Bytes of a whole number, or of words such as `8GiB`, `500 MB`. Raises RequestError, which calls the
    budget by this name.
    """
    if isinstance(budget, numbers.Real) and not isinstance(budget, bool):
        whole = isinstance(budget, numbers.Integral) or float(budget).is_integer()
        if whole and budget > 0:
            return int(budget)
    found = re.fullmatch(
        r"\s*((?:[0-9]{1,12}|[0-9]{1,3}(?:,[0-9]{3}){1,3})(?:\.[0-9]{1,6})?)\s*([A-Za-z]{0,3})\s*",
        str(budget),
    )
    if isinstance(budget, str) and found is not None and found[2].upper() in _UNITS:
        size = int(float(found[1].replace(",", "")) * _UNITS[found[2].upper()])
        if size > 0:
            return size
    rule = "it must be a whole number of bytes over 0, or a number with a unit, as 8GiB or 500MB"
    raise RequestError(f"{name} is {shown(budget)}; {rule}", field=name)


def mib(size: float) -> str:
    """For people."""
    return f"{size / 2**20:,.1f} MiB"


def mib_up(size: int) -> str:
    """The same, of what is needed: a budget of so much, as it is written, is enough."""
    return mib(math.ceil(size * 10 / 2**20) * 2**20 / 10)


def mib_down(size: int) -> str:
    """The same, of what is there."""
    return mib(size * 10 // 2**20 * 2**20 / 10)
