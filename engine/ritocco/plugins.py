"""What other packages add to ritocco: sub-commands, and the exporter that an engine may ask for graphs.

A plug-in is an object named by an entry point of the group `ritocco.plugins`. Nothing is imported before
somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, cast

from ritocco.checkpoint import Checkpoint
from ritocco.errors import BackendError

GROUP = "ritocco.plugins"
EXPORTER = "export"


class Exporter(Protocol):
    """What the plug-in `export` offers."""

    command: Callable[..., None]
    """The sub-command `ritocco export`."""

    def export(self, checkpoint: Checkpoint, out: Path, *, dtype: str) -> None:
        """Write the checkpoint's graphs to the folder `out`. dtype: `float32`, `float16`, `bfloat16`."""


def exporter() -> Exporter:
    """The exporter. Raises BackendError where none is installed."""
    for point in entry_points(group=GROUP, name=EXPORTER):
        return cast(Exporter, point.load())
    raise BackendError('no exporter is installed; pip install "ritocco[onnx]"')
