"""The tables of the six schedulers, from a checkpoint's `scheduler_config.json`.

`build` is the way in. Each builder writes one method as rows of the recurrence in `steps`, with
diffusers 0.42's behaviour: which levels a step leads between, how a run warms up and how it ends. Numbers are
float64 from diffusers' float32 tables of signal power and sigma on.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ritocco.errors import RequestError
from ritocco.scheduler_config import TRAITS, Settings, settings
from ritocco.sigmas import sigma_levels, whole_timesteps
from ritocco.steps import NO_HISTORY, History, Row, StepTable, advance, preview, stack

__all__ = ["NO_HISTORY", "SCHEDULERS", "History", "Row", "StepTable", "advance", "build", "preview", "stack"]

SCHEDULERS: tuple[str, ...] = tuple(TRAITS)

F64 = npt.NDArray[np.float64]
# The rows from `start` on, and the scale of the noise that a whole run starts from.
Draft: TypeAlias = tuple[list[Row], float]

# Adams-Bashforth weights, newest first, by count. [Liu et al. 2022, arXiv:2202.09778, Eq. 12]
_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
_GAUSS_NODES = (-1 / math.sqrt(3), 1 / math.sqrt(3))  # two of them integrate a cubic exactly


def build(scheduler: str, steps: int, config: Mapping[str, Any], *, strength: float = 1.0) -> StepTable:
    """The table of one run.

    scheduler: one of SCHEDULERS. steps: 1 or more, at most the config's `num_train_timesteps`. config: the
    dictionary of a checkpoint's `scheduler_config.json`, read as diffusers' `from_config` of that scheduler's
    class would.
    strength: over 0, up to 1; below 1 the run starts later, from x0 with the noise of that row, and takes
    int(steps * strength) steps. What diffusers' inpainting pipeline does there is kept: PNDM begins with a
    repeated timestep again, DPMSolverMultistep with a first-order step, and KLMS with the weights of a run
    that has a history.

    Returns `steps` rows; PNDM has one more from 2 steps on, and trailing spacing may have one more by
    rounding.

    Raises RequestError where scheduler, steps or strength break a rule, or where these steps give no finite
    numbers under this config; CheckpointError where the config holds what is unsupported.
    """
    with np.errstate(all="ignore"):  # what is not finite is refused below, by name
        s = settings(scheduler, config)
        steps = _steps(steps, s)
        start = _start(steps, strength)
        rows, start_noise = _BUILDERS[scheduler](s, steps, start)
    if not rows:
        raise RequestError(f"strength is {strength}; no step is left of {steps}", field="strength")
    if strength == 1.0:
        rows[0] = replace(rows[0], start_signal=0.0, start_noise=start_noise)
    table = StepTable.of(rows, scheduler=scheduler, notes=(*s.notes, *_notes(s, steps, rows)))
    if not table.is_finite():
        raise RequestError(
            f"scheduler is {scheduler!r}, num_inference_steps is {steps}; under this checkpoint's "
            f"prediction_type {s.prediction!r} and timestep_spacing {s.spacing!r} the steps are not finite "
            "numbers: take another scheduler, or fewer steps",
            field="input.scheduler",
        )
    return table


def _steps(steps: int, s: Settings) -> int:
    try:
        count = operator.index(steps)
    except TypeError:
        count = 0
    if isinstance(steps, bool) or not 1 <= count <= s.train_steps:
        raise RequestError(
            f"num_inference_steps is {steps!r}; it is a whole number from 1 to the checkpoint's "
            f"num_train_timesteps, {s.train_steps}",
            field="input.num_inference_steps",
        )
    return count


def _start(steps: int, strength: float) -> int:
    if isinstance(strength, bool) or not isinstance(strength, numbers.Real) or not 0.0 <= strength <= 1.0:
        raise RequestError(f"strength is {strength!r}; it is a number over 0, up to 1", field="strength")
    taken = min(int(steps * strength), steps)
    if taken < 1:
        raise RequestError(
            f"strength is {strength}; of {steps} steps it leaves none, 1/{steps} or more leaves some",
            field="strength",
        )
    return steps - taken


def _notes(s: Settings, steps: int, rows: Sequence[Row]) -> tuple[str, ...]:
    if s.continuous:
        return ()
    first, last = rows[0].timestep, rows[-1].timestep
    if last < 0:
        return (
            f"{s.scheduler} with {steps} steps: trailing spacing rounds to one step too many, at timestep "
            f"{last:g}; kept as diffusers has it, but one step more or less looks better",
        )
    if steps == 1 and first <= max(s.steps_offset, 1):
        return (
            f"{s.scheduler} with 1 step sits at timestep {first:g} under {s.spacing} spacing, where the "
            "network expects next to no noise; kept as diffusers has it, but take more steps",
        )
    return ()


def _outputs(prediction: str, alpha: float, sigma: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """x0 and noise as weights of (x, e), for x = alpha x0 + sigma noise with alpha^2 + sigma^2 = 1.

    [Salimans and Ho 2022, arXiv:2202.00512, App. D]
    """
    if prediction == "epsilon":
        return (1.0 / alpha, -sigma / alpha), (0.0, 1.0)
    if prediction == "v_prediction":
        return (alpha, -sigma), (sigma, alpha)
    return (0.0, 1.0), (1.0 / sigma, -alpha / sigma)


def _alpha_bar(s: Settings, timestep: int) -> np.float64:
    """Signal power at a training timestep; -1 is the last one, as in diffusers (see `_notes`)."""
    if timestep >= s.train_steps:
        raise RequestError(
            f"num_inference_steps is too many for this checkpoint: its spacing reaches timestep {timestep}, "
            f"its training ended at {s.train_steps - 1}",
            field="input.num_inference_steps",
        )
    return np.float64(s.alphas_cumprod[timestep])


def _alpha_bar_after(s: Settings, timestep: int) -> np.float64:
    if timestep >= 0:
        return _alpha_bar(s, timestep)
    return np.float64(1.0 if s.set_alpha_to_one else s.alphas_cumprod[0])


def _power_row(
    s: Settings,
    timestep: float,
    alpha: float,
    sigma: float,
    *,
    memory: tuple[float, float],
    a: float,
    b: tuple[float, ...],
    push: float = 1.0,
) -> Row:
    """A row in the space where the powers of signal and noise, alpha^2 and sigma^2, add up to 1."""
    (u, v), _ = _outputs(s.prediction, alpha, sigma)
    b0, b1, b2, b3 = (*b, 0.0, 0.0, 0.0)[:4]
    return Row(
        timestep=timestep,
        in_scale=1.0,
        p=memory[0],
        q=memory[1],
        a=a,
        b=(b0, b1, b2, b3),
        push=push,
        u=u,
        v=v,
        start_signal=alpha,
        start_noise=sigma,
    )


def _ddim(s: Settings, steps: int, start: int) -> Draft:
    """[Song et al. 2021, arXiv:2010.02502, Eq. 12] with sigma_t = 0."""
    rows = []
    for t in whole_timesteps(s, steps)[start:].tolist():
        now, after = _alpha_bar(s, t), _alpha_bar_after(s, t - s.train_steps // steps)
        alpha, sigma = np.sqrt(now), np.sqrt(1.0 - now)
        x0, noise = _outputs(s.prediction, alpha, sigma)
        if s.zero_snr:  # alpha may be 0: the step has to be written in x0
            memory, a = x0, np.sqrt(1.0 - after) / sigma
            b0 = np.sqrt(after) - a * alpha
        else:
            memory, a = noise, np.sqrt(after) / alpha
            b0 = np.sqrt(1.0 - after) - a * sigma
        rows.append(_power_row(s, t, alpha, sigma, memory=memory, a=a, b=(b0,)))
    return rows, 1.0


def _pndm(s: Settings, steps: int, start: int) -> Draft:
    """Pseudo linear multistep. [Liu et al. 2022, arXiv:2202.09778, Eq. 9 and 12]

    The second row repeats the first step with the mean of the outputs at both of its ends.
    """
    told = whole_timesteps(s, steps)
    told = np.concatenate([told[:2], told[1:]])[start:]
    stride = s.train_steps // steps
    rows: list[Row] = []
    for i, t in enumerate(told.tolist()):
        b: tuple[float, ...]
        if i == 1:
            first = rows[0]
            a, b0 = _transfer(s, t + stride, t)
            a = a / first.a  # from where the first row led, by way of where it started
            b = (b0 / 2, b0 / 2 - a * first.b[0])
        else:
            a, b0 = _transfer(s, t, t - stride)
            b = tuple(b0 * weight for weight in _ADAMS_BASHFORTH[min(max(i, 1), 4)])
        now = _alpha_bar(s, t)
        push = 0.0 if i == 1 else 1.0
        rows.append(
            _power_row(s, t, np.sqrt(now), np.sqrt(1.0 - now), memory=(0.0, 1.0), a=a, b=b, push=push)
        )
    return rows, 1.0


def _transfer(s: Settings, timestep: int, after: int) -> tuple[np.float64, np.float64]:
    """Weights of x and of the (averaged) output in a step between two timesteps. [arXiv:2202.09778, Eq. 9]"""
    now, then = _alpha_bar(s, timestep), _alpha_bar_after(s, after)
    alpha, sigma = np.sqrt(now), np.sqrt(1.0 - now)
    _, (p, q) = _outputs(s.prediction, alpha, sigma)
    toward = (then - now) / (now * np.sqrt(1.0 - then) + alpha * sigma * np.sqrt(then))
    return np.sqrt(then) / alpha - toward * p, -toward * q


def _sigma_row(
    s: Settings, timestep: float, sigma: float, *, a: float, b: tuple[float, ...], c: float = 0.0
) -> Row:
    """A row in the space where noise of standard deviation sigma is added to the signal."""
    scale = 1.0 / np.sqrt(sigma**2 + 1.0)
    (u, v), (p, q) = _outputs(s.prediction, scale, sigma * scale)
    b0, b1, b2, b3 = (*b, 0.0, 0.0, 0.0)[:4]
    return Row(
        timestep=timestep,
        in_scale=scale,
        p=p * scale,
        q=q,
        a=a,
        b=(b0, b1, b2, b3),
        c=c,
        u=u * scale,
        v=v,
        start_signal=1.0,
        start_noise=sigma,
    )


def _first_sigma(s: Settings, sigmas: F64) -> float:
    highest = float(sigmas.max())
    return math.sqrt(highest**2 + 1.0) if s.spacing == "leading" else highest


def _euler(s: Settings, steps: int, start: int) -> Draft:
    """[Karras et al. 2022, arXiv:2206.00364, Alg. 2] without churn or correction."""
    told, sigmas = sigma_levels(s, steps)
    rows = [
        _sigma_row(s, told[i], sigmas[i], a=1.0, b=(sigmas[i + 1] - sigmas[i],))
        for i in range(start, len(told))
    ]
    return rows, _first_sigma(s, sigmas)


def _euler_ancestral(s: Settings, steps: int, start: int) -> Draft:
    """A step down below the wanted level, then up with fresh noise. [Song et al. 2021, arXiv:2011.13456]"""
    told, sigmas = sigma_levels(s, steps)
    rows = []
    for i in range(start, len(told)):
        sigma, after = sigmas[i], sigmas[i + 1]
        up = after * np.sqrt(sigma**2 - after**2) / sigma
        down = after**2 / sigma  # sqrt(after^2 - up^2), without the cancellation
        rows.append(_sigma_row(s, told[i], sigma, a=1.0, b=(down - sigma,), c=up))
    return rows, _first_sigma(s, sigmas)


def _lms(s: Settings, steps: int, start: int) -> Draft:
    """Adams-Bashforth over uneven sigmas: the polynomial through the last four derivatives, integrated."""
    told, sigmas = sigma_levels(s, steps)
    rows = [
        _sigma_row(s, told[i], sigmas[i], a=1.0, b=_lagrange_integrals(sigmas[max(i - 3, 0) : i + 2][::-1]))
        for i in range(start, len(told))
    ]
    return rows, _first_sigma(s, sigmas)


def _lagrange_integrals(sigmas: F64) -> tuple[float, ...]:
    """Integrals from sigmas[1] to sigmas[0] of the Lagrange polynomials of sigmas[1:], at most 4 points."""
    end, points = sigmas[0], sigmas[1:]
    middle, half = (end + points[0]) / 2, (end - points[0]) / 2
    weights = []
    for k, point in enumerate(points):
        others = np.delete(points, k)
        values = [np.prod((middle + half * node - others) / (point - others)) for node in _GAUSS_NODES]
        weights.append(half * sum(values))
    return tuple(weights)


def _dpm_solver(s: Settings, steps: int, start: int) -> Draft:
    """DPM-Solver++ (2M) in x0, midpoint or Heun. [Lu et al. 2022, arXiv:2211.01095, Alg. 2]"""
    told, sigmas = sigma_levels(s, steps)
    count = len(told)
    alphas = 1.0 / np.sqrt(sigmas**2 + 1.0)
    noises = sigmas * alphas
    log_snr = -np.log(sigmas)
    rows = []
    for i in range(start, count):
        alpha, sigma = alphas[i], noises[i]
        h = log_snr[i + 1] - log_snr[i]
        shrink = np.expm1(-h)
        last = i == count - 1
        lower = last and (s.euler_at_final or s.ends_at_zero or (s.lower_order_final and count < 15))
        b0, b1 = -alphas[i + 1] * shrink, 0.0
        if s.solver_order == 2 and i > start and not lower:
            heun = s.solver_type == "heun"
            slope = alphas[i + 1] * (shrink / h + 1.0) if heun else b0 / 2
            per_step = h / (log_snr[i] - log_snr[i - 1])
            b0, b1 = b0 + slope * per_step, -slope * per_step
        x0, _ = _outputs(s.prediction, alpha, sigma)
        rows.append(_power_row(s, told[i], alpha, sigma, memory=x0, a=noises[i + 1] / sigma, b=(b0, b1)))
    return rows, 1.0


_BUILDERS: Mapping[str, Callable[[Settings, int, int], Draft]] = {
    "DDIM": _ddim,
    "K_EULER": _euler,
    "DPMSolverMultistep": _dpm_solver,
    "K_EULER_ANCESTRAL": _euler_ancestral,
    "PNDM": _pndm,
    "KLMS": _lms,
}
