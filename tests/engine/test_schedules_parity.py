"""Our tables against diffusers' six schedulers: same network, noise and latents; the final samples compared.

diffusers' float32 tables of signal power and sigma are used as they are; what it computes from them is taken
in float64 ("exact"), because its float32 steps cost 1e-4 at zero terminal SNR, where x starts at 4096.
A second run leaves diffusers untouched ("stock") where its own rounding allows the comparison.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import random
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ritocco.errors import CheckpointError, RequestError
from ritocco.scheduler_config import settings
from ritocco.schedules import NO_HISTORY, SCHEDULERS, StepTable, advance, build
from ritocco_bench.asked import DIFFUSERS_CLASSES

F64 = npt.NDArray[np.float64]
DOWNCASTING = ("euler_discrete", "euler_ancestral_discrete", "dpmsolver_multistep")
STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SHAPE = (1, 4, 4, 4)
DATA_MEAN, DATA_STD = 0.4, 0.3


class Float64Torch(types.ModuleType):
    """`torch` for a scheduler module that would round its samples to float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def network(prediction: str, x: F64, timestep: float, alphas_cumprod: F64) -> F64:
    """A denoiser of bounded x0: the posterior mean of a Gaussian, through tanh. x: of unit total power."""
    power = np.interp(timestep, np.arange(len(alphas_cumprod)), alphas_cumprod)
    alpha, sigma = np.sqrt(power), np.sqrt(1.0 - power)
    mean = DATA_MEAN * np.cos(np.arange(x.size)).reshape(x.shape)
    gain = DATA_STD**2 * alpha / (DATA_STD**2 * power + sigma**2)
    x0: F64 = np.tanh(mean + gain * (x - alpha * mean))
    if prediction == "sample":
        return x0
    e: F64 = (x - alpha * x0) / sigma if prediction == "epsilon" else (alpha * x - x0) / sigma
    return e


def ours(table: StepTable, prediction: str, x0: F64, draws: F64, alphas_cumprod: F64) -> F64:
    x = x0 * table.start_signal[0] + draws[0] * table.start_noise[0]
    history = NO_HISTORY
    for i in range(len(table)):
        row = table.row(i)
        e = network(prediction, x * row.in_scale, row.timestep, alphas_cumprod)
        x, history = advance(row, x, e, draws[i + 1], history)
    return np.asarray(x)


@contextlib.contextmanager
def patched(draws: F64, position: list[int], *, exact: bool) -> Iterator[None]:
    def noise(shape: Any, *, dtype: torch.dtype, **_: Any) -> torch.Tensor:
        return torch.from_numpy(draws[position[0] + 1]).to(dtype)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in DOWNCASTING:
            module = importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
            patch.setattr(module, "randn_tensor", noise)
            if exact:
                patch.setattr(module, "torch", Float64Torch("torch"))
        yield


POWER = torch.Tensor.__pow__


def correct_sqrt(tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.asarray(np.sqrt(tensor.numpy())))


def correct_power(tensor: torch.Tensor, exponent: Any) -> torch.Tensor:
    return correct_sqrt(tensor) if exponent == 0.5 else POWER(tensor, exponent)


def reference(scheduler: str, config: dict[str, Any], steps: int) -> Any:
    """diffusers' scheduler, its square roots correctly rounded.

    torch's are an ulp off on some processors, which zero-terminal SNR enlarges: see `betas.py`.
    """
    diffusers: Any = importlib.import_module("diffusers")
    diffusers.logging.set_verbosity_error()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(torch, "sqrt", correct_sqrt)
        patch.setattr(torch.Tensor, "sqrt", correct_sqrt)
        patch.setattr(torch.Tensor, "__pow__", correct_power)
        warnings.simplefilter("ignore")
        made = getattr(diffusers, DIFFUSERS_CLASSES[scheduler]).from_config(config)
        made.set_timesteps(steps)
    return made


