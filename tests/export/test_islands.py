"""float16 graphs where activations are large, computed in float16 itself: by ONNX's reference evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from ritocco.nets.blocks import Attention, ResnetBlock
from ritocco.nets.io import NetworkIO, Port
from ritocco_export.graphs import write_graph
from ritocco_export.islands import GRAPH_OPS
from ritocco_kernels.ops import REFERENCE, Ops

# Of the largest value: weights, activations and output are rounded to 11 bits, sums over 72 products.
TOLERANCE = 0.01


def error_of(module: torch.nn.Module, x: torch.Tensor, folder: Path) -> tuple[float, set[str]]:
    """Largest error of the module's float16 graph over the largest value, and its operators."""
    port = Port(name="x", shape=tuple(x.shape), dtype="float16")
    out = Port(name="y", shape=tuple(x.shape), dtype="float16")
    io = NetworkIO(inputs=(port,), outputs=(out,), ranges={}, multiples={})
    write_graph(module.half(), io, folder / "model.onnx", opset=20, static=True)
    graph = onnx.load(folder / "model.onnx")
    with np.errstate(over="ignore", invalid="ignore"):
        outputs: Any = ReferenceEvaluator(graph).run(None, {"x": x.half().numpy()})
        found = outputs[0].astype(np.float64)
    with torch.inference_mode():
        wanted = module.float()(x.half().float()).double().numpy()
    if isinstance(module, ResnetBlock):  # what the block adds, not what it lets through
        found, wanted = found - x.half().double().numpy(), wanted - x.half().double().numpy()
    if not np.isfinite(found).all():
        return np.inf, set()
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    return error, {node.op_type for node in graph.graph.node}


def block(ops: Ops) -> torch.nn.Module:
    torch.manual_seed(0)
    made = ResnetBlock(8, 8, groups=2, eps=1e-6, ops=ops).eval().requires_grad_(False)
    made.conv2.weight *= 100  # else the sum with large activations rounds its output away
    return made


@pytest.mark.parametrize("scale", [1.0, 400.0])
def test_a_group_norm_takes_large_activations(tmp_path: Path, scale: float) -> None:
    torch.manual_seed(1)
    x = scale * torch.randn(1, 8, 8, 8)
    error, operators = error_of(block(GRAPH_OPS), x, tmp_path)
    assert error < TOLERANCE * (1 if scale == 1 else 8)
    assert "Cast" in operators


def test_without_its_island_it_does_not(tmp_path: Path) -> None:
    torch.manual_seed(1)
    error, _ = error_of(block(REFERENCE), 400 * torch.randn(1, 8, 8, 8), tmp_path)
    assert error > 0.2


def test_attention_scores_are_scaled_before_the_product(tmp_path: Path) -> None:
    """Queries and keys of 90 over 64 channels: their product, 5e5, is past float16, a 64th of it is not."""

    class Scores(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = x.reshape(1, 4, 1, 64).transpose(1, 2)
            mixed = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
            return mixed.transpose(1, 2).reshape(x.shape)

    x = 90 * torch.sign(torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(2)))
    error, operators = error_of(Scores(), x, tmp_path)
    assert error < TOLERANCE
    assert "Softmax" in operators
    assert issubclass(Attention, torch.nn.Module), "which calls the same function"


def test_float32_graphs_have_no_casts(tiny_graphs: Path) -> None:
    graph = onnx.load(tiny_graphs / "vae_decoder" / "model.onnx", load_external_data=False)
    assert "Cast" not in {node.op_type for node in graph.graph.node}
