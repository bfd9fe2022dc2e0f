"""What of a graph lives from when until when: small graphs by hand; exported ones, run in one allocation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from ritocco.artefacts import open_artefacts
from ritocco.errors import CheckpointError
from ritocco.nets.io import GraphName
from ritocco_export.arena import Lifetime, allocate
from ritocco_export.graphs import example_inputs
from ritocco_export.liveness import Liveness, liveness, read_graph

Array = np.ndarray[Any, Any]
ROW = 4 * 6  # bytes of a float32 [6]


def small(text: str) -> onnx.ModelProto:
    model: onnx.ModelProto = parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]> g {text}')
    return model


def of(text: str, *shape: int) -> Liveness:
    return liveness(small(text), {"x": shape or (2, 3)})


def test_a_chain() -> None:
    found = of("(float[N,3] x) => (float[N,3] y) { a = Relu(x) b = Exp(a) y = Neg(b) }")
    assert found.tensors == {"a": Lifetime(ROW, 0, 1), "b": Lifetime(ROW, 1, 2)}
    assert (found.inputs, found.outputs) == ({"x": ROW}, {"y": ROW})
    assert (found.weights, found.constants, found.idle) == (0, {}, frozenset())
    # Both live while b is made of a: no result takes its operand's place.
    assert allocate(found.tensors).size == 64 + ROW


def test_an_output_that_no_node_gives_is_named() -> None:
    with pytest.raises(CheckpointError, match="no node gives the graph's output 'z'"):
        of("(float[N,3] x) => (float[N,3] z) { a = Relu(x) }")


def test_a_number_of_elements_follows_from_the_shape() -> None:
    """And does not hold the tensor whose elements they are."""
    found = of(
        "(float[N,3] x) => (float[K] y) { a = Relu(x) b = Exp(a) c = Neg(b) s = Size(a) "
        "zero = Constant<value: tensor = int64[1] {0}>() t = Unsqueeze(s, zero) y = Reshape(c, t) }"
    )
    assert found.shapes["y"] == (6,)
    assert found.tensors["a"] == Lifetime(ROW, 0, 1)


def test_a_branch_is_held_until_it_is_joined() -> None:
    found = of("(float[N,3] x) => (float[N,3] y) { a = Relu(x) b = Exp(a) c = Neg(b) y = Add(a, c) }")
    assert found.tensors["a"] == Lifetime(ROW, 0, 3)
    assert found.tensors["b"] == Lifetime(ROW, 1, 2)


def test_sizes_follow_the_inputs() -> None:
    text = "(float16[N,3] x) => (float[N,3] y) { a = Relu(x) b = Cast<to: int = 1>(a) y = Neg(b) }"
    found = of(text, 7, 3)
    assert {name: one.size for name, one in found.tensors.items()} == {"a": 42, "b": 84}
    assert found.inputs == {"x": 42}
    with pytest.raises(CheckpointError, match=r"input 'x' can't have the shape \[7, 4\]"):
        of(text, 7, 4)
    with pytest.raises(CheckpointError, match="takes 'x', whose shape nobody knows"):
        liveness(small(text), {})


@pytest.mark.parametrize(
    "view",
    [
        "s = Constant<value: tensor = int64[2] {3, 2}>() v = Reshape(a, s)",
        "v = Flatten<axis: int = 0>(a)",
        "s = Constant<value: tensor = int64[1] {0}>() v = Unsqueeze(a, s)",
        "s = Constant<value: tensor = int64[1] {0}>() u = Unsqueeze(a, s) v = Squeeze(u, s)",
        "v = Identity(a)",
    ],
)
def test_a_view_keeps_its_base_alive(view: str) -> None:
    """By what reads it, however late, and however many views lie between."""
    text = (
        f"(float[N,3] x) => (float[K] y) {{ a = Relu(x) b = Exp(a) {view} c = Neg(b) d = Neg(v) y = Neg(d) }}"
    )
    found = of(text)
    steps = list(found.steps)
    assert found.storage["v"] == "a"
    assert found.tensors["a"] == Lifetime(ROW, 0, len(steps) - 2)
    assert found.tensors.keys() == {"a", "b", "c", "d"}


def test_a_view_alone_holds_nothing() -> None:
    found = of("(float[N,3] x) => (float[N,3] y) { a = Relu(x) b = Exp(a) y = Neg(b) v = Flatten(a) }")
    assert found.tensors["a"] == Lifetime(ROW, 0, 1)
    assert found.idle == {3}


def test_a_transpose_is_no_view() -> None:
    found = of("(float[N,3] x) => (float[3,N] y) { a = Relu(x) b = Transpose(a) y = Neg(b) }")
    assert found.tensors == {"a": Lifetime(ROW, 0, 1), "b": Lifetime(ROW, 1, 2)}


def test_an_output_that_nobody_reads_is_written_all_the_same() -> None:
    found = of(
        "(float[N,4] x) => (float[N,2] y) "
        "{ a = Relu(x) b, c = Split<axis: int = 1, num_outputs: int = 2>(a) y = Neg(b) }",
        2,
        4,
    )
    assert found.tensors["c"] == Lifetime(16, 1, 1)
    assert found.tensors["b"] == Lifetime(16, 1, 2)


def test_what_a_caller_gets_is_his() -> None:
    """A graph's output, whatever reads it here, and the bytes that it is a view of."""
    found = of(
        "(float[N,3] x) => (float[N,3] y, float[K] v) { a = Relu(x) y = Exp(a) b = Neg(y) v = Flatten(b) }"
    )
    assert found.tensors == {"a": Lifetime(ROW, 0, 1)}
    assert found.outputs == {"y": ROW, "v": ROW}
    assert found.storage["v"] == "b"


