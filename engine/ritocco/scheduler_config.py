"""What a checkpoint's `scheduler_config.json` says to one of the six schedulers: settings and signal power.

Keys are read as diffusers' `from_config` of the requested class would read them, whatever class wrote the
file: the class's own keys count, a missing key takes that class's default, other keys have no effect. Two
defaults are ours: `clip_sample` is false and `skip_prk_steps` is true.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ritocco.betas import alphas_cumprod, cosine_betas, linspace_float32
from ritocco.errors import CheckpointError, RequestError, RitoccoError
from ritocco.shown import shown

F32 = npt.NDArray[np.float32]

_BETAS = frozenset({"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"})
_COMMON = _BETAS | {"prediction_type", "timestep_spacing", "steps_offset"}
_REMAPPED = frozenset({"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"})

# A key that changes nothing unless it is switched on; worth a note where the requested class doesn't have it.
_SWITCHES = ("clip_sample", "thresholding", "rescale_betas_zero_snr", *sorted(_REMAPPED), "use_lu_lambdas")
# Not variance-preserving diffusion with betas: their numbers mean something else.
_FOREIGN_CLASSES = ("FlowMatch", "EDM", "ScoreSde", "VQDiffusion", "CosineDPM")

_MOST_TRAIN_STEPS = 100_000  # a table of more would be a mistake, or an attack on memory
# Stands for zero at the terminal step of the sigma-space classes, as in diffusers: the smallest float16.
_NEARLY_ZERO_ALPHA_BAR = np.float32(2.0**-24)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """What one of diffusers' scheduler classes reads and accepts."""

    class_name: str
    keys: frozenset[str]
    spacing: str
    predictions: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
    set_alpha_to_one: bool = False


TRAITS: Mapping[str, Traits] = {
    "DDIM": Traits(
        class_name="DDIMScheduler",
        keys=_COMMON | {"clip_sample", "thresholding", "set_alpha_to_one", "rescale_betas_zero_snr"},
        spacing="leading",
        set_alpha_to_one=True,
    ),
    "K_EULER": Traits(
        class_name="EulerDiscreteScheduler",
        keys=_COMMON
        | _REMAPPED
        | {"interpolation_type", "timestep_type", "final_sigmas_type", "rescale_betas_zero_snr"}
        | {"sigma_min", "sigma_max"},
        spacing="linspace",
    ),
    "DPMSolverMultistep": Traits(
        class_name="DPMSolverMultistepScheduler",
        keys=_COMMON
        | _REMAPPED
        | {"solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final"}
        | {"thresholding", "use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting", "variance_type"}
        | {"lambda_min_clipped", "final_sigmas_type", "rescale_betas_zero_snr"}
        # Not arguments of this class, yet its sigma remapping looks them up in whatever the file holds.
        | {"sigma_min", "sigma_max"},
        spacing="linspace",
    ),
    "K_EULER_ANCESTRAL": Traits(
        class_name="EulerAncestralDiscreteScheduler",
        keys=_COMMON | {"rescale_betas_zero_snr"},
        spacing="linspace",
        predictions=("epsilon", "v_prediction"),
    ),
    "PNDM": Traits(
        class_name="PNDMScheduler",
        keys=_COMMON | {"skip_prk_steps", "set_alpha_to_one"},
        spacing="leading",
        predictions=("epsilon", "v_prediction"),
    ),
    "KLMS": Traits(
        class_name="LMSDiscreteScheduler",
        keys=_COMMON | _REMAPPED | {"sigma_min", "sigma_max"},
        spacing="linspace",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Settings:
    """One scheduler's settings, resolved and checked.

    alphas_cumprod: float32 [T], signal power per training timestep, rescaled to zero terminal SNR where asked
    for.
    prediction: "epsilon", "v_prediction" or "sample". spacing: "leading", "linspace" or "trailing".
    remap: how sigmas are respaced, "none", "karras" or "exponential", between sigma_min and sigma_max where
    given.
    interpolation: "linear" or "log_linear", between the training timesteps' sigmas.
    continuous: the network is told log(sigma) / 4 instead of a timestep (v_prediction only).
    ends_at_zero: the last sigma is 0, not the smallest of training. lambda_min: where the log-SNR is clipped.
    cosine: beta_schedule is squaredcos_cap_v2. notes: lines for the log.
    """

    scheduler: str
    alphas_cumprod: F32
    prediction: str
    spacing: str
    steps_offset: int
    set_alpha_to_one: bool
    zero_snr: bool
    remap: str
    sigma_min: float | None
    sigma_max: float | None
    interpolation: str
    continuous: bool
    ends_at_zero: bool
    solver_order: int
    solver_type: str
    lower_order_final: bool
    euler_at_final: bool
    lambda_min: float
    cosine: bool
    notes: tuple[str, ...]

    @property
    def train_steps(self) -> int:
        """Number of training timesteps T."""
        return len(self.alphas_cumprod)

    @property
    def train_sigmas(self) -> F32:
        """float32 [T], ascending: noise over signal at each training timestep, sqrt((1 - a) / a)."""
        one = np.float32(1.0)
        sigmas: F32 = np.sqrt((one - self.alphas_cumprod) / self.alphas_cumprod)
        return sigmas


class _Reader:
    """Typed look-ups in a scheduler config; each error names the key, the value and the rule."""

    def __init__(self, config: Mapping[str, Any], scheduler: str, keys: frozenset[str]) -> None:
        unused = set(_unused(config))
        self.values = {k: v for k, v in config.items() if k in keys and k not in unused and v is not None}
        self.scheduler = scheduler

    def refuse(self, key: str, rule: str) -> CheckpointError:
        value = self.values.get(key)
        return CheckpointError(f"scheduler_config.json: {key} is {shown(value)}; {rule} ({self.scheduler})")

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "it is true or false")
        return value

    def off(self, key: str, meaning: str) -> None:
        if self.flag(key, False):
            raise self.refuse(key, f"{meaning} is not supported, it has to be false")

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self.values.get(key, default)
        if value not in allowed:
            raise self.refuse(key, f"supported: {', '.join(allowed)}")
        return str(value)

    def whole(self, key: str, default: int, least: int) -> int:
        value = self.values.get(key, default)
        try:
            number = operator.index(value)
        except TypeError:
            number = least - 1
        if isinstance(value, bool) or number < least:
            raise self.refuse(key, f"it is a whole number, {least} or more")
        return number

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, str | bool) else float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise self.refuse(key, "it is a number") from error
        if math.isnan(number):
            raise self.refuse(key, "it is a number")
        return number


