"""Noise variance per training timestep and the signal power left, in float32 as diffusers stores them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def cosine_betas(count: int) -> F32:
    """The schedule `squaredcos_cap_v2`, float32 [count].

    [Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 17], at most 0.999 each.
    """

    def signal(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1.0 - signal((i + 1) / count) / signal(i / count), 0.999) for i in range(count)]
    return np.array(betas, dtype=np.float32)


def linspace_float32(start: float, end: float, count: int) -> F32:
    """`torch.linspace` in float32 to the bit: from both ends to the middle, one rounding per element."""
    if count == 1:
        return np.array([start], dtype=np.float32)
    first, last = np.float32(start), np.float32(end)
    step = float((last - first) / np.float32(count - 1))
    index = np.arange(count)
    rising = float(first) + step * index
    falling = float(last) - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def alphas_cumprod(betas: F32, *, zero_snr: bool) -> F32:
    """Signal power per training timestep, float32 [T].

    [Ho et al. 2020, arXiv:2006.11239, Eq. 4]; products in float64, stored in float32, as in torch.
    """
    one = np.float32(1.0)
    if zero_snr:
        betas = _rescale_to_zero_snr(betas)
    return np.cumprod((one - betas).astype(np.float64)).astype(np.float32)


def _rescale_to_zero_snr(betas: F32) -> F32:
    """Shifts and scales the signal so that none is left at the last timestep.

    [Lin et al. 2023, arXiv:2305.08891, Alg. 1] Square roots are rounded correctly here; torch's are one ulp
    off on some processors (measured: AMD EPYC, torch 2.13). There diffusers' tables differ from these by that
    ulp, which the differences near the last timestep enlarge to as much as 3e-5 of a value.
    """
    one = np.float32(1.0)
    signal = np.sqrt(alphas_cumprod(betas, zero_snr=False))
    first, last = signal[0], signal[-1]
    signal = (signal - last) * (first / (first - last))
    power = signal**2
    return one - np.concatenate([power[:1], power[1:] / power[:-1]])
