"""NVIDIA's own parser and builder on our graphs: TensorRT for RTX, which needs no GPU for that."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from planted_graphs import PLANTED, with_int64_timestep
from ritocco.artefacts import GRAPH_FILE, open_artefacts
from ritocco.checkpoint import open_checkpoint
from ritocco.loading import pocket_model
from ritocco.nets.io import GRAPHS, HOISTED_GRAPHS, Layout
from ritocco_export.exporter import contract_for, profile_ranges
from ritocco_export.graphs import OPSETS, graph_module, write_graph
from ritocco_export.profiles import Profile
from ritocco_export.tensorrt_check import check_model
from tensorrt_oracle import library
from tensorrt_oracle.oracle import Question, Verdict, allowed, ask

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "tensorrt-oracle.md"
TOKENS = "ModelImporter.cpp:1071: Make sure input tokens has Int64 binding."

pytestmark = [
    # There it is a failure where it is missing.
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64",
        reason="the package of TensorRT-RTX that can be called without a GPU is for Linux on x86-64",
    ),
    # Seconds each on an idle machine; exporting and building take their time on a busy one.
    pytest.mark.timeout(900),
]


def write(
    folder: Path,
    model: Path,
    dtype: str,
    *asked: str,
    static: bool = False,
    hoisted: bool = False,
    layout: Layout = "ritocco",
) -> list[Question]:
    """A checkpoint's graphs, without the parity gate, which `test_export.py` has."""
    checkpoint = open_checkpoint(model)
    profiles = [Profile.parse(one) for one in asked]
    contract = contract_for(
        checkpoint, dtype=dtype, layout=layout, profiles=profiles, static=static, hoisted=hoisted
    )
    kept = profile_ranges(contract, profiles, static=static)
    questions = []
    for graph, io in contract.items():
        module = graph_module(checkpoint, graph, dtype=getattr(torch, dtype), layout=layout)
        write_graph(module, io, folder / graph / GRAPH_FILE, opset=OPSETS[dtype], static=static)
        questions.append(Question.of(folder / graph / GRAPH_FILE, io, [one[graph] for one in kept]))
    return questions


def questions_of(folder: Path) -> list[Question]:
    artefacts = open_artefacts(folder)
    return [Question.of(artefacts.graph(name), io) for name, io in artefacts.contract.items()]


def verdicts(questions: list[Question]) -> dict[str, Verdict]:
    answers = ask(questions)
    return {asked.file.parent.name: found for asked, found in zip(questions, answers, strict=True)}


def assert_taken(found: dict[str, Verdict], *, tokens: str = "tokens") -> None:
    assert found
    assert {name: verdict.objections for name, verdict in found.items() if verdict.objections} == {}
    assert all(verdict.layers > 20 and verdict.engine_bytes > 1 << 16 for verdict in found.values())
    # Allowed, and there: else the list of what is allowed has grown stale.
    expected = {"text_encoder": (TOKENS.replace("tokens", tokens),)} if "text_encoder" in found else {}
    assert {name: verdict.warnings for name, verdict in found.items() if verdict.warnings} == expected


@pytest.mark.parametrize("graphs", ["tiny_graphs", "tiny_half_graphs", "tiny_hoisted_graphs"])
def test_dynamic_graphs_are_taken_with_their_profiles(graphs: str, request: pytest.FixtureRequest) -> None:
    questions = questions_of(request.getfixturevalue(graphs))
    (unet,) = (one for one in questions if one.file.parent.name in ("unet", "unet_step"))
    names = (
        {"sample", "timestep", "context"} if graphs != "tiny_hoisted_graphs" else {"latents", "rows", "time"}
    )
    assert names <= set(unet.profiles[0])
    assert_taken(verdicts(questions))


def test_graphs_of_optimums_layout_are_taken(tiny_optimum_graphs: Path) -> None:
    assert_taken(verdicts(questions_of(tiny_optimum_graphs)), tokens="input_ids")


def test_graphs_of_one_size_are_taken(tiny_static_graphs: Path, tiny_static_hoisted_graphs: Path) -> None:
    """The UNet in one and in two; the other graphs are the same."""
    hoisted = [one for one in questions_of(tiny_static_hoisted_graphs) if "unet_" in one.file.parent.name]
    questions = questions_of(tiny_static_graphs) + hoisted
    assert not any(one.profiles for one in questions)
    found = verdicts(questions)
    assert set(found) == {*GRAPHS, *HOISTED_GRAPHS}
    assert_taken(found)


