"""From when until when each tensor of an exported graph is needed, at one size of its inputs.

The order of steps is that of the graph's nodes. Weights are not read: their shapes are enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx
from onnx.reference import ReferenceEvaluator

from ritocco.errors import CheckpointError
from ritocco.shown import said, shown
from ritocco_export.arena import Lifetime

VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators whose output is their first input's bytes in the same order, under another shape."""

_ONNX = ("", "ai.onnx")
_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
# Functions whose shapes ONNX does not tell.
_AS_FIRST_INPUT = frozenset({"GroupNormalization"})
_OF_SHAPE = frozenset({"Shape", "Size"})  # of a tensor that may have no values, or many
_SMALL = 4096  # elements: shapes, and what they are made of


@dataclass(frozen=True, kw_only=True, slots=True)
class Liveness:
    """Names are the graph's; sizes are bytes.

    steps: what each node is, in the order in which they run. tensors: what is computed and needs memory of
    its own, but outputs; a node's own output is never put where an input of it lies. inputs, outputs: the
    caller's, apart from the tensors, for the whole call. weights: the graph's initializers, all of them.
    constants: what follows from weights and shapes alone and is read by what does not; whoever runs one size
    computes it once, beside the weights. idle: steps that need not run: constants, and views. storage: for
    every tensor that a step gives, the tensor in whose bytes it lies, itself where it is no view. shapes,
    dtypes: of every tensor; dtypes as ONNX numbers them.
    """

    steps: Sequence[str]
    tensors: Mapping[str, Lifetime]
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    weights: int
    constants: Mapping[str, int]
    idle: frozenset[int]
    storage: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, int]


def read_graph(file: Path) -> onnx.ModelProto:
    """A model without the weights that lie in files beside it. Raises CheckpointError where it is none."""
    try:
        return onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's errors share no base with the disk's
        raise CheckpointError(f"{file}: no ONNX graph ({said(error)})") from error


def input_ranks(model: onnx.ModelProto) -> dict[str, int]:
    """How many axes each input has."""
    return {one.name: len(one.type.tensor_type.shape.dim) for one in _inputs(model.graph)}


