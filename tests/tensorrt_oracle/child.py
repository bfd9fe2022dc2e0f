"""The process that TensorRT-RTX is called in: questions come as JSON lines, and answers go.

Every warning and error goes to standard error too, at once: where the libraries end the process, they are its
last words.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx

from tensorrt_oracle.library import UNUSABLE, Library, UnusableError

# What the parser's log calls types, and what ONNX calls them where that is something else.
_NAMES = {"HALF": "FLOAT16", "BF16": "BFLOAT16", "FP8": "FLOAT8E4M3FN", "FP4": "FLOAT4E2M1"}
_TENSOR = re.compile(r"\[([^\[\]]+) -> \([^()]*\)\[(\w+)\]\]")


class Ear:
    """What the libraries say of one graph.

    The parser narrows some types without a warning (float64 becomes float32): its news name the type of each
    node's inputs and outputs, which are held against those of the graph.
    """

    def __init__(self, types: dict[str, str]) -> None:
        """types: of the graph's tensors, as ONNX calls them."""
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self._types, self._compared = types, set[str]()

    def hear(self, level: str, text: str) -> None:
        """Take a message."""
        if level == "news":
            if " inputs: [" in text or " outputs: [" in text:
                self._compare(text)
            return
        sys.stderr.write(f"{level}: {text}\n")
        (self.errors if level == "error" else self.warnings).append(text)

    def close(self, layers: int) -> None:
        """To be called after the last message: without types in the news, casts would go unseen."""
        if layers and not self._compared:
            self.hear("error", "the parser's log names no types; casts can't be told")

    def _compare(self, text: str) -> None:
        for name, kind in _TENSOR.findall(text):
            if name in self._types and name not in self._compared:
                self._compared.add(name)
                wanted, found = self._types[name], _NAMES.get(kind, kind)
                if wanted != found:
                    self.hear("warning", f"silent cast: {name} is {wanted}, and {found} in TensorRT")


def types_of(file: Path) -> dict[str, str]:
    """The type of each tensor of a graph; none where it is no graph."""
    # protobuf's errors and the inference's share no base; the parser has its own words for what is wrong.
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception:
        return {}
    with suppress(Exception):
        model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    held = {value.name: value.type.tensor_type.elem_type for value in values}
    held |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name: onnx.TensorProto.DataType.Name(kind) for name, kind in held.items() if kind}


def answer(library: Library, question: dict[str, Any]) -> dict[str, Any]:
    """One question, as `oracle.Question` writes it, to what `oracle.Verdict` holds."""
    start = time.monotonic()
    file = Path(question["file"])
    ear = Ear(types_of(file))
    library.say = ear.hear
    layers, size = library.judge(file, question["profiles"], build=question["build"])
    ear.close(layers)
    if question["build"] and layers and not size and not ear.errors:
        ear.hear("error", "no engine, and no word why")
    return {
        "errors": ear.errors,
        "warnings": ear.warnings,
        "layers": layers,
        "engine_bytes": size,
        "seconds": round(time.monotonic() - start, 2),
    }


def main() -> None:
    """Answer every question; exits with UNUSABLE where that can't be."""
    # The libraries print on standard output too.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        library = Library(lambda level, text: None)
    except UnusableError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(UNUSABLE)
    for line in sys.stdin:
        out.write(json.dumps(answer(library, json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
