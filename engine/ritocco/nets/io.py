"""What goes into and comes out of each network: names, shapes, dtypes, ranges.

One contract for exporter, builder, runtime and test.
Symbols in shapes: N images or prompts, M UNet rows, H and W latent cells per side. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ritocco.nets.specs import TextSpec, UNetSpec, VAESpec

Range = tuple[int, int, int]
"""Smallest, best and largest size."""

CELLS: Range = (8, 64, 128)
"""Latent cells per side: 64 to 1024 pixels at 8 pixels per cell."""

ROWS: Range = (1, 2, 8)
"""UNet rows: up to four guided images."""

IMAGES: Range = (1, 1, 4)
"""Images per call of the autoencoder, prompts per call of the text encoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """One input or output.

    shape: per axis a number, a symbol, or a factor and a symbol as in `8*H`.
    dtype: as NumPy and torch name it.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str

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
    ranges: Mapping[str, Range]
    multiples: Mapping[str, int]


def unet_io(spec: UNetSpec, *, tokens: int, dtype: str) -> NetworkIO:
    """sample, timestep, context -> noise (whatever the checkpoint predicts). tokens: `TextSpec.positions`."""
    return NetworkIO(
        inputs=(
            Port(name="sample", shape=("M", spec.in_channels, "H", "W"), dtype=dtype),
            Port(name="timestep", shape=("M",), dtype="float32"),
            Port(name="context", shape=("M", tokens, spec.context_dim), dtype=dtype),
        ),
        outputs=(Port(name="noise", shape=("M", spec.out_channels, "H", "W"), dtype=dtype),),
        ranges={"M": ROWS, "H": CELLS, "W": CELLS},
        multiples={"H": spec.size_multiple, "W": spec.size_multiple},
    )


def vae_encoder_io(spec: VAESpec, *, dtype: str) -> NetworkIO:
    """pixels in [-1,1] -> latents, scaled for the UNet."""
    return NetworkIO(
        inputs=(_pixels(spec, spec.in_channels, dtype),),
        outputs=(_latents(spec, dtype),),
        ranges={"N": IMAGES, "H": CELLS, "W": CELLS},
        multiples={},
    )


def vae_decoder_io(spec: VAESpec, *, dtype: str) -> NetworkIO:
    """latents, scaled as the UNet's -> pixels, about [-1,1]."""
    return NetworkIO(
        inputs=(_latents(spec, dtype),),
        outputs=(_pixels(spec, spec.out_channels, dtype),),
        ranges={"N": IMAGES, "H": CELLS, "W": CELLS},
        multiples={},
    )


def text_encoder_io(spec: TextSpec, *, dtype: str) -> NetworkIO:
    """tokens -> context."""
    return NetworkIO(
        inputs=(Port(name="tokens", shape=("N", spec.positions), dtype="int64"),),
        outputs=(Port(name="context", shape=("N", spec.positions, spec.width), dtype=dtype),),
        ranges={"N": IMAGES},
        multiples={},
    )


def _pixels(spec: VAESpec, channels: int, dtype: str) -> Port:
    return Port(name="pixels", shape=("N", channels, f"{spec.factor}*H", f"{spec.factor}*W"), dtype=dtype)


def _latents(spec: VAESpec, dtype: str) -> Port:
    return Port(name="latents", shape=("N", spec.latent_channels, "H", "W"), dtype=dtype)


def _resolve(dim: str, sizes: Mapping[str, int]) -> int:
    factor, _, symbol = dim.rpartition("*")
    return int(factor or 1) * sizes[symbol]
