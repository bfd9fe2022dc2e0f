"""The Runtime seam: what a runtime promises to the loop above it. NumPy and plain Python only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ritocco.pixels import Kept, Mask, Pixels
from ritocco.steps import StepTable

Floats: TypeAlias = npt.NDArray[np.float32]
Tokens: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """What a runtime is and what it takes.

    device, dtype: as torch writes them (`cuda:0`, `bfloat16`). lane_timesteps: whether the rows of one UNet
    call may have different timesteps. size_multiple: latent height and width are multiples of it (cells).
    heights, widths: least and most cells; None where any size runs. areas: heights and widths that go
    together, where not all do. whole_timesteps: fractions are cut off.
    """

    device: str
    dtype: str
    lane_timesteps: bool
    size_multiple: int
    heights: tuple[int, int] | None = None
    widths: tuple[int, int] | None = None
    areas: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = ()
    whole_timesteps: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSize:
    """Height and width of a latent, in cells of 8 pixels."""

    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lane:
    """One picture on its way: what a Batch needs to move it along its table.

    table: the steps. seed: of the noise that its rows add. guidance: 1 skips the unconditional half.
    latents: float32 [4,h,w], in the scheduler's space. history: float32 [3,4,h,w], newest first; None at the
    start. context: float32 [77,D] of the prompt. unconditional: the same of the negative prompt, or None at
    guidance 1. condition: float32 [5,h,w], the mask, then the masked-image latents.
    Lanes that hold the same table, context or condition object share what is computed from it.
    """

    table: StepTable
    seed: int
    guidance: float
    latents: Floats
    context: Floats
    unconditional: Floats | None
    condition: Floats
    history: Floats | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LaneState:
    """Where a lane stands between two steps.

    latents: float32 [4,h,w]. history: float32 [3,4,h,w]. broken_row: the first table row after which the
    latents were not finite, or None.
    """

    latents: Floats
    history: Floats
    broken_row: int | None


class Batch(Protocol):
    """Up to `capacity` lanes of one size, on one runtime."""

    def join(self, slot: int, lane: Lane) -> None:
        """Put a lane into a free slot; whatever does not change from step to step is computed here."""

    def step(self, rows: Mapping[int, int]) -> None:
        """Move each named slot's lane by the given row of its table; the others stay where they are."""

    def peek(self, slot: int) -> LaneState:
        """Where a lane stands, as a copy; it stays, and nothing about it changes."""

    def leave(self, slot: int) -> LaneState:
        """Take a lane out; it may join any Batch of the same size again."""


class Runtime(Protocol):
    """All networks of one checkpoint on one runtime. Host arrays are NumPy."""

    traits: Traits

    def encode_text(self, tokens: Tokens) -> Floats:
        """int64 [N,77] -> float32 [N,77,D]."""

    def encode_image(self, pixels: Floats) -> Floats:
        """float32 [N,3,H,W] in [-1,1] -> float32 [N,4,H/8,W/8]: the posterior's mean, scaled for the UNet."""

    def encode_pixels(self, pixels: Pixels, mask: Mask | None) -> Floats:
        """A picture uint8 [H,W,3], mid grey where the mask (bool [H,W]) is true -> float32 [1,4,H/8,W/8]."""

    def decode(self, latents: Floats) -> Floats:
        """float32 [N,4,h,w] -> float32 [N,3,8h,8w], about [-1,1]."""

    def decode_pixels(self, latents: Floats, kept: Kept | None) -> Pixels:
        """float32 [N,4,h,w] -> uint8 [N,8h,8w,3], with the kept pixels in their place.

        Raises NonFiniteError, with step -1, where the decoder gives NaN or infinity.
        """

    def open(self, size: LatentSize, capacity: int) -> Batch:
        """A Batch for lanes of one size."""
