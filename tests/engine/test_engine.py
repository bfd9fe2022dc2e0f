"""Engine.predict on the tiny checkpoint: seeds, batches, pictures, options, logs, errors, threads."""

from __future__ import annotations

import base64
import io
import random
import re
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

import ritocco
from ritocco import BackendError, Engine, NonFiniteError, Prediction, PredictionInput, RequestError, loading
from ritocco.backends.allocator import capturing
from ritocco.backends.network import NetworkBatch
from ritocco.backends.torch_ import TorchRuntime
from ritocco.checkpoint import load_tokenizer, open_checkpoint
from ritocco.images import data_uri, encode
from ritocco.noise import normal
from ritocco.safety import NSFW_ERROR, SafetyChecker

# Between batch sizes the matrix products differ in their last bits, which guidance enlarges: measured 1.3e-5
# on decoded floats of about [-1, 1]. One of a picture's 256 levels is 8e-3 wide, so only a value that lies
# this close to a border between two may come out differently, and then by one level.
FLOAT_TOLERANCE = 5e-5
LEVELS = 1
PROGRESS = re.compile(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)/(\d+)")
Ask = Callable[..., dict[str, Any]]
Pixels = npt.NDArray[np.uint8]


def networks(engine: Engine) -> TorchRuntime:
    """The torch runtime of a tiny or spied engine."""
    runtime: Any = engine.runtime
    return cast(TorchRuntime, getattr(runtime, "inner", runtime))


def decoded(engine: Engine) -> npt.NDArray[np.float32]:
    """What a spied engine decoded last."""
    runtime: Any = engine.runtime
    result: npt.NDArray[np.float32] = runtime.decoded[-1]
    return result


def arrays(prediction: Prediction) -> list[Pixels]:
    return [np.asarray(image) for image in prediction.images]