def theirs(
    made: Any, x0: F64, draws: F64, alphas_cumprod: F64, *, exact: bool, start: int | None = None
) -> F64:
    """diffusers' run as its inpainting pipeline makes it. start: None at full strength."""
    timesteps = made.timesteps[start or 0 :]
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(start or 0)
    if exact:
        for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
            if hasattr(made, name):
                setattr(made, name, getattr(made, name).double())
    position = [0]
    first = torch.from_numpy(draws[0])
    with patched(draws, position, exact=exact):
        if start is None:
            x = first * made.init_noise_sigma
        else:
            x = made.add_noise(torch.from_numpy(x0), first, timesteps[:1])
        prediction = made.config.prediction_type
        for i, timestep in enumerate(timesteps):
            position[0] = i
            seen = made.scale_model_input(x, timestep).numpy()
            e = torch.from_numpy(network(prediction, seen, float(timestep), alphas_cumprod))
            x = made.step(e, timestep, x, return_dict=False)[0]
    return np.asarray(x.numpy(), dtype=np.float64)


def fails(scheduler: str, config: dict[str, Any], steps: int, strength: float) -> bool:
    """Whether diffusers raises, or ends in numbers that are not finite."""
    draws = np.random.default_rng(0).standard_normal((steps + 3, *SHAPE))
    start = None if strength == 1.0 else steps - min(int(steps * strength), steps)
    if start == steps:
        return True
    try:
        made = reference(scheduler, config, steps)
        powers = made.alphas_cumprod.double().numpy()
        with np.errstate(all="ignore"):
            return not np.isfinite(theirs(made, draws[0], draws, powers, exact=True, start=start)).all()
    except (ValueError, IndexError, NotImplementedError):
        return True


def relative_error(
    scheduler: str,
    config: dict[str, Any],
    steps: int,
    *,
    exact: bool = True,
    strength: float = 1.0,
    seed: int = 0,
) -> float:
    """Of the final sample, in the 2-norm; infinite where shapes or timesteps of the two runs differ."""
    rng = np.random.default_rng(seed)
    draws, x0 = rng.standard_normal((steps + 3, *SHAPE)), rng.uniform(-0.8, 0.8, SHAPE)
    table = build(scheduler, steps, config, strength=strength)
    made = reference(scheduler, config, steps)
    start = None if strength == 1.0 else steps - min(int(steps * strength), steps)
    told = made.timesteps[start or 0 :].double().numpy()
    if len(told) != len(table) or not np.allclose(told, table.timesteps, rtol=0, atol=1e-3):
        return float("inf")
    alphas_cumprod = settings(scheduler, config).alphas_cumprod.astype(np.float64)
    prediction = config.get("prediction_type", "epsilon")
    expected = theirs(made, x0, draws, alphas_cumprod, exact=exact, start=start)
    got = ours(table, prediction, x0, draws, alphas_cumprod)
    if not np.isfinite(expected).all():
        return float("inf")
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def accepted(scheduler: str) -> Iterator[dict[str, Any]]:
    """Every combination of prediction type, spacing, remapped sigmas and zero SNR that one class takes."""
    predictions = ["epsilon", "v_prediction", "sample"]
    if scheduler in ("PNDM", "K_EULER_ANCESTRAL"):
        predictions.remove("sample")
    remaps = (
        ["none", "karras", "exponential"]
        if scheduler in ("K_EULER", "KLMS", "DPMSolverMultistep")
        else ["none"]
    )
    snr = [False] if scheduler in ("PNDM", "KLMS") else [False, True]
    for prediction, spacing, remap, zero in itertools.product(
        predictions, ("leading", "linspace", "trailing"), remaps, snr
    ):
        if scheduler == "DDIM" and zero and prediction == "epsilon":
            continue  # see test_ddim_at_zero_snr_with_epsilon
        yield STABLE_DIFFUSION | {
            "prediction_type": prediction,
            "timestep_spacing": spacing,
            "use_karras_sigmas": remap == "karras",
            "use_exponential_sigmas": remap == "exponential",
            "rescale_betas_zero_snr": zero,
        }


