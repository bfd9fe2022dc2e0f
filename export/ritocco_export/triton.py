"""`ritocco export --triton`: a model repository for Triton Inference Server, from a folder of graphs.

Each network is a model of the ONNX Runtime backend; `ritocco` is one of the Python backend, which calls them
(see `ritocco.scale.triton_pipeline`). [triton-inference-server/common, protobuf/model_config.proto;
parameters of the accelerator: onnxruntime_backend's README, "Parameter mapping"]
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from ritocco.artefacts import Artefacts, is_graph_file
from ritocco.errors import BackendError, RequestError
from ritocco.nets.io import GraphName, NetworkIO, Port, Ranges
from ritocco.scale.triton_pipeline import GRAPHS, OPTIONS, OUTPUTS, PREFIX, batch_symbol, whole_ranges
from ritocco.schema import PredictionInput

PIPELINE = "ritocco"
ACCELERATORS = ("tensorrt", "none")
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}
_PRECISION = {"float32": "FP32", "float16": "FP16"}
_INPUTS = {"integer": "TYPE_INT64", "number": "TYPE_FP64", "boolean": "TYPE_BOOL", "string": "TYPE_STRING"}
_MODEL = '''"""What Triton's Python backend looks for; `ritocco` has to be installed beside it."""

from ritocco.scale.triton_pipeline import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(
    artefacts: Artefacts, out: Path, *, instances: int = 4, accelerator: str = "tensorrt"
) -> None:
    """Write the repository to the folder `out`, which must not be there, or be empty; all of it or nothing.

    Graphs are copied, as onnx takes hard links for an attack. instances: predictions at a time. accelerator:
    of ACCELERATORS. Raises RequestError for a folder that holds something, or lies in that of the graphs,
    BackendError for graphs that Triton's Python backend can't feed, OSError.
    """
    _refuse_within(out, artefacts.path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(
            f"--triton is {str(out)!r}, which holds something; name a new folder", field="--triton"
        )
    _refuse(artefacts)
    part = out.absolute().parent / f".{out.name}.{secrets.token_hex(8)}.part"
    try:
        part.mkdir(parents=True)
        for graph, io in artefacts.contract.items():
            model = part / f"{PREFIX}{graph}"
            (model / "1").mkdir(parents=True)
            for file in sorted(artefacts.graph(graph).parent.iterdir()):
                if is_graph_file(file.name):
                    shutil.copyfile(file, model / "1" / file.name)
            ranges = whole_ranges(artefacts, graph)
            text = network_config(graph, io, ranges, accelerator=accelerator)
            (model / "config.pbtxt").write_text(text, encoding="utf-8")
        pipeline = part / PIPELINE / "1"
        pipeline.mkdir(parents=True)
        (pipeline / "model.py").write_text(_MODEL, encoding="utf-8")
        shutil.copytree(
            artefacts.path,
            pipeline / GRAPHS,
            ignore=lambda folder, names: [name for name in names if is_graph_file(name)],
        )
        (pipeline.parent / "config.pbtxt").write_text(pipeline_config(instances), encoding="utf-8")
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def network_config(graph: GraphName, io: NetworkIO, ranges: Ranges, *, accelerator: str) -> str:
    """The `config.pbtxt` of a network. ranges: smallest, best and largest size of each symbol.

    Inputs of one first axis that moves are batches to Triton: it puts those of several requests together. A
    fixed one, as of `--static`, it would refuse: to it such graphs know no batches.
    """
    batch = batch_symbol(io, ranges)
    best, most = ranges[batch][1:] if batch else (0, 0)
    blocks = [
        f'name: "{PREFIX}{graph}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {most}",
        *(_port("input", port, ranges, batched=batch is not None) for port in io.inputs),
        *(_port("output", port, ranges, batched=batch is not None) for port in io.outputs),
        "instance_group [ { count: 1 kind: KIND_AUTO } ]",
    ]
    if batch and most > 1:
        blocks.append(f"dynamic_batching {{ preferred_batch_size: [ {most} ] }}")
    if accelerator == "tensorrt":
        blocks.append(_accelerator(io, ranges))
    blocks.append(_warm_up(io, ranges, best if batch else 0))
    return "\n".join(blocks) + "\n"


def pipeline_config(instances: int) -> str:
    """The `config.pbtxt` of the model that takes a request: the schema's inputs, most of them optional."""
    properties = PredictionInput.model_json_schema()["properties"]
    required = {name for name, info in PredictionInput.model_fields.items() if info.is_required()}
    kinds = {name: _INPUTS[_kind(held)] for name, held in properties.items()} | {OPTIONS: "TYPE_STRING"}
    blocks = [f'name: "{PIPELINE}"', 'backend: "python"', "max_batch_size: 0"]
    for name, kind in kinds.items():
        optional = "" if name in required else " optional: true"
        blocks.append(f'input [ {{ name: "{name}" data_type: {kind} dims: [ 1 ]{optional} }} ]')
    for name, dims in zip(OUTPUTS, (-1, 1), strict=True):
        blocks.append(f'output [ {{ name: "{name}" data_type: TYPE_STRING dims: [ {dims} ] }} ]')
    blocks.append(f"instance_group [ {{ count: {instances} kind: KIND_CPU }} ]")
    return "\n".join(blocks) + "\n"


def _refuse_within(out: Path, graphs: Path) -> None:
    """It would be copied into itself; and what follows a link is a folder of another name."""
    there, here = out.resolve(), graphs.resolve()
    if there.is_relative_to(here) or here.is_relative_to(there):
        how = "lies in" if there.is_relative_to(here) else "holds"
        rule = f"which {how} --graphs, {str(graphs)!r}; name a folder beside it"
        raise RequestError(f"--triton is {str(out)!r}, {rule}", field="--triton")


def _refuse(artefacts: Artefacts) -> None:
    if artefacts.hoisted:
        why = "what a lane keeps, tens of MiB, would go through the host's memory at every step"
        raise BackendError(f"{artefacts.path}: exported with --hoisted; {why}. Export without it")
    if artefacts.manifest is None or artefacts.layout != "ritocco":
        raise BackendError(
            f"{artefacts.path}: an export of Optimum's layout; export in ours, --layout ritocco"
        )
    if artefacts.manifest.dtype not in _PRECISION:
        held = artefacts.manifest.dtype
        raise BackendError(f"{artefacts.path}: {held} graphs, which NumPy does not have; export fp16 or fp32")


def _port(kind: str, port: Port, ranges: Ranges, *, batched: bool) -> str:
    dims = ", ".join(str(dim) for dim in _dims(port, ranges)[1 if batched else 0 :])
    # A batch of numbers has no axis left; Triton wants one, which it takes away before the backend's call.
    shape = f"dims: [ {dims} ]" if dims else "dims: [ 1 ] reshape: { shape: [ ] }"
    return f'{kind} [ {{ name: "{port.name}" data_type: {_TYPES[port.dtype]} {shape} }} ]'


def _dims(port: Port, ranges: Ranges) -> list[int]:
    moving = {symbol for symbol, (least, _, most) in ranges.items() if least < most}
    sizes = {symbol: best for symbol, (_, best, _) in ranges.items()}
    fixed = port.resolve(sizes)
    return [
        -1 if isinstance(dim, str) and dim.rpartition("*")[2] in moving else size
        for dim, size in zip(port.shape, fixed, strict=True)
    ]


def _accelerator(io: NetworkIO, ranges: Ranges) -> str:
    dtypes = {port.dtype for port in (*io.inputs, *io.outputs)}
    held = {"precision_mode": "FP16" if "float16" in dtypes else "FP32", "trt_engine_cache_enable": "1"}
    if shapes := io.shapes(ranges):
        for place, kind in enumerate(("min", "opt", "max")):
            each = (f"{name}:{'x'.join(map(str, three[place]))}" for name, three in shapes.items())
            held[f"trt_profile_{kind}_shapes"] = ",".join(each)
    parameters = "\n".join(
        f'    parameters {{ key: "{key}" value: "{value}" }}' for key, value in held.items()
    )
    return (
        'optimization { execution_accelerators { gpu_execution_accelerator [ {\n    name: "tensorrt"\n'
        f"{parameters}\n}} ] }} }}"
    )


def _warm_up(io: NetworkIO, ranges: Ranges, batch: int) -> str:
    """One call at the best sizes, so that the first request does not wait for what is made at the first."""
    sizes = {symbol: best for symbol, (_, best, _) in ranges.items()}
    inputs = []
    for port in io.inputs:
        dims = port.resolve(sizes)[1 if batch else 0 :] or (1,)
        shape = ", ".join(map(str, dims))
        inputs.append(
            f'    inputs {{ key: "{port.name}" value {{ data_type: {_TYPES[port.dtype]} '
            f"dims: [ {shape} ] zero_data: true }} }}"
        )
    return (
        "model_warmup [ {\n" + f'    name: "best" batch_size: {max(batch, 1)}\n' + "\n".join(inputs) + "\n} ]"
    )


def _kind(held: Mapping[str, object]) -> str:
    """A JSON type of a schema's property; of several the one that is not null."""
    if isinstance(kind := held.get("type"), str):
        return kind
    options = held.get("anyOf", held.get("allOf", []))
    assert isinstance(options, list)  # noqa: S101 - of our own schema
    kinds = [one["type"] for one in options if one.get("type") not in (None, "null")]
    return kinds[0] if kinds else "string"
