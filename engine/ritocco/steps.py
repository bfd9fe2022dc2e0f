"""The table that a schedule is, and the one step of all schedulers: a linear recurrence, its numbers as data.

For step i, with the network's output e (after guidance):

    model input   = in_scale_i * x                    (the 5 condition channels join afterwards, unscaled)
    m_0           = p_i * x + q_i * e                 (what this method remembers)
    x'            = a_i * x + sum_{k=0..3} b_{i,k} * m_{-k} + c_i * z,    z ~ N(0, 1)
    history       = (m_0, m_-1, m_-2) where push_i, else unchanged
    x0 (preview)  = u_i * x + v_i * e

x is the latent in the scheduler's own space: signal and noise powers add up to 1 for DDIM, PNDM and
DPMSolverMultistep; noise of standard deviation sigma is added to the signal for the Eulers and KLMS.
Remembered is the raw output (PNDM), x0 (DPMSolverMultistep, and DDIM at zero terminal SNR), or the noise (the
others).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = Any  # whatever has + and *: a float, a NumPy array, a torch tensor
History: TypeAlias = tuple[Array, Array, Array]
F64 = npt.NDArray[np.float64]

NO_HISTORY: History = (0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The numbers of one step, or of one step of each of N lanes.

    Every field is a float, or an array or tensor that broadcasts with the latent ([N,1,1,1]: a row per lane).
    push: 1 where the history moves on, 0 where it stays (PNDM's second evaluation).
    start_signal, start_noise: a run that starts here begins with start_signal * x0 + start_noise * noise.
    """

    timestep: Array
    in_scale: Array
    p: Array
    q: Array
    a: Array
    b: tuple[Array, Array, Array, Array]
    c: Array = 0.0
    push: Array = 1.0
    u: Array
    v: Array
    start_signal: Array
    start_noise: Array

    def map(self, convert: Callable[[Array], Array]) -> Row:
        """This row with every number converted, e.g. `stack(rows).map(torch.from_numpy)`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        b0, b1, b2, b3 = values.pop("b")
        b = (convert(b0), convert(b1), convert(b2), convert(b3))
        return Row(b=b, **{name: convert(value) for name, value in values.items()})


def stack(rows: Sequence[Row], *, dtype: npt.DTypeLike = np.float32) -> Row:
    """One row per lane: every number becomes an array [N,1,1,1] of `dtype`. Tables may be mixed."""

    def lanes(values: list[float]) -> npt.NDArray[Any]:
        return np.array(values, dtype=dtype).reshape(-1, 1, 1, 1)

    b0, b1, b2, b3 = (lanes([row.b[k] for row in rows]) for k in range(4))
    single = {f.name: lanes([getattr(row, f.name) for row in rows]) for f in fields(Row) if f.name != "b"}
    return Row(b=(b0, b1, b2, b3), **single)


def advance(row: Row, x: Array, e: Array, z: Array, history: Sequence[Array]) -> tuple[Array, History]:
    """The one step of every scheduler.

        m_0     = p x + q e
        x'      = a x + b_0 m_0 + b_1 m_-1 + b_2 m_-2 + b_3 m_-3 + c z
        history = push (m_0, m_-1, m_-2) + (1 - push) (m_-1, m_-2, m_-3)

    row: floats, or arrays [N,1,1,1] so that each lane takes its own row. x: latents [N,4,h,w]. e: the
    network's output after guidance, same shape. z: standard normal noise, same shape; 0.0 will do where c is
    0. history: m_-1, m_-2, m_-3, same shape each, or NO_HISTORY at the start. Returns the next latents and
    the next history, in the dtype that the operands promote to. Pure arithmetic, alike for NumPy arrays and
    torch tensors; nothing is changed in place.
    """
    m1, m2, m3 = history
    b0, b1, b2, b3 = row.b
    m0 = row.p * x + row.q * e
    x_next = row.a * x + b0 * m0 + b1 * m1 + b2 * m2 + b3 * m3 + row.c * z
    stay = 1.0 - row.push
    return x_next, (row.push * m0 + stay * m1, row.push * m1 + stay * m2, row.push * m2 + stay * m3)


def preview(row: Row, x: Array, e: Array) -> Array:
    """The picture this step believes in: x0 = u x + v e, latents [N,4,h,w]. x: as it was before the step."""
    return row.u * x + row.v * e


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepTable:
    """All steps of one run: N rows of host float64 numbers, noisiest first; arrays are read-only.

    timesteps [N]: what the network is told (fractional for some). in_scale, p, q, a, c, u, v [N], b [N,4],
    push [N] (bool): the coefficients of `advance` and `preview`. start_signal, start_noise [N]: scales of x0
    and of unit noise in the latent with which a run starts at that row; row 0 of a whole run starts from
    noise alone. Rows after the first count on the history of those before them; a table from
    `build(strength=...)` does not.
    notes: lines for the log, about settings that diffusers accepts and that one would not want.
    """

    scheduler: str
    timesteps: F64
    in_scale: F64
    p: F64
    q: F64
    a: F64
    b: F64
    c: F64
    push: npt.NDArray[np.bool_]
    u: F64
    v: F64
    start_signal: F64
    start_noise: F64
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            array = np.array(getattr(self, name), dtype=bool if name == "push" else np.float64)
            shape = (len(self.timesteps), 4) if name == "b" else (len(self.timesteps),)
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}; a table of {shape[0]} rows takes {shape}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def noisy(self) -> bool:
        """Whether any row adds noise."""
        return bool(self.c.any())

    def row(self, index: int) -> Row:
        """Row `index` as floats. Raises IndexError past the end."""
        b0, b1, b2, b3 = (float(weight) for weight in self.b[index])
        single = {
            f.name: float(getattr(self, f.name)[index])
            for f in fields(Row)
            if f.name not in ("b", "timestep")
        }
        return Row(timestep=float(self.timesteps[index]), b=(b0, b1, b2, b3), **single)

    def take(self, rows: slice | Sequence[int]) -> StepTable:
        """The table of some of the rows, in that order."""
        picked = rows if isinstance(rows, slice) else np.asarray(rows, dtype=np.intp)
        return replace(self, **{name: getattr(self, name)[picked] for name in _ARRAYS})

    @classmethod
    def of(cls, rows: Sequence[Row], *, scheduler: str, notes: tuple[str, ...] = ()) -> StepTable:
        """The table of these rows of floats."""
        columns: dict[str, Any] = {
            name: np.array([getattr(row, "timestep" if name == "timesteps" else name) for row in rows])
            for name in _ARRAYS
        }
        return cls(scheduler=scheduler, notes=notes, **columns)

    def is_finite(self) -> bool:
        """Whether every number of the table is."""
        return all(bool(np.isfinite(getattr(self, name)).all()) for name in _ARRAYS)


_ARRAYS = (
    "timesteps",
    "in_scale",
    "p",
    "q",
    "a",
    "b",
    "c",
    "push",
    "u",
    "v",
    "start_signal",
    "start_noise",
)
