"""The matrix's column of restrictions: what TensorRT 10.1's parser wants of an operator beside its types.

Every row with words in that column has its rule here, under the operator's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

Shape = tuple[int | None, ...]
"""None: an axis of any length."""

LARGEST_K = 3840  # TopK takes fewer

_RESIZE = {
    "coordinate_transformation_mode": (
        "half_pixel",
        ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
    ),
    "mode": ("nearest", ("nearest", "linear")),
    "nearest_mode": ("round_prefer_floor", ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
    "keep_aspect_ratio_policy": ("stretch", ("stretch",)),
}


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a model's values, those of its subgraphs included.

    shapes: where inferred. constants: initializers and outputs of Constant; None for one whose values lie in
    another file.
    """

    shapes: Mapping[str, Shape]
    constants: Mapping[str, onnx.TensorProto | None]

    def value(self, name: str) -> np.ndarray[Any, Any] | None:
        """Of a constant whose values are at hand."""
        tensor = self.constants.get(name)
        return None if tensor is None else onnx.numpy_helper.to_array(tensor)

    def rank(self, name: str) -> int | None:
        """Number of axes."""
        shape = self.shapes.get(name)
        return None if shape is None else len(shape)


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and those in the attributes of its nodes, however deep."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs_of(inner)


def known_of(graph: onnx.GraphProto) -> Known:
    """Of a model on which shapes were inferred."""
    shapes: dict[str, Shape] = {}
    constants: dict[str, onnx.TensorProto | None] = {}
    for part in graphs_of(graph):
        for value in (*part.input, *part.output, *part.value_info):
            if value.type.tensor_type.HasField("shape"):
                dims = value.type.tensor_type.shape.dim
                shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
        for tensor in part.initializer:
            shapes[tensor.name] = tuple(tensor.dims)
            constants[tensor.name] = None if onnx.external_data_helper.uses_external_data(tensor) else tensor
        for node in part.node:
            if node.op_type == "Constant":
                held = next((one.t for one in node.attribute if one.name == "value"), None)
                constants |= dict.fromkeys(node.output, held)
    return Known(shapes, constants)


def restricted(node: onnx.NodeProto, known: Known) -> Iterator[str]:
    """What of a node the parser does not take, in words."""
    rule = RULES.get(node.op_type)
    if rule is not None:
        held = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        yield from rule(node, held, known)


Rule = Callable[[onnx.NodeProto, Mapping[str, Any], Known], Iterator[str]]


def _given(node: onnx.NodeProto, place: int) -> str:
    """An input's name; empty where it is left out."""
    return str(node.input[place]) if len(node.input) > place else ""


