"""Will TensorRT's parser take a graph? Its published operator matrix, asked without TensorRT.

The matrix is that of TensorRT 10.1 (onnx/onnx-tensorrt, branch 10.1-GA, docs/operators.md); newer parsers
take more. It is a second opinion: the parser itself is the first, where one is at hand.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import onnx

from ritocco.artefacts import MANIFEST
from ritocco.nets.io import NetworkIO, Port
from ritocco_export.tensorrt_restrictions import SEEDED, Known, graphs_of, known_of, restricted

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
_NAMES: Mapping[str, str] = {  # of a contract's dtypes, in ONNX
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "int64": "INT64",
    "int32": "INT32",
}
# Their outputs' shapes depend on the data, not on the inputs' shapes.
_DATA_DEPENDENT = {"Compress", "NonMaxSuppression", "NonZero", "Unique"}
# The inputs that tell an operator how large its output is; their numbers have to follow from shapes.
_SIZING: Mapping[str, tuple[int, ...]] = {
    "CenterCropPad": (1,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "MaxUnpool": (2,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Upsample": (1,),
}
_OF_SHAPE = {"Shape", "Size"}  # told by a shape, whatever the numbers are
_RANDOM = {"Bernoulli", "Multinomial", *SEEDED}
# Their outputs are booleans whatever they compare.
_COMPARISONS = {"Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual"}


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
    """A row of the matrix. restrictions: in NVIDIA's words; what they mean is in `tensorrt_restrictions`."""

    supported: bool
    types: frozenset[str]
    restrictions: str


