"""Small graphs with one fault each: for ONNX's checker, our check and NVIDIA's parser to find."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ritocco.nets.io import NetworkIO, Port

IO = NetworkIO(
    inputs=(Port(name="x", shape=("M", 4, "H", "W"), dtype="float32"),),
    outputs=(Port(name="y", shape=("M", 4, "H", "W"), dtype="float32"),),
    ranges={"M": (1, 2, 4), "H": (8, 8, 16), "W": (8, 8, 16)},
    multiples={},
)
"""What a graph here has to keep to, where `Planted.io` is no other."""
_TIMES = NetworkIO(
    inputs=(Port(name="timestep", shape=("M",), dtype="float32"),),
    outputs=(Port(name="y", shape=("M",), dtype="float32"),),
    ranges={"M": (1, 2, 4)},
    multiples={},
)

F = TensorProto.FLOAT
Shape = Sequence[str | int]
SHAPE: Shape = ("rows", 4, "h", "w")


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """A fault.

    rule: of our check that finds it, None where it is for ONNX's own checker to find. said: its words, a
    pattern. io: the contract of the graph.
    """

    make: Callable[[], onnx.ModelProto]
    fault: str
    rule: str | None = None
    said: str = ""
    io: NetworkIO = IO


def model(
    *nodes: onnx.NodeProto,
    kind: int = F,
    name: str = "x",
    shape: Shape = SHAPE,
    out: Shape = SHAPE,
    opset: int = 20,
    constants: tuple[onnx.TensorProto, ...] = (),
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """Nodes between the input x and the output y."""
    graph = helper.make_graph(
        list(nodes),
        "planted",
        [helper.make_tensor_value_info(name, kind, list(shape))],
        [helper.make_tensor_value_info("y", F, list(out))],
        list(constants),
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports)


def node(kind: str, inputs: tuple[str, ...] = ("x",), output: str = "y", **more: Any) -> onnx.NodeProto:
    """One node, named after its operator and its output."""
    return helper.make_node(kind, list(inputs), [output], name=f"the_{kind}_{output}", **more)


def cast(source: str, output: str, to: int) -> onnx.NodeProto:
    """A Cast."""
    return node("Cast", (source,), output, to=to)


def constant(name: str, values: Any, dtype: str = "float32") -> onnx.TensorProto:
    """An initializer."""
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def with_int64_timestep(model: onnx.ModelProto) -> None:
    """Make the input `timestep` int64, and cast it to what the graph goes on with."""
    (given,) = (value for value in model.graph.input if value.name == "timestep")
    given.type.tensor_type.elem_type = TensorProto.INT64
    for node in model.graph.node:
        node.input[:] = ["fractional" if name == "timestep" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Cast", ["timestep"], ["fractional"], to=F))


_TWICE: Shape = ("rows", 4, "h2", "w2")
_SCALES = constant("scales", [1, 1, 2, 2])
_RESIZE = ("x", "", "scales")


def _early_bfloat16() -> onnx.ModelProto:
    weights = helper.make_tensor("weights", TensorProto.BFLOAT16, [4, 4, 1, 1], np.full(16, 0.5))
    to, back = cast("x", "b", TensorProto.BFLOAT16), cast("c", "y", F)
    return model(to, node("Conv", ("b", "weights"), "c"), back, constants=(weights,))


def _counted(output: str) -> list[onnx.NodeProto]:
    """A size, int64 [1], that is computed from the data; the constant `one` is [1]."""
    return [
        node("ReduceMax", output="largest", keepdims=0),
        cast("largest", "count", TensorProto.INT64),
        node("Reshape", ("count", "one"), output),
    ]


def _branching() -> onnx.ModelProto:
    """A choice between x and coin tosses."""
    branches = [
        helper.make_graph(
            [node(kind, output=name)], name, [], [helper.make_tensor_value_info(name, F, SHAPE)]
        )
        for kind, name in (("Relu", "kept"), ("Bernoulli", "tossed"))
    ]
    choice = node("If", ("whether",), then_branch=branches[0], else_branch=branches[1])
    return model(choice, constants=(constant("whether", True, "bool"),))


PLANTED: Mapping[str, Planted] = {
    "clean": Planted(fault="none", make=lambda: model(node("Relu"))),
    "opset": Planted(
        fault="opset 22",
        make=lambda: model(node("Relu"), opset=22),
        rule="opset",
        said="opset 22; TensorRT 10.1 reads 9 to 20",
    ),
    "custom": Planted(
        fault="an operator of `com.microsoft`",
        make=lambda: model(node("Fused", domain="com.microsoft"), domains=("com.microsoft",)),
        rule="domain",
        said=r"com\.microsoft\.Fused",
    ),
    "operator": Planted(
        fault="`Bernoulli`, which the parser lacks",
        make=lambda: model(node("Bernoulli")),
        rule="operator",
        said="Bernoulli is not supported",
    ),
    "unknown": Planted(
        fault="an operator that ONNX does not have",
        make=lambda: model(node("NotThere")),
        rule="operator",
        said="NotThere is not supported",
    ),
    "double": Planted(
        fault="float64 arithmetic",
        make=lambda: model(cast("x", "d", TensorProto.DOUBLE), node("Relu", ("d",), "e"), cast("e", "y", F)),
        rule="type",
        said="Cast in DOUBLE",
    ),
    "double input": Planted(
        fault="a float64 input",
        make=lambda: model(cast("x", "y", F), kind=TensorProto.DOUBLE),
        rule="input type",
        said="float64",
    ),
    "double weights": Planted(
        fault="float64 weights",
        make=lambda: model(
            cast("w", "f", F), node("Mul", ("x", "f")), constants=(constant("w", [1.1], "float64"),)
        ),
        rule="type",
        said="weights in DOUBLE",
    ),
    "int16": Planted(
        fault="int16 arithmetic",
        make=lambda: model(cast("x", "i", TensorProto.INT16), cast("i", "y", F)),
        rule="type",
        said="Cast in INT16",
    ),
    "integers": Planted(
        fault="`Sigmoid` of integers",
        make=lambda: model(
            cast("x", "i", TensorProto.INT32), node("Sigmoid", ("i",), "s"), cast("s", "y", F)
        ),
        rule="type",
        said="Sigmoid in INT32",
    ),
    "bfloat16": Planted(fault="`Conv` in bfloat16 at opset 20", make=_early_bfloat16),
    "timestep": Planted(
        fault="an int64 timestep",
        make=lambda: model(
            cast("timestep", "y", F),
            kind=TensorProto.INT64,
            name="timestep",
            shape=("rows",),
            out=("rows",),
        ),
        rule="input type",
        said="fractional timesteps",
        io=_TIMES,
    ),
    "channels": Planted(
        fault="a dynamic axis that no profile covers",
        make=lambda: model(node("Relu"), shape=("rows", "c", "h", "w"), out=("rows", "c", "h", "w")),
        rule="profile",
        said="axis 1 is dynamic",
    ),
    "axes": Planted(
        fault="an input of another rank than the contract's",
        make=lambda: model(node("Relu"), shape=("rows", 4), out=("rows", 4)),
        rule="contract",
        said="2 axes; the contract has 4",
    ),
    "port": Planted(
        fault="an input that the contract lacks",
        make=lambda: model(node("Relu", ("z",)), name="z"),
        rule="contract",
        said="does not have",
    ),
    "rank": Planted(
        fault="an output declared with another rank",
        make=lambda: model(node("Relu"), out=("rows", 4)),
        rule="contract",
        said="2 axes; the contract has 4",
    ),
    "missing input": Planted(
        fault="an input of the contract that is not there",
        make=lambda: model(node("Relu")),
        rule="contract",
        said="does not have",
        io=replace(IO, inputs=(*IO.inputs, Port(name="context", shape=("M", 8), dtype="float32"))),
    ),
    "missing output": Planted(
        fault="an output of the contract that is not there",
        make=lambda: model(node("Relu")),
        rule="contract",
        said="an output of the contract",
        io=replace(IO, outputs=(*IO.outputs, Port(name="z", shape=("M",), dtype="float32"))),
    ),
    "dtype": Planted(
        fault="an input of another dtype than the contract's",
        make=lambda: model(cast("x", "y", F), kind=TensorProto.FLOAT16),
        rule="contract",
        said="FLOAT16; the contract has FLOAT",
    ),
    "one size": Planted(
        fault="an axis of one length, where the profile has more",
        make=lambda: model(node("Relu"), shape=("rows", 4, 8, "w"), out=("rows", 4, 8, "w")),
        rule="profile",
        said="axis 2 is 8 long, and 8 to 16 is asked of it",
    ),
    "inner": Planted(
        fault="`Bernoulli` inside a branch of an `If`",
        make=_branching,
        rule="operator",
        said="Bernoulli is not supported",
    ),
    "shapes": Planted(
        fault="`Conv` of weights for other channels",
        make=lambda: model(
            node("Conv", ("x", "weights")), constants=(constant("weights", np.ones((4, 5, 1, 1))),)
        ),
        rule="shape",
        said="4 channels; its weights are for 5",
    ),
    "nonzero": Planted(
        fault="`NonZero`, whose shape depends on the data",
        make=lambda: model(node("NonZero", output="n"), cast("n", "y", F), out=(4, "found")),
        rule="data-dependent",
        said="depends on the data",
    ),
    "cut": Planted(
        fault="`Slice` up to an end that is computed from the data",
        make=lambda: model(
            *_counted("end"),
            node("Slice", ("x", "zero", "end", "zero")),
            out=("found", 4, "h", "w"),
            constants=(constant("zero", [0], "int64"), constant("one", [1], "int64")),
        ),
        rule="data-dependent",
        said="Slice's shape depends on the data: end",
    ),
    "filled": Planted(
        fault="`ConstantOfShape` of sizes that are computed from the data",
        make=lambda: model(
            *_counted("rows"),
            node("Concat", ("rows", "rest"), "sizes", axis=0),
            node("ConstantOfShape", ("sizes",)),
            out=("found", 4, 8, 8),
            constants=(constant("rest", [4, 8, 8], "int64"), constant("one", [1], "int64")),
        ),
        rule="data-dependent",
        said="ConstantOfShape's shape depends on the data: sizes",
    ),
    "reshaped": Planted(
        fault="`Conv` behind a `Reshape` to as many axes as the data says",
        make=lambda: model(
            *_counted("end"),
            node("Slice", ("sides", "zero", "end"), "sizes"),
            node("Reshape", ("x", "sizes"), "reshaped"),
            node("Conv", ("reshaped", "weights")),
            constants=(
                constant("sides", [-1, 4, 8, 8], "int64"),
                constant("zero", [0], "int64"),
                constant("one", [1], "int64"),
                constant("weights", np.ones((4, 4, 1, 1))),
            ),
        ),
        rule="data-dependent",
        said="Reshape's shape depends on the data: sizes",
    ),
    "cubic": Planted(
        fault="`Resize` with mode cubic",
        make=lambda: model(node("Resize", _RESIZE, mode="cubic"), out=_TWICE, constants=(_SCALES,)),
        rule="attribute",
        said="Resize with mode cubic",
    ),
    "antialias": Planted(
        fault="`Resize` with antialias",
        make=lambda: model(
            node("Resize", _RESIZE, mode="linear", antialias=1), out=_TWICE, constants=(_SCALES,)
        ),
        rule="attribute",
        said="antialias",
    ),
    "axes of a slice": Planted(
        fault="`Slice` whose axes are computed",
        make=lambda: model(
            node("Shape", output="rows_of_x", end=1),
            node("Sub", ("rows_of_x", "rows_of_x"), "axis"),
            node("Slice", ("x", "zero", "one", "axis")),
            out=("first", 4, "h", "w"),
            constants=(constant("zero", [0], "int64"), constant("one", [1], "int64")),
        ),
        rule="attribute",
        said="Slice with axes that are no constant",
    ),
}
"""By name; the one called clean has no fault."""

VIOLATIONS = {name: planted for name, planted in PLANTED.items() if planted.rule is not None}
"""Those that our check finds by itself."""
