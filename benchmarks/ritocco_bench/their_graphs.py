"""diffusers' pipeline on graphs of its own networks: what OpenVINO and ONNX Runtime are worth by themselves.

UNet and autoencoder are exported from diffusers' modules for the one size that is measured.

The text encoder stays in torch. Graphs are kept in GRAPHS, so that no measured process makes them.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ritocco_bench.theirs import Diffusers

if TYPE_CHECKING:
    from ritocco_bench.worker import Job

GRAPHS = Path(".cache/bench/their-graphs")


class _Step(nn.Module):
    """The UNet with three inputs and one output."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        noise: Tensor = self.unet(sample, timestep, context, return_dict=False)[0]
        return noise


class _Compiled(nn.Module):
    """A graph in a module's place, with what the pipeline asks of that beside calling it."""

    def __init__(self, graph: Any, like: Any) -> None:
        super().__init__()
        self._graph = graph
        for name in ("config", "dtype", "device"):
            if hasattr(like, name):
                object.__setattr__(self, name, getattr(like, name))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        held = list(inputs)
        if "encoder_hidden_states" in named:  # the UNet's
            held[1] = torch.as_tensor(held[1], dtype=torch.float32).reshape(1)
            return (self._graph([*held, named["encoder_hidden_states"]]),)
        return self._graph(held)


class GraphDiffusers(Diffusers, ABC):
    """The pipeline on graphs. suffix: of their files."""

    held = "float32"
    suffix = ".onnx"

    def _prepare(self, pipe: Any) -> None:
        job, cells = self._job, self._job.size // 8
        rows, side = 2 * job.outputs, (job.size, job.size)
        zeros = partial(torch.zeros, device=job.device)
        context = zeros(rows, 77, int(pipe.unet.config.cross_attention_dim))
        sample = zeros(rows, int(pipe.unet.config.in_channels), cells, cells)
        latents = zeros(job.outputs, int(pipe.vae.config.latent_channels), cells, cells)
        folder = GRAPHS / _key(job)
        graphs: tuple[tuple[Any, str, Any, tuple[Tensor, ...]], ...] = (
            (pipe, "unet", _Step(pipe.unet), (sample, torch.ones(1, device=job.device), context)),
            (pipe.vae, "encoder", pipe.vae.encoder, (zeros(1, 3, *side),)),
            (pipe.vae, "decoder", pipe.vae.decoder, (latents,)),
        )
        for owner, name, module, inputs in graphs:
            file = folder / f"{name}{self.suffix}"
            if not file.is_file():
                # Beside its place until it is whole.
                part = folder.with_name(f"{folder.name}.{name}.{secrets.token_hex(4)}")
                part.mkdir(parents=True)
                with torch.inference_mode():
                    self._export(module.eval(), inputs, part / file.name)
                folder.mkdir(exist_ok=True)
                for made in sorted(part.iterdir(), key=lambda one: one.name == file.name):
                    made.rename(folder / made.name)
                shutil.rmtree(part)
            setattr(owner, name, _Compiled(self._open(file), getattr(owner, name)))

    def _export(self, module: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> None:
        torch.onnx.export(module, inputs, file, dynamo=True, external_data=True, verbose=False)

    @abstractmethod
    def _open(self, file: Path) -> Any:
        """A callable: a list of tensors in, a tensor out."""


class OpenVinoDiffusers(GraphDiffusers):
    """On the CPU in the job's dtype, as OpenVINO's hint has it; converted by its own frontend for torch."""

    suffix = ".xml"

    def _export(self, module: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> None:
        from ritocco.backends.openvino_library import openvino

        shapes = [tuple(one.shape) for one in inputs]
        model = openvino.convert_model(module, example_input=inputs, input=shapes)
        openvino.save_model(model, file, compress_to_fp16=False)

    def _open(self, file: Path) -> Any:
        from ritocco.backends.openvino_library import openvino

        hint = {"bfloat16": "bf16", "float32": "f32"}[self._job.dtype]
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
        request = openvino.Core().compile_model(str(file), "CPU", options).create_infer_request()

        def run(inputs: Sequence[Tensor]) -> Tensor:
            request.infer([one.contiguous().numpy() for one in inputs], share_inputs=True)
            return torch.from_numpy(request.get_output_tensor(0).data.copy())

        return run


class OnnxDiffusers(GraphDiffusers):
    """In float32, on CUDA's provider where the job's device is one. provider: of ONNX Runtime."""

    provider = ""

    def _open(self, file: Path) -> Any:
        from ritocco.backends.onnxruntime_library import onnxruntime

        wanted = self.provider or (
            "CUDAExecutionProvider" if self._job.device.startswith("cuda") else "CPUExecutionProvider"
        )
        session = onnxruntime.InferenceSession(str(file), providers=[wanted], enable_fallback=0)
        if session.get_providers()[0] != wanted:
            raise RuntimeError(f"ONNX Runtime fell back to {session.get_providers()[0]}; {wanted} is wanted")
        names = [port.name for port in session.get_inputs()]

        def run(inputs: Sequence[Tensor]) -> Tensor:
            feeds = {name: one.contiguous().cpu().numpy() for name, one in zip(names, inputs, strict=True)}
            return torch.from_numpy(session.run(None, feeds)[0]).to(self._job.device)

        return run


class TensorRtDiffusers(OnnxDiffusers):
    """By ONNX Runtime's TensorRT provider."""

    provider = "TensorrtExecutionProvider"


def _key(job: Job) -> str:
    """Of the model's folder and what the graphs are made for."""
    model = Path(job.model).resolve()
    stamps = [
        f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in sorted(model.rglob("*"))
    ]
    digest = hashlib.sha256("\n".join([str(model), *stamps]).encode()).hexdigest()[:12]
    return f"{digest}-{job.size}-{job.outputs}"
