"""What other packages add to ritocco: sub-commands, and the exporter, which makes graphs and engines.

A plug-in is an object named by an entry point of the group `ritocco.plugins`. Nothing is imported before
somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from ritocco.errors import BackendError

if TYPE_CHECKING:  # what is exported already is run without torch
    import typer

    from ritocco.artefacts import Artefacts
    from ritocco.backends.engine_store import EngineOptions
    from ritocco.backends.tensorrt_library import Library
    from ritocco.checkpoint import Checkpoint
    from ritocco.graph_plan import GraphPlan, Sizes
    from ritocco.nets.io import GraphName

GROUP = "ritocco.plugins"
EXPORTER = "export"
Say = Callable[[str], None]
"""Takes a line about work that takes minutes."""


class Plugin(Protocol):
    """What every plug-in offers."""

    def register(self, app: typer.Typer) -> None:
        """Add its sub-commands to `ritocco`."""


class Exporter(Plugin, Protocol):
    """What the plug-in `export` offers."""

    def export(self, checkpoint: Checkpoint, out: Path, *, dtype: str, hoisted: bool, say: Say) -> None:
        """Write the checkpoint's graphs to the folder `out`.

        dtype: `float32`, `float16`, `bfloat16`. hoisted: the UNet in two graphs, once a request and the step.
        """

    def build_engine(
        self,
        artefacts: Artefacts,
        graph: GraphName,
        out: Path,
        *,
        library: Library,
        options: EngineOptions,
        target: str,
        timing: Path | None,
        say: Say,
    ) -> None:
        """Write a graph's TensorRT engine to the file `out`. target: a compute capability as `sm89`, or empty
        for the GPU at hand. timing: a file of kernels timed before.
        """

    def structure(self, artefacts: Artefacts, graph: GraphName) -> str:
        """A digest of a graph without its weights."""

    def arenas(self, artefacts: Artefacts, asked: Mapping[GraphName, Sizes]) -> Mapping[GraphName, GraphPlan]:
        """What each graph takes in one allocation at the sizes that are asked of it; nothing is run, no
        weight is read.
        """


def plugins() -> list[Plugin]:
    """All that are installed, in the order of their names."""
    points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    return [cast(Plugin, point.load()) for point in points]


def exporter() -> Exporter:
    """The exporter. Raises BackendError where none is installed."""
    for point in entry_points(group=GROUP, name=EXPORTER):
        return cast(Exporter, point.load())
    raise BackendError('no exporter is installed; pip install "ritocco[onnx]"')