@cache
def matrix() -> Mapping[str, Operator]:
    """Operator name -> what TensorRT 10.1 takes of it."""
    text = (files("ritocco_export") / "tensorrt_operators.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader((line for line in text.splitlines() if not line.startswith("#")), delimiter="\t")
    return {
        row["operator"]: Operator(
            row["supported"] == "Y",
            frozenset(filter(None, map(str.strip, row["types"].split(",")))),
            row["restrictions"] or "",
        )
        for row in rows
    }


def check_graph(file: Path, io: NetworkIO, *, opset: int | None = None) -> list[Finding]:
    """Everything that TensorRT's parser would object to in a graph; empty where it is clean.

    io: the graph's contract, whose ranges become the optimisation profile.
    opset: that of the manifest, if any.
    """
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:  # the checker's errors share no base
        first = str(error).strip().splitlines()
        return [Finding(level="error", rule="valid", subject=file.name, message=first[0] if first else "")]
    model = onnx.load(str(file), load_external_data=False)
    if model.training_info:
        found = "training_info: a graph to train, which no runtime here reads"
        return [Finding(level="error", rule="valid", subject=file.name, message=found)]
    return [*_told(model, opset), *_external(model, file), *check_model(model, io)]


def _told(model: onnx.ModelProto, opset: int | None) -> Iterator[Finding]:
    """Of the opset that the manifest names."""
    held = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if opset is not None and held != [opset]:
        yield _error(
            "opset", MANIFEST, f"says {opset}; the graph imports {', '.join(map(str, held)) or 'none'}"
        )


def _external(model: onnx.ModelProto, file: Path) -> Iterator[Finding]:
    """Weights in another file: whether they lie in it, as many bytes as there have to be."""
    for graph in graphs_of(model.graph):
        for tensor in graph.initializer:
            if not onnx.external_data_helper.uses_external_data(tensor):
                continue
            held = {entry.key: entry.value for entry in tensor.external_data}
            try:
                if (file.parent / held["location"]).samefile(file):
                    raise ValueError("in the graph's own file")
                size = (file.parent / held["location"]).stat().st_size
                offset = int(held.get("offset", 0))
                length = int(held.get("length", size - offset))
            except (KeyError, ValueError, OSError) as error:
                yield _error("weights", tensor.name, f"lie nowhere that can be read ({error})")
                continue
            each = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            needed = math.prod(tensor.dims) * each
            if offset < 0 or offset + length > size or length != needed:
                message = f"{length} bytes from {offset} on; {needed} are needed, the file has {size}"
                yield _error("weights", tensor.name, message)


def check_model(model: onnx.ModelProto, io: NetworkIO) -> list[Finding]:
    """`check_graph` of a model in memory that is known to be valid ONNX."""
    typed = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graphs = list(graphs_of(typed.graph))
    nodes = [node for graph in graphs for node in graph.node]
    nodes += [node for function in typed.functions for node in function.node]
    return [
        *_opset(typed),
        *_ports(typed.graph, io),
        *_operators(nodes),
        *_sizes(graphs, nodes),
        *_types(graphs, nodes),
        *_restrictions(nodes, known_of(typed.graph)),
        *_channels(typed.graph),
    ]


def _opset(model: onnx.ModelProto) -> Iterator[Finding]:
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            yield _error("domain", entry.domain, "not one of ONNX's own operators; TensorRT needs a plug-in")
        elif entry.version not in OPSETS:
            rule = f"opset {entry.version}; TensorRT 10.1 reads {OPSETS[0]} to {OPSETS[-1]}"
            yield _error("opset", entry.domain or "ai.onnx", rule)
    if sum(entry.domain in ("", "ai.onnx") for entry in model.opset_import) > 1:
        yield _error("opset", "ai.onnx", "imported more than once; which opset counts is left to the reader")


def _ports(graph: onnx.GraphProto, io: NetworkIO) -> Iterator[Finding]:
    """Inputs and outputs against the contract: what is there, types, axes, and the sizes they take."""
    held = {tensor.name for tensor in graph.initializer}
    for kind, values, ports in (
        ("an input", [value for value in graph.input if value.name not in held], io.inputs),
        ("an output", graph.output, io.outputs),
    ):
        found = {value.name: value for value in values}
        wanted = {port.name: port for port in ports}
        for name in found.keys() - wanted.keys():
            yield _error("contract", name, f"{kind} that the contract does not have")
        for name in wanted.keys() - found.keys():
            yield _error("contract", name, f"{kind} of the contract that the graph does not have")
        for name in sorted(found.keys() & wanted.keys()):
            yield from _axes(found[name], wanted[name], io)
            yield from _kind(found[name], wanted[name])
    for value in graph.input:
        yield from _input_kind(value)


def _input_kind(value: onnx.ValueInfoProto) -> Iterator[Finding]:
    kind = value.type.tensor_type.elem_type
    if kind == onnx.TensorProto.DOUBLE:
        yield _error("input type", value.name, "float64; the parser would cast it")
    if kind == onnx.TensorProto.INT64 and value.name == "timestep":
        yield _error("input type", value.name, "int64, and three schedulers use fractional timesteps")
    elif kind == onnx.TensorProto.INT64:
        yield _note("input type", value.name, "int64: TensorRT 10 and later")


def _kind(value: onnx.ValueInfoProto, port: Port) -> Iterator[Finding]:
    kind = value.type.tensor_type.elem_type
    wanted = onnx.TensorProto.DataType.Value(_NAMES[port.dtype])
    # What `_input_kind` says of a timestep or of float64 is enough.
    if kind not in (wanted, onnx.TensorProto.INT64, onnx.TensorProto.DOUBLE):
        name = onnx.TensorProto.DataType.Name(kind)
        yield _error("contract", value.name, f"{name}; the contract has {_NAMES[port.dtype]}")


def _axes(value: onnx.ValueInfoProto, port: Port, io: NetworkIO) -> Iterator[Finding]:
    dims = value.type.tensor_type.shape.dim
    if len(dims) != len(port.shape):
        yield _error("contract", value.name, f"{len(dims)} axes; the contract has {len(port.shape)}")
        return
    for axis, (dim, size) in enumerate(zip(dims, port.shape, strict=True)):
        symbol = size.rpartition("*")[2] if isinstance(size, str) else None
        fixed = dim.dim_value if dim.HasField("dim_value") else None
        if fixed is None and symbol not in io.ranges and port in io.inputs:
            yield _error("profile", value.name, f"axis {axis} is dynamic, and no profile covers it")
        elif fixed is not None:
            sizes = {symbol: io.ranges[symbol] for symbol in port.symbols}
            ends = [port.resolve({one: held[i] for one, held in sizes.items()})[axis] for i in (0, 2)]
            if ends != [fixed, fixed]:
                asked = " to ".join(map(str, dict.fromkeys(ends)))
                yield _error(
                    "profile", value.name, f"axis {axis} is {fixed} long, and {asked} is asked of it"
                )


def _operators(nodes: Sequence[onnx.NodeProto]) -> Iterator[Finding]:
    for node in nodes:
        if node.domain not in ("", "ai.onnx"):
            message = f"{node.domain}.{node.op_type} is not one of ONNX's operators"
            yield _error("domain", _name(node), message)
            continue
        row = matrix().get(node.op_type)
        if row is None or not row.supported:
            yield _error("operator", _name(node), f"{node.op_type} is not supported")
        elif node.op_type in _DATA_DEPENDENT:
            yield _error("data-dependent", _name(node), f"{node.op_type}'s shape depends on the data")


def _sizes(graphs: Sequence[onnx.GraphProto], nodes: Sequence[onnx.NodeProto]) -> Iterator[Finding]:
    """Shapes that depend on numbers which are computed from the inputs' numbers."""
    told = {tensor.name for graph in graphs for tensor in graph.initializer} | {""}
    for node in nodes:  # a graph's nodes stand in an order in which they can run
        inner = any(one.HasField("g") or one.graphs for one in node.attribute)
        if node.op_type in _OF_SHAPE or (
            told.issuperset(node.input) and node.op_type not in _RANDOM and not inner
        ):
            told.update(node.output)
        for place in _SIZING.get(node.op_type, ()):
            name = node.input[place] if len(node.input) > place else ""
            if name not in told:
                message = f"{node.op_type}'s shape depends on the data: {name} does not follow from shapes"
                yield _error("data-dependent", _name(node), message)


def _types(graphs: Sequence[onnx.GraphProto], nodes: Sequence[onnx.NodeProto]) -> Iterator[Finding]:
    known: dict[str, int] = {}
    for graph in graphs:
        known |= _types_of(graph)
        for tensor in graph.initializer:
            if tensor.data_type == onnx.TensorProto.DOUBLE:
                message = "weights in DOUBLE; the parser narrows them without a word"
                yield _error("type", tensor.name, message)
            elif tensor.data_type not in _TYPES:
                kind = onnx.TensorProto.DataType.Name(tensor.data_type)
                yield _error("type", tensor.name, f"weights in {kind}, which the matrix does not have")
    for node in nodes:
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


def _restrictions(nodes: Sequence[onnx.NodeProto], known: Known) -> Iterator[Finding]:
    for node in nodes:
        for message in restricted(node, known):
            yield _error("attribute", _name(node), message)
        if node.op_type in SEEDED:
            yield _note("attribute", _name(node), f"{node.op_type}: TensorRT ignores its seed")


def _channels(graph: onnx.GraphProto) -> Iterator[Finding]:
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.input, *graph.value_info)}
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "Conv" or node.input[1] not in weights:
            continue
        axes = shapes.get(node.input[0], ())  # none where shape inference finds no rank
        groups = next((held.i for held in node.attribute if held.name == "group"), 1)
        wanted, found = weights[node.input[1]][1] * groups, axes[1].dim_value if len(axes) > 1 else 0
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


def _note(rule: str, subject: str, message: str) -> Finding:
    return Finding(level="note", rule=rule, subject=subject, message=message)