def opened(uri: str) -> Image.Image:
    """The picture in a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.fixture
def rows_per_step(tiny_engine: Engine) -> Iterator[list[int]]:
    """UNet rows of every evaluation."""
    rows: list[int] = []
    hook = networks(tiny_engine).unet.conv_out.register_forward_hook(lambda *call: rows.append(len(call[2])))
    yield rows
    hook.remove()


def test_the_answer(tiny_engine: Engine, ask: Ask) -> None:
    prediction = tiny_engine.predict(ask(num_outputs=2, size=(128, 64)))
    assert prediction.status == "succeeded"
    assert prediction.error is None
    assert prediction.version == tiny_engine.version
    assert re.fullmatch("[0-9a-f]{64}", prediction.version)
    assert prediction.input["image"] == "<PIL image 128x64>"
    assert prediction.input["num_outputs"] == 2
    assert [image.size for image in prediction.images] == [(128, 64)] * 2
    assert [image.mode for image in prediction.images] == ["RGB"] * 2
    assert prediction.output is not None
    for uri, image in zip(prediction.output, prediction.images, strict=True):
        assert uri.startswith("data:image/png;base64,")
        assert opened(uri).tobytes() == image.tobytes()
    assert prediction.started_at is not None
    assert prediction.completed_at is not None
    assert prediction.created_at <= prediction.started_at <= prediction.completed_at
    phases = {"inputs", "text", "encode", "denoise", "decode", "outputs", "predict_time"}
    assert set(prediction.metrics) == phases
    total = prediction.metrics["predict_time"]
    assert sum(prediction.metrics[name] for name in phases - {"predict_time"}) <= total + 1e-3
    assert '"images"' not in prediction.to_json()


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistep", "K_EULER_ANCESTRAL"])
def test_output_i_of_seed_s_is_output_0_of_seed_s_plus_i(
    spied_engine: Engine, ask: Ask, scheduler: str
) -> None:
    given = ask(num_outputs=4, scheduler=scheduler, num_inference_steps=4)
    together = arrays(spied_engine.predict(given))
    floats = decoded(spied_engine)
    for i in range(4):
        (alone,) = arrays(spied_engine.predict(given | {"num_outputs": 1, "seed": 7 + i}))
        assert np.abs(decoded(spied_engine)[0] - floats[i]).max() <= FLOAT_TOLERANCE
        assert np.abs(alone.astype(int) - together[i].astype(int)).max() <= LEVELS
    pair = spied_engine.predict(given | {"num_outputs": 2, "seed": 8})
    assert np.abs(decoded(spied_engine) - floats[1:3]).max() <= FLOAT_TOLERANCE
    assert len(pair.images) == 2
    assert min(np.abs(floats[i] - floats[i + 1]).max() for i in range(3)) > 0.1


def test_text_and_condition_are_encoded_once_for_all_outputs(
    spied_engine: Engine, ask: Ask, rows_per_step: list[int]
) -> None:
    spied_engine.predict(ask(num_outputs=4, num_inference_steps=2))
    spy: Any = spied_engine.runtime
    assert spy.calls == {"encode_text": 1, "prompts": 2, "encode_image": 1, "open": 1, "decode": 1}
    assert spy.capacities == [4]
    assert rows_per_step == [8, 8]


def test_guidance_one_skips_the_unconditional_half(
    spied_engine: Engine, ask: Ask, rows_per_step: list[int]
) -> None:
    given = ask(guidance_scale=1, num_outputs=2, num_inference_steps=2)
    spied_engine.predict(given)
    spy: Any = spied_engine.runtime
    assert spy.calls["prompts"] == 1
    assert rows_per_step == [2, 2]
    before = decoded(spied_engine)
    spied_engine.predict(given | {"negative_prompt": "a bench"})
    np.testing.assert_array_equal(decoded(spied_engine), before)


def test_prompts_reach_the_picture(spied_engine: Engine, ask: Ask) -> None:
    results = []
    for change in ({}, {"prompt": "a dog"}, {"negative_prompt": "a bench"}, {"negative_prompt": ""}):
        spied_engine.predict(ask() | change)
        results.append(decoded(spied_engine))
    plain, other, negative, empty = results
    assert np.abs(other - plain).max() > 0.01
    assert np.abs(negative - plain).max() > 0.01
    np.testing.assert_array_equal(empty, plain)


def test_kept_pixels_are_the_resized_inputs_bit_for_bit(tiny_engine: Engine, ask: Ask) -> None:
    given = ask()
    given["image"] = given["image"].resize((100, 90))
    resized = np.asarray(given["image"].resize((64, 64), Image.Resampling.LANCZOS))
    black = np.asarray(given["mask"]) == 0
    prediction = tiny_engine.predict(given)
    assert prediction.output is not None
    for result in (*arrays(prediction), np.asarray(opened(prediction.output[0]))):
        np.testing.assert_array_equal(result[black], resized[black])
        assert (result[~black] != resized[~black]).mean() > 0.5
    (raw,) = arrays(tiny_engine.predict(given, paste_back=False))
    assert (raw[black] != resized[black]).mean() > 0.5
    np.testing.assert_array_equal(raw[~black], result[~black])


def test_a_feather_softens_the_white_side_only(tiny_engine: Engine, ask: Ask) -> None:
    given = ask()
    (hard,) = arrays(tiny_engine.predict(given))
    (soft,) = arrays(tiny_engine.predict(given, mask_feather=6))
    black = np.asarray(given["mask"]) == 0
    np.testing.assert_array_equal(soft[black], np.asarray(given["image"])[black])
    changed = (soft != hard).any(axis=2)
    assert changed[~black].mean() > 0.2
    assert not changed[26, 20]  # the middle of the white, further from the seam than the feather


def test_strength_starts_later_from_the_image(spied_engine: Engine, ask: Ask) -> None:
    steps: list[int] = []
    given = ask(num_inference_steps=5)
    spied_engine.predict(given)
    whole = decoded(spied_engine)
    spied_engine.predict(given, strength=0.4, on_step=lambda done, total: steps.append(total))
    assert steps == [2, 2]
    spy: Any = spied_engine.runtime
    assert spy.calls["encode_image"] == 3
    part = decoded(spied_engine)
    given["image"] = Image.new("RGB", (64, 64), "red")
    given["mask"] = Image.new("L", (64, 64), 255)  # hides the image from the condition, not from the start
    results = []
    for colour in ("red", "green"):
        given["image"] = Image.new("RGB", (64, 64), colour)
        for options in ({}, {"strength": 0.4}):
            spied_engine.predict(given, **cast(Any, options))
            results.append(decoded(spied_engine))
    assert np.abs(part - whole).max() > 0.1
    np.testing.assert_array_equal(results[0], results[2])
    assert np.abs(results[1] - results[3]).max() > 1e-3


def test_latents_take_the_place_of_the_seeds_noise(spied_engine: Engine, ask: Ask) -> None:
    spied_engine.predict(ask(seed=40, num_outputs=2))
    seeded = decoded(spied_engine)
    noise = np.stack([normal(seed, 0, (4, 8, 8)) for seed in (40, 41)])
    for latents in (noise, noise.astype(np.float64), torch.from_numpy(noise), noise.tolist()):
        spied_engine.predict(ask(seed=1, num_outputs=2), latents=cast(Any, latents))
        np.testing.assert_array_equal(decoded(spied_engine), seeded)
    spied_engine.predict(ask(seed=1, num_outputs=2), latents=noise[0])
    np.testing.assert_array_equal(decoded(spied_engine)[0], decoded(spied_engine)[1])


@pytest.mark.parametrize(("name", "kind"), [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_output_formats(tiny_engine: Engine, ask: Ask, name: str, kind: str) -> None:
    given = ask(num_inference_steps=1, ritocco={"output_format": name})
    prediction = tiny_engine.predict(given)
    assert prediction.output is not None
    assert opened(prediction.output[0]).format == kind
    assert opened(prediction.output[0]).size == (64, 64)
    if name == "png":
        overridden = tiny_engine.predict(given, output_format="jpg").output
        assert overridden is not None
        assert opened(overridden[0]).format == "JPEG"


def test_a_checked_input_may_be_passed(tiny_engine: Engine, ask: Ask) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    uri = data_uri(encode(pixels))
    given = ask(num_inference_steps=1) | {"image": uri, "mask": uri}
    checked = PredictionInput.model_validate(given)
    assert tiny_engine.predict(checked).input["image"].startswith("data:")
    local = PredictionInput.model_validate(ask(), context={"allow_local": True})
    assert (tiny_engine.predict(local).images[0]) == tiny_engine.predict(ask()).images[0]


def test_extensions_count_under_their_key_and_nowhere_else(tiny_engine: Engine, ask: Ask) -> None:
    plain = tiny_engine.predict(ask())
    sent = ask(strength=0.4, paste_back=False, aspect_ratio="1:1", size=(64, 64))
    ignored = tiny_engine.predict(sent)
    assert ignored.images[0].tobytes() == plain.images[0].tobytes()
    assert "Ignored unknown input: aspect_ratio, paste_back, strength" in ignored.logs
    assert "strength" not in ignored.input
    raw = tiny_engine.predict(ask(ritocco={"paste_back": False}))
    assert raw.images[0].tobytes() != plain.images[0].tobytes()
    back = tiny_engine.predict(ask(ritocco={"paste_back": False}), paste_back=True)
    assert back.images[0].tobytes() == plain.images[0].tobytes()
    assert "Ignored" not in plain.logs + raw.logs


def test_nulls_mean_defaults(tiny_engine: Engine, ask: Ask) -> None:
    names = ["negative_prompt", "guidance_scale", "scheduler", "num_outputs", "disable_safety_checker"]
    given = ask(num_inference_steps=2)
    nulls = tiny_engine.predict(given | dict.fromkeys(names) | {"ritocco": None})
    assert nulls.images[0].tobytes() == tiny_engine.predict(given).images[0].tobytes()


def test_hostile_keys_can_neither_forge_progress_nor_break_the_log(tiny_engine: Engine, ask: Ask) -> None:
    given = ask(num_inference_steps=1)
    given |= {"\n100%|#| 9/9": 1, "\ud800": 2, "x" * 5000: 3}
    prediction = tiny_engine.predict(given | cast(Any, {5: 4}))
    matches = [match for line in prediction.logs.splitlines() if (match := PROGRESS.match(line))]
    assert [match.groups() for match in matches] == [("100", "1", "1")]
    assert max(map(len, prediction.logs.splitlines())) < 1000
    assert set(prediction.input) == set(ask())


def test_logs(tiny_engine: Engine, ask: Ask) -> None:
    prediction = tiny_engine.predict(ask(num_inference_steps=4, scheduler="DDIM"))
    lines = prediction.logs.splitlines()
    assert lines[0] == "Using seed: 7"
    assert sum("no safety checker" in line for line in lines) == 1
    assert any("float32" in line for line in lines)
    matches = [match.groups() for line in lines if (match := PROGRESS.match(line))]
    assert matches == [("25", "1", "4"), ("50", "2", "4"), ("75", "3", "4"), ("100", "4", "4")]
    assert PROGRESS.match(lines[-1])
    cut = tiny_engine.predict(ask(num_inference_steps=1, prompt="a cat on the bench " * 40))
    assert "prompt cut after 75 tokens" in cut.logs


def test_the_masks_warnings_are_logged(tiny_engine: Engine, ask: Ask) -> None:
    given = ask(num_inference_steps=1, mask=Image.new("L", (32, 32)))
    prediction = tiny_engine.predict(given)
    assert "the mask has 32x32 pixels and the image 64x64" in prediction.logs
    assert "nothing is repainted" in prediction.logs
    assert prediction.images[0].tobytes() == given["image"].tobytes()


def test_a_seed_is_drawn_where_none_is_given(
    tiny_engine: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = []

    def draw(end: int) -> int:
        bounds.append(end)
        return 65535

    monkeypatch.setattr(secrets, "randbelow", draw)
    drawn = tiny_engine.predict(ask(seed=None, num_inference_steps=1))
    assert bounds == [65536]
    assert drawn.logs.startswith("Using seed: 65535\n")
    again = tiny_engine.predict(ask(seed=65535, num_inference_steps=1))
    assert again.images[0].tobytes() == drawn.images[0].tobytes()
    zero = tiny_engine.predict(ask(seed=0, num_inference_steps=1))
    assert zero.logs.startswith("Using seed: 0\n")
    assert len(bounds) == 1


def test_seeds_are_64_bits_wide_and_wrap(spied_engine: Engine, ask: Ask) -> None:
    results = {}
    for seed in (0, -1, 2**64 - 1, -(2**63), 2**63, 2**32):
        spied_engine.predict(ask(seed=seed, num_inference_steps=1))
        results[seed] = decoded(spied_engine)[0]
    np.testing.assert_array_equal(results[-1], results[2**64 - 1])
    np.testing.assert_array_equal(results[-(2**63)], results[2**63])
    assert np.abs(results[2**32] - results[0]).max() > 0.1
    spied_engine.predict(ask(seed=2**64 - 1, num_outputs=2, num_inference_steps=1))
    assert np.abs(decoded(spied_engine)[1] - results[0]).max() <= FLOAT_TOLERANCE


@pytest.mark.parametrize("stop_after", [1, 3])
def test_on_step_sees_every_step_and_may_cancel(spied_engine: Engine, ask: Ask, stop_after: int) -> None:
    seen: list[tuple[int, int]] = []

    def show(done: int, total: int) -> bool | None:
        seen.append((done, total))
        return False if done == stop_after else None

    prediction = spied_engine.predict(ask(num_inference_steps=4, scheduler="DDIM"), on_step=show)
    assert seen == [(done, 4) for done in range(1, stop_after + 1)]
    assert prediction.status == "canceled"
    assert prediction.output is None
    assert prediction.images == []
    assert prediction.error is None
    assert prediction.completed_at is not None
    assert prediction.logs.splitlines()[-1] == f"Canceled after {stop_after} of 4 steps"
    spy: Any = spied_engine.runtime
    assert spy.calls["decode"] == 0
    after = spied_engine.predict(ask(num_inference_steps=4, scheduler="DDIM"), on_step=lambda *_: None)
    assert after.status == "succeeded"


def test_an_error_in_on_step_is_the_callers_and_leaves_the_engine_usable(
    tiny_engine: Engine, ask: Ask
) -> None:
    def fails(done: int, total: int) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        tiny_engine.predict(ask(), on_step=fails)
    assert tiny_engine.predict(ask()).status == "succeeded"


BAD_REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no image": ({"image": None}, {}, "input.image"),
    "no mask": ({"mask": "nowhere.png"}, {}, "input.mask"),
    "size": ({"width": 100}, {}, "input.width"),
    "scheduler": ({"scheduler": "DDPM"}, {}, "input.scheduler"),
    "steps": ({"num_inference_steps": 501}, {}, "input.num_inference_steps"),
    "guidance": ({"guidance_scale": 0.5}, {}, "input.guidance_scale"),
    "outputs": ({"num_outputs": 5}, {}, "input.num_outputs"),
    "seed": ({"seed": 2**64}, {}, "input.seed"),
    "extension": ({"ritocco": {"colour": 1}}, {}, "input.ritocco.colour"),
    "latents inside": ({"ritocco": {"latents": [0]}}, {}, "input.ritocco.latents"),
    "strength": ({}, {"strength": 0}, "strength"),
    "strength leaves nothing": ({}, {"strength": 0.1}, "strength"),
    "feather": ({}, {"mask_feather": -1}, "mask_feather"),
    "format": ({}, {"output_format": "gif"}, "output_format"),
    "latents shape": ({}, {"latents": np.zeros((2, 4, 8, 8))}, "latents"),
    "latents order": ({"width": 128}, {"latents": np.zeros((4, 16, 8))}, "latents"),
    "latents NaN": ({}, {"latents": np.full((4, 8, 8), np.nan)}, "latents"),
    "latents infinite": ({}, {"latents": np.full((4, 8, 8), np.inf)}, "latents"),
    "latents too large": ({}, {"latents": np.full((4, 8, 8), 1e300)}, "latents"),
    "latents text": ({}, {"latents": "noise"}, "latents"),
    "latents complex": ({}, {"latents": np.zeros((4, 8, 8), np.complex64)}, "latents"),
    "latents ragged": ({}, {"latents": [[1.0], [1.0, 2.0]]}, "latents"),
    "latents with gradient": ({}, {"latents": torch.zeros(4, 8, 8, requires_grad=True)}, "latents"),
    "a path on a server": ({"image": "bench.png"}, {"allow_local": False}, "input.image"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_refused_before_any_network_runs(
    spied_engine: Engine, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("bench.png")
    changes, options, field = BAD_REQUESTS[name]
    with pytest.raises(RequestError) as caught:
        spied_engine.predict(ask() | changes, **options)
    assert caught.value.field == field
    assert field.rpartition(".")[2] in str(caught.value)
    spy: Any = spied_engine.runtime
    assert not spy.calls


def test_a_size_that_the_network_does_not_take_is_refused(spied_engine: Engine, ask: Ask) -> None:
    spy: Any = spied_engine.runtime
    spied_engine.traits = replace(spied_engine.traits, size_multiple=16)
    with pytest.raises(RequestError, match=r"input\.height is 64; .* multiples of 128") as caught:
        spied_engine.predict(ask(size=(128, 64)))
    assert caught.value.field == "input.height"
    assert not spy.calls


@pytest.mark.parametrize("kind", [None, [], "text", 5])
def test_an_input_that_is_no_mapping(tiny_engine: Engine, kind: Any) -> None:
    with pytest.raises(RequestError, match="input"):
        tiny_engine.predict(kind)


def test_allow_local_false_takes_what_the_wire_can_carry(tiny_engine: Engine, ask: Ask) -> None:
    given = ask(num_inference_steps=1)
    for name in ("image", "mask"):
        file = io.BytesIO()
        given[name].save(file, "PNG")
        encoded = base64.b64encode(file.getvalue()).decode()
        given[name] = f"data:image/png;base64,{encoded}"
    prediction = tiny_engine.predict(given, allow_local=False)
    local = tiny_engine.predict(ask(num_inference_steps=1))
    assert prediction.images[0].tobytes() == local.images[0].tobytes()
    assert prediction.input["image"].startswith("data:")


def poison_from(engine: Engine, monkeypatch: pytest.MonkeyPatch, call: int, value: float) -> None:
    """From the given evaluation on, the UNet's first output number is `value`."""
    unet, calls = networks(engine).unet, [0]
    original = unet.step

    def step(*args: Any) -> Tensor:
        output = original(*args)
        calls[0] += 1
        if calls[0] >= call:
            output[0, 0, 0, 0] = value
        return output

    monkeypatch.setattr(unet, "step", step)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("call", [1, 3])