def test_two_profiles_of_the_unet_are_taken(tiny_graphs: Path) -> None:
    artefacts = open_artefacts(tiny_graphs)
    io = artefacts.contract["unet"]
    small = {symbol: (least, least, least) for symbol, (least, _, _) in io.ranges.items()}
    question = Question.of(artefacts.graph("unet"), io, [small, io.ranges])
    assert len(question.profiles) == 2
    assert_taken(verdicts([question]))


@pytest.mark.slow
def test_several_profiles_of_an_export_are_taken(tiny_checkpoint: Path, tmp_path: Path) -> None:
    questions = write(tmp_path, tiny_checkpoint, "float32", "64@1..4", "128..192@1..2")
    assert [len(one.profiles) for one in questions] == [2, 2, 2, 2]
    assert questions[1].profiles[0] != questions[1].profiles[1]
    assert_taken(verdicts(questions))


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float16"])
def test_the_pocket_models_graphs_of_one_size_are_taken(tmp_path: Path, dtype: str) -> None:
    questions = write(tmp_path, pocket_model(), dtype, "512@1", static=True)
    assert not any(one.profiles for one in questions)
    assert_taken(verdicts(questions))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("hoisted", [False, True])
def test_the_pocket_models_dynamic_graphs_are_taken(tmp_path: Path, dtype: str, hoisted: bool) -> None:
    assert_taken(verdicts(write(tmp_path, pocket_model(), dtype, "64..1024@1..4", hoisted=hoisted)))


def with_custom_operator(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    node.op_type, node.domain = "QuickGelu", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def with_unknown_operator(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Sigmoid").op_type = "NotThere"


def with_double_weights(model: onnx.ModelProto) -> None:
    weights = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("conv1.weight"))
    values = numpy_helper.to_array(weights).astype("float64")
    weights.CopyFrom(numpy_helper.from_array(values, weights.name))


def with_weights_of_another_rank(model: onnx.ModelProto) -> None:
    weights = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("conv1.weight"))
    weights.dims[:] = [weights.dims[0], weights.dims[1] * 9]


def with_weights_of_another_shape(model: onnx.ModelProto) -> None:
    weights = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("conv1.weight"))
    weights.dims[:] = [weights.dims[0], weights.dims[1] * 3, weights.dims[2], 1]


BREAKS: dict[Callable[[onnx.ModelProto], None], str] = {
    with_int64_timestep: "Make sure input timestep has Int64 binding",
    with_custom_operator: "Plugin not found",
    with_unknown_operator: "Plugin not found",
    with_double_weights: r"silent cast: \S+conv1.weight is DOUBLE, and FLOAT in TensorRT",
    with_weights_of_another_rank: "parser error",
    with_weights_of_another_shape: "parser error",
}


@pytest.mark.parametrize("break_it", BREAKS)
def test_a_broken_graph_is_refused(
    break_it: Callable[[onnx.ModelProto], None], tiny_graphs: Path, tmp_path: Path
) -> None:
    artefacts = open_artefacts(tiny_graphs)
    model = onnx.load(artefacts.graph("unet"))
    break_it(model)
    onnx.save(model, tmp_path / "model.onnx")
    (verdict,) = ask([Question.of(tmp_path / "model.onnx", artefacts.contract["unet"], build=False)])
    assert re.search(BREAKS[break_it], " ".join(verdict.objections))


def test_a_size_that_no_profile_covers_is_refused(tiny_graphs: Path) -> None:
    file = open_artefacts(tiny_graphs).graph("vae_decoder")
    (verdict,) = ask([Question(file=file)])
    assert verdict.layers > 50
    assert "no optimization profile has been defined" in verdict.errors[-1]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, str]]:
    """Of each planted graph what ONNX's checker, our check and TensorRT-RTX say."""
    folder = tmp_path_factory.mktemp("planted")
    questions = []
    for number, planted in enumerate(PLANTED.values()):
        onnx.save(planted.make(), folder / f"{number}.onnx")
        questions.append(Question.of(folder / f"{number}.onnx", planted.io))
    return {
        name: (checked(question.file), matrix(name), heard(verdict))
        for name, question, verdict in zip(PLANTED, questions, ask(questions), strict=True)
    }