@pytest.mark.parametrize(
    "text",
    [
        "(float[N,3] x) => (float[K,L] v) { v = Flatten(x) }",
        "(float[N,3] x) => (float[N,3] y, float[K,L] v) { y = Relu(x) v = Flatten(y) }",
        "(float[N,3] x) => (float[2] v) { c = Constant<value: tensor = float[2] {1, 2}>() v = Identity(c) }",
    ],
)
def test_an_output_that_would_be_a_view_of_what_is_not_its_own_is_a_copy(text: str) -> None:
    found = of(text)
    assert found.storage["v"] == "v"
    assert len(found.steps) - 1 not in found.idle
    assert not found.tensors


def test_two_views_of_one_tensor_are_two_outputs() -> None:
    found = of(
        "(float[N,3] x) => (float[K,L] v, float[N,3] w) { a = Relu(x) v = Flatten(a) w = Identity(a) }"
    )
    assert found.storage == {"a": "a", "v": "a", "w": "w"}
    assert found.outputs == {"v": ROW, "w": ROW}
    assert not found.tensors


SHAPE_OF_X = """(float[N,3,H] x) => (float[N,K] y) {
    s = Shape(x)
    zero = Constant<value: tensor = int64[1] {0}>() one = Constant<value: tensor = int64[1] {1}>()
    n = Slice(s, zero, one)
    rest = Constant<value: tensor = int64[1] {-1}>() flat = Concat<axis: int = 0>(n, rest)
    a = Relu(x) v = Reshape(a, flat) z = Exp(v)
    top = Gather<axis: int = 0>(s, two) scale = Cast<to: int = 1>(top) filled = Expand(scale, n)
    column = Unsqueeze(filled, one) y = Div(z, column)
}"""


def test_what_follows_from_shapes_is_no_activation() -> None:
    model = small(SHAPE_OF_X)
    model.graph.initializer.append(numpy_helper.from_array(np.array(2), "two"))
    found = liveness(model, {"x": (2, 3, 5)})
    assert found.tensors == {"a": Lifetime(120, 6, 8), "z": Lifetime(120, 8, 13)}
    assert found.shapes["v"] == (2, 15)
    # Of all that, what a step reads: one number for each row, under its view.
    assert found.constants == {"filled": 8}
    assert found.weights == 8
    assert {found.steps[step] for step in range(14) if step not in found.idle} == {"Relu", "Exp", "Div"}


def test_a_random_number_is_no_constant() -> None:
    found = of("(float[N,3] x) => (float[N,3] y) { r = RandomNormal<shape: ints = [2, 3]>() y = Add(x, r) }")
    assert found.tensors == {"r": Lifetime(ROW, 0, 1)}


