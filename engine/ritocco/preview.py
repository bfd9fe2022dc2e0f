"""What a request looks like between two steps: small pictures of its latents, without a decoder.

A linear map of the four channels to colours is fitted to the request itself: the latents of its masked image
are known, and so are the colours of the 8 x 8 pixels behind each of their cells. That holds for any network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ritocco.backends.runtime import Floats, Lane, LaneState
from ritocco.images import Inputs
from ritocco.noise import normal
from ritocco.pixels import LATENT_FACTOR, Pixels, from_model, masked_to_model

_RIDGE = 1e-3  # of the latents' own power, so that a picture without detail fits too


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Preview:
    """taken: steps. lanes: as they began or rejoined. states: where they stand. inputs: of the request."""

    taken: int
    lanes: Sequence[Lane]
    states: Sequence[LaneState]
    inputs: Inputs

    def pictures(self) -> Pixels:
        """uint8 [N,h,w,3] of N outputs, a pixel for each latent cell. A lane that is broken is mid grey."""
        known = self.lanes[0].condition[1:]
        colors = fitted(known, cell_means(masked_to_model(self.inputs.pixels, self.inputs.mask)[0]))
        clean = np.stack([believed(lane, state, self.taken) for lane, state in self._pairs()])
        with np.errstate(invalid="ignore", over="ignore"):
            made = np.einsum("kc,nkhw->nchw", colors[:-1], clean) + colors[-1][None, :, None, None]
        return from_model(np.nan_to_num(made, nan=0.0, posinf=0.0, neginf=0.0))

    def _pairs(self) -> Sequence[tuple[Lane, LaneState]]:
        return list(zip(self.lanes, self.states, strict=True))


def believed(lane: Lane, state: LaneState, taken: int) -> Floats:
    """The clean latents [4,h,w] that the last output speaks of, after `taken` steps.

    What the lane remembers of it (m = p x + q e) and where it stands give the output e and the latents x that
    it was for, and so its picture (x0 = u x + v e). A step that adds noise is taken back; otherwise the next
    row stands for the last, which is the same for methods of first order and those that remember x0.
    """
    x, m = state.latents, state.history[0]
    if taken >= len(lane.table):
        return x
    row = lane.table.row(taken - 1)
    with np.errstate(invalid="ignore", over="ignore"):
        if row.c:
            noise = normal(lane.seed, taken, x.shape)
            x = (x - np.float32(row.b[0]) * m - np.float32(row.c) * noise) / np.float32(row.a)
        else:
            row = lane.table.row(taken)
        e = (m - np.float32(row.p) * x) / np.float32(row.q)
        made: Floats = np.float32(row.u) * x + np.float32(row.v) * e
    return made


def cell_means(pixels: Floats) -> Floats:
    """float32 [3,8h,8w] -> [3,h,w]."""
    channels, height, width = pixels.shape
    f = LATENT_FACTOR
    cells = pixels.reshape(channels, height // f, f, width // f, f)
    made: Floats = cells.mean(axis=(2, 4), dtype=np.float32)
    return made


def fitted(latents: Floats, colors: Floats) -> Floats:
    """The map from latents [4,h,w] to colours [3,h,w]: float32 [5,3], the last row added. Least squares, held
    back a little where the latents do not tell.
    """
    x = latents.reshape(len(latents), -1).T.astype(np.float64)
    y = colors.reshape(len(colors), -1).T.astype(np.float64)
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    dx = x - x_mean
    power = dx.T @ dx
    held = power + np.eye(len(power)) * (_RIDGE * np.trace(power) / len(power) + 1e-9)
    slope = np.linalg.solve(held, dx.T @ (y - y_mean))
    return np.concatenate([slope, (y_mean - x_mean @ slope)[None]]).astype(np.float32)
