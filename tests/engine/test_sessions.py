"""Exported graphs on ONNX Runtime, OpenVINO and stand-ins of TensorRT: one conformance suite, beside torch.

TensorRT itself does not run here: what is tested is all up to the last call of its API.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import pytest

import ritocco
from planted_graphs import with_int64_timestep
from ritocco import BackendError, CheckpointError, Engine, RequestError
from ritocco.artefacts import open_artefacts
from ritocco.backends import SESSION_BACKENDS, open_sessions
from ritocco.backends.openvino_library import openvino
from ritocco.backends.runtime import Floats
from ritocco.backends.sessions import SessionRuntime
from ritocco.loading import graph_options
from ritocco.nets.io import NetworkIO
from ritocco.schedules import SCHEDULERS
from ritocco_export.plugin import Plugin

# On decoded floats, largest value about 1: float32 on both sides, in another order of sums. Measured: 6e-6.
TOLERANCE = 1e-4

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RITOCCO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


# The provider's package may be installed; it would be taken before the bindings.
OPTIONS = {"tensorrt-rtx": {"via": "bindings"}}
STAND_INS = Path(__file__).parents[1] / "stand_ins"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "own_graphs" in metafunc.fixturenames:
        pairs = [(name, graphs) for graphs in ("plain", "hoisted") for name in sorted(SESSION_BACKENDS)]
        names = ["-".join(pair) for pair in pairs]
        metafunc.parametrize(("backend", "own_graphs"), pairs, indirect=True, scope="module", ids=names)
    elif "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", sorted(SESSION_BACKENDS), indirect=True, scope="module")


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest, standing_in: None) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def own_graphs(request: pytest.FixtureRequest) -> Path:
    """float32 graphs in our layout, the UNet in one or in two."""
    name = "tiny_graphs" if request.param == "plain" else "tiny_hoisted_graphs"
    return cast(Path, request.getfixturevalue(name))


@pytest.fixture(scope="module")
def static_graphs(tiny_static_graphs: Path, tiny_static_hoisted_graphs: Path) -> dict[bool, Path]:
    """Graphs of 128 x 64 pixels and one picture, the UNet in one (False) or in two (True)."""
    return {False: tiny_static_graphs, True: tiny_static_hoisted_graphs}


def load(model: Path, backend: str, dtype: str = "float32") -> Engine:
    return ritocco.load(model, backend=backend, dtype=dtype, backend_options=OPTIONS.get(backend))


@pytest.fixture(scope="module")
def engine(backend: str, own_graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RITOCCO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield load(own_graphs, backend)


def floats(engine: Engine, given: dict[str, Any], **options: Any) -> Floats:
    """What `predict` decoded, before it was rounded to bytes."""
    kept: list[Floats] = []
    runtime = cast(Any, engine.runtime)
    decode = type(runtime).decode

    def keep(latents: Floats) -> Floats:
        kept.append(decode(runtime, latents))
        return kept[-1]

    runtime.decode = keep
    try:
        engine.predict(given, **options)
    finally:
        del runtime.decode
    return kept[0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_paints_as_with_torch(
    engine: Engine, tiny_engine: Engine, ask: Ask, scheduler: str
) -> None:
    given = ask(scheduler=scheduler, num_inference_steps=4)
    difference = np.abs(floats(engine, given) - floats(tiny_engine, given)).max()
    assert difference < TOLERANCE


@pytest.mark.parametrize("size", [(64, 64), (192, 128)])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_sizes_and_guidance(
    engine: Engine, tiny_engine: Engine, ask: Ask, size: tuple[int, int], guidance: float
) -> None:
    given = ask(size=size, guidance_scale=guidance, num_outputs=2)
    found = floats(engine, given)
    assert found.shape == (2, 3, size[1], size[0])
    assert np.abs(found - floats(tiny_engine, given)).max() < TOLERANCE


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_output_i_of_seed_s_is_output_0_of_seed_s_plus_i(engine: Engine, ask: Ask, count: int) -> None:
    """The graphs take two pictures at a time: three and four go in two calls."""
    batch = floats(engine, ask(num_outputs=count, seed=7))
    last = floats(engine, ask(num_outputs=1, seed=7 + count - 1))
    assert np.abs(batch[-1] - last[0]).max() < TOLERANCE


def test_cancellation(engine: Engine, ask: Ask) -> None:
    steps: list[int] = []

    def stop(done: int, total: int) -> bool:
        steps.append(done)
        return done < 2

    assert engine.predict(ask(num_inference_steps=9), on_step=stop).status == "canceled"
    assert steps == [1, 2]


def test_a_size_outside_the_profile_is_refused_before_anything_runs(engine: Engine, ask: Ask) -> None:
    with pytest.raises(RequestError, match=r"input\.width is 320; these graphs take 64 to 256"):
        engine.predict(ask(size=(320, 64)))


def test_the_log_says_what_runs(engine: Engine, backend: str, ask: Ask) -> None:
    logs = engine.predict(ask()).logs
    device = "cuda:0" if backend.startswith("tensorrt") else "cpu"
    assert f"Running {backend} on {device}: as asked; in float32" in logs
    assert "carry no safety checker" in logs


def test_optimums_layout_paints_the_same(
    backend: str, tiny_optimum_graphs: Path, tiny_engine: Engine, ask: Ask
) -> None:
    engine = load(tiny_optimum_graphs, backend)
    assert not engine.traits.lane_timesteps
    for scheduler in ("DDIM", "K_EULER"):
        given = ask(scheduler=scheduler, num_outputs=2)
        assert np.abs(floats(engine, given) - floats(tiny_engine, given)).max() < TOLERANCE


@pytest.mark.slow
def test_the_dtype_of_an_export_without_a_manifest_is_that_of_its_graphs(
    tiny_checkpoint: Path, export: Callable[..., Path], tmp_path: Path, ask: Ask
) -> None:
    made = export(tiny_checkpoint, "optimum-half", "64..128@1..4", layout="optimum", dtype="float16")
    folder = shutil.copytree(made, tmp_path / "theirs")
    (folder / "ritocco.json").unlink()
    engine = ritocco.load(folder, backend="onnxruntime", device="cpu")
    assert engine.traits.dtype == "float16"
    assert engine.predict(ask(num_inference_steps=1)).status == "succeeded"
    with pytest.raises(BackendError, match="dtype is 'float32'; these graphs are float16"):
        ritocco.load(folder, backend="onnxruntime", device="cpu", dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_graphs_run_on_openvino_alone(
    tiny_bfloat16_graphs: Path, tiny_engine: Engine, ask: Ask, dtype: str
) -> None:
    """In float32 arithmetic too, what passes between graphs is rounded to 8 bits."""
    computed = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == "bfloat16" and not computed:
        with pytest.raises(BackendError, match="which this processor does not compute in; float32 is"):
            load(tiny_bfloat16_graphs, "openvino", dtype=dtype)
        return
    engine = load(tiny_bfloat16_graphs, "openvino", dtype=dtype)
    difference = np.abs(floats(engine, ask()) - floats(tiny_engine, ask()))
    assert difference.max() < 0.3
    assert difference.mean() < 0.03
    with pytest.raises(BackendError, match="bfloat16 graphs don't run on ONNX Runtime here"):
        ritocco.load(tiny_bfloat16_graphs, backend="onnxruntime")


@pytest.mark.parametrize(
    ("name", "device", "dtype", "exported", "hoisted"),
    [
        ("openvino", "auto", "auto", "float32", True),
        ("openvino", "cpu", "bfloat16", "float32", True),
        ("onnxruntime", "auto", "auto", "float32", True),
        ("onnxruntime", "cuda:1", "auto", "float16", False),
        ("onnxruntime", "tensorrt", "float32", "float32", False),
        ("tensorrt", "auto", "auto", "float16", False),
        ("tensorrt-rtx", "cuda", "bfloat16", "bfloat16", False),
    ],
)
def test_a_checkpoint_is_exported_as_its_backend_runs_it_best(
    name: str, device: str, dtype: str, exported: str, hoisted: bool
) -> None:
    assert graph_options(name, device, dtype) == {"dtype": exported, "hoisted": hoisted}


@pytest.mark.parametrize(
    "graphs", ["tiny_half_graphs", pytest.param("tiny_half_hoisted_graphs", marks=pytest.mark.slow)]
)
def test_half_graphs_on_a_cpu_are_near(
    backend: str, graphs: str, tiny_engine: Engine, ask: Ask, request: pytest.FixtureRequest
) -> None:
    engine = load(request.getfixturevalue(graphs), backend, dtype="auto")
    difference = np.abs(floats(engine, ask()) - floats(tiny_engine, ask()))
    assert difference.max() < 0.1
    assert difference.mean() < 0.01


WITHOUT_TORCH = """
import sys
import numpy as np
import socket
asked = []
def refused(*args, **kwargs):
    asked.append(args)
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refused
import ritocco
options = {"via": "bindings"} if sys.argv[2] == "tensorrt-rtx" else None
engine = ritocco.load(sys.argv[1], backend=sys.argv[2], backend_options=options)
image = np.zeros((64, 64, 3), np.uint8)
p = engine.predict({"image": image, "mask": image[..., 0] + 255, "prompt": "x", "width": 64, "height": 64,
                    "num_inference_steps": 1})
