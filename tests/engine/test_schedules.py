"""Tables as data, the step as arithmetic, orders of convergence on a Gaussian, and what is refused.

Parity with diffusers is in test_schedules_parity.py; nothing here needs it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ritocco.errors import CheckpointError, RequestError
from ritocco.noise import normal
from ritocco.scheduler_config import from_pipeline, settings
from ritocco.schedules import NO_HISTORY, SCHEDULERS, Row, StepTable, advance, build, preview, stack

F64 = npt.NDArray[np.float64]
CONFIG: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
ARRAYS = [f.name for f in dataclasses.fields(StepTable) if f.name not in ("scheduler", "notes")]
MEAN, STD = 0.7, 0.5  # of the Gaussian data


def gaussian_output(prediction: str, x: F64, signal: float, noise: float) -> F64:
    """The exact network for Gaussian data, at x = signal * x0 + noise * z."""
    x0 = MEAN + STD**2 * signal / (STD**2 * signal**2 + noise**2) * (x - signal * MEAN)
    if prediction == "sample":
        return np.asarray(x0)
    if prediction == "epsilon":
        return np.asarray((x - signal * x0) / noise)
    total = math.hypot(signal, noise)
    return np.asarray((signal * x / total**2 - x0) * total / noise)


def gaussian_ode(x: F64, start: tuple[float, float], end: tuple[float, float]) -> F64:
    """Where the probability flow takes x between two levels. [Song et al. 2021, arXiv:2011.13456, Eq. 13]"""
    spread = [math.sqrt(STD**2 * signal**2 + noise**2) for signal, noise in (start, end)]
    return np.asarray(end[0] * MEAN + (x - start[0] * MEAN) * spread[1] / spread[0])


def levels(scheduler: str, steps: int, config: dict[str, Any]) -> list[tuple[float, float]]:
    """Scales of signal and noise at each row, which the x0 of an epsilon-predicting twin spells out."""
    table = build(scheduler, steps, config | {"prediction_type": "epsilon"})
    return [(1.0 / row.u, -row.v / row.u) for row in map(table.row, range(len(table)))]


def ode_error(scheduler: str, steps: int, **extra: Any) -> float:
    """Error, before the last row, of a run that starts on the exact trajectory."""
    config = CONFIG | extra
    table, path = build(scheduler, steps, config), levels(scheduler, steps, config)
    x, history = np.linspace(-2.0, 2.0, 9) * path[0][1], NO_HISTORY
    exact = gaussian_ode(x, path[0], path[-1])
    for i in range(len(table) - 1):
        e = gaussian_output(extra["prediction_type"], x, *path[i])
        x, history = advance(table.row(i), x, e, 0.0, history)
    return float(np.abs(x - exact).max())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("scheduler", "least", "most"),
    [("DDIM", 1.85, 2.1), ("K_EULER", 1.9, 2.1), ("DPMSolverMultistep", 3.9, 4.5), ("KLMS", 11.0, 18.0)],
)
def test_order_of_convergence(scheduler: str, prediction: str, least: float, most: float) -> None:
    extra = {"prediction_type": prediction, "use_karras_sigmas": True}
    errors = [ode_error(scheduler, steps, **extra) for steps in (50, 100, 200)]
    for coarse, fine in itertools.pairwise(errors):
        assert least < coarse / fine < most, errors


def test_pndm_is_of_second_order_in_epsilon_and_of_first_in_v() -> None:
    # It averages raw outputs, and v turns with the timestep: kept, because diffusers does.
    for prediction, least, most in (("epsilon", 2.8, 4.5), ("v_prediction", 1.9, 2.1)):
        errors = [ode_error("PNDM", steps, prediction_type=prediction) for steps in (50, 100, 200)]
        for coarse, fine in itertools.pairwise(errors):
            assert least < coarse / fine < most, errors


def test_ancestral_noise_leaves_the_datas_distribution() -> None:
    steps = 100
    config = CONFIG | {"prediction_type": "v_prediction"}
    table, path = build("K_EULER_ANCESTRAL", steps, config), levels("K_EULER_ANCESTRAL", steps, config)
    assert table.noisy
    shape = (1, 4, 64, 64)
    x, history = normal(3, 0, shape) * table.start_noise[0], NO_HISTORY
    for i in range(len(table)):
        e = gaussian_output("v_prediction", x, *path[i])
        x, history = advance(table.row(i), x, e, normal(3, i + 1, shape), history)
    assert abs(x.mean() - MEAN) < 0.02
    assert abs(x.std() - STD) < 0.03


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_preview_is_the_networks_x0(scheduler: str) -> None:
    for prediction in ("epsilon", "v_prediction"):
        config = CONFIG | {"prediction_type": prediction}
        table, path = build(scheduler, 12, config), levels(scheduler, 12, config)
        x = np.linspace(-3.0, 3.0, 7)
        for i, (signal, noise) in enumerate(path):
            x0 = gaussian_output("sample", x, signal, noise)
            e = gaussian_output(prediction, x, signal, noise)
            np.testing.assert_allclose(preview(table.row(i), x, e), x0, atol=1e-9)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_networks_input_has_unit_power(scheduler: str) -> None:
    table = build(scheduler, 12, CONFIG, strength=0.5)
    power = table.in_scale**2 * (table.start_signal**2 + table.start_noise**2)
    np.testing.assert_allclose(power, 1.0, rtol=1e-12)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_table_is_immutable_host_data(scheduler: str) -> None:
    table = build(scheduler, 9, CONFIG)
    for name in ARRAYS:
        array = getattr(table, name)
        assert array.dtype == (bool if name == "push" else np.float64)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.a = table.b  # type: ignore[misc]
    assert table.b.shape == (len(table), 4)


def test_a_table_keeps_no_hold_on_what_it_was_made_from() -> None:
    table = build("DDIM", 3, CONFIG)
    mine = np.array(table.a)
    copy = dataclasses.replace(table, a=mine)
    mine[0] = 99.0
    assert copy.a[0] == table.a[0]


def test_a_table_of_ragged_columns_is_refused() -> None:
    table = build("DDIM", 3, CONFIG)
    with pytest.raises(ValueError, match="c has shape"):
        dataclasses.replace(table, c=np.zeros(2))


def test_rows_can_be_taken() -> None:
    table = build("KLMS", 8, CONFIG)
    for picked, expected in ((slice(2, 5), [2, 3, 4]), ([7, 0], [7, 0])):
        part = table.take(picked)
        assert len(part) == len(expected)
        assert [part.row(i) for i in range(len(part))] == [table.row(i) for i in expected]
    with pytest.raises(IndexError):
        table.row(8)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_whole_run_starts_from_noise_alone(scheduler: str) -> None:
    for spacing in ("leading", "linspace", "trailing"):
        table = build(scheduler, 10, CONFIG | {"timestep_spacing": spacing})
        later = build(scheduler, 10, CONFIG | {"timestep_spacing": spacing}, strength=0.999)
        assert table.start_signal[0] == 0.0
        in_sigma_space = scheduler in ("K_EULER", "K_EULER_ANCESTRAL", "KLMS")
        if not in_sigma_space:
            assert table.start_noise[0] == 1.0
        elif spacing == "leading":
            assert table.start_noise[0] * table.in_scale[0] == pytest.approx(1.0)
        else:
            sigma = math.sqrt(1 / table.in_scale[0] ** 2 - 1)
            assert table.start_noise[0] == pytest.approx(sigma)
        assert later.start_signal[0] > 0.0
        assert len(later) < len(table)


def test_a_whole_number_of_steps_is_left_at_any_strength() -> None:
    for strength, expected in ((1.0, 10), (0.99, 9), (0.5, 5), (0.19, 1), (0.1, 1)):
        assert len(build("K_EULER", 10, CONFIG, strength=strength)) == expected
    assert len(build("K_EULER", 10, CONFIG, strength=np.float32(0.5))) == 5  # type: ignore[arg-type]
    # PNDM evaluates twice at one timestep from two steps on.
    assert [len(build("PNDM", 10, CONFIG, strength=s)) for s in (1.0, 0.5, 0.2, 0.1)] == [11, 6, 3, 2]
    assert [len(build("PNDM", steps, CONFIG)) for steps in (1, 2, 3)] == [1, 3, 4]


def mixed_rows() -> list[Row]:
    pndm = build("PNDM", 10, CONFIG)
    return [
        pndm.row(1),
        pndm.row(6),
        build("KLMS", 20, CONFIG).row(7),
        build("K_EULER_ANCESTRAL", 5, CONFIG | {"prediction_type": "v_prediction"}).row(2),
        build("DPMSolverMultistep", 12, CONFIG).row(5),
        build("DDIM", 3, CONFIG).row(0),
    ]


def lanes(seed: int, count: int) -> npt.NDArray[np.float32]:
    return normal(seed, 0, (count, 4, 3, 5))


def test_every_lane_takes_its_own_row() -> None:
    rows = mixed_rows()
    n = len(rows)
    x, e, z = lanes(1, n), lanes(2, n), lanes(3, n)
    history = (lanes(4, n), lanes(5, n), lanes(6, n))
    together, after = advance(stack(rows), x, e, z, history)
    assert together.dtype == np.float32
    for i, row in enumerate(rows):
        alone, after_alone = advance(row, x[i], e[i], z[i], [h[i] for h in history])
        np.testing.assert_allclose(together[i], alone, rtol=2e-6, atol=2e-6)
        for batched, single in zip(after, after_alone, strict=True):
            np.testing.assert_allclose(batched[i], single, rtol=2e-6, atol=2e-6)


def test_history_stays_exactly_where_a_row_does_not_push() -> None:
    rows = mixed_rows()
    n = len(rows)
    x, e = lanes(1, n), lanes(2, n)
    history = (lanes(4, n), lanes(5, n), lanes(6, n))
    row = stack(rows)
    _, after = advance(row, x, e, 0.0, history)
    assert [float(push) for push in row.push.ravel()] == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    memory = row.p * x + row.q * e
    for before, now, pushed in zip(history, after, (memory, *history[:2]), strict=True):
        assert np.array_equal(now[0], before[0])
        assert np.array_equal(now[1:], pushed[1:])


def test_torch_steps_like_numpy() -> None:
    rows = mixed_rows()
    n = len(rows)
    x, e, z = lanes(1, n), lanes(2, n), lanes(3, n)
    history = (lanes(4, n), lanes(5, n), lanes(6, n))
    row = stack(rows)
    expected, after = advance(row, x, e, z, history)
    of_torch = row.map(torch.from_numpy)
    got, got_after = advance(
        of_torch,
        torch.from_numpy(x),
        torch.from_numpy(e),
        torch.from_numpy(z),
        [torch.from_numpy(h) for h in history],
    )
    assert isinstance(got, torch.Tensor)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-6)
    for theirs, mine in zip(got_after, after, strict=True):
        np.testing.assert_allclose(theirs.numpy(), mine, rtol=1e-6, atol=1e-6)


def test_nothing_is_changed_in_place() -> None:
    row = stack(mixed_rows())
    n = row.a.shape[0]
    inputs = [lanes(seed, n) for seed in range(6)]
    copies = [a.copy() for a in inputs]
    advance(row, inputs[0], inputs[1], inputs[2], inputs[3:])
    for before, now in zip(copies, inputs, strict=True):
        assert np.array_equal(before, now)


def test_schedules_import_no_torch() -> None:
    code = (
        "import sys, ritocco.schedules, ritocco.noise; "
        "print([name for name in ('torch', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("scheduler", "config", "words"),
    [
        ("DDIM", {"clip_sample": True}, "clip_sample is True"),
        ("DDIM", {"thresholding": True}, "thresholding is True"),
        ("DPMSolverMultistep", {"thresholding": True}, "thresholding is True"),
        ("DPMSolverMultistep", {"solver_order": 3}, "solver_order is 3; supported: 1, 2"),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type is 'sde-dpmsolver"),
        ("DPMSolverMultistep", {"algorithm_type": "dpmsolver"}, "algorithm_type is 'dpmsolver'"),
        ("DPMSolverMultistep", {"algorithm_type": "deis"}, "algorithm_type is 'deis'"),
        ("DPMSolverMultistep", {"solver_type": "rk4"}, "solver_type is 'rk4'"),
        ("DPMSolverMultistep", {"use_lu_lambdas": True}, "use_lu_lambdas is True"),
        ("DPMSolverMultistep", {"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ("DPMSolverMultistep", {"use_dynamic_shifting": True}, "use_dynamic_shifting is True"),
        ("DPMSolverMultistep", {"variance_type": "learned_range"}, "variance_type is 'learned_range'"),
        ("DPMSolverMultistep", {"lambda_min_clipped": "low"}, "lambda_min_clipped is 'low'"),
        ("K_EULER", {"use_beta_sigmas": True}, "use_beta_sigmas is True"),
        ("K_EULER", {"use_karras_sigmas": True, "use_exponential_sigmas": True}, "only one of"),
        ("K_EULER", {"use_karras_sigmas": "yes"}, "use_karras_sigmas is 'yes'"),
        ("K_EULER", {"final_sigmas_type": "one"}, "final_sigmas_type is 'one'"),
        ("K_EULER", {"interpolation_type": "cubic"}, "interpolation_type is 'cubic'"),
        ("K_EULER", {"timestep_type": "odd"}, "timestep_type is 'odd'"),
        ("K_EULER", {"sigma_min": -1.0}, "sigma_min is -1.0"),
        ("K_EULER", {"sigma_max": float("nan")}, "sigma_max is nan"),
        ("PNDM", {"skip_prk_steps": False}, "skip_prk_steps is False"),
        ("KLMS", {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ("KLMS", {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ("KLMS", {"timestep_spacing": "even"}, "timestep_spacing is 'even'"),
        ("KLMS", {"steps_offset": -1}, "steps_offset is -1"),
        ("KLMS", {"num_train_timesteps": 1000.5}, "num_train_timesteps is 1000.5"),
        ("KLMS", {"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000"),
        ("KLMS", {"beta_end": 1.5}, "beta_end is 1.5"),
        ("KLMS", {"beta_start": "small"}, "beta_start is 'small'"),
        ("KLMS", {"trained_betas": [0.1, 0.2]}, "trained_betas has shape"),
        ("KLMS", {"trained_betas": ["a", "b"]}, "trained_betas is not a list of numbers"),
        ("KLMS", {"trained_betas": [2.0] * 1000}, "betas have to be"),
        ("KLMS", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name is 'FlowMatch"),
    ],
)
def test_an_unsupported_config_is_refused_by_name(scheduler: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match="scheduler_config") as caught:
        build(scheduler, 10, CONFIG | config)
    assert words in str(caught.value)


@pytest.mark.parametrize("scheduler", ["PNDM", "K_EULER_ANCESTRAL"])
def test_sample_prediction_names_the_schedulers_that_can(scheduler: str) -> None:
    with pytest.raises(RequestError, match="DDIM, K_EULER, DPMSolverMultistep, KLMS") as caught:
        build(scheduler, 10, CONFIG | {"prediction_type": "sample"})
    assert caught.value.field == "input.scheduler"


@pytest.mark.parametrize(
    ("arguments", "field", "words"),
    [
        ({"scheduler": "HEUN"}, "input.scheduler", "scheduler is 'HEUN'; it is one of DDIM, K_EULER"),
        ({"steps": 0}, "input.num_inference_steps", "num_inference_steps is 0"),
        ({"steps": 1001}, "input.num_inference_steps", "num_inference_steps is 1001"),
        ({"steps": 2.5}, "input.num_inference_steps", "num_inference_steps is 2.5"),
        ({"steps": True}, "input.num_inference_steps", "num_inference_steps is True"),
        ({"steps": 1000}, "input.num_inference_steps", "reaches timestep 1000"),
        ({"scheduler": "DPMSolverMultistep", "steps": 1000}, "input.scheduler", "not finite"),
        ({"strength": 0.0}, "strength", "strength is 0.0"),
        ({"strength": 0.09}, "strength", "of 10 steps it leaves none"),
        ({"strength": 1.1}, "strength", "strength is 1.1"),
        ({"strength": float("nan")}, "strength", "strength is nan"),
        ({"strength": "1"}, "strength", "strength is '1'"),
    ],
)
def test_a_broken_request_is_refused(arguments: dict[str, Any], field: str, words: str) -> None:
    asked: dict[str, Any] = {"scheduler": "DDIM", "steps": 10, "config": CONFIG} | arguments
    with pytest.raises(RequestError) as caught:
        build(**asked)
    assert caught.value.field == field
    assert words in str(caught.value)


def test_what_diffusers_keeps_and_nobody_wants_is_noted() -> None:
    assert build("K_EULER", 25, CONFIG).notes == ()
    (one_step,) = build("K_EULER", 1, CONFIG).notes
    assert "1 step sits at timestep 0 under linspace" in one_step
    (one_step,) = build("DDIM", 1, CONFIG).notes
    assert "1 step sits at timestep 1 under leading" in one_step
    assert build("K_EULER", 1, CONFIG | {"timestep_spacing": "trailing"}).notes == ()
    (rounded,) = build("DDIM", 61, CONFIG | {"timestep_spacing": "trailing"}).notes
    assert "one step too many" in rounded
    (ignored,) = build("PNDM", 10, CONFIG | {"rescale_betas_zero_snr": True}).notes
    assert "rescale_betas_zero_snr is true, which PNDMScheduler doesn't have" in ignored


def test_missing_keys_take_the_classs_default() -> None:
    assert {name: settings(name, {}).spacing for name in SCHEDULERS} == {
        "DDIM": "leading",
        "K_EULER": "linspace",
        "DPMSolverMultistep": "linspace",
        "K_EULER_ANCESTRAL": "linspace",
        "PNDM": "leading",
        "KLMS": "linspace",
    }
    assert settings("DDIM", {}).set_alpha_to_one
    assert not settings("PNDM", {}).set_alpha_to_one
    assert settings("DDIM", {"timestep_spacing": None, "trained_betas": None}).spacing == "leading"


def test_a_pipeline_folder_forces_two_settings() -> None:
    written = {
        "steps_offset": 0,
        "skip_prk_steps": False,
        "_use_default_values": ["steps_offset", "beta_end"],
    }
    forced = from_pipeline(written)
    assert written["steps_offset"] == 0
    assert forced["_use_default_values"] == ["beta_end"]
    assert settings("PNDM", forced).steps_offset == 1
    assert build("PNDM", 4, forced).timesteps[0] == 751.0
    assert from_pipeline({})["steps_offset"] == 1
