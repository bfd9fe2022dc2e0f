"""Where the pictures of a prediction come from: its own words, a file of ours, or another server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ritocco.images import data_uri
from ritocco.server.files import Files

_PICTURES = ("image", "mask")
# The address of a file of ours, under whatever name the server was reached.
_OWN_FILE = re.compile(
    r"https?://[^/?#]+/(?:[^?#]*/)?(?:files|outputs)/([0-9a-hjkmnp-tv-z]{26})(?:/[^/?#]*)?"
)


def with_own_files(files: Files, given: Mapping[str, Any]) -> dict[str, Any]:
    """Files of ours come from the disk: the server need not reach itself, nor be public."""
    made = dict(given)
    for name in _PICTURES:
        found = _OWN_FILE.match(made.get(name) or "")
        file = None if found is None else files.find(found[1])
        if file is not None:
            made[name] = data_uri(files.read(file), "png")  # the type is not believed anyway
    return made


def is_elsewhere(given: Mapping[str, Any]) -> bool:
    """Whether a picture of it has to be fetched."""
    return any(str(given.get(name)).lstrip()[:5].lower() != "data:" for name in _PICTURES)