def _unused(config: Mapping[str, Any]) -> list[str]:
    """Keys that whoever wrote the config left at their class's defaults."""
    value = config.get("_use_default_values") or []
    if not isinstance(value, list | tuple) or not all(isinstance(key, str) for key in value):
        raise CheckpointError(
            f"scheduler_config.json: _use_default_values is {shown(value)}; it is a list of keys"
        )
    return list(value)


def from_pipeline(config: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler config of a pipeline folder, with what diffusers' inpainting pipeline forces on it.

    `steps_offset` becomes 1 and `skip_prk_steps` true, whatever the file says.
    """
    forced = {"steps_offset": 1, "skip_prk_steps": True}
    unused = [key for key in _unused(config) if key not in forced]
    return {**config, **forced, "_use_default_values": unused}


def settings(scheduler: str, config: Mapping[str, Any]) -> Settings:
    """Reads a scheduler config for one of the six schedulers, whatever class of diffusers wrote it.

    Raises RequestError for an unknown scheduler, or one that the checkpoint's prediction type rules out;
    CheckpointError for a setting that is unsupported, contradictory or out of range.
    """
    if scheduler not in TRAITS:
        raise RequestError(
            f"scheduler is {scheduler!r}; it is one of {', '.join(TRAITS)}", field="input.scheduler"
        )
    traits = TRAITS[scheduler]
    written_by = str(config.get("_class_name", traits.class_name))
    if written_by.startswith(_FOREIGN_CLASSES):
        raise CheckpointError(
            f"scheduler_config.json: _class_name is {shown(written_by)}; "
            "it is not diffusion with discrete betas"
        )
    reader = _Reader(config, scheduler, traits.keys)
    ends_at_zero = reader.choice("final_sigmas_type", "zero", ("zero", "sigma_min")) == "zero"
    _refuse_unsupported(reader, ends_at_zero=ends_at_zero)
    zero_snr = reader.flag("rescale_betas_zero_snr", False)
    signal_power = alphas_cumprod(_betas(reader), zero_snr=zero_snr)
    if zero_snr and scheduler != "DDIM":
        signal_power[-1] = _NEARLY_ZERO_ALPHA_BAR
    signal_power.setflags(write=False)
    prediction = _prediction(reader, traits)
    continuous = reader.choice("timestep_type", "discrete", ("discrete", "continuous")) == "continuous"
    lambda_min = reader.number("lambda_min_clipped")
    return Settings(
        scheduler=scheduler,
        alphas_cumprod=signal_power,
        prediction=prediction,
        spacing=reader.choice("timestep_spacing", traits.spacing, ("leading", "linspace", "trailing")),
        steps_offset=reader.whole("steps_offset", 0, 0),
        set_alpha_to_one=reader.flag("set_alpha_to_one", traits.set_alpha_to_one),
        zero_snr=zero_snr,
        remap=_remap(reader),
        sigma_min=_positive(reader, "sigma_min"),
        sigma_max=_positive(reader, "sigma_max"),
        interpolation=reader.choice("interpolation_type", "linear", ("linear", "log_linear")),
        continuous=continuous and prediction == "v_prediction",
        ends_at_zero=ends_at_zero,
        solver_order=reader.whole("solver_order", 2, 1),
        solver_type=reader.choice("solver_type", "midpoint", ("midpoint", "heun", "logrho", "bh1", "bh2")),
        lower_order_final=reader.flag("lower_order_final", True),
        euler_at_final=reader.flag("euler_at_final", False),
        lambda_min=-math.inf if lambda_min is None else lambda_min,
        cosine=reader.values.get("beta_schedule") == "squaredcos_cap_v2",
        notes=_ignored(config, traits),
    )


def check_scheduler(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Why some of the six schedulers can't run with a config, one line each.

    Raises CheckpointError where none can.
    """
    problems: list[RitoccoError] = []
    for scheduler in TRAITS:
        try:
            settings(scheduler, config)
        except RitoccoError as error:
            problems.append(error)
    if len(problems) == len(TRAITS):
        raise CheckpointError(str(problems[0])) from problems[0]
    return tuple(str(error) for error in problems)


def _refuse_unsupported(reader: _Reader, *, ends_at_zero: bool) -> None:
    reader.off("clip_sample", "clipping the predicted sample")
    reader.off("thresholding", "dynamic thresholding")
    reader.off("use_beta_sigmas", "the Beta spacing of sigmas")
    reader.off("use_lu_lambdas", "the spacing by log-SNR")
    reader.off("use_flow_sigmas", "flow matching")
    reader.off("use_dynamic_shifting", "shifting for flow matching")
    if not reader.flag("skip_prk_steps", True):
        raise reader.refuse(
            "skip_prk_steps", "Runge-Kutta warm-up steps are not supported, it has to be true"
        )
    # deis: diffusers runs it as DPM-Solver++ here, down to the smallest sigma only.
    algorithms = ("dpmsolver++", "deis") if not ends_at_zero else ("dpmsolver++",)
    reader.choice("algorithm_type", "dpmsolver++", algorithms)
    if reader.whole("solver_order", 2, 1) > 2:
        raise reader.refuse("solver_order", "supported: 1, 2")
    if reader.values.get("variance_type") is not None:
        raise reader.refuse("variance_type", "a network that also predicts the variance is not supported")


def _prediction(reader: _Reader, traits: Traits) -> str:
    allowed: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
    if reader.scheduler == "K_EULER":
        allowed += ("original_sample",)  # an older name that this class still takes
    prediction = reader.choice("prediction_type", "epsilon", allowed)
    prediction = "sample" if prediction == "original_sample" else prediction
    if prediction not in traits.predictions:
        able = ", ".join(name for name, other in TRAITS.items() if prediction in other.predictions)
        raise RequestError(
            f"scheduler is {reader.scheduler!r}; this checkpoint's prediction_type is {prediction!r}, "
            f"which runs with {able}",
            field="input.scheduler",
        )
    return prediction


def _remap(reader: _Reader) -> str:
    karras = reader.flag("use_karras_sigmas", False)
    exponential = reader.flag("use_exponential_sigmas", False)
    if karras and exponential:
        raise reader.refuse(
            "use_karras_sigmas", "only one of use_karras_sigmas and use_exponential_sigmas may be true"
        )
    return "karras" if karras else "exponential" if exponential else "none"


def _positive(reader: _Reader, key: str) -> float | None:
    value = reader.number(key)
    if value is not None and not 0.0 < value < math.inf:
        raise reader.refuse(key, "it is greater than 0")
    return value


def _ignored(config: Mapping[str, Any], traits: Traits) -> tuple[str, ...]:
    return tuple(
        f"scheduler_config.json: {key} is true, which {traits.class_name} doesn't have; it has no effect"
        for key in _SWITCHES
        if config.get(key) is True and key not in traits.keys
    )


def _betas(reader: _Reader) -> F32:
    """Noise variance per training timestep, float32 [T]. [Ho et al. 2020, arXiv:2006.11239, Sec. 4]"""
    count = reader.whole("num_train_timesteps", 1000, 2)
    if count > _MOST_TRAIN_STEPS:
        raise reader.refuse("num_train_timesteps", f"it is {_MOST_TRAIN_STEPS} at most")
    trained = reader.values.get("trained_betas")
    kinds = ("linear", "scaled_linear", "squaredcos_cap_v2")
    if trained is not None:
        try:
            betas = np.array(trained, dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError("scheduler_config.json: trained_betas is not a list of numbers") from error
        if betas.shape != (count,):
            raise CheckpointError(
                f"scheduler_config.json: trained_betas has shape {betas.shape}; "
                f"num_train_timesteps is {count}"
            )
    elif (kind := reader.choice("beta_schedule", "linear", kinds)) == "squaredcos_cap_v2":
        betas = cosine_betas(count)
    else:
        start, end = reader.number("beta_start"), reader.number("beta_end")
        start, end = 0.0001 if start is None else start, 0.02 if end is None else end
        if not (0.0 <= start < 1.0 and 0.0 <= end < 1.0):
            raise CheckpointError(
                f"scheduler_config.json: beta_start is {start}, beta_end is {end}; "
                "both are from 0 to less than 1"
            )
        if kind == "linear":
            betas = linspace_float32(start, end, count)
        else:
            betas = linspace_float32(start**0.5, end**0.5, count) ** 2
    if not ((betas >= 0.0) & (betas < 1.0)).all() or not betas.any():
        raise CheckpointError("scheduler_config.json: betas have to be from 0 to less than 1, and not all 0")
    return betas