def worst(
    scheduler: str, steps: int, *, exact: bool = True, prediction: str = ""
) -> tuple[float, dict[str, Any]]:
    """The largest error of all accepted combinations (of one prediction type), and whose it is."""
    configs = [c for c in accepted(scheduler) if exact or not c["rescale_betas_zero_snr"]]
    configs = [c for c in configs if prediction in ("", c["prediction_type"])] or [STABLE_DIFFUSION]
    errors = [(relative_error(scheduler, c, steps, exact=exact), i) for i, c in enumerate(configs)]
    error, index = max(errors)
    return error, configs[index]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 25])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_accepted_combination_agrees(scheduler: str, steps: int) -> None:
    error, config = worst(scheduler, steps)
    assert error <= 3e-6, config


@pytest.mark.parametrize("steps", [3, 10])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_untouched_diffusers_agrees(scheduler: str, steps: int) -> None:
    error, config = worst(scheduler, steps, exact=False)
    assert error <= 3e-6, config


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("steps", "bound"), [(50, 3e-6), (500, 1e-5)])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_accepted_combination_agrees_over_many_steps(
    scheduler: str, steps: int, bound: float, prediction: str
) -> None:
    error, config = worst(scheduler, steps, prediction=prediction)
    assert error <= bound, config


@pytest.mark.parametrize(("steps", "bound"), [(50, 3e-6), (500, 1e-5)])
@pytest.mark.parametrize("scheduler", sorted(set(SCHEDULERS) - {"KLMS"}))
def test_stable_diffusions_own_config_agrees_over_many_steps(
    scheduler: str, steps: int, bound: float
) -> None:
    for prediction in ("epsilon", "v_prediction"):
        config = STABLE_DIFFUSION | {"prediction_type": prediction}
        assert relative_error(scheduler, config, steps) <= bound
        assert relative_error(scheduler, config, steps, exact=False) <= bound


def test_ddim_at_zero_snr_with_epsilon() -> None:
    config = STABLE_DIFFUSION | {"rescale_betas_zero_snr": True}
    assert relative_error("DDIM", config | {"timestep_spacing": "leading"}, 25) <= 3e-6
    trailing = config | {"timestep_spacing": "trailing"}
    made = reference("DDIM", trailing, 25)
    alphas_cumprod = settings("DDIM", trailing).alphas_cumprod.astype(np.float64)
    with np.errstate(all="ignore"):
        sample = theirs(made, np.zeros(SHAPE), np.ones((28, *SHAPE)), alphas_cumprod, exact=True)
    assert not np.isfinite(sample).all()
    with pytest.raises(RequestError, match="not finite"):
        build("DDIM", 25, trailing)


@pytest.mark.parametrize("strength", [0.99, 0.8, 0.5, 0.21, 0.1])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_strength_is_the_pipelines_later_start(scheduler: str, strength: float) -> None:
    for steps, prediction in itertools.product((10, 25), ("epsilon", "v_prediction")):
        config = STABLE_DIFFUSION | {"prediction_type": prediction}
        assert relative_error(scheduler, config, steps, strength=strength) <= 3e-6


