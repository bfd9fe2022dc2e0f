"""The model repository for Triton: read by Triton's own definitions, held against the graphs, and run."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from ritocco import BackendError, RequestError, cli, load
from ritocco.artefacts import open_artefacts
from ritocco.images import data_uri
from ritocco.scale.triton_pipeline import TritonPythonModel
from ritocco.schema import PredictionInput
from ritocco_export.triton import network_config, write_repository
from triton_double import NUMPY, Triton, configs

NETWORKS = ("ritocco_text_encoder", "ritocco_unet", "ritocco_vae_decoder", "ritocco_vae_encoder")
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(params=["tiny_graphs", "tiny_half_graphs"])
def graphs(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture
def repository(graphs: Path, tmp_path: Path) -> Path:
    write_repository(open_artefacts(graphs), tmp_path / "models", instances=3)
    return tmp_path / "models"


@pytest.fixture
def serve() -> Callable[[Path], tuple[Triton, TritonPythonModel]]:
    def start(repository: Path) -> tuple[Triton, TritonPythonModel]:
        triton, model = Triton(repository), TritonPythonModel()
        model.initialize({"model_repository": str(repository / "ritocco"), "model_version": "1"}, triton)
        return triton, model

    return start


def given(asked: dict[str, Any]) -> dict[str, Any]:
    """As a client gives it: pictures as data URIs."""
    for name in ("image", "mask"):
        file = io.BytesIO()
        asked[name].save(file, "PNG")
        asked[name] = data_uri(file.getvalue())
    return asked


def test_triton_reads_it_and_the_graphs_fit(repository: Path) -> None:
    found = configs(repository)
    assert sorted(found) == ["ritocco", *NETWORKS]
    for name in NETWORKS:
        config = found[name]
        assert (config.name, config.backend) == (name, "onnxruntime")
        graph = onnx.load(repository / name / "1" / "model.onnx", load_external_data=False).graph
        for ports, values in ((config.input, graph.input), (config.output, graph.output)):
            assert [port.name for port in ports] == [value.name for value in values]
            for port, value in zip(ports, values, strict=True):
                tensor = value.type.tensor_type
                dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
                assert NUMPY[DataType.Name(port.data_type)] == dtype
                shape = list(port.reshape.shape) if port.HasField("reshape") else list(port.dims)
                dims = list(tensor.shape.dim)[1:]
                assert len(dims) == len(shape)
                for dim, said in zip(dims, shape, strict=True):
                    assert said in (-1, dim.dim_value)
                    assert (said == -1) == (dim.dim_value == 0), "moving where the graph moves"
        assert config.max_batch_size >= 1
        assert config.instance_group[0].kind == ModelInstanceGroup.Kind.KIND_AUTO


def test_onnx_reads_the_weights_here_and_there(graphs: Path, repository: Path) -> None:
    """It takes hard links for an attack."""
    artefacts = open_artefacts(graphs)
    for graph in artefacts.contract:
        copied = onnx.load(repository / f"ritocco_{graph}" / "1" / "model.onnx")
        assert copied == onnx.load(artefacts.graph(graph))


def test_profiles_and_warm_up_are_those_of_the_contract(graphs: Path, repository: Path) -> None:
    artefacts = open_artefacts(graphs)
    config = configs(repository)["ritocco_unet"]
    unet = artefacts.contract["unet"]
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    held = accelerator.parameters
    half = unet.inputs[0].dtype == "float16"
    assert (accelerator.name, held["precision_mode"]) == ("tensorrt", "FP16" if half else "FP32")
    for place, kind in enumerate(("min", "opt", "max")):
        said = dict(one.split(":") for one in held[f"trt_profile_{kind}_shapes"].split(","))
        wanted = {name: "x".join(map(str, three[place])) for name, three in unet.shapes(unet.ranges).items()}
        assert said == wanted
    (warm,) = config.model_warmup
    _, best, most = unet.ranges["M"]
    assert (warm.batch_size, config.max_batch_size) == (best, most)
    assert list(config.dynamic_batching.preferred_batch_size) == [most]
    assert set(warm.inputs) == {port.name for port in unet.inputs}
    assert warm.inputs["sample"].dims[0] == unet.inputs[0].shape[1]
    assert list(warm.inputs["timestep"].dims) == [1]


def test_graphs_of_fixed_sizes_know_no_batches(graphs: Path) -> None:
    """Triton holds all dims of a model without batches against the graph, the first among them."""
    for name, network in open_artefacts(graphs).contract.items():
        fixed = {symbol: (best, best, best) for symbol, (_, best, _) in network.ranges.items()}
        text = network_config(name, network, fixed, accelerator="none")
        config = text_format.Parse(text, ModelConfig())
        sizes = {symbol: best for symbol, (_, best, _) in network.ranges.items()}
        assert config.max_batch_size == 0
        for ports, told in ((network.inputs, config.input), (network.outputs, config.output)):
            assert [tuple(port.dims) for port in told] == [port.resolve(sizes) for port in ports]
        (warm,) = config.model_warmup
        assert warm.batch_size == 1
        assert {name: tuple(one.dims) for name, one in warm.inputs.items()} == {
            port.name: port.resolve(sizes) for port in network.inputs
        }


def test_a_static_export_is_a_repository_that_paints(
    tiny_static_graphs: Path, tmp_path: Path, serve: Any, ask: Ask
) -> None:
    """Each config says its graph's own shapes, the first axis too, and calls keep to them."""
    write_repository(open_artefacts(tiny_static_graphs), tmp_path / "models")
    found = configs(tmp_path / "models")
    assert sorted(found) == ["ritocco", *NETWORKS]
    for name in NETWORKS:
        config = found[name]
        graph = onnx.load(tmp_path / "models" / name / "1" / "model.onnx", load_external_data=False).graph
        assert (config.max_batch_size, config.HasField("dynamic_batching")) == (0, False)
        for told, values in ((config.input, graph.input), (config.output, graph.output)):
            held = {
                value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
            }
            assert {port.name: list(port.dims) for port in told} == held
            assert not any(port.HasField("reshape") for port in told)
        (warm,) = config.model_warmup
        assert warm.batch_size == 1
        (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
        assert set(accelerator.parameters) == {"precision_mode", "trt_engine_cache_enable"}, "no profile"
    triton, model = serve(tmp_path / "models")
    asked = given(ask(size=(128, 64), num_inference_steps=2, prompt="a cat", seed=5))
    (answer,) = model.execute([triton.request("ritocco", **asked)])
    assert not answer.has_error(), answer.error().message()
    with load(tiny_static_graphs, backend="onnxruntime", device="cpu") as engine:
        wanted = engine.predict(asked)
    assert [one.decode() for one in answer.tensors[0].as_numpy()] == wanted.output
    (answer,) = model.execute([triton.request("ritocco", **given(ask(size=(64, 64))))])
    assert answer.has_error(), "of another size"
    assert "64" in answer.error().message()


def test_the_pipeline_takes_the_schema(repository: Path) -> None:
    config = configs(repository)["ritocco"]
    inputs = {one.name: one for one in config.input}
    assert set(inputs) == {*PredictionInput.model_fields, "options"}
    assert {name for name, one in inputs.items() if not one.optional} == {"image", "mask"}
    kinds = {name: DataType.Name(one.data_type).removeprefix("TYPE_") for name, one in inputs.items()}
    assert {kinds[name] for name in ("image", "mask", "prompt", "scheduler", "negative_prompt")} == {"STRING"}
    assert {kinds[name] for name in ("width", "height", "seed", "num_outputs")} == {"INT64"}
    assert (kinds["guidance_scale"], kinds["disable_safety_checker"]) == ("FP64", "BOOL")
    assert config.instance_group[0].count == 3


def test_it_paints_what_the_library_paints(graphs: Path, repository: Path, serve: Any, ask: Ask) -> None:
    triton, model = serve(repository)
    asked = given(ask(num_outputs=2, num_inference_steps=2, prompt="a cat", seed=5))
    (answer,) = model.execute([triton.request("ritocco", **asked)])
    assert not answer.has_error(), answer.error().message()
    output, prediction = (tensor.as_numpy() for tensor in answer.tensors)
    with load(graphs, backend="onnxruntime", device="cpu") as engine:
        wanted = engine.predict(asked)
    assert [one.decode() for one in output] == wanted.output
    told = json.loads(prediction[0])
    assert (told["status"], told["version"], told["output"]) == (wanted.status, wanted.version, wanted.output)
    assert triton.rows["ritocco_unet"] == [4, 4], "two prompts of two pictures, in one call a step"
    model.finalize()


def test_bad_requests_are_errors_in_words(repository: Path, serve: Any, ask: Ask) -> None:
    triton, model = serve(repository)
    asked = given(ask(num_inference_steps=1))
    for change, words in (
        ({"image": "/etc/passwd"}, "input.image is '/etc/passwd'"),
        ({"num_outputs": 9}, "input.num_outputs is 9. Must be less than or equal to 4"),
        ({"options": "{"}, "options is '{'; it must be JSON"),
        ({"options": "[" * 100_000}, "; it must be JSON that is nested less deeply"),
        ({"options": '{"mask_feather": ' + "9" * 5000 + "}"}, "; it must be JSON"),
        ({"options": '{"output_format": "tiff"}'}, "output_format"),
        ({"image": "http://127.0.0.1/x.png"}, "127.0.0.1"),
    ):
        (answer,) = model.execute([triton.request("ritocco", **{**asked, **change})])
        assert words in answer.error().message()


@pytest.mark.parametrize(
    ("name", "field"), [("image", "input.image"), ("seed", "input.seed"), ("options",) * 2]
)
@pytest.mark.parametrize("shape", [(0,), (2,), (2, 0)])
def test_a_tensor_has_one_element(
    repository: Path, serve: Any, ask: Ask, name: str, field: str, shape: tuple[int, ...]
) -> None:
    triton, model = serve(repository)
    asked = given(ask(num_inference_steps=1))
    tensors = [one for one in triton.request("ritocco", **asked) if one.name() != name]
    kind = np.int64 if name == "seed" else np.object_
    tensors.append(triton.Tensor(name, np.full(shape, 5 if name == "seed" else b"{}", kind)))
    (answer,) = model.execute([tensors])
    words = f"{field} is a tensor of shape {list(shape)}; it must have one element"
    assert answer.error().message() == words


def test_a_networks_error_is_told(repository: Path, serve: Any, ask: Ask) -> None:
    triton, model = serve(repository)
    triton.configs["ritocco_unet"].max_batch_size = 1
    asked = given(ask(num_inference_steps=1))
    (answer,) = model.execute([triton.request("ritocco", **asked)])
    assert answer.error().message().startswith("ritocco_unet: AssertionError")


def test_without_an_accelerator(tiny_graphs: Path, tmp_path: Path) -> None:
    write_repository(open_artefacts(tiny_graphs), tmp_path / "models", accelerator="none")
    assert not configs(tmp_path / "models")["ritocco_unet"].HasField("optimization")


def test_what_it_can_not_be_made_of(
    tiny_hoisted_graphs: Path, tiny_optimum_graphs: Path, tiny_bfloat16_graphs: Path, tmp_path: Path
) -> None:
    for graphs, words in (
        (tiny_hoisted_graphs, "exported with --hoisted"),
        (tiny_optimum_graphs, "Optimum's layout"),
        (tiny_bfloat16_graphs, "bfloat16 graphs, which NumPy does not have"),
    ):
        with pytest.raises(BackendError, match=words):
            write_repository(open_artefacts(graphs), tmp_path / "models")
    assert list(tmp_path.iterdir()) == []


def test_it_is_not_written_into_its_graphs_nor_around_them(tiny_graphs: Path, tmp_path: Path) -> None:
    """A link is the folder that it leads to."""
    graphs = tmp_path / "graphs"
    shutil.copytree(tiny_graphs, graphs)
    before = sorted(graphs.rglob("*"))
    (tmp_path / "link").symlink_to(graphs, target_is_directory=True)
    for out, how in (
        (graphs, "lies in"),
        (graphs / "models", "lies in"),
        (tmp_path / "link" / "a" / "models", "lies in"),
        (tmp_path / "graphs" / ".." / "graphs" / "models", "lies in"),
        (tmp_path, "holds"),
    ):
        with pytest.raises(RequestError) as caught:
            write_repository(open_artefacts(graphs), out)
        assert caught.value.field == "--triton"
        rule = f"which {how} --graphs, {str(graphs)!r}; name a folder beside it"
        assert str(caught.value) == f"--triton is {str(out)!r}, {rule}"
    assert sorted(graphs.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graphs", "link"]


def test_nothing_is_left_of_one_that_failed(
    tiny_graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ritocco_export.triton.pipeline_config", lambda instances: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_repository(open_artefacts(tiny_graphs), tmp_path / "models")
    assert list(tmp_path.iterdir()) == []


def test_the_command(
    tiny_graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["ritocco", "export", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    out = tmp_path / "models"
    assert run("--triton", out, "--graphs", tiny_graphs) == (0, f"{out}\n", "")
    status, _, err = run("--triton", out, "--graphs", tiny_graphs)
    assert (status, err) == (
        2,
        f"error: --triton is {str(out)!r}, which holds something; name a new folder\n",
    )
    assert "--triton needs --graphs" in run("--triton", tmp_path / "x")[2]
    assert "--accelerator is 'x'" in run("--triton", tmp_path / "x", "--graphs", out, "--accelerator", "x")[2]
    assert "does nothing with --triton" in run("--triton", out, "--graphs", out, "--dtype", "fp16")[2]
