"""Parity of graphs that are there, measured again beside the checkpoint that they were made of."""

from __future__ import annotations

from collections.abc import Callable

from ritocco.artefacts import Artefacts
from ritocco.checkpoint import Checkpoint
from ritocco.errors import RitoccoError
from ritocco_export.figures import Figures
from ritocco_export.gate import compare, compare_hoisted
from ritocco_export.picture import compare_picture


def measured(checkpoint: Checkpoint, artefacts: Artefacts) -> tuple[dict[str, Figures], dict[str, str]]:
    """What the gate finds of each graph and of the picture, and what keeps it from finding anything.

    Of somebody else's export the picture alone: its graphs may take other types than ours. Keys: names of
    graphs, `unet` for two that stand for it, and `picture`.
    """
    asked: dict[str, Callable[[], Figures]] = {}
    if artefacts.manifest is not None:
        static = all(
            least == most for io in artefacts.contract.values() for least, _, most in io.ranges.values()
        )
        for graph, io in artefacts.contract.items():
            asked[graph] = lambda graph=graph, io=io: compare(  # type: ignore[misc]
                checkpoint, graph, artefacts.graph(graph), io, layout=artefacts.layout, static=static
            )
        if artefacts.hoisted:
            asked["unet"] = lambda: compare_hoisted(
                checkpoint, artefacts.path, artefacts.contract, static=static
            )
    asked["picture"] = lambda: compare_picture(checkpoint, artefacts.path)
    found: dict[str, Figures] = {}
    failed: dict[str, str] = {}
    for name, measure in asked.items():
        try:
            found[name] = measure()
        except RitoccoError as error:
            failed[name] = str(error)
    return found, failed