def test_weights_are_not_read_and_not_counted_as_inputs(tmp_path: Path) -> None:
    """Their file need not be there; older graphs name them among their inputs, too."""
    model = small("(float[N,3] x, float[3,500] w) => (float[N,500] y) { a = MatMul(x, w) y = Relu(a) }")
    weight = numpy_helper.from_array(np.zeros((3, 500), np.float32), "w")
    model.graph.initializer.append(weight)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="gone", size_threshold=0)
    (tmp_path / "gone").unlink()
    found = liveness(read_graph(tmp_path / "m.onnx"), {"x": (2, 3)})
    assert (found.inputs, found.weights) == ({"x": ROW}, 6000)
    assert found.tensors == {"a": Lifetime(4000, 0, 1)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "(float[N,3] x) => (int64[2,K] y) { a = NonZero(x) y = Neg(a) }",
            "NonZero: the shape of its output 'a'",
        ),
        (
            "(float[N,3] x) => (float[K,L] y) "
            "{ s = Constant<value: tensor = int64[1] {6}>() f = Reshape(x, s)"
            " k = Cast<to: int = 7>(f) y = Reshape(x, k) }",
            "Reshape: the shape of its output 'y'",
        ),
        ("(float[N,3] x) => (float[N,3] y) { y = Bend(x) }", "Bend: no operator of ONNX's"),
        ("(float[N,3] x) => (float[N,3] y) { y = Exp(b) b = Exp(x) }", "Exp: no node before it gives 'b'"),
        ("(float[N,3] x) => (float[N,3] y) { y = MatMul(x, x) }", "MatMul: its shapes don't fit together"),
        (
            "(float[N,3] x, bool b) => (float[N,3] y) { y = If(b) <"
            "then_branch = t () => (float[N,3] p) { p = Exp(x) }, "
            "else_branch = e () => (float[N,3] q) { q = Neg(x) }> }",
            "If holds a graph of its own",
        ),
    ],
)
def test_what_can_not_be_told_is_named(text: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        liveness(small(text), {"x": (2, 3), "b": ()})


def test_what_is_no_graph_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"m\.onnx: no ONNX graph"):
        read_graph(tmp_path / "m.onnx")


@dataclass
class Machine:
    """Runs a graph node by node; what is computed lies in one array of bytes, at the offsets given.

    A step's results are NaN before it runs, and what nobody needs any more is NaN behind it.
    """

    model: onnx.ModelProto
    found: Liveness
    offsets: Mapping[str, int]
    size: int

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.memory = np.full(self.size, 0xFF, np.uint8)
        self.own: dict[str, Array] = {**feeds}
        self.own |= {one.name: numpy_helper.to_array(one) for one in self.model.graph.initializer}
        outputs = [one.name for one in self.model.graph.output]
        for name in outputs:
            root = self.found.storage[name]
            self.own[root] = np.full(self.found.shapes[root], -1, self.dtype(root))
        nodes = list(enumerate(self.model.graph.node))
        constant = [step for step, node in nodes if step in self.found.idle and not self.is_view(node)]
        for step in constant:
            node = self.model.graph.node[step]
            self.own |= dict(zip(node.output, self.computed(node), strict=True))
        for step, node in nodes:
            if step not in self.found.idle:
                self.step(step, node)
        return {name: self.at(name) for name in outputs}

    def is_view(self, node: onnx.NodeProto) -> bool:
        return all(self.found.storage[name] != name for name in node.output)

    def step(self, step: int, node: onnx.NodeProto) -> None:
        for name in node.output:
            self.poison(name)
        results = self.computed(node)
        for name, result in zip(node.output, results, strict=True):
            assert result.shape == self.found.shapes[name], (node.name, name)
            assert result.dtype == self.dtype(name), (node.name, name)
            self.at(name)[...] = result
        for name, one in self.found.tensors.items():
            if one.last == step:
                self.poison(name)

    def computed(self, node: onnx.NodeProto) -> list[Array]:
        names = list(dict.fromkeys(name for name in node.input if name))
        single = helper.make_graph(
            [node],
            "single",
            [
                helper.make_tensor_value_info(one, self.found.dtypes[one], self.found.shapes[one])
                for one in names
            ],
            [onnx.ValueInfoProto(name=name) for name in node.output],
        )
        opsets = list(self.model.opset_import)
        model = helper.make_model(single, opset_imports=opsets, ir_version=self.model.ir_version)
        results = ReferenceEvaluator(model).run(None, {name: self.at(name) for name in names})
        return [np.asarray(one) for one in results]

    def at(self, name: str) -> Array:
        """The tensor where it lies."""
        root = self.found.storage.get(name, name)
        if root in self.own:
            return self.own[root].reshape(self.found.shapes[name])
        start = self.offsets[root]
        part = self.memory[start : start + self.found.tensors[root].size]
        assert part.nbytes == self.found.tensors[root].size, name
        lies: Array = part.view(self.dtype(name)).reshape(self.found.shapes[name])
        return lies

    def poison(self, name: str) -> None:
        lies = self.at(name)
        lies.reshape(-1).view(np.uint8)[:] = 0xFF

    def dtype(self, name: str) -> Any:
        return helper.tensor_dtype_to_np_dtype(self.found.dtypes[name])


