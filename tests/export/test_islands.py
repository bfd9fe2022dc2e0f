"""float16 graphs where activations are large, computed in float16 itself: by ONNX's reference evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from ritocco.nets import clip
from ritocco.nets.blocks import Attention, ResnetBlock, TransformerBlock
from ritocco.nets.io import GRAPHS, NetworkIO, Port
from ritocco.nets.specs import EncoderSpec
from ritocco_export.graphs import write_graph
from ritocco_export.islands import GRAPH_OPS
from ritocco_kernels.ops import REFERENCE, Ops

# Of the largest value: weights, activations and output are rounded to 11 bits, sums over 72 products.
TOLERANCE = 0.01


class LayerNormalization(OpRun):
    """As ONNX has it: statistics in `stash_type`, float32. Its own evaluator takes the dtype of the input."""

    op_domain = ""

    def _run(  # the attributes' names are ONNX's
        self, X: Any, Scale: Any, B: Any = None, axis: Any = None, epsilon: Any = None, stash_type: Any = None
    ) -> tuple[Any]:
        assert (axis, stash_type) == (-1, 1)
        wide = X.astype(np.float32)
        wide = wide - wide.mean(-1, keepdims=True)
        normed = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + epsilon)
        return ((normed.astype(X.dtype) * Scale + (0 if B is None else B)).astype(X.dtype),)


def error_of(
    module: torch.nn.Module, x: torch.Tensor, folder: Path, *operators: type[OpRun]
) -> tuple[float, set[str]]:
    """Largest error of the module's float16 graph over the largest value, and its operators.

    operators: in place of the evaluator's own.
    """
    port = Port(name="x", shape=tuple(x.shape), dtype="float16")
    out = Port(name="y", shape=tuple(x.shape), dtype="float16")
    io = NetworkIO(inputs=(port,), outputs=(out,), ranges={}, multiples={})
    write_graph(module.half(), io, folder / "model.onnx", opset=20, static=True)
    graph = onnx.load(folder / "model.onnx")
    with np.errstate(over="ignore", invalid="ignore"):
        evaluator = ReferenceEvaluator(graph, new_ops=list(operators))
        outputs: Any = evaluator.run(None, {"x": x.half().numpy()})
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


ENCODER = EncoderSpec(width=64, inner=64, layers=1, heads=1, activation="gelu", eps=1e-5)


@pytest.mark.parametrize("network", ["unet", "text encoder"])
def test_attention_scores_are_scaled_before_the_product(tmp_path: Path, network: str) -> None:
    """Queries and keys of 90 over 64 channels: their product, 518400, is past float16, an eighth is not."""
    torch.manual_seed(2)
    made: torch.nn.Module
    if network == "unet":
        unet = made = Attention(64, 1)
        queries, keys = unet.to_q, unet.to_k
    else:
        text = made = clip.Attention(ENCODER, causal=True)
        queries, keys = text.q_proj, text.k_proj
    made.eval().requires_grad_(False)
    for layer in (queries, keys):
        layer.weight.copy_(90 * torch.eye(64))
        if layer.bias is not None:
            layer.bias.zero_()
    error, operators = error_of(made, torch.sign(torch.randn(1, 4, 64)), tmp_path)
    assert error < TOLERANCE
    assert "Softmax" in operators


class UNetNorms(torch.nn.Module):
    """The second layer norm of a block, behind the first, self-attention and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.block = TransformerBlock(64, 4, context_dim=64, ops=GRAPH_OPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.attend_self(x)[1]


class TextNorms(torch.nn.Module):
    """The same of the text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = clip.Layer(ENCODER, causal=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.layer.layer_norm2(x + self.layer.self_attn(self.layer.layer_norm1(x)))
        return normed


@pytest.mark.parametrize("norms", [UNetNorms, TextNorms])
def test_layer_norms_take_large_activations(tmp_path: Path, norms: type[torch.nn.Module]) -> None:
    """Of 800, whose squares are past float16: statistics in float16 don't do."""
    torch.manual_seed(3)
    made = norms().eval().requires_grad_(False)
    x = 800 * torch.randn(1, 16, 64)
    error, operators = error_of(made, x, tmp_path, LayerNormalization)
    assert error < TOLERANCE
    assert "LayerNormalization" in operators
    assert error_of(made, x, tmp_path)[0] > 0.2


@pytest.mark.parametrize("name", GRAPHS)
def test_every_norm_of_a_half_export_has_its_statistics_in_float32(tiny_half_graphs: Path, name: str) -> None:
    graph = onnx.load(tiny_half_graphs / name / "model.onnx", load_external_data=False)
    typed = onnx.shape_inference.infer_shapes(graph).graph
    types = {value.name: value.type.tensor_type.elem_type for value in typed.value_info}
    norms = [node for node in typed.node if "Normalization" in node.op_type]
    assert {node.op_type for node in norms} == {
        "text_encoder": {"LayerNormalization"},
        "unet": {"InstanceNormalization", "LayerNormalization"},
        "vae_encoder": {"InstanceNormalization"},
        "vae_decoder": {"InstanceNormalization"},
    }[name]
    for node in norms:
        if node.op_type == "InstanceNormalization":
            assert types[node.input[0]] == types[node.output[0]] == onnx.TensorProto.FLOAT
        else:
            assert [held.i for held in node.attribute if held.name == "stash_type"] in ([], [1])


def test_float32_graphs_have_no_casts(tiny_graphs: Path) -> None:
    graph = onnx.load(tiny_graphs / "vae_decoder" / "model.onnx", load_external_data=False)
    assert "Cast" not in {node.op_type for node in graph.graph.node}
