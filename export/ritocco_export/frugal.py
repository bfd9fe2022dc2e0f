"""Computing in float32 on weights held in fewer bytes, so that the gate needs little more than they take.

They stay as they lie in the checkpoint's or the graph's files, mapped into memory; each is widened when it is
used, and given back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ritocco.backends import installed
from ritocco.backends.onnxruntime_ import PROVIDERS, OnnxSession
from ritocco.backends.onnxruntime_library import onnxruntime
from ritocco.backends.sessions import Session
from ritocco.checkpoint import Checkpoint, load_network
from ritocco.nets.io import GraphName
from ritocco.parameters import NetworkName


class _Widened(nn.Module):
    def forward(self, held: Tensor) -> Tensor:
        return held.float()


def widen(module: nn.Module) -> nn.Module:
    """Make every read of a parameter give it in float32; it stays as it is. Returns `module`."""
    for part in list(module.modules()):
        for name, held in list(part.named_parameters(recurse=False)):
            if held.dtype != torch.float32:
                # unsafe: what is read has another dtype than what is held.
                parametrize.register_parametrization(part, name, _Widened(), unsafe=True)
    return module


def load_widened(
    checkpoint: Checkpoint, network: NetworkName, *, held: torch.dtype, dtype: torch.dtype, **options: Any
) -> nn.Module:
    """As `load_network`, with weights rounded to `held`; computes in `dtype`, float32.

    The autoencoder, a thirtieth of the whole, is loaded in float32.
    """
    rounded = load_network(checkpoint, network, **{**options, "later": ()}, dtype=held)
    return rounded.to(dtype) if network == "vae" else widen(rounded)


def can_run(dtype: str) -> bool:
    """Whether graphs of a dtype run on this machine's CPU."""
    return dtype != "bfloat16" or installed("openvino")


def open_session(file: Path, graph: GraphName, dtype: str) -> Session:
    """A graph as it is written, on a CPU, computed in float32: on OpenVINO where it is a bfloat16 graph, else
    on ONNX Runtime.
    """
    if dtype == "bfloat16":
        from ritocco.backends.openvino_ import OpenVinoSession
        from ritocco.backends.openvino_library import openvino

        return OpenVinoSession(openvino.Core(), file, {"INFERENCE_PRECISION_HINT": "f32"})
    cpu = PROVIDERS["cpu"]
    return OnnxSession(file, _options(), wanted=cpu, graph=graph, providers=[cpu])


def _options() -> onnxruntime.SessionOptions:
    """Of a session that leaves weights as they lie in the file.

    Folding constants would widen all float16 weights at once, and packing for the CPU's kernels copies them.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # The other order casts all weights first.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options