assert p.status == "succeeded", p
assert not asked, asked
unwanted = "torch", "transformers", "diffusers", "onnx", "openvino_telemetry"
print(*[name for name in unwanted if name in sys.modules])
"""


def test_graphs_run_without_torch_or_a_socket(backend: str, own_graphs: Path, tmp_path: Path) -> None:
    """Nor does a runtime's telemetry, which is off where it takes itself to be in CI, leave an identity."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(str(root / name) for name in ("engine", "kernels", "export"))
    paths = os.pathsep.join([paths, str(STAND_INS)])
    told = ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {name: held for name, held in os.environ.items() if name not in told}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(own_graphs), backend],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    makers = {"intel", "Microsoft"}
    assert not [place for place in tmp_path.rglob("*") if place.name in makers]


def test_a_checkpoint_is_exported_once(
    backend: str,
    tiny_checkpoint: Path,
    tiny_graphs: Path,
    tiny_hoisted_graphs: Path,
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    on_cpu = backend in ("openvino", "onnxruntime")
    graphs = tiny_hoisted_graphs if on_cpu else tiny_graphs
    caplog.set_level("INFO", logger="ritocco.loading")
    exports: list[Path] = []

    class Stub(Plugin):
        def export(self, checkpoint: Any, out: Path, *, dtype: str, hoisted: bool, say: Any) -> None:
            exports.append(out)
            say("unet: exporting")
            assert (dtype, hoisted) == ("float32", on_cpu)
            shutil.copytree(graphs, out)

    monkeypatch.setenv("RITOCCO_CACHE", str(Path(os.environ["RITOCCO_CACHE"]) / backend))
    monkeypatch.setattr("ritocco.plugins.exporter", Stub)
    first = load(tiny_checkpoint, backend)
    second = load(tiny_checkpoint, backend)
    said = [record.getMessage() for record in caplog.records if record.name == "ritocco.loading"]
    assert [line.partition(" ")[0] for line in said] == ["exporting", "unet:"]
    assert len(exports) == 1
    assert first.version == second.version == open_artefacts(graphs).version
    assert (floats(first, ask()) == floats(second, ask())).all()


def test_auto_takes_the_fastest_that_is_installed(
    tiny_graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefacts = open_artefacts(tiny_graphs)
    opened: list[str] = []

    def fake(artefacts: Any, name: str, *rest: object) -> tuple[SimpleNamespace, tuple[str, ...]]:
        opened.append(name)
        return SimpleNamespace(traits=SimpleNamespace(device="cpu")), ()

    monkeypatch.setenv("RITOCCO_CACHE", str(tmp_path))  # engines that other tests built lie elsewhere
    monkeypatch.setattr("ritocco.backends._open", fake)
    for absent in ((), ("openvino",), ("onnxruntime",)):
        monkeypatch.setattr("ritocco.backends.installed", lambda name, absent=absent: name not in absent)
        open_sessions(artefacts, backend="auto", device="auto", dtype="auto")
    monkeypatch.setattr("ritocco.backends.installed", lambda name: True)
    open_sessions(artefacts, backend="auto", device="cuda", dtype="auto")
    assert opened == ["openvino", "onnxruntime", "openvino", "onnxruntime"]
    monkeypatch.setattr("ritocco.backends.installed", lambda name: False)
    with pytest.raises(BackendError, match=r'pip install "ritocco\[openvino\]" or "ritocco\[onnx\]"'):
        open_sessions(artefacts, backend="auto", device="auto", dtype="auto")
    monkeypatch.undo()
    monkeypatch.setattr("ritocco.backends.installed", lambda name: False)
    with pytest.raises(BackendError, match=r"openvino.*not installed; pip install"):
        open_sessions(artefacts, backend="openvino", device="auto", dtype="auto")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "torch"}, "exported graphs run on openvino or onnxruntime or tensorrt or tensorrt-rtx"),
        ({"backend": "onnxruntime", "device": "cuda"}, "has no CUDAExecutionProvider"),
        ({"backend": "onnxruntime", "dtype": "float16"}, "these graphs are float32"),
        ({"backend": "onnxruntime", "device": "tensorrt"}, "has no TensorrtExecutionProvider"),
        ({"backend": "openvino", "device": "cuda"}, "runs on cpu"),
        ({"backend": "openvino", "dtype": "float16"}, "float32 or bfloat16"),
    ],
)
def test_what_can_not_run_is_refused(tiny_graphs: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(BackendError, match=said):
        ritocco.load(tiny_graphs, **options)  # type: ignore[arg-type]


def test_options_of_checkpoints_are_refused_for_graphs(tiny_graphs: Path) -> None:
    with pytest.raises(CheckpointError, match="variant and tokenizer are for checkpoints"):
        ritocco.load(tiny_graphs, variant="fp16")


@pytest.mark.parametrize(
    ("graph", "spoil", "said"),
    [
        ("unet", lambda g: g.output.insert(0, g.input[0]), "unet: its first output is .*; noise is needed"),
        (
            "text_encoder",
            lambda g: _retype(g, "tokens", onnx.TensorProto.DOUBLE),
            "tokens is .*double.* 2 axes",
        ),
        (
            "unet",
            lambda g: g.input[1].type.tensor_type.shape.dim.add(dim_value=1),
            "timestep is .* of 2 axes",
        ),
    ],
    ids=["output", "dtype", "rank"],
)
def test_graphs_that_are_fed_or_read_otherwise_are_refused_at_load(
    graph: str, spoil: Callable[[Any], object], said: str, tiny_graphs: Path
) -> None:
    """By what a session of such a graph says of it."""
    model = onnx.load(tiny_graphs / graph / "model.onnx", load_external_data=False)
    spoil(model.graph)
    artefacts = open_artefacts(tiny_graphs)
    sessions: dict[Any, Any] = {name: Told(artefacts.contract[name]) for name in artefacts.contract}
    sessions[graph].read(model.graph)
    with pytest.raises(BackendError, match=said):
        SessionRuntime(artefacts, sessions, device="cpu", dtype="float32")


class Told:
    """A Session's account of its ports: those of the contract, or of a graph."""

    def __init__(self, io: NetworkIO) -> None:
        self.dtypes = {port.name: port.dtype for port in io.inputs}
        self.ranks = {port.name: len(port.shape) for port in io.inputs}
        self.outputs = [{port.name} for port in io.outputs]

    def read(self, graph: Any) -> None:
        names = {onnx.TensorProto.DOUBLE: "tensor(double)", onnx.TensorProto.INT64: "int64"}
        for port in graph.input:
            held = port.type.tensor_type
            self.dtypes[port.name] = names.get(held.elem_type, "float32")
            self.ranks[port.name] = len(held.shape.dim)
        self.outputs = [{port.name} for port in graph.output]


def _retype(graph: Any, name: str, kind: int) -> None:
    next(port for port in graph.input if port.name == name).type.tensor_type.elem_type = kind


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_older_exports_of_optimum_take_a_timestep_in_brackets(
    name: str, tiny_optimum_graphs: Path, tmp_path: Path, ask: Ask
) -> None:
    plain = shutil.copytree(tiny_optimum_graphs, tmp_path / "plain")
    (plain / "ritocco.json").unlink()
    older = shutil.copytree(plain, tmp_path / "older")
    file = older / "unet" / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    # timestep [1], which a Squeeze brings to the scalar that the graph goes on with.
    port = next(one for one in model.graph.input if one.name == "timestep")
    port.type.tensor_type.shape.dim.add(dim_value=1)
    for node in model.graph.node:
        for index, given in enumerate(node.input):
            if given == "timestep":
                node.input[index] = "timestep_scalar"
    model.graph.node.insert(0, onnx.helper.make_node("Squeeze", ["timestep"], ["timestep_scalar"]))
    onnx.save(model, file)
    wanted, found = (floats(load(folder, name), ask()) for folder in (plain, older))
    np.testing.assert_array_equal(found, wanted)


def test_a_graph_with_other_inputs_is_refused(tiny_graphs: Path) -> None:
    class Other:
        dtypes = {"x": "float32"}  # noqa: RUF012
        ranks = {"x": 2}  # noqa: RUF012
        outputs = ({"y"},)

        def run(self, feeds: Any) -> npt.NDArray[Any]:
            raise AssertionError

    with pytest.raises(BackendError, match="text_encoder: the graph takes x; tokens are the inputs"):
        SessionRuntime(
            open_artefacts(tiny_graphs),
            dict.fromkeys(("text_encoder", "unet", "vae_encoder", "vae_decoder"), Other()),  # type: ignore[arg-type]
            device="cpu",
            dtype="float32",
        )


def test_whole_timesteps_are_warned_of_by_name(
    backend: str,
    tiny_optimum_graphs: Path,
    tiny_engine: Engine,
    tmp_path: Path,
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An export of Optimum's whose timestep is int64; with this spacing not all schedulers' are whole."""
    folder = shutil.copytree(tiny_optimum_graphs, tmp_path / "whole")
    (folder / "ritocco.json").unlink()
    model = onnx.load(folder / "unet" / "model.onnx", load_external_data=False)
    with_int64_timestep(model)
    onnx.save(model, folder / "unet" / "model.onnx")
    config = folder / "scheduler" / "scheduler_config.json"
    spaced = json.loads(config.read_text(encoding="utf-8")) | {"timestep_spacing": "linspace"}
    config.write_text(json.dumps(spaced), encoding="utf-8")
    engine = load(folder, backend)
    assert engine.traits.whole_timesteps
    warning = "uses fractional timesteps, and these graphs take whole ones"
    assert f"K_EULER {warning}" in engine.predict(ask(scheduler="K_EULER")).logs
    given = ask(scheduler="DDIM")
    assert warning not in engine.predict(given).logs
    monkeypatch.setattr(tiny_engine, "_scheduler", {**tiny_engine._scheduler, "timestep_spacing": "linspace"})
    assert np.abs(floats(engine, given) - floats(tiny_engine, given)).max() < TOLERANCE


def test_graphs_of_one_size_take_one_row_too(
    backend: str, static_graphs: dict[bool, Path], tiny_engine: Engine, ask: Ask
) -> None:
    """At guidance 1 a picture has one prompt and one row; these graphs take two."""
    for hoisted in (False, True):
        engine = load(static_graphs[hoisted], backend)
        for given in (
            ask(size=(128, 64), guidance_scale=1.0, num_outputs=3),
            ask(size=(128, 64), guidance_scale=5.0),
        ):
            assert np.abs(floats(engine, given) - floats(tiny_engine, given)).max() < TOLERANCE
        with pytest.raises(RequestError, match="these graphs take 128 alone"):
            engine.predict(ask(size=(64, 64)))


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that can't be written, whoever asks."""
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    monkeypatch.setenv("RITOCCO_CACHE", str(blocked))
    return blocked


def test_graphs_run_without_a_cache(backend: str, tiny_graphs: Path, ask: Ask, no_cache: Path) -> None:
    engine = load(tiny_graphs, backend)
    assert engine.predict(ask()).status == "succeeded"
    assert no_cache.is_file()


def test_a_checkpoint_that_can_not_be_kept_says_why(
    backend: str, tiny_checkpoint: Path, no_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Writer(Plugin):
        def export(self, checkpoint: Any, out: Path, *, dtype: str, hoisted: bool, say: Any) -> None:
            out.mkdir(parents=True)

    monkeypatch.setattr("ritocco.plugins.exporter", Writer)
    with pytest.raises(BackendError, match="Set RITOCCO_CACHE to another folder"):
        load(tiny_checkpoint, backend)


def test_a_backend_that_is_not_there_is_named_with_those_that_are(tiny_checkpoint: Path) -> None:
    with pytest.raises(RequestError, match="must be auto, torch, openvino, onnxruntime, tensorrt"):
        ritocco.load(tiny_checkpoint, backend="tpu")


def test_a_checkpoints_safety_checker_is_not_lost(
    backend: str, tiny_safety_checkpoint: Path, tiny_graphs: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ritocco.loading._exported", lambda checkpoint, **options: open_artefacts(tiny_graphs)
    )
    engine = load(tiny_safety_checkpoint, backend)
    safety = engine._safety
    assert safety is not None
    monkeypatch.setattr(type(safety), "flag", lambda self, pixels: [True] * len(pixels))
    flagged = engine.predict(ask())
    assert flagged.status == "failed"
    assert "safety checker runs on torch" in flagged.logs
    assert engine.predict(ask(disable_safety_checker=True)).status == "succeeded"