def test_a_network_that_breaks_is_an_error_that_names_the_step(
    tiny_engine: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch, call: int, value: float
) -> None:
    poison_from(tiny_engine, monkeypatch, call, value)
    with pytest.raises(NonFiniteError, match=f"step {call} of 5 .*float16") as caught:
        tiny_engine.predict(ask(num_inference_steps=5, scheduler="DDIM", num_outputs=2))
    assert caught.value.step == call - 1


@pytest.mark.parametrize("stage", ["encode_text", "encode_image", "decode"])
def test_other_networks_that_break_are_errors_too(
    spied_engine: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    original = getattr(spied_engine.runtime, stage)
    monkeypatch.setattr(spied_engine.runtime, stage, lambda array: original(array) * np.float32(np.nan))
    network = {"encode_text": "text encoder", "encode_image": "autoencoder's encoder", "decode": "decoded"}
    with pytest.raises(NonFiniteError, match=network[stage]) as caught:
        spied_engine.predict(ask())
    assert caught.value.step == -1


def test_the_engine_runs_on_any_runtime(spied_engine: Engine, ask: Ask) -> None:
    spied_engine.predict(ask(num_outputs=2))
    hoisted = decoded(spied_engine)
    unet = networks(spied_engine).unet

    def forward(*arrays: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            output: npt.NDArray[np.float32] = unet(*map(torch.from_numpy, arrays)).numpy()
        return output

    spy: Any = spied_engine.runtime
    spy.open = lambda size, capacity: NetworkBatch(forward, capacity=capacity, lane_timesteps=False)
    spied_engine.predict(ask(num_outputs=2))
    assert np.abs(decoded(spied_engine) - hoisted).max() <= FLOAT_TOLERANCE


def test_eight_threads_get_the_pictures_of_sequential_runs(tiny_engine: Engine, ask: Ask) -> None:
    schedulers = ["DDIM", "K_EULER", "K_EULER_ANCESTRAL", "PNDM"] * 2
    requests = [
        ask(seed=i, scheduler=scheduler, prompt="a cat" * (i % 3), num_inference_steps=2 + i % 2)
        for i, scheduler in enumerate(schedulers)
    ]
    sequential = [tiny_engine.predict(given) for given in requests]
    gate = threading.Barrier(8)

    def call(given: dict[str, Any]) -> Prediction:
        gate.wait(60)
        return tiny_engine.predict(given)

    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(call, requests))
    for ours, theirs, given in zip(parallel, sequential, requests, strict=True):
        assert ours.images[0].tobytes() == theirs.images[0].tobytes()
        assert ours.logs.startswith(f"Using seed: {given['seed']}\n")
    assert len({prediction.id for prediction in parallel}) == 8


def test_a_closed_engine_refuses(tiny_checkpoint: Path, ask: Ask) -> None:
    with ritocco.load(tiny_checkpoint, dtype="float32") as engine:
        assert engine.predict(ask(num_inference_steps=1)).status == "succeeded"
    with pytest.raises(BackendError, match="closed"):
        engine.predict(ask())
    engine.close()


@pytest.mark.parametrize(("device", "given_back"), [("cuda:0", 1), ("cpu", 0)])
def test_a_closed_engine_gives_the_drivers_memory_back(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, device: str, given_back: int
) -> None:
    """Once nothing of the runtime is left that could hold it."""
    engine = ritocco.load(tiny_checkpoint, device="cpu", dtype="float32", backend="torch")
    engine.traits = replace(engine.traits, device=device)
    runtime: Any = engine.runtime
    parameter = weakref.ref(next(runtime.unet.parameters()))
    del runtime
    left: list[object] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append(parameter()))
    engine.close()
    assert left == [None] * given_back