OTHER_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("DDIM", {"set_alpha_to_one": True, "steps_offset": 0}),
    ("DDIM", {}),
    ("DDIM", {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "squaredcos_cap_v2"}),
    ("PNDM", {"set_alpha_to_one": True, "steps_offset": 0, "beta_schedule": "linear"}),
    ("PNDM", {"_class_name": "DDIMScheduler", "use_karras_sigmas": True, "rescale_betas_zero_snr": True}),
    ("K_EULER", {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}),
    (
        "K_EULER",
        {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
    ),
    ("K_EULER", {"interpolation_type": "log_linear"}),
    ("K_EULER", {"interpolation_type": "log_linear", "use_karras_sigmas": True, "steps_offset": 1}),
    ("K_EULER", {"sigma_min": 0.1, "sigma_max": 9.0, "use_exponential_sigmas": True}),
    ("K_EULER", {"prediction_type": "original_sample"}),
    ("K_EULER", {"clip_sample": True, "thresholding": True, "skip_prk_steps": False}),
    ("K_EULER_ANCESTRAL", {"num_train_timesteps": 100, "beta_end": 0.1, "steps_offset": 1}),
    ("KLMS", {"sigma_min": 0.1, "sigma_max": 9.0, "use_exponential_sigmas": True}),
    ("KLMS", {"sigma_min": 0.1, "sigma_max": 9.0, "use_karras_sigmas": True}),
    ("KLMS", {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400}),
    ("DPMSolverMultistep", {"solver_type": "heun", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistep", {"solver_order": 1, "euler_at_final": True}),
    ("DPMSolverMultistep", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistep", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    (
        "DPMSolverMultistep",
        {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"},
    ),
    ("DPMSolverMultistep", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    ("DPMSolverMultistep", {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}),
    ("DPMSolverMultistep", {"sigma_min": 0.1, "sigma_max": 9.0, "use_karras_sigmas": True}),
    ("DPMSolverMultistep", {"use_exponential_sigmas": True, "use_flow_sigmas": False, "flow_shift": 3.0}),
    ("DPMSolverMultistep", {"trained_betas": list(np.linspace(0.001, 0.02, 50)), "num_train_timesteps": 50}),
]


@pytest.mark.parametrize(("scheduler", "config"), OTHER_CONFIGS)
def test_configs_of_other_checkpoints_agree(scheduler: str, config: dict[str, Any]) -> None:
    explicit = {"clip_sample": False, "skip_prk_steps": True} if scheduler in ("DDIM", "PNDM") else {}
    for steps in (4, 20):
        assert relative_error(scheduler, explicit | config, steps) <= 3e-6


def test_a_pipelines_config_in_memory_counts_its_defaults_as_missing() -> None:
    written = reference("PNDM", {"beta_schedule": "scaled_linear", "skip_prk_steps": True}, 5).config
    assert "timestep_spacing" in written["_use_default_values"]
    assert settings("K_EULER", written).spacing == "linspace"
    assert relative_error("K_EULER", dict(written), 7) <= 3e-6


def random_config(rng: random.Random, scheduler: str) -> dict[str, Any]:
    train_steps = rng.choice([100, 333, 1000, 1000, 1000, 1024])
    config: dict[str, Any] = {
        "num_train_timesteps": train_steps,
        "clip_sample": False,
        "skip_prk_steps": True,
    }
    optional: dict[str, list[Any]] = {
        "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
        "beta_start": [0.0001, 0.00085, 0.001],
        "beta_end": [0.01, 0.012, 0.02],
        "prediction_type": ["epsilon", "v_prediction", "sample"],
        "timestep_spacing": ["leading", "linspace", "trailing"],
        "steps_offset": [0, 1, 2],
        "set_alpha_to_one": [False, True],
        "rescale_betas_zero_snr": [False, True],
        rng.choice(["use_karras_sigmas", "use_exponential_sigmas"]): [False, True],
        "final_sigmas_type": ["zero", "sigma_min"],
        "solver_type": ["midpoint", "heun"],
        "solver_order": [1, 2],
        "lower_order_final": [False, True],
        "euler_at_final": [False, True],
        "timestep_type": ["discrete", "continuous"],
        "_class_name": list(DIFFUSERS_CLASSES.values()),
    }
    if scheduler in ("K_EULER", "DPMSolverMultistep"):
        optional |= {"sigma_min": [None, 0.05], "sigma_max": [None, 10.0], "lambda_min_clipped": [-5.1]}
        optional |= {"interpolation_type": ["linear", "linear", "log_linear"]}
    for key, values in optional.items():
        if rng.random() < 0.6:
            config[key] = rng.choice(values)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_configs_agree_or_are_refused_with_reason(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 - picks test cases
    compared = 0
    for _ in range(100):
        scheduler = rng.choice(SCHEDULERS)
        config = random_config(rng, scheduler)
        steps = rng.choice([1, 2, 3, 4, 7, 12, 20, 33, 61])
        strength = rng.choice([1.0, 1.0, 0.6])
        try:
            build(scheduler, steps, config, strength=strength)
        except (RequestError, CheckpointError):
            assert fails(scheduler, config, steps, strength), (scheduler, steps, config)
            continue
        compared += 1
        assert relative_error(scheduler, config, steps, strength=strength) <= 3e-6, (scheduler, steps, config)
    assert compared >= 60
