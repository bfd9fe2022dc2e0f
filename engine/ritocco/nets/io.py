"""What goes into and comes out of each network: names, shapes, dtypes, ranges.

One contract for exporter, builder, runtime and test.
Symbols in shapes: N images, prompts or lanes, M UNet rows, R rows of a step table, H and W latent cells per
side. No torch here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from ritocco.nets.specs import TextSpec, UNetSpec, VAESpec

Range = tuple[int, int, int]
"""Smallest, best and largest size."""

Ranges = Mapping[str, Range]
"""Of every symbol of a graph."""

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, best and largest shape."""

GraphName = Literal["text_encoder", "unet", "unet_once", "unet_step", "vae_encoder", "vae_decoder"]
GRAPHS: tuple[GraphName, ...] = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
HOISTED_GRAPHS: tuple[GraphName, ...] = (
    "text_encoder",
    "unet_once",
    "unet_step",
    "vae_encoder",
    "vae_decoder",
)
"""The same with the UNet in two: what does not change from step to step, and the step."""

Layout = Literal["ritocco", "optimum"]
"""Whose names and conventions a set of graphs has.

`ritocco`: a timestep for each UNet row; the autoencoder scales latents for the UNet, and its encoder gives
the posterior's mean. `optimum`: one scalar timestep a call; latents as the autoencoder has them, and its
encoder gives mean and log variance.
"""

CELLS: Range = (8, 64, 128)
"""Latent cells per side: 64 to 1024 pixels at 8 pixels per cell."""

ROWS: Range = (1, 2, 8)
"""UNet rows: up to four guided images."""

IMAGES: Range = (1, 1, 4)
"""Images per call of the autoencoder, prompts per call of the text encoder, lanes per UNet step."""

PROMPTS: Range = (1, 2, 2)
"""Prompts of a lane: one at guidance 1, else the negative prompt before it."""

TABLE_ROWS: Range = (1, 50, 512)
"""Rows of a lane's step table; PNDM has one more than steps."""


MOST_IMAGES = 16
"""Pictures side by side that graphs can be exported for."""