def _constant(place: int, what: str) -> Rule:
    def rule(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
        name = _given(node, place)
        if name and name not in known.constants:
            yield f"{node.op_type} with {what} that {'are' if what == 'axes' else 'is'} no constant"

    return rule


def _zero_point(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    if name := _given(node, 2):
        value = known.value(name)
        if value is None or value.astype(np.float32).any():
            yield f"{node.op_type} with a zero point that is not a constant 0"


def _pooling(indices: bool, ranks: Sequence[int] = (2, 3)) -> Rule:
    def rule(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
        if any(one != 1 for one in held.get("dilations", ())):
            yield f"{node.op_type} with dilations {list(held['dilations'])}"
        if ranks and len(held.get("kernel_shape", ())) not in ranks:
            yield f"{node.op_type} over {len(held.get('kernel_shape', ()))} axes; it pools over 2 or 3"
        if indices and len([name for name in node.output if name]) > 1:
            yield f"{node.op_type} with indices as an output"

    return rule


def _constant_kind(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    if held.keys() & {"sparse_value", "value_string", "value_strings"}:
        yield "a sparse or string constant"


def _deform(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    rank = known.rank(_given(node, 0))
    if rank is not None and rank not in (3, 4):
        yield f"DeformConv of {rank} axes; it takes one or two beside batch and channels"
    pads = list(held.get("pads", ()))
    if pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
        yield f"DeformConv with pads {pads}, which differ between beginning and end"


def _dropout(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    if name := _given(node, 2):
        value = known.value(name)
        if value is None or value.any():
            yield "Dropout with a training mode that is not a constant false"


def _eye(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    shape = known.shapes.get(_given(node, 0))
    if shape is None or None in shape:
        yield "EyeLike of an input without a fixed shape"


def _grid(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    rank = known.rank(_given(node, 0))
    if rank not in (None, 4):
        yield f"GridSample of {rank} axes; it takes 4"


def _recurrent(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    names = list(held.get("activations", ()))
    if held.get("direction") == b"bidirectional" and names[: len(names) // 2] != names[len(names) // 2 :]:
        yield f"{node.op_type} whose two directions have different activations"
    if node.op_type == "LSTM":
        for name in ("input_forget", "layout"):
            if held.get(name):
                yield f"LSTM with {name} {held[name]}"


def _hardmax(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    shape, axis = known.shapes.get(_given(node, 0)), held.get("axis", -1)
    if shape is None or shape[axis] is None:
        yield f"Hardmax along axis {axis}, whose length is not fixed"


def _if(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    for one, other in zip(held["then_branch"].output, held["else_branch"].output, strict=True):
        if one.name == other.name:
            yield f"If whose branches both call an output {one.name}"
        ranks = known.rank(one.name), known.rank(other.name)
        if None not in ranks and ranks[0] != ranks[1]:
            yield f"If whose branches give {ranks[0]} and {ranks[1]} axes"


def _layer_norm(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    if len([name for name in node.output if name]) > 1:
        yield "LayerNormalization with more than its first output"


def _loop(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    body, carried = held["body"], len(node.input) - 2
    # Of the body: iteration and condition, then what is carried; condition, what is carried, then the scans.
    for entry, end in zip(body.input[2:], body.output[1 : 1 + carried], strict=False):
        shapes = known.shapes.get(entry.name), known.shapes.get(end.name)
        if None not in shapes and shapes[0] != shapes[1]:
            yield f"Loop that carries {entry.name} in one shape and {end.name} in another"
    if len(body.output) > 1 + carried and _given(node, 0) not in known.constants:
        yield "Loop that collects outputs over a number of rounds that is no constant"


def _resize(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    for name, (default, allowed) in _RESIZE.items():
        value = held.get(name, default.encode())
        if value.decode() not in allowed:
            yield f"Resize with {name} {value.decode()}"
    if held.get("antialias"):
        yield "Resize with antialias"
    axes, scales = list(held.get("axes", ())), _given(node, 2)
    if axes and scales and scales not in known.constants and axes != list(range(len(axes))):
        yield f"Resize with computed scales of the axes {axes}; they must be all, in order"


def _scatter(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    if held.get("reduction", b"none") != b"none":
        yield f"ScatterND with reduction {held['reduction'].decode()}"


def _top_k(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    if not held.get("sorted", 1):
        yield "TopK that is not sorted"
    value = known.value(_given(node, 1))
    if value is not None and int(value.max()) >= LARGEST_K:
        yield f"TopK with K {int(value.max())}; it must be less than {LARGEST_K}"


def _nothing(node: onnx.NodeProto, held: Mapping[str, Any], known: Known) -> Iterator[str]:
    yield from ()


SEEDED = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_AXES_AT = {
    **dict.fromkeys(("Pad", "Slice"), 3),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), 1),
    **dict.fromkeys(
        (
            f"Reduce{kind}"
            for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
        ),
        1,
    ),
}
RULES: Mapping[str, Rule] = {
    **{name: _constant(place, "axes") for name, place in _AXES_AT.items()},
    **dict.fromkeys(SEEDED, _nothing),  # taken, and noted by the check
    "AveragePool": _pooling(indices=False),
    "Constant": _constant_kind,
    "CumSum": _constant(1, "an axis"),
    "DeformConv": _deform,
    "DequantizeLinear": _zero_point,
    "Dropout": _dropout,
    "EyeLike": _eye,
    "GRU": _recurrent,
    "GridSample": _grid,
    "Hardmax": _hardmax,
    "If": _if,
    "LSTM": _recurrent,
    "LayerNormalization": _layer_norm,
    "Loop": _loop,
    "LpPool": _pooling(indices=False, ranks=()),
    "MaxPool": _pooling(indices=True),
    "OneHot": _constant(1, "a depth"),
    "QuantizeLinear": _zero_point,
    "RNN": _recurrent,
    "Resize": _resize,
    "ScatterND": _scatter,
    "TopK": _top_k,
}
