"""`ritocco export --trtexec`: the commands that build each graph with NVIDIA's own tools, ready to paste.

Flags: samples/common/sampleOptions.cpp of NVIDIA/TensorRT for trtexec, where `--profile=N` begins a profile;
`polygraphy convert --help` (0.53) for Polygraphy, where shapes are repeated for each profile.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ritocco.artefacts import Artefacts
from ritocco.nets.io import GraphName, Shapes

_KINDS = ("min", "opt", "max")


def commands(artefacts: Artefacts) -> str:
    """Two commands for each graph, for a POSIX shell, under a comment each. Engines go to the current folder:
    in the export's own they would be strangers that its manifest refuses.
    """
    blocks = []
    for graph in artefacts.contract:
        profiles = shapes_of(artefacts, graph)
        about = f"{len(profiles)} profile{'s' * (len(profiles) > 1)}" if profiles else "one size"
        blocks.append(f"# {graph}: {about}")
        for words in (trtexec(artefacts, graph), polygraphy(artefacts, graph)):
            blocks.append(" \\\n  ".join(words) + "\n")
    return "\n".join(blocks)


def shapes_of(artefacts: Artefacts, graph: GraphName) -> list[dict[str, Shapes]]:
    """Smallest, best and largest shape of each moving input, for each profile; none for a static graph."""
    io = artefacts.contract[graph]
    found = [io.shapes(ranges) for ranges in artefacts.profiles(graph)]
    return [shapes for shapes in found if shapes]


def trtexec(artefacts: Artefacts, graph: GraphName) -> list[str]:
    """The words of a command, quoted; the first has the graph, the rest an option or a profile each."""
    profiles = []
    for index, shapes in enumerate(shapes_of(artefacts, graph)):
        words = [
            f"--{kind}Shapes=" + ",".join(f"{name}:{_times(held[i])}" for name, held in shapes.items())
            for i, kind in enumerate(_KINDS)
        ]
        profiles.append(_line([f"--profile={index}", *words]))
    first = ["trtexec", f"--onnx={artefacts.graph(graph)}", f"--saveEngine={graph}.engine"]
    return [_line(first), "--stronglyTyped --noTF32 --skipInference", *profiles]


def polygraphy(artefacts: Artefacts, graph: GraphName) -> list[str]:
    """See `trtexec`."""
    profiles = []
    for shapes in shapes_of(artefacts, graph):
        words: list[str] = []
        for i, kind in enumerate(_KINDS):
            words.append(f"--trt-{kind}-shapes")
            words += [f"{name}:[{','.join(map(str, held[i]))}]" for name, held in shapes.items()]
        profiles.append(_line(words))
    file = str(artefacts.graph(graph))
    file = f"./{file}" if file.startswith("-") else file  # no option
    first = ["polygraphy", "convert", file, "--convert-to", "trt"]
    return [_line(first), f"--strongly-typed -o {graph}.engine", *profiles]


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _line(words: Sequence[str]) -> str:
    return " ".join(map(shlex.quote, words))
