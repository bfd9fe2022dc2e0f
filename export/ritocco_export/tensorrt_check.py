"""Will TensorRT's parser take a graph? Its published operator matrix, asked without TensorRT.

The matrix is that of TensorRT 10.1 (onnx/onnx-tensorrt, branch 10.1-GA, docs/operators.md); newer parsers
take more. It is a second opinion: the parser itself is the first, where one is at hand.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import onnx

from ritocco.nets.io import NetworkIO

OPSETS = range(9, 21)
_TYPES: Mapping[int, str] = {
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.BOOL: "BOOL",
}
# Their outputs' shapes depend on the data, not on the inputs' shapes.
_DATA_DEPENDENT = {"Compress", "NonMaxSuppression", "NonZero", "Unique"}
# Their outputs are booleans whatever they compare.
_COMPARISONS = {"Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual"}
_CONSTANT_AXES = {"Pad": 3, "Slice": 3, "Squeeze": 1, "Unsqueeze": 1}  # operator -> which input
_RESIZE = {
    "coordinate_transformation_mode": (
        "half_pixel",
        ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
    ),
    "mode": ("nearest", ("nearest", "linear")),
    "nearest_mode": ("round_prefer_floor", ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
    "keep_aspect_ratio_policy": ("stretch", ("stretch",)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that the parser would not take (`error`), or take with a change (`note`).

    rule: which of the rules, by name. subject: the node, port or graph it is about.
    """

    level: str
    rule: str
    subject: str
    message: str


@dataclass(frozen=True, slots=True)
class Operator:
    """A row of the matrix."""

    supported: bool
    types: frozenset[str]


