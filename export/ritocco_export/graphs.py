"""The networks as ONNX graphs: plain PyTorch operations, standard operators, weights beside the graph.

opset 20 is the newest that TensorRT 10.1's parser documents (9 to 20); bfloat16 needs 22, where ONNX allows
it in `Conv`. Group norm becomes InstanceNormalization over groups, a reshape before and behind: one operator
that every parser has, where GroupNormalization is new at opset 21.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ritocco.checkpoint import Checkpoint, load_network
from ritocco.nets.io import GraphName, Layout, NetworkIO, Range
from ritocco.nets.unet import UNet
from ritocco.nets.vae import VAE
from ritocco_export.hoisted import UNetOnceGraph, UNetStepGraph
from ritocco_export.islands import GRAPH_OPS

_AXES = {"N": "images", "M": "rows", "R": "steps", "H": "height", "W": "width"}  # as the graphs name them
OPSETS = {"float32": 20, "float16": 20, "bfloat16": 22}


class UNetGraph(nn.Module):
    """The plain UNet; Optimum's takes one timestep for all rows."""

    def __init__(self, unet: UNet, layout: Layout) -> None:
        super().__init__()
        self.unet, self.layout = unet, layout

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """[M,9,h,w], [M] or [], [M,77,D] -> [M,4,h,w]."""
        if self.layout == "optimum":
            timestep = timestep.reshape(1).expand(sample.shape[0])
        out: Tensor = self.unet(sample, timestep, context)
        return out


class VaeEncoderGraph(nn.Module):
    """Pixels to the scaled mean; Optimum's to mean and log variance, not scaled."""

    def __init__(self, vae: VAE, layout: Layout) -> None:
        super().__init__()
        self.vae, self.layout = vae, layout

    def forward(self, pixels: Tensor) -> Tensor:
        """[N,3,8h,8w] -> [N,4 or 8,h,w]."""
        if self.layout == "ritocco":
            return self.vae.encode_mean(pixels)
        moments: Tensor = self.vae.encoder(pixels)
        return moments if self.vae.quant_conv is None else cast(Tensor, self.vae.quant_conv(moments))


class VaeDecoderGraph(nn.Module):
    """Scaled latents to pixels; Optimum's takes them as the autoencoder has them."""

    def __init__(self, vae: VAE, layout: Layout) -> None:
        super().__init__()
        self.vae, self.layout = vae, layout

    def forward(self, latents: Tensor) -> Tensor:
        """[N,4,h,w] -> [N,3,8h,8w]."""
        if self.layout == "ritocco":
            return self.vae.decode(latents)
        unscaled = latents if self.vae.post_quant_conv is None else self.vae.post_quant_conv(latents)
        return cast(Tensor, self.vae.decoder(unscaled))


def graph_module(
    checkpoint: Checkpoint, graph: GraphName, *, dtype: torch.dtype, layout: Layout
) -> nn.Module:
    """What a graph is traced from, with its weights on the CPU in `dtype`."""
    if graph == "text_encoder":
        return load_network(checkpoint, "text_encoder", dtype=dtype)
    if graph in ("vae_encoder", "vae_decoder"):
        vae = cast(VAE, load_network(checkpoint, "vae", dtype=dtype, ops=GRAPH_OPS))
        return VaeEncoderGraph(vae, layout) if graph == "vae_encoder" else VaeDecoderGraph(vae, layout)
    unet = cast(UNet, load_network(checkpoint, "unet", dtype=dtype, ops=GRAPH_OPS))
    if graph == "unet":
        return UNetGraph(unet, layout)
    return UNetOnceGraph(unet) if graph == "unet_once" else UNetStepGraph(unet)


def example_inputs(io: NetworkIO, sizes: Mapping[str, int], *, seed: int = 0) -> list[Tensor]:
    """Inputs of the contract's shapes: normal latents and contexts, timesteps, tokens and lanes within
    bounds.
    """
    generator = torch.Generator().manual_seed(seed)
    out = []
    for port in io.inputs:
        shape = port.resolve(sizes)
        if port.dtype == "int64":
            out.append(torch.randint(0, 100, shape, generator=generator))
        elif port.name == "rows":
            out.append(torch.randint(0, sizes["N"], shape, generator=generator, dtype=torch.int32))
        elif port.name in ("timestep", "timesteps"):
            out.append(1000 * torch.rand(shape, generator=generator))
        else:
            values = torch.randn(shape, generator=generator)
            if port.name in ("pixels", "sample") and shape[1] == 3:
                values = values.clamp(-1, 1)
            out.append(values.to(getattr(torch, port.dtype)))
    return out


def write_graph(module: nn.Module, io: NetworkIO, file: Path, *, opset: int, static: bool) -> None:
    """Export to `file`; weights go to a second file beside it where they pass a megabyte.

    static: the best size of each range alone, else every size of the ranges.
    """
    sizes = {symbol: _example_size(io, symbol, static=static) for symbol in io.ranges}
    inputs = example_inputs(io, sizes)
    shapes = None if static else _as_arguments(module, _dynamic_shapes(io))
    with _quiet():
        program = torch.onnx.export(
            module,
            tuple(inputs),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[port.name for port in io.inputs],
            output_names=[port.name for port in io.outputs],
            dynamic_shapes=shapes,
            optimize=False,
        )
        if program is None:
            raise RuntimeError("torch.onnx.export returned no program")
        weights = list(program.model.graph.initializers.values())
        program.optimize()
        # Where in which file of this machine each node came from, and how torch traced it: nobody's business.
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
    file.parent.mkdir(parents=True, exist_ok=True)
    program.save(file, external_data=_bytes_of(module) > 1 << 20)
    # The optimizer's rules hold on to the nodes that they last looked at, and so to every weight, for good.
    for weight in (*weights, *program.model.graph.initializers.values()):
        weight.const_value = None


def _example_size(io: NetworkIO, symbol: str, *, static: bool) -> int:
    least, best, most = io.ranges[symbol]
    if static:
        return best
    # torch.export takes an axis of length 1 for a constant; distinct lengths keep axes apart.
    multiple = io.multiples.get(symbol, 1)
    wanted = {"H": 3, "W": 4, "M": 3, "R": 5}.get(symbol, 2) * multiple
    return min(max(wanted, least), most) if most > 1 else 1


def _dynamic_shapes(io: NetworkIO) -> tuple[dict[int, Any] | None, ...]:
    dims = {symbol: _dim(symbol, io.ranges[symbol], io.multiples.get(symbol, 1)) for symbol in io.ranges}
    out = []
    for port in io.inputs:
        axes = {}
        for axis, size in enumerate(port.shape):
            if isinstance(size, str):
                factor, _, symbol = size.rpartition("*")
                if dims[symbol] is not None:
                    axes[axis] = int(factor) * dims[symbol] if factor else dims[symbol]
        out.append(axes or None)
    return tuple(out)


def _as_arguments(module: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """torch.export wants those of a variable number of inputs together, at the place that they have."""
    kinds = [one.kind for one in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return shapes
    place = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:place], shapes[place:])


def _dim(symbol: str, sizes: Range, multiple: int) -> Any:
    least, _, most = sizes
    if least == most:
        return None
    base = torch.export.Dim(_AXES[symbol], min=least // multiple, max=most // multiple)
    return multiple * base if multiple > 1 else base


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own workings, which a user can do nothing about."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
