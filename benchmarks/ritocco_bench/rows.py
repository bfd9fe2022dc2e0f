"""Rows of results in a file of rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ritocco_bench.environment import Environment, environment

_SAME = ("sources", "machine", "driver", "versions")


def add_options(parser: argparse.ArgumentParser, file: str) -> None:
    """`--out`, a file of benchmarks/results where nothing is said, and `--resume`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results") / file,
        help="JSONL file that rows are added to",
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out what the file has from these sources and machine"
    )


def append(
    file: Path, row: Mapping[str, Any], *, device: str = "cpu", env: Environment | None = None
) -> None:
    """Add a row, with the machine and the moment that it was obtained at. env: None looks now."""
    found = asdict(environment(device) if env is None else env)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({**row, "environment": found}) + "\n")


def held(file: Path, env: Environment) -> list[dict[str, Any]]:
    """The rows of a file that were obtained from the same sources on such a machine; a torn line is none.

    Nothing where the file is missing, and where nobody knows the sources.
    """
    if not file.is_file() or not env.sources:
        return []
    wanted = {name: asdict(env)[name] for name in _SAME}
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            found = {name: row["environment"].get(name) for name in _SAME}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        if found == wanted:
            rows.append(row)
    return rows