@cache
def matrix() -> Mapping[str, Operator]:
    """Operator name -> what TensorRT 10.1 takes of it."""
    text = (files("ritocco_export") / "tensorrt_operators.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader((line for line in text.splitlines() if not line.startswith("#")), delimiter="\t")
    return {
        row["operator"]: Operator(
            row["supported"] == "Y", frozenset(filter(None, map(str.strip, row["types"].split(","))))
        )
        for row in rows
    }


def check_graph(file: Path, io: NetworkIO) -> list[Finding]:
    """Everything that TensorRT's parser would object to in a graph; empty where it is clean.

    io: the graph's contract, whose ranges become the optimisation profile.
    """
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:  # the checker's errors share no base
        first = str(error).strip().splitlines()
        return [Finding(level="error", rule="valid", subject=file.name, message=first[0] if first else "")]
    model = onnx.load(str(file), load_external_data=False)
    return check_model(model, io)


def check_model(model: onnx.ModelProto, io: NetworkIO) -> list[Finding]:
    """`check_graph` of a model in memory that is known to be valid ONNX."""
    typed = onnx.shape_inference.infer_shapes(model, data_prop=True)
    rules: tuple[Callable[[onnx.ModelProto, NetworkIO], Iterator[Finding]], ...] = (
        _opset,
        _ports,
        _operators,
        _types,
        _attributes,
        _axes,
        _channels,
    )
    return [finding for rule in rules for finding in rule(typed, io)]


def _opset(model: onnx.ModelProto, io: NetworkIO) -> Iterator[Finding]:
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            yield _error("domain", entry.domain, "not one of ONNX's own operators; TensorRT needs a plug-in")
        elif entry.version not in OPSETS:
            rule = f"opset {entry.version}; TensorRT 10.1 reads {OPSETS[0]} to {OPSETS[-1]}"
            yield _error("opset", entry.domain or "ai.onnx", rule)


def _ports(model: onnx.ModelProto, io: NetworkIO) -> Iterator[Finding]:
    ports = {port.name: port for port in io.inputs}
    for value in model.graph.input:
        kind = value.type.tensor_type.elem_type
        if kind == onnx.TensorProto.DOUBLE:
            yield _error("input type", value.name, "float64; the parser would cast it")
        if kind == onnx.TensorProto.INT64:
            if value.name == "timestep":
                yield _error("input type", value.name, "int64, and three schedulers use fractional timesteps")
            else:
                yield Finding(
                    level="note",
                    rule="input type",
                    subject=value.name,
                    message="int64: TensorRT 10 and later",
                )
        port = ports.get(value.name)
        if port is None:
            yield _error("contract", value.name, "an input that the contract does not have")
            continue
        dims = value.type.tensor_type.shape.dim
        if len(dims) != len(port.shape):
            yield _error("contract", value.name, f"{len(dims)} axes; the contract has {len(port.shape)}")
            continue
        for axis, (dim, size) in enumerate(zip(dims, port.shape, strict=True)):
            symbol = size.rpartition("*")[2] if isinstance(size, str) else None
            if dim.dim_param and symbol not in io.ranges:
                yield _error("profile", value.name, f"axis {axis} is dynamic, and no profile covers it")


def _operators(model: onnx.ModelProto, io: NetworkIO) -> Iterator[Finding]:
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            yield _error(
                "domain", _name(node), f"{node.domain}.{node.op_type} is not one of ONNX's operators"
            )
            continue
        row = matrix().get(node.op_type)
        if row is None or not row.supported:
            yield _error("operator", _name(node), f"{node.op_type} is not supported")
        elif node.op_type in _DATA_DEPENDENT:
            yield _error("data-dependent", _name(node), f"{node.op_type}'s shape depends on the data")


def _types(model: onnx.ModelProto, io: NetworkIO) -> Iterator[Finding]:
    known = _types_of(model.graph)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.DOUBLE:
            yield _error("type", tensor.name, "weights in DOUBLE; the parser narrows them without a word")
    for node in model.graph.node:
        row = matrix().get(node.op_type)
        if row is None or not row.supported or node.domain not in ("", "ai.onnx"):
            continue
        # Which inputs share the operator's type is its own affair; the outputs' types are what it computes.
        for name in node.input[:1] if node.op_type in _COMPARISONS else node.output:
            kind = known.get(name)
            if name and kind is not None and _TYPES.get(kind) not in row.types:
                written = _TYPES.get(kind) or onnx.TensorProto.DataType.Name(kind)
                allowed = ", ".join(sorted(row.types))
                yield _error("type", _name(node), f"{node.op_type} in {written}; it takes {allowed}")


def _attributes(model: onnx.ModelProto, io: NetworkIO) -> Iterator[Finding]:
    for node in model.graph.node:
        held = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Resize":
            for name, (default, allowed) in _RESIZE.items():
                value = held.get(name, default.encode())
                if value.decode() not in allowed:
                    yield _error("attribute", _name(node), f"Resize with {name} {value.decode()}")
            if held.get("antialias"):
                yield _error("attribute", _name(node), "Resize with antialias")
        if node.op_type == "LayerNormalization" and len([name for name in node.output if name]) > 1:
            yield _error("attribute", _name(node), "LayerNormalization with more than its first output")
        if node.op_type == "Constant" and held.keys() & {"sparse_value", "value_string", "value_strings"}:
            yield _error("attribute", _name(node), "a sparse or string constant")


def _axes(model: onnx.ModelProto, io: NetworkIO) -> Iterator[Finding]:
    constant = {tensor.name for tensor in model.graph.initializer}
    constant |= {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    for node in model.graph.node:
        place = _CONSTANT_AXES.get(node.op_type)
        if place is not None and len(node.input) > place and node.input[place] not in {"", *constant}:
            yield _error("attribute", _name(node), f"{node.op_type} with axes that are no constant")


def _channels(model: onnx.ModelProto, io: NetworkIO) -> Iterator[Finding]:
    shapes = {
        value.name: value.type.tensor_type.shape.dim
        for value in (*model.graph.input, *model.graph.value_info)
    }
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Conv" or node.input[0] not in shapes or node.input[1] not in weights:
            continue
        groups = next((held.i for held in node.attribute if held.name == "group"), 1)
        wanted, found = weights[node.input[1]][1] * groups, shapes[node.input[0]][1].dim_value
        if found and found != wanted:  # 0: a dynamic axis
            yield _error("shape", _name(node), f"Conv of {found} channels; its weights are for {wanted}")


def _types_of(graph: onnx.GraphProto) -> dict[str, int]:
    values = (*graph.input, *graph.output, *graph.value_info)
    return {value.name: value.type.tensor_type.elem_type for value in values} | {
        tensor.name: tensor.data_type for tensor in graph.initializer
    }


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or node.output[0])


def _error(rule: str, subject: str, message: str) -> Finding:
    return Finding(level="error", rule=rule, subject=subject, message=message)