def checked(file: Path) -> str:
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception:  # the checker's errors share no base
        return "refuses"
    return "takes"


def matrix(name: str) -> str:
    found = check_model(PLANTED[name].make(), PLANTED[name].io)
    return "refuses" if any(finding.level == "error" for finding in found) else "takes"


def heard(verdict: Verdict) -> str:
    if verdict.errors:
        return "refuses"
    if any("silent cast" in text for text in verdict.objections):
        return "narrows, silently"
    return "warns" if verdict.objections else "takes"


def test_every_planted_fault_is_refused_by_one_of_three(judged: dict[str, tuple[str, str, str]]) -> None:
    """The strictest counts: `ritocco export --check` is the checker and the check, CI has the oracle too."""
    assert judged["clean"] == ("takes", "takes", "takes")
    missed = [name for name in PLANTED if set(judged[name]) == {"takes"}]
    assert missed == ["clean"]
    # Who has no TensorRT has the first two, which miss nothing that the third finds.
    assert [name for name in PLANTED if judged[name][:2] == ("takes", "takes")] == ["clean"]


def test_the_differences_are_listed(judged: dict[str, tuple[str, str, str]]) -> None:
    rows = ["| fault | `onnx.checker` | our check | TensorRT-RTX 1.7.1 |", "|---|---|---|---|"]
    rows += [f"| {PLANTED[name].fault} | {' | '.join(said)} |" for name, said in judged.items()]
    table = "\n".join(rows)
    assert table in TABLE.read_text(encoding="utf-8"), f"{TABLE.name} should hold:\n{table}"


@pytest.mark.parametrize(
    ("warning", "whether"),
    [
        (TOKENS, True),
        ("Make sure input input_ids has Int64 binding.", True),
        ("Make sure input timestep has Int64 binding.", False),
        ("silent cast: tokens is INT64, and INT32 in TensorRT", False),
    ],
)
def test_which_warnings_are_allowed(warning: str, whether: bool) -> None:
    assert allowed(warning) is whether
    assert (Verdict(errors=(), warnings=(warning,)).objections == ()) is whether


DIES_AT_THE_SECOND = """
import os, sys
sys.stdin.readline()
print({answer!r}, flush=True)
if sys.stdin.readline():
    print("terminate called", file=sys.stderr, flush=True)
    os.abort()
"""


def test_a_process_that_dies_condemns_its_graph_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child answers the first graph of each process, and dies at the second."""
    monkeypatch.delenv("PYTHONFAULTHANDLER", raising=False)  # which has last words of its own
    script = tmp_path / "child.py"
    answer = json.dumps({"errors": [], "warnings": [], "layers": 7, "engine_bytes": 8, "seconds": 0})
    script.write_text(DIES_AT_THE_SECOND.format(answer=answer), encoding="utf-8")
    questions = [Question(file=tmp_path / str(n)) for n in range(3)]
    first, second, third = ask(questions, child=(sys.executable, str(script)))
    assert (first.layers, second.layers, third.layers) == (7, 0, 7)
    assert second.objections == (
        "TensorRT-RTX ended its process, exit status -6; its last words: terminate called",
    )


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(library.UnusableError, match="no C compiler"):
        library.Library(lambda level, text: None)
    monkeypatch.setattr(library, "PACKAGE", "not_installed_at_all")
    with pytest.raises(library.UnusableError, match="TensorRT-RTX is missing; pip install"):
        library.package_folder()


def run(*arguments: str) -> tuple[int, str]:
    paths = ":".join(str(ROOT / name) for name in ("tests", "engine"))
    done = subprocess.run(
        [sys.executable, "-m", "tensorrt_oracle", *arguments],
        env={"PYTHONPATH": paths, "PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_command_says_it_by_its_exit_status(tiny_graphs: Path, tmp_path: Path) -> None:
    status, said = run(str(tiny_graphs), "--graph", "vae_decoder", "--no-build")
    assert status == 0
    assert re.search(r"^vae_decoder +taken +\d+ +none", said, re.MULTILINE)
    status, said = run(str(tmp_path))
    assert (status, "error: " in said) == (2, True)
    status, said = run(str(tiny_graphs), "--graph", "vae")
    assert (status, "--graph is vae; there are text_encoder, unet" in said) == (2, True)