def case(folder: Path, graph: GraphName) -> tuple[onnx.ModelProto, Liveness, dict[str, Array], list[Array]]:
    """A graph with its weights, its liveness, small inputs, and what ONNX Runtime makes of them."""
    artefacts = open_artefacts(folder)
    io, file = artefacts.contract[graph], artefacts.graph(graph)
    sizes = {symbol: min(max(2, least), most) for symbol, (least, _, most) in io.ranges.items()}
    values = example_inputs(io, sizes)
    feeds = {port.name: value.numpy() for port, value in zip(io.inputs, values, strict=True)}
    found = liveness(read_graph(file), {name: value.shape for name, value in feeds.items()})
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return onnx.load(str(file)), found, feeds, session.run(None, feeds)


@pytest.mark.parametrize("graph", ["text_encoder", "unet", "vae_encoder", "vae_decoder"])
def test_a_graph_runs_in_one_allocation(tiny_graphs: Path, graph: GraphName) -> None:
    model, found, feeds, wanted = case(tiny_graphs, graph)
    arena = allocate(found.tensors)
    apart = {}
    end = 0
    for name, one in found.tensors.items():
        apart[name], end = end, end + -(-one.size // 64) * 64
    assert arena.size < end / 3
    (got,) = Machine(model, found, arena.offsets, arena.size).run(feeds).values()
    np.testing.assert_allclose(got, wanted[0], rtol=0, atol=1e-4 * np.abs(wanted[0]).max())
    if graph == "unet":  # the same to the last bit where every tensor has its own place
        (alone,) = Machine(model, found, apart, end).run(feeds).values()
        assert (got == alone).all()


@pytest.mark.parametrize("graph", ["unet_once", "unet_step"])
def test_a_hoisted_graph_runs_in_one_allocation(tiny_hoisted_graphs: Path, graph: GraphName) -> None:
    model, found, feeds, wanted = case(tiny_hoisted_graphs, graph)
    arena = allocate(found.tensors)
    got = Machine(model, found, arena.offsets, arena.size).run(feeds)
    for ours, theirs in zip(got.values(), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_it_does_not_run_where_two_tensors_share_bytes(tiny_graphs: Path) -> None:
    model, found, feeds, _ = case(tiny_graphs, "unet")
    arena = allocate(found.tensors)
    live = [name for name, one in found.tensors.items() if one.first <= arena.busiest <= one.last]
    one, other = sorted(live, key=lambda name: -found.tensors[name].size)[:2]
    shifted = {**arena.offsets, one: arena.offsets[other]}
    size = arena.size + found.tensors[one].size
    with np.errstate(all="ignore"):
        (got,) = Machine(model, found, shifted, size).run(feeds).values()
    assert np.isnan(got).any()


def test_every_layout_and_dtype_has_a_plan(
    tiny_optimum_graphs: Path, tiny_half_graphs: Path, tiny_bfloat16_graphs: Path, tiny_graphs: Path
) -> None:
    """Half as many bytes for half as wide numbers, but for what is computed in float32 whatever the dtype."""
    sizes = {"M": 2, "N": 1, "H": 16, "W": 8}
    most = {}
    for folder in (tiny_graphs, tiny_optimum_graphs, tiny_half_graphs, tiny_bfloat16_graphs):
        artefacts = open_artefacts(folder)
        for graph, io in artefacts.contract.items():
            shapes = {port.name: port.resolve(sizes) for port in io.inputs}
            found = liveness(read_graph(artefacts.graph(graph)), shapes)
            for port in io.outputs:
                assert found.shapes[port.name] == port.resolve(sizes)
            most[folder.name, graph] = allocate(found.tensors).lower_bound
    for graph in ("text_encoder", "unet", "vae_encoder", "vae_decoder"):
        own = most[tiny_graphs.name, graph]
        assert most[tiny_optimum_graphs.name, graph] == pytest.approx(own, rel=0.01)
        for half in (tiny_half_graphs, tiny_bfloat16_graphs):
            assert 0.49 * own < most[half.name, graph] < 0.8 * own


def test_dtypes_of_numpy_and_onnx_agree() -> None:
    found = of("(float[N,3] x) => (bool[N,3] y) { a = Cast<to: int = 10>(x) b = Neg(a) y = Equal(a, b) }")
    assert found.dtypes["a"] == TensorProto.FLOAT16
    assert (found.tensors["a"].size, found.outputs["y"]) == (12, 6)