LARGEST: Mapping[str, int] = {
    "N": MOST_IMAGES,
    "M": 2 * MOST_IMAGES,
    "R": TABLE_ROWS[2],
    "H": CELLS[2],
    "W": CELLS[2],
}
"""Of each symbol, in any export."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """One input or output.

    shape: per axis a number, a symbol, or a factor and a symbol as in `8*H`.
    dtype: as NumPy and torch name it.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols in the shape."""
        return frozenset(dim.rpartition("*")[2] for dim in self.shape if isinstance(dim, str))

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with numbers for its symbols. Raises KeyError for a symbol that `sizes` lacks."""
        return tuple(dim if isinstance(dim, int) else _resolve(dim, sizes) for dim in self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkIO:
    """The contract of one network.

    ranges: smallest, best and largest size of each symbol. multiples: what a symbol's size must be a
    multiple of (a symbol that is not there takes any size).
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    ranges: Ranges
    multiples: Mapping[str, int]

    def shapes(self, ranges: Ranges) -> dict[str, Shapes]:
        """What `ranges`, a part of the contract's, mean for each input that has more than one shape."""
        moving = {symbol for symbol, (least, _, most) in self.ranges.items() if least < most}
        least, best, most = ({symbol: one[i] for symbol, one in ranges.items()} for i in range(3))
        return {
            port.name: (port.resolve(least), port.resolve(best), port.resolve(most))
            for port in self.inputs
            if moving & port.symbols
        }

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The size of each symbol, from the shapes of the inputs by name."""
        found = {}
        for port in self.inputs:
            for dim, size in zip(port.shape, shapes[port.name], strict=True):
                if isinstance(dim, str):
                    factor, _, symbol = dim.rpartition("*")
                    found[symbol] = size // int(factor or 1)
        return found


Contract = Mapping[GraphName, NetworkIO]


def contract_of(
    unet: UNetSpec,
    vae: VAESpec,
    text: TextSpec,
    *,
    dtype: str,
    layout: Layout = "ritocco",
    hoisted: bool = False,
) -> Contract:
    """The contracts of a checkpoint's graphs: GRAPHS, or HOISTED_GRAPHS, which only our own layout has."""
    tokens = text.positions
    denoiser: Contract = (
        {
            "unet_once": unet_once_io(unet, tokens=tokens, dtype=dtype),
            "unet_step": unet_step_io(unet, tokens=tokens, dtype=dtype),
        }
        if hoisted
        else {"unet": unet_io(unet, tokens=tokens, dtype=dtype, layout=layout)}
    )
    return {
        "text_encoder": text_encoder_io(text, dtype=dtype, layout=layout),
        **denoiser,
        "vae_encoder": vae_encoder_io(vae, dtype=dtype, layout=layout),
        "vae_decoder": vae_decoder_io(vae, dtype=dtype, layout=layout),
    }


def contract_digest(contract: Contract) -> str:
    """64 hex digits that change when a name, shape, dtype or multiple does; ranges are a choice of each
    export.
    """
    ports = {name: {**asdict(io), "ranges": None} for name, io in contract.items()}
    return hashlib.sha256(json.dumps(ports, sort_keys=True).encode()).hexdigest()


def unet_io(spec: UNetSpec, *, tokens: int, dtype: str, layout: Layout = "ritocco") -> NetworkIO:
    """sample, timestep, context -> noise (whatever the checkpoint predicts). tokens: `TextSpec.positions`."""
    own = layout == "ritocco"
    context = "context" if own else "encoder_hidden_states"
    return NetworkIO(
        inputs=(
            Port(name="sample", shape=("M", spec.in_channels, "H", "W"), dtype=dtype),
            Port(name="timestep", shape=("M",) if own else (), dtype="float32"),
            Port(name=context, shape=("M", tokens, spec.context_dim), dtype=dtype),
        ),
        outputs=(
            Port(
                name="noise" if own else "out_sample", shape=("M", spec.out_channels, "H", "W"), dtype=dtype
            ),
        ),
        ranges={"M": ROWS, "H": CELLS, "W": CELLS},
        multiples={"H": spec.size_multiple, "W": spec.size_multiple},
    )


def unet_once_io(spec: UNetSpec, *, tokens: int, dtype: str) -> NetworkIO:
    """timesteps, context, condition -> what a lane keeps for all its steps: `HOISTED`, then keys and values.

    One lane a call: its table's timesteps, its one or two prompts, its mask and masked-image latents.
    """
    return NetworkIO(
        inputs=(
            Port(name="timesteps", shape=("R",), dtype="float32"),
            Port(name="context", shape=("M", tokens, spec.context_dim), dtype=dtype),
            Port(name="condition", shape=(1, spec.in_channels - spec.out_channels, "H", "W"), dtype=dtype),
        ),
        outputs=_hoisted(spec, "R", 1, tokens, dtype),
        ranges={"R": TABLE_ROWS, "M": PROMPTS, "H": CELLS, "W": CELLS},
        multiples={"H": spec.size_multiple, "W": spec.size_multiple},
    )


def unet_step_io(spec: UNetSpec, *, tokens: int, dtype: str) -> NetworkIO:
    """latents, rows, and for the lanes side by side what `unet_once` gave -> noise.

    rows: the lane of each UNet row. time: each lane's row of its `time`.
    """
    return NetworkIO(
        inputs=(
            Port(name="latents", shape=("N", spec.out_channels, "H", "W"), dtype=dtype),
            Port(name="rows", shape=("M",), dtype="int32"),
            *_hoisted(spec, "N", "N", tokens, dtype),
        ),
        outputs=(Port(name="noise", shape=("M", spec.out_channels, "H", "W"), dtype=dtype),),
        ranges={"N": IMAGES, "M": ROWS, "H": CELLS, "W": CELLS},
        multiples={"H": spec.size_multiple, "W": spec.size_multiple},
    )


HOISTED = ("time", "hoisted_condition")
"""The first ports between the two graphs; keys and values of every cross-attention follow, in call order."""


def _hoisted(spec: UNetSpec, times: str, lanes: int | str, tokens: int, dtype: str) -> tuple[Port, ...]:
    # A tensor for each layer's keys and one for its values: packed into one they would have to be cut apart
    # at every step, and a wrong order would show in the picture only, not in a shape or a name.
    time, condition = HOISTED
    return (
        Port(name=time, shape=(times, spec.time_width), dtype=dtype),
        Port(name=condition, shape=(lanes, spec.channels[0], "H", "W"), dtype=dtype),
        *(
            Port(name=f"{kind}_{layer:02}", shape=("M", heads, tokens, width), dtype=dtype)
            for layer, (heads, width) in enumerate(spec.cross_attentions)
            for kind in ("keys", "values")
        ),
    )


def vae_encoder_io(spec: VAESpec, *, dtype: str, layout: Layout = "ritocco") -> NetworkIO:
    """pixels in [-1,1] -> latents, scaled for the UNet; Optimum's: mean and log variance, not scaled."""
    own = layout == "ritocco"
    moments = Port(name="latent_parameters", shape=("N", 2 * spec.latent_channels, "H", "W"), dtype=dtype)
    return NetworkIO(
        inputs=(_pixels(spec, spec.in_channels, dtype, "pixels" if own else "sample"),),
        outputs=(_latents(spec, dtype, "latents") if own else moments,),
        ranges={"N": IMAGES, "H": CELLS, "W": CELLS},
        multiples={},
    )


def vae_decoder_io(spec: VAESpec, *, dtype: str, layout: Layout = "ritocco") -> NetworkIO:
    """latents, scaled as the UNet's (Optimum's: not scaled) -> pixels, about [-1,1]."""
    own = layout == "ritocco"
    return NetworkIO(
        inputs=(_latents(spec, dtype, "latents" if own else "latent_sample"),),
        outputs=(_pixels(spec, spec.out_channels, dtype, "pixels" if own else "sample"),),
        ranges={"N": IMAGES, "H": CELLS, "W": CELLS},
        multiples={},
    )


def text_encoder_io(spec: TextSpec, *, dtype: str, layout: Layout = "ritocco") -> NetworkIO:
    """tokens -> context."""
    own = layout == "ritocco"
    return NetworkIO(
        inputs=(Port(name="tokens" if own else "input_ids", shape=("N", spec.positions), dtype="int64"),),
        outputs=(
            Port(
                name="context" if own else "last_hidden_state",
                shape=("N", spec.positions, spec.width),
                dtype=dtype,
            ),
        ),
        ranges={"N": IMAGES},
        multiples={},
    )


def _pixels(spec: VAESpec, channels: int, dtype: str, name: str) -> Port:
    return Port(name=name, shape=("N", channels, f"{spec.factor}*H", f"{spec.factor}*W"), dtype=dtype)


def _latents(spec: VAESpec, dtype: str, name: str) -> Port:
    return Port(name=name, shape=("N", spec.latent_channels, "H", "W"), dtype=dtype)


def _resolve(dim: str, sizes: Mapping[str, int]) -> int:
    factor, _, symbol = dim.rpartition("*")
    return int(factor or 1) * sizes[symbol]
