"""The matrix's restrictions: every row with one has a rule, which finds its violation and takes the rest."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from planted_graphs import IO, constant, model, node
from ritocco_export.tensorrt_check import check_model, matrix
from ritocco_export.tensorrt_restrictions import RULES, SEEDED, Known, graphs_of, known_of, restricted

KNOWN = Known(
    shapes={
        "image": (None, 4, None, 8),
        "flat": (2, 3),
        "cells": (None, None),
        "volume": (1, 2, 8, 8, 8),
    },
    constants={
        "zero": constant("zero", 0, "int8"),
        "one": constant("one", 1, "int8"),
        "many": constant("many", [3840], "int64"),
        "few": constant("few", [3839], "int64"),
        "elsewhere": None,
    },
)


def graph(name: str, *shapes: tuple[str, int]) -> onnx.GraphProto:
    """A branch or body of outputs of these names and ranks."""
    outputs = [helper.make_tensor_value_info(one, TensorProto.FLOAT, [1] * rank) for one, rank in shapes]
    return helper.make_graph([], name, [], outputs)


def made(kind: str, inputs: str = "image", outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    """`-` stands for an input that is left out."""
    given = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(kind, given, outputs.split(), **attributes)


def branches(one: tuple[str, int], other: tuple[str, int]) -> onnx.NodeProto:
    return made("If", "one", then_branch=graph("a", one), else_branch=graph("b", other))


def looped(count: str, *, scans: int) -> onnx.NodeProto:
    names = [("condition", 0), ("carried", 1), *((f"scan{i}", 1) for i in range(scans))]
    return made(
        "Loop", f"{count} - start", " ".join(f"o{i}" for i in range(1 + scans)), body=graph("b", *names)
    )


REDUCTIONS = sorted(name for name in matrix() if name.startswith("Reduce"))
VIOLATIONS = {
    "AveragePool": (made("AveragePool", kernel_shape=[2, 2], dilations=[2, 1]), r"dilations \[2, 1\]"),
    "AveragePool of 4": (made("AveragePool", kernel_shape=[2] * 4), "over 4 axes"),
    "LpPool": (made("LpPool", kernel_shape=[2], dilations=[2]), "dilations"),
    "MaxPool": (made("MaxPool", "image", "y where", kernel_shape=[2, 2]), "indices as an output"),
    "MaxPool of 1": (made("MaxPool", kernel_shape=[2]), "over 1 axes"),
    "Constant": (made("Constant", "", value_string="x"), "string constant"),
    "CumSum": (made("CumSum", "image axis"), "an axis that is no constant"),
    "DeformConv": (made("DeformConv", "volume w o"), "5 axes"),
    "DeformConv padded": (made("DeformConv", "image w o", pads=[0, 1, 1, 1]), "differ between"),
    "DequantizeLinear": (made("DequantizeLinear", "image s one"), "zero point"),
    "QuantizeLinear": (made("QuantizeLinear", "image s computed"), "zero point"),
    "Dropout": (made("Dropout", "image - one"), "training mode"),
    "EyeLike": (made("EyeLike", "cells"), "without a fixed shape"),
    "GridSample": (made("GridSample", "volume g"), "5 axes; it takes 4"),
    "GRU": (
        made("GRU", "x w r", direction="bidirectional", activations=["Sigmoid", "Tanh", "Relu", "Tanh"]),
        "different activations",
    ),
    "RNN": (made("RNN", "x w r", direction="bidirectional", activations=["Tanh", "Relu"]), "different"),
    "LSTM": (made("LSTM", "x w r", layout=1), "layout 1"),
    "LSTM coupled": (made("LSTM", "x w r", input_forget=1), "input_forget 1"),
    "Hardmax": (made("Hardmax", axis=2), "whose length is not fixed"),
    "If": (branches(("a", 2), ("b", 3)), "2 and 3 axes"),
    "If of one name": (branches(("a", 2), ("a", 2)), "both call an output a"),
    "LayerNormalization": (made("LayerNormalization", "image s", "y mean"), "more than its first output"),
    "Loop": (looped("computed", scans=1), "rounds that is no constant"),
    "OneHot": (made("OneHot", "image depth values"), "a depth that is no constant"),
    "Pad": (made("Pad", "image pads - axes"), "axes that are no constant"),
    "Slice": (made("Slice", "image start end axes"), "axes that are no constant"),
    "Squeeze": (made("Squeeze", "image axes"), "axes that are no constant"),
    "Unsqueeze": (made("Unsqueeze", "image axes"), "axes that are no constant"),
    **{name: (made(name, "image axes"), "axes that are no constant") for name in REDUCTIONS},
    "Resize": (made("Resize", "image - few", mode="cubic"), "mode cubic"),
    "Resize smoothed": (made("Resize", "image - few", antialias=1), "antialias"),
    "Resize rounded": (made("Resize", "image - few", coordinate_transformation_mode="x"), "mode x"),
    "Resize computed": (made("Resize", "image - scales", axes=[2, 3]), r"the axes \[2, 3\]"),
    "ScatterND": (made("ScatterND", "image i u", reduction="add"), "reduction add"),
    "TopK": (made("TopK", "image few", "v i", sorted=0), "not sorted"),
    "TopK of many": (made("TopK", "image many", "v i"), "less than 3840"),
}
TAKEN = {
    "AveragePool": made("AveragePool", kernel_shape=[2, 2], dilations=[1, 1]),
    "LpPool": made("LpPool", kernel_shape=[2]),
    "MaxPool": made("MaxPool", kernel_shape=[2, 2, 2]),
    "Constant": made("Constant", "", value_float=1.0),
    "CumSum": made("CumSum", "image zero"),
    "DeformConv": made("DeformConv", "image w o", pads=[1, 2, 1, 2]),
    "DequantizeLinear": made("DequantizeLinear", "image s zero"),
    "QuantizeLinear": made("QuantizeLinear", "image s"),
    "Dropout": made("Dropout", "image - zero"),
    "EyeLike": made("EyeLike", "flat"),
    "GridSample": made("GridSample", "image g"),
    "GRU": made("GRU", "x w r", direction="bidirectional", activations=["Sigmoid", "Tanh"] * 2),
    "RNN": made("RNN", "x w r", activations=["Tanh"]),
    "LSTM": made("LSTM", "x w r", layout=0, input_forget=0),
    "Hardmax": made("Hardmax"),
    "If": branches(("a", 2), ("b", 2)),
    "LayerNormalization": made("LayerNormalization", "image s"),
    "Loop": looped("few", scans=1),
    "OneHot": made("OneHot", "image one values"),
    "Pad": made("Pad", "image pads - elsewhere"),
    "Slice": made("Slice", "image start end one step"),
    "Squeeze": made("Squeeze", "image"),
    "Unsqueeze": made("Unsqueeze", "image one"),
    **{name: made(name, "image one") for name in REDUCTIONS},
    "Resize": made("Resize", "image - few", mode="linear", axes=[2, 3]),
    "ScatterND": made("ScatterND", "image i u"),
    "TopK": made("TopK", "image few", "v i"),
    **{name: made(name, "image") for name in SEEDED},
}


def test_every_restriction_has_its_rule() -> None:
    rows = {name for name, row in matrix().items() if row.restrictions}
    assert rows == set(RULES) == set(TAKEN)
    assert rows - {name.split()[0] for name in VIOLATIONS} == set(SEEDED)


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_found(name: str) -> None:
    violating, said = VIOLATIONS[name]
    known = known_of(helper.make_graph([violating], "g", [], []))
    (message,) = restricted(
        violating, Known({**known.shapes, **KNOWN.shapes}, {**known.constants, **KNOWN.constants})
    )
    assert message.split()[0] in (violating.op_type, "a")
    assert re.search(said, message)


@pytest.mark.parametrize("name", TAKEN)
def test_what_keeps_to_it_is_taken(name: str) -> None:
    known = known_of(helper.make_graph([TAKEN[name]], "g", [], []))
    known = Known({**known.shapes, **KNOWN.shapes}, {**known.constants, **KNOWN.constants})
    assert list(restricted(TAKEN[name], known)) == []


def value(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def test_what_a_loop_carries_keeps_its_shape() -> None:
    inputs = [value("i"), value("c"), value("entry", 2, 5)]
    body = helper.make_graph([], "body", inputs, [value("condition"), value("end", 3, 5)])
    loop = made("Loop", "few - start", "y", body=body)
    found = list(restricted(loop, known_of(helper.make_graph([loop], "g", [], []))))
    assert found == ["Loop that carries entry in one shape and end in another"]


def test_a_seed_that_is_ignored_is_noted() -> None:
    tossed = model(
        node("RandomNormalLike", seed=1.0), constants=(constant("unused", np.zeros(1), "float32"),)
    )
    (finding,) = check_model(tossed, IO)
    assert (finding.level, finding.message) == ("note", "RandomNormalLike: TensorRT ignores its seed")


def test_constants_of_an_inner_graph_and_of_a_node_count() -> None:
    inner = helper.make_graph(
        [node("Constant", (), "axes", value=constant("t", [1], "int64"))], "inner", [], []
    )
    outer = helper.make_graph([made("If", "one", then_branch=inner, else_branch=inner)], "outer", [], [])
    known = known_of(outer)
    assert [part.name for part in graphs_of(outer)] == ["outer", "inner", "inner"]
    held = known.value("axes")
    assert held is not None
    assert held.tolist() == [1]
    assert list(restricted(made("ReduceSum", "image axes"), known)) == []