def test_a_device_that_is_lost_keeps_no_engine_from_being_closed(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ritocco.load(tiny_checkpoint, device="cpu", dtype="float32", backend="torch")
    engine.traits = replace(engine.traits, device="cuda:0")

    def lost() -> None:
        assert capturing.locked(), "nothing is captured meanwhile, on other devices either"
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    engine.close()
    assert "torch keeps memory that nobody uses (CUDA error: an illegal" in caplog.text
    assert not capturing.locked()
    with pytest.raises(BackendError, match="closed"):
        engine.plan()


def test_closing_between_a_requests_check_and_its_turn_is_a_clear_error(
    tiny_checkpoint: Path, ask: Ask
) -> None:
    engine, given = ritocco.load(tiny_checkpoint, dtype="float32"), ask()
    encoded = io.BytesIO()
    given["image"].save(encoded, "PNG")

    class ClosesTheEngine(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            engine.close()
            return super().read(size)

    with pytest.raises(BackendError, match="closed"):
        engine.predict(given | {"image": ClosesTheEngine(encoded.getvalue())})


def test_close_waits_for_the_running_prediction(tiny_checkpoint: Path, ask: Ask) -> None:
    engine = ritocco.load(tiny_checkpoint, dtype="float32")
    closer = threading.Thread(target=engine.close)

    def close_elsewhere(done: int, total: int) -> None:
        if done == 1:
            closer.start()

    assert engine.predict(ask(num_inference_steps=3), on_step=close_elsewhere).status == "succeeded"
    closer.join(60)
    with pytest.raises(BackendError, match="closed"):
        engine.predict(ask())


def test_predict_changes_no_global_state(tiny_engine: Engine, ask: Ask) -> None:
    def state() -> list[Any]:
        return [
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.random.get_rng_state().tolist(),
            np.random.get_state(legacy=False)["state"]["key"].tolist(),  # noqa: NPY002 - the global one is meant
            random.getstate(),
        ]

    before = state()
    tiny_engine.predict(ask(scheduler="K_EULER_ANCESTRAL", num_outputs=2))
    assert state() == before


class Flagger(SafetyChecker):
    """Flags the pictures of these indices, and keeps what it was shown."""

    def __init__(self, *flagged: int) -> None:
        self.flagged = flagged
        self.shown: list[Pixels] = []

    def flag(self, images: Pixels) -> list[bool]:
        self.shown.append(images)
        return [i in self.flagged for i in range(len(images))]


@pytest.fixture
def guarded(tiny_checkpoint: Path, tiny_engine: Engine) -> Callable[..., Engine]:
    """An engine whose safety checker flags the outputs of these indices."""
    checkpoint = open_checkpoint(tiny_checkpoint)

    def make(flagger: Flagger) -> Engine:
        return Engine(tiny_engine.runtime, load_tokenizer(checkpoint), checkpoint.scheduler, safety=flagger)

    return make


def test_flagged_pictures_are_dropped(guarded: Callable[..., Engine], tiny_engine: Engine, ask: Ask) -> None:
    flagger, given = Flagger(0, 2), ask(num_outputs=4)
    prediction, everything = guarded(flagger).predict(given), tiny_engine.predict(given)
    assert prediction.status == "succeeded"
    assert prediction.output is not None
    assert [image.tobytes() for image in prediction.images] == [
        everything.images[i].tobytes() for i in (1, 3)
    ]
    assert [opened(uri).tobytes() for uri in prediction.output] == [i.tobytes() for i in prediction.images]
    assert "NSFW content detected in 2 of 4 outputs; dropped" in prediction.logs
    # It judges what the user would see, kept pixels included.
    np.testing.assert_array_equal(flagger.shown[0], np.stack(arrays(everything)))


def test_all_flagged_is_a_failed_prediction(guarded: Callable[..., Engine], ask: Ask) -> None:
    prediction = guarded(Flagger(0, 1)).predict(ask(num_outputs=2))
    assert prediction.status == "failed"
    assert prediction.error == NSFW_ERROR
    assert prediction.error.startswith("NSFW content detected. Try running it again")
    assert prediction.output is None
    assert prediction.images == []


def test_the_checker_can_be_switched_off(guarded: Callable[..., Engine], ask: Ask) -> None:
    flagger = Flagger(0)
    prediction = guarded(flagger).predict(ask(disable_safety_checker=True))
    assert prediction.status == "succeeded"
    assert flagger.shown == []


def test_a_checkpoints_own_checker_runs(
    tiny_safety_checkpoint: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ritocco.load(tiny_safety_checkpoint, dtype="float32")
    shown = []
    original = SafetyChecker.flag

    def flag(self: SafetyChecker, images: Pixels) -> list[bool]:
        shown.append(len(images))
        return original(self, images)

    monkeypatch.setattr(SafetyChecker, "flag", flag)
    prediction = engine.predict(ask(num_outputs=2, num_inference_steps=1))
    assert shown == [2]
    assert prediction.status == "succeeded"
    assert len(prediction.images) == 2
    assert "safety checker" not in prediction.logs


def test_no_picture_escapes_the_checker_through_close(guarded: Callable[..., Engine], ask: Ask) -> None:
    flagger = Flagger(0)
    engine = guarded(flagger)
    runtime, original = engine.runtime, engine.runtime.decode
    closer = threading.Thread(target=engine.close)

    def decode(latents: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        closer.start()  # it waits for the device, which it gets before the checker does
        return original(latents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "decode", decode)
        prediction = engine.predict(ask(num_inference_steps=1))
    closer.join(60)
    assert prediction.status == "failed"
    assert len(flagger.shown) == 1


def test_the_default_engine_is_made_once_from_the_environment(
    tiny_checkpoint: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    original = loading.load

    def load(*args: Any, **options: Any) -> Engine:
        loads.append(args)
        return original(*args, dtype="float32", **options)

    monkeypatch.setattr(loading, "_default", None)
    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setenv("RITOCCO_MODEL", str(tiny_checkpoint))
    first = ritocco.predict(ask(num_inference_steps=1))
    second = ritocco.predict(ask(num_inference_steps=1), paste_back=False)
    assert len(loads) == 1
    assert first.version == second.version
    assert first.images[0].tobytes() != second.images[0].tobytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cuda:99"}, "cuda:99"),
        ({"dtype": "float16"}, "float16"),
        ({"backend": "tensorrt"}, "tensorrt"),
    ],
)
def test_load_refuses_what_this_machine_cannot(
    tiny_checkpoint: Path, options: dict[str, str], words: str
) -> None:
    with pytest.raises(BackendError, match=words):
        ritocco.load(tiny_checkpoint, **cast(Any, {"device": "cpu"} | options))


@pytest.mark.parametrize("act", ["predict", "close"])
def test_on_step_can_not_wait_for_its_own_engine(tiny_engine: Engine, ask: Ask, act: str) -> None:
    def on_step(done: int, total: int) -> None:
        if act == "predict":
            tiny_engine.predict(ask())
        else:
            tiny_engine.close()

    with pytest.raises(BackendError, match="on_step"):
        tiny_engine.predict(ask(), on_step=on_step)
    assert tiny_engine.predict(ask()).status == "succeeded"


def test_prompts_are_read_before_the_device_is_asked_for(
    tiny_engine: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    encode, text = tiny_engine._tokenizer.encode, tiny_engine.runtime.encode_text

    def tokens(texts: Any) -> Any:
        order.append(f"tokens, device {'held' if tiny_engine._device.locked() else 'free'}")
        return encode(texts)

    def encoder(ids: Any) -> Any:
        order.append("text encoder")
        return text(ids)

    monkeypatch.setattr(tiny_engine._tokenizer, "encode", tokens)
    monkeypatch.setattr(tiny_engine.runtime, "encode_text", encoder)
    tiny_engine.predict(ask())
    assert order == ["tokens, device free", "text encoder"]