def liveness(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> Liveness:
    """Of every tensor of a graph whose inputs have these shapes.

    Raises CheckpointError, which names the node and the tensor, for a graph inside a node, an operator that
    is none of ONNX's, and a tensor whose shape depends on more than the shapes of the inputs.
    """
    typed = _Typed(model, shapes)
    for node in model.graph.node:
        typed.infer(node)
    for one in model.graph.output:
        if one.name not in typed.types:
            raise CheckpointError(f"no node gives the graph's output {shown(one.name)}")
    return _lives(model.graph, typed)


class _Typed:
    """Types of all tensors, values of the small ones that follow from shapes, and which are constant."""

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._opsets = list(model.opset_import)
        self._versions = {"" if one.domain in _ONNX else one.domain: one.version for one in self._opsets}
        self._ir = model.ir_version
        self.types: dict[str, onnx.TypeProto] = {}
        self.values: dict[str, onnx.TensorProto] = {}
        self.constant: set[str] = set()
        for tensor in model.graph.initializer:
            self.types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            self.constant.add(tensor.name)
            if not onnx.external_data_helper.uses_external_data(tensor) and prod(tensor.dims) <= _SMALL:
                self.values[tensor.name] = tensor
        if model.graph.sparse_initializer:
            raise CheckpointError("sparse weights, of which no plan is made")
        for one in _inputs(model.graph):
            self.types[one.name] = _of_shape(one, shapes)

    def infer(self, node: onnx.NodeProto) -> None:
        """Learn of a node's outputs."""
        if any(one.HasField("g") or one.graphs for one in node.attribute):
            raise CheckpointError(f"{_told(node)} holds a graph of its own; no plan is made of those")
        given = [name for name in node.input if name]
        if strangers := [name for name in given if name not in self.types]:
            raise CheckpointError(f"{_told(node)}: no node before it gives {shown(strangers[0])}")
        known = self._known(node, given)
        if known is None:
            found = self._inferred(node, given)
        else:
            found = {name: _type_of(one) for name, one in zip(node.output, known, strict=True)}
            self.values |= dict(zip(node.output, known, strict=True))
        for name in filter(None, node.output):
            if not _is_whole(found.get(name)):
                rule = "can't be told from the shapes of the graph's inputs"
                raise CheckpointError(f"{_told(node)}: the shape of its output {shown(name)} {rule}")
            self.types[name] = found[name]
        if node.op_type in _OF_SHAPE or (
            all(name in self.constant for name in given) and node.op_type not in _RANDOM
        ):
            self.constant.update(filter(None, node.output))

    def _known(self, node: onnx.NodeProto, given: Sequence[str]) -> list[onnx.TensorProto] | None:
        """The outputs' values, where they are small and follow from shapes and small weights."""
        if node.domain not in _ONNX or node.op_type in _RANDOM or "" in node.output:
            return None
        if node.op_type in _OF_SHAPE:
            dims = _shape(self.types[given[0]])
            if node.op_type == "Size":
                return [onnx.helper.make_tensor("", onnx.TensorProto.INT64, [], [prod(dims)])]
            held = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            part = dims[held.get("start", 0) : held.get("end", len(dims))]
            return [onnx.helper.make_tensor("", onnx.TensorProto.INT64, [len(part)], part)]
        if not all(name in self.values for name in given):
            return None
        single = onnx.helper.make_graph(
            [node],
            "single",
            [onnx.helper.make_value_info(name, self.types[name]) for name in dict.fromkeys(given)],
            [onnx.ValueInfoProto(name=name) for name in node.output],
        )
        feeds = {name: onnx.numpy_helper.to_array(self.values[name]) for name in given}
        # Whatever can't be computed here stays without values; what needs them is refused by its name.
        with suppress(Exception):
            made = onnx.helper.make_model(single, opset_imports=self._opsets, ir_version=self._ir)
            found = ReferenceEvaluator(made).run(None, feeds)
            if isinstance(found, list) and all(one.size <= _SMALL for one in found):
                return [onnx.numpy_helper.from_array(one) for one in found]
        return None

    def _inferred(self, node: onnx.NodeProto, given: Sequence[str]) -> Mapping[str, onnx.TypeProto]:
        if node.op_type in _AS_FIRST_INPUT and node.domain in _ONNX:
            return {node.output[0]: self.types[node.input[0]]}
        domain = "" if node.domain in _ONNX else node.domain
        try:
            schema = onnx.defs.get_schema(node.op_type, self._versions.get(domain, 1), domain)
            return onnx.shape_inference.infer_node_outputs(
                schema,
                node,
                {name: self.types[name] for name in given},
                {name: self.values[name] for name in given if name in self.values},
                opset_imports=self._opsets,
                ir_version=self._ir,
            )
        except onnx.defs.SchemaError as error:
            raise CheckpointError(f"{_told(node)}: no operator of ONNX's") from error
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
            raise CheckpointError(f"{_told(node)}: its shapes don't fit together ({said(error)})") from error


def _lives(graph: onnx.GraphProto, typed: _Typed) -> Liveness:
    inputs, outputs = [one.name for one in _inputs(graph)], [one.name for one in graph.output]
    storage = _storages(graph, typed.constant, outputs)
    constant = typed.constant - set(outputs)  # those are written in every call
    callers = {*inputs, *(storage.get(name, name) for name in outputs)}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    constants: dict[str, int] = {}
    initializers = {one.name for one in graph.initializer}
    idle = set()
    for step, node in enumerate(graph.node):
        made = [name for name in node.output if name]
        # A view of a view reads nothing; what is constant was computed before.
        if made and all(name in constant or storage[name] != name for name in made):
            idle.add(step)
            continue
        for name in filter(None, node.input):
            held = storage.get(name, name)
            if held in constant:
                if held not in initializers:
                    constants[held] = _bytes(typed.types[held])
            elif held not in inputs:
                last[held] = step
        for name in made:
            if storage[name] == name:
                first[name] = step
    tensors = {
        name: Lifetime(_bytes(typed.types[name]), step, last.get(name, step))
        for name, step in first.items()
        if name not in callers
    }
    return Liveness(
        steps=[f"{node.op_type} {node.name}".strip() for node in graph.node],
        tensors=tensors,
        inputs={name: _bytes(typed.types[name]) for name in inputs},
        outputs={name: _bytes(typed.types[name]) for name in outputs},
        weights=sum(_bytes(typed.types[name]) for name in initializers),
        constants=constants,
        idle=frozenset(idle),
        storage=storage,
        shapes={name: _shape(one) for name, one in typed.types.items()},
        dtypes={name: one.tensor_type.elem_type for name, one in typed.types.items()},
    )


def _storages(graph: onnx.GraphProto, constant: set[str], outputs: Sequence[str]) -> dict[str, str]:
    """For every tensor that a node gives, the one that it lies in.

    An output has bytes of its own: a view of anything but a tensor that is computed here for this output
    alone is a copy.
    """
    storage: dict[str, str] = {}
    given = {one.name for one in _inputs(graph)}
    owner: dict[str, str] = {}  # storage -> the output that it is
    for node in graph.node:
        for name in filter(None, node.output):
            storage[name] = name
            if node.op_type in VIEWS and node.domain in _ONNX and node.input[0]:
                held = storage.get(node.input[0], node.input[0])
                if name not in outputs or not (held in given or held in constant or held in owner):
                    storage[name] = held
            if name in outputs:
                owner[storage[name]] = name
    return storage


def _inputs(graph: onnx.GraphProto) -> Iterable[onnx.ValueInfoProto]:
    """Those that a caller gives: older graphs name their weights among them."""
    weights = {one.name for one in graph.initializer}
    return [one for one in graph.input if one.name not in weights]


def _of_shape(port: onnx.ValueInfoProto, shapes: Mapping[str, tuple[int, ...]]) -> onnx.TypeProto:
    """The input's type with a shape of numbers."""
    if port.name not in shapes:
        raise CheckpointError(f"the graph takes {shown(port.name)}, whose shape nobody knows")
    shape, told = shapes[port.name], port.type.tensor_type
    fixed = [dim.dim_value if dim.HasField("dim_value") else None for dim in told.shape.dim]
    if len(fixed) != len(shape) or any(
        one not in (None, size) for one, size in zip(fixed, shape, strict=True)
    ):
        raise CheckpointError(f"the graph's input {shown(port.name)} can't have the shape {list(shape)}")
    return onnx.helper.make_tensor_type_proto(told.elem_type, shape)


def _type_of(value: onnx.TensorProto) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(value.data_type, value.dims)


def _is_whole(found: onnx.TypeProto | None) -> bool:
    """Whether it is a tensor's, with a size for every axis and elements that take a known number of bytes."""
    if found is None or not found.HasField("tensor_type") or not found.tensor_type.HasField("shape"):
        return False
    if found.tensor_type.elem_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        return False
    return all(dim.HasField("dim_value") for dim in found.tensor_type.shape.dim)


def _shape(found: onnx.TypeProto) -> tuple[int, ...]:
    return tuple(dim.dim_value for dim in found.tensor_type.shape.dim)


def _bytes(found: onnx.TypeProto) -> int:
    dtype: Any = onnx.helper.tensor_dtype_to_np_dtype(found.tensor_type.elem_type)
    return prod(_shape(found)) * int(dtype.itemsize)


def _told(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {shown(node.name)}" if node.name else node.op_type
