"""The gate's arithmetic on weights that stay as they are stored."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ritocco.artefacts import GRAPH_FILE, open_artefacts, read_manifest
from ritocco.backends.torch_ import TorchRuntime
from ritocco.checkpoint import load_network, open_checkpoint
from ritocco.nets.io import GRAPHS, GraphName
from ritocco_export.frugal import load_widened, open_session, widen
from ritocco_export.graphs import example_inputs, graph_module

CPU = torch.device("cpu")


def wide(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [value.float() if value.is_floating_point() else value for value in inputs]


@pytest.mark.parametrize("graph", ["text_encoder", "unet", "vae_encoder", "vae_decoder"])
def test_a_widened_network_computes_what_a_float32_one_does(
    tiny_checkpoint: Path, tiny_half_graphs: Path, graph: GraphName
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    io = open_artefacts(tiny_half_graphs).contract[graph]
    inputs = wide(example_inputs(io, {symbol: least for symbol, (least, _, _) in io.ranges.items()}))
    plain, held = (graph_module(checkpoint, graph, dtype=torch.float16, layout="ritocco") for _ in range(2))
    with torch.inference_mode():
        assert torch.equal(widen(held)(*inputs), plain.float()(*inputs))
    kept = [parameter.dtype for name, parameter in held.named_parameters()]
    assert kept.count(torch.float16) == len(kept) > 10


def test_a_runtime_on_widened_weights_holds_them_rounded(tiny_checkpoint: Path) -> None:
    def load(*args: Any, **options: Any) -> torch.nn.Module:
        return load_widened(*args, held=torch.float16, **options)

    checkpoint = open_checkpoint(tiny_checkpoint)
    runtime = TorchRuntime(checkpoint, device=CPU, dtype=torch.float32, load=load)
    assert {parameter.dtype for parameter in runtime.unet.parameters()} == {torch.float16}
    tokens = np.arange(154, dtype=np.int64).reshape(2, 77)
    rounded = load_network(checkpoint, "text_encoder", dtype=torch.float16).float()
    assert np.array_equal(runtime.encode_text(tokens), rounded(torch.from_numpy(tokens)).numpy())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_float16_graph_is_run_without_a_float32_copy_of_its_weights(tmp_path: Path) -> None:
    """200 MB of weights in 24 layers; a copy of all in float32 is 400 MB."""
    from ritocco.nets.io import NetworkIO, Port
    from ritocco_export.graphs import write_graph

    torch.manual_seed(0)
    layers = [torch.nn.Linear(2048, 2048, bias=False) for _ in range(24)]
    module = torch.nn.Sequential(*layers).half().requires_grad_(False)
    ports = [Port(name=name, shape=(4, 2048), dtype="float16") for name in ("x", "y")]
    io = NetworkIO(inputs=(ports[0],), outputs=(ports[1],), ranges={}, multiples={})
    write_graph(module, io, tmp_path / GRAPH_FILE, opset=20, static=True)
    del module, layers
    gc.collect()
    feeds = {"x": np.ones((4, 2048), np.float16)}
    before = anonymous_bytes()
    found = open_session(tmp_path / GRAPH_FILE, "unet", "float16").run(feeds)
    assert np.isfinite(found).all()
    assert anonymous_bytes() - before < 150e6


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    resident, shared = (int(pages) for pages in Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def test_bfloat16_graphs_are_valid_and_not_run_where_nothing_runs_them(
    tiny_checkpoint: Path, tiny_bfloat16_graphs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ritocco_export import frugal, gate

    assert read_manifest(tiny_bfloat16_graphs).parity["unet"]["arithmetic"] == "float32"
    graphs, checkpoint = open_artefacts(tiny_bfloat16_graphs), open_checkpoint(tiny_checkpoint)
    file, io = graphs.graph("unet"), graphs.contract["unet"]
    monkeypatch.setattr(frugal, "installed", lambda package: False)
    figures = gate.compare(checkpoint, "unet", file, io, layout="ritocco", static=False)
    assert figures.arithmetic == ""
    assert "openvino is not installed" in figures.line("bfloat16")


@pytest.mark.slow
def test_bfloat16_graphs_are_measured_again_though_tensorrt_would_not_take_them(
    tiny_checkpoint: Path, tiny_bfloat16_graphs: Path
) -> None:
    from ritocco_export.report import report

    passed, text = report(tiny_bfloat16_graphs, as_json=True, checkpoint=open_checkpoint(tiny_checkpoint))
    told = json.loads(text)
    assert not passed, "opset 22"
    assert told["measured_again"]
    assert {*told["parity"]} == {*GRAPHS, "picture"}
    assert not [one for found in told["findings"].values() for one in found if one["rule"] == "parity"]
