"""What OpenVINO keeps of compiled models: sealed when it is written, thrown away where it changed since.

OpenVINO itself sees what is wrong with a compiled graph, and does not look at its weights (2026.4).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ritocco.disk import write_whole

_SEALS = "seals.json"


def seal(folder: Path, intact: Mapping[str, str]) -> None:
    """Keep the digests of all compiled models in a folder; if that fails, the next start compiles again.

    intact: those that are known, of `throw_away_unsealed`.
    """
    with suppress(OSError):
        held = {file.name: intact.get(file.name) or _digest(file) for file in folder.glob("*.blob")}
        if held != _seals(folder):
            write_whole(folder / _SEALS, json.dumps(held, indent=2, sort_keys=True).encode())


def throw_away_unsealed(folder: Path) -> dict[str, str] | None:
    """Delete the compiled models that changed since they were sealed, or never were, as their process ended
    too early. Returns the digests of the others by name; None where one can't be read or deleted.
    """
    seals, intact = _seals(folder), {}
    try:
        for file in folder.glob("*.blob"):
            digest = _digest(file)
            if seals.get(file.name) == digest:
                intact[file.name] = digest
            else:
                file.unlink(missing_ok=True)
    except OSError:
        return None
    return intact


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seals(folder: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        held = json.loads((folder / _SEALS).read_bytes())
        if isinstance(held, dict):
            return held
    return {}
