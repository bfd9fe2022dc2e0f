"""`PYTHONPATH=tests python -m tensorrt_oracle.norms`: the two forms of group norm, side by side.

The embedded UNet of one size (2 x 9 x 64 x 64) at opset 20, where a group norm becomes InstanceNormalization,
and at 21, where it becomes GroupNormalization: nodes, what ONNX Runtime's CPU makes of them, its time in
alternating rounds, and what TensorRT-RTX makes of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from ritocco.checkpoint import open_checkpoint
from ritocco.loading import pocket_model
from ritocco.nets.io import NetworkIO
from ritocco_export.exporter import contract_for
from ritocco_export.graphs import example_inputs, graph_module, write_graph
from ritocco_export.profiles import Profile
from tensorrt_oracle.oracle import Question, ask

OPSETS = (20, 21)
DTYPES = ("float32", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """One graph. session, feeds: to run it with ONNX Runtime."""

    name: str
    file: Path
    nodes: int
    optimised: int
    session: Any
    feeds: dict[str, Any]

    @classmethod
    def write(cls, folder: Path, dtype: str, opset: int) -> Form:
        """Export and open it."""
        checkpoint = open_checkpoint(pocket_model())
        profiles = [Profile.parse("512x512@1")]
        io: NetworkIO = contract_for(
            checkpoint, dtype=dtype, layout="ritocco", profiles=profiles, static=True
        )["unet"]
        file = folder / f"{dtype}-{opset}" / "model.onnx"
        module = graph_module(checkpoint, "unet", dtype=getattr(torch, dtype), layout="ritocco")
        write_graph(module, io, file, opset=opset, static=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(file.with_name("optimised.onnx"))
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        inputs = example_inputs(io, {symbol: best for symbol, (_, best, _) in io.ranges.items()})
        return cls(
            name=f"opset {opset}, {dtype}",
            file=file,
            nodes=_nodes(file),
            optimised=_nodes(file.with_name("optimised.onnx")),
            session=session,
            feeds={port.name: value.numpy() for port, value in zip(io.inputs, inputs, strict=True)},
        )

    def run(self) -> float:
        """Processor seconds of one run."""
        begun = time.process_time()
        self.session.run(None, self.feeds)
        return time.process_time() - begun


def main() -> int:
    """Command line; writes a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m tensorrt_oracle.norms", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        forms = [Form.write(Path(folder), dtype, opset) for dtype in DTYPES for opset in OPSETS]
        seconds = timed(forms, rounds)
        verdicts = ask([Question(file=form.file) for form in forms])
        sys.stdout.write(
            "| graph | nodes | after ONNX Runtime's optimisation (CPU) | processor time of a run "
            "| layers in TensorRT-RTX | engine |\n|---|---|---|---|---|---|\n"
        )
        for form, verdict in zip(forms, verdicts, strict=True):
            taken = seconds[form.name]
            spread = f"{statistics.median(taken):.3f} s ({min(taken):.3f} to {max(taken):.3f})"
            engine = f"{verdict.engine_bytes / 1e6:.1f} MB" if not verdict.objections else "refused"
            cells = (form.name, form.nodes, form.optimised, spread, verdict.layers, engine)
            sys.stdout.write(f"| {' | '.join(str(cell) for cell in cells)} |\n")
    return 0


def timed(forms: Sequence[Form], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every round; the forms take turns, after one run each that is not counted."""
    for form in forms:
        form.run()
    seconds: dict[str, list[float]] = {form.name: [] for form in forms}
    for _ in range(rounds):
        for form in forms:
            seconds[form.name].append(form.run())
    return seconds


def _nodes(file: Path) -> int:
    return len(onnx.load(file, load_external_data=False).graph.node)


if __name__ == "__main__":
    sys.exit(main())
