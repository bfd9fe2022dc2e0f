"""A row of a result in a file of rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ritocco_bench.environment import environment


def append(file: Path, row: Mapping[str, Any], *, device: str = "cpu") -> None:
    """Add a row, with the machine and the moment that it was obtained at."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({**row, "environment": asdict(environment(device))}) + "\n")
