"""Timesteps and noise levels of one run, from a checkpoint's settings.

Everything up to the table of sigmas repeats diffusers' float32 arithmetic, so that nothing which is rounded
to a whole timestep falls to the other side.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ritocco.betas import linspace_float32
from ritocco.scheduler_config import Settings

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_KARRAS_RHO = 7.0  # [Karras et al. 2022, arXiv:2206.00364, Sec. D.1]


def whole_timesteps(s: Settings, steps: int) -> npt.NDArray[np.int64]:
    """Timesteps of DDIM and (before its repeated second one) PNDM, int64, noisiest first."""
    total = s.train_steps
    if s.spacing == "linspace":
        return np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
    if s.spacing == "leading":
        return np.arange(steps)[::-1] * (total // steps) + s.steps_offset
    return np.round(np.arange(total, 0, -total / steps)).astype(np.int64) - 1


def _fractional_timesteps(s: Settings, steps: int) -> F32:
    if s.spacing == "linspace":
        return np.linspace(0, s.train_steps - 1, steps, dtype=np.float32)[::-1].copy()
    return whole_timesteps(s, steps).astype(np.float32)


def _solver_timesteps(s: Settings, steps: int) -> npt.NDArray[np.int64]:
    """DPM-Solver's: one more point than steps, the last of which is left out."""
    alpha, sigma = np.sqrt(s.alphas_cumprod), np.sqrt(np.float32(1.0) - s.alphas_cumprod)
    log_snr = np.log(alpha) - np.log(sigma)
    total = s.train_steps - int(np.searchsorted(log_snr[::-1], np.float32(s.lambda_min)))
    if s.spacing == "linspace":
        return np.linspace(0, total - 1, steps + 1).round()[::-1][:-1].astype(np.int64)
    if s.spacing == "leading":
        return np.arange(steps + 1)[::-1][:-1] * (total // (steps + 1)) + s.steps_offset
    return np.arange(total, 0, -s.train_steps / steps).round().astype(np.int64) - 1


def sigma_levels(s: Settings, steps: int) -> tuple[F64, F64]:
    """Timesteps [N] and sigmas [N + 1 or more] of the sigma-space classes, noisiest first, ending as the
    config says.

    N is `steps`, but for trailing spacing, where rounding may add one, and a clipped log-SNR, which takes
    some away.
    """
    solver = s.scheduler == "DPMSolverMultistep"
    timesteps = (_solver_timesteps if solver else _fractional_timesteps)(s, steps)
    known = s.train_sigmas
    levels: F64 | F32
    if s.interpolation == "log_linear":
        ends = np.log(known[[-1, 0]])
        levels = np.exp(linspace_float32(float(ends[0]), float(ends[1]), steps + 1))
    else:
        levels = np.interp(timesteps, np.arange(len(known)), known)
    told = timesteps.astype(np.float64)
    if s.remap != "none":
        # DPM-Solver spreads its steps over the whole training range, the others over their own timesteps'.
        levels = _remapped(s, known[::-1] if solver else levels, steps)
        told = _timesteps_of(levels, known)
        if solver:
            told = np.trunc(told.round() if s.remap == "karras" and not s.cosine else told)
    last = 0.0 if s.ends_at_zero else float(known[0])
    sigmas = np.append(levels, last).astype(np.float32)
    if s.continuous:
        told = np.log(sigmas[:-1]) * np.float32(0.25)
    return told.astype(np.float32).astype(np.float64), sigmas.astype(np.float64)


def _remapped(s: Settings, levels: F64 | F32, steps: int) -> F64:
    """`steps` sigmas from the first of `levels` to the last, evenly spaced in 7th roots or in logarithms."""
    # The one case in which diffusers ignores the config's ends.
    own_ends = s.scheduler == "KLMS" and s.remap == "karras"
    low = float(levels[-1]) if own_ends or s.sigma_min is None else s.sigma_min
    high = float(levels[0]) if own_ends or s.sigma_max is None else s.sigma_max
    if s.remap == "exponential":
        return np.asarray(np.exp(np.linspace(math.log(high), math.log(low), steps)))
    low_root, high_root = low ** (1.0 / _KARRAS_RHO), high ** (1.0 / _KARRAS_RHO)
    remapped: F64 = (high_root + np.linspace(0, 1, steps) * (low_root - high_root)) ** _KARRAS_RHO
    return remapped


def _timesteps_of(sigmas: F64, known: F32) -> F64:
    """Fractional timesteps whose log-sigma, linear between the training timesteps, is that of `sigmas`."""
    log_known = np.log(known)
    log_sigmas = np.log(np.maximum(sigmas, 1e-10))
    below = np.clip(np.searchsorted(log_known, log_sigmas, side="right") - 1, 0, len(known) - 2)
    low, high = log_known[below], log_known[below + 1]
    weight = np.clip((low - log_sigmas) / (low - high), 0.0, 1.0)
    timesteps: F64 = (1.0 - weight) * below + weight * (below + 1)
    return timesteps
