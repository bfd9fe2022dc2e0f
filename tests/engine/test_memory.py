"""What a request is said to take, beside what torch's allocator handed out for it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ritocco
from ritocco.checkpoint import Checkpoint, open_checkpoint
from ritocco.cli import app
from ritocco.device import onednn_bfloat16
from ritocco.errors import BackendError, CheckpointError, RequestError
from ritocco.high_water import RESERVE_BYTES
from ritocco.known import KNOWN, outline
from ritocco.live_memory import Live
from ritocco.loading import pocket_model
from ritocco.memory import PHASES, Rehearsal, Usage
from ritocco.plan_report import planned
from ritocco.plan_verify import allocated, resident
from ritocco.plans import MemoryPlan, Planner, asked_without_pictures, strategies
from ritocco.schema import InputError

HAS_BFLOAT16 = onednn_bfloat16()
# Where oneDNN has no bfloat16 there is nothing to hold a plan against, and `plan` refuses.
FORETOLD = ["float32", *(["bfloat16"] if HAS_BFLOAT16 else [])]
LARGER = (((256, 256), 1), ((512, 384), 2), ((512, 512), 4))
MOST_OVER = 0.02  # of the allocator's peak; never below it
STANDING = 96 << 10  # of oneDNN, which a plan always counts: much beside a network of a megabyte
MOST_BESIDE = 0.1  # of the process's peak, which holds what no allocator knows of


@pytest.fixture(scope="module")
def tiny_float16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in float16, so that weights take memory in float32."""
    from ritocco_bench.folder import make_folder

    return make_folder(tmp_path_factory.mktemp("memory") / "tiny", "tiny")


def usage(checkpoint: Checkpoint, *, dtype: torch.dtype, **asked: Any) -> Usage:
    return Rehearsal(checkpoint, dtype=dtype).usage(**asked)


def assert_foretold(
    model: Path, dtype: str, size: tuple[int, int], count: int, budget: int | None = None, **changes: object
) -> MemoryPlan:
    width, height = size
    given = {"width": width, "height": height, "num_outputs": count, "num_inference_steps": 3, **changes}
    fields, plan = planned(model, given, dtype=dtype, variant=None, tokenizer=None, budget=budget)
    assert plan.dtype == dtype
    taken = allocated(model, fields, dtype=dtype, memory_budget=budget)
    said = plan.usage
    assert tuple(said.phases) == tuple(taken)
    assert tuple(taken)[: len(PHASES)] == PHASES
    for name, most in taken.items():
        assert said.phases[name].most >= most, name
    peak = max(taken.values())
    phase, foretold = said.peak
    # Two phases may be so near that either is the highest within what a plan may be over.
    assert (1 + MOST_OVER) * taken[phase] + STANDING >= peak
    assert foretold.most <= (1 + MOST_OVER) * peak + STANDING
    return plan


@pytest.mark.parametrize("dtype", FORETOLD)
@pytest.mark.parametrize(
    ("size", "count"),
    [((64, 64), 1), ((256, 128), 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGER)],
)
def test_the_embedded_models_peak_is_foretold(size: tuple[int, int], count: int, dtype: str) -> None:
    assert_foretold(pocket_model(), dtype, size, count)


@pytest.mark.slow
def test_the_same_request_takes_the_same_whatever_was_asked_before(tiny_float16: Path) -> None:
    checkpoint = open_checkpoint(tiny_float16)
    small: dict[str, Any] = {"height": 64, "width": 64}
    large: dict[str, Any] = {"height": 256, "width": 256, "num_outputs": 4}
    rehearsal = Rehearsal(checkpoint, dtype=torch.float32)
    first = rehearsal.usage(**small)
    rehearsal.usage(**large)
    assert rehearsal.usage(**small) == first
    assert all(phase.moment != "what was held before" for phase in first.phases.values())
    movable = Rehearsal(checkpoint, dtype=torch.float32, movable=True)
    ways: list[dict[str, Any]] = [{"at_once": one.at_once, "leaving": one.leaving} for one in strategies(1)]
    forth = [movable.usage(**small, **way) for way in ways]
    other = Rehearsal(checkpoint, dtype=torch.float32, movable=True)
    assert [other.usage(**small, **way) for way in reversed(ways)] == forth[::-1]


def test_latents_are_held_until_their_pictures_are_decoded(tiny_float16: Path) -> None:
    """Of as many pixels, so that decoding itself takes alike."""
    rehearsal = Rehearsal(open_checkpoint(tiny_float16), dtype=torch.float32)
    taken = [
        rehearsal.usage(height=256, width=256, num_outputs=count).phases["decode"].most for count in (3, 4)
    ]
    picture, lane = 4 * 3 * 256 * 256, 4 * 4 * (1 + 3) * 32 * 32  # its latents and three steps of history
    assert taken[1] - taken[0] == picture + lane


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FORETOLD)
@pytest.mark.parametrize(("size", "count"), [((256, 256), 1), ((256, 128), 4), ((384, 256), 2)])
def test_a_full_size_models_peak_is_foretold(
    size: tuple[int, int], count: int, dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from ritocco_bench.folder import make_folder

    model = make_folder(tmp_path_factory.getbasetemp() / "full", "full")
    assert_foretold(model, dtype, size, count)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", FORETOLD)
def test_three_pictures_of_the_full_size_are_foretold(
    dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from ritocco_bench.folder import make_folder

    model = make_folder(tmp_path_factory.getbasetemp() / "full", "full")
    assert_foretold(model, dtype, (512, 512), 3, num_inference_steps=2)


def test_pictures_and_masks_lie_on_a_gpu_as_bytes(tiny_float16: Path) -> None:
    rehearsal = Rehearsal(open_checkpoint(tiny_float16), dtype=torch.float16, device="cuda")
    asked: dict[str, Any] = {"height": 256, "width": 192, "course": True}
    found = [rehearsal.usage(**asked, num_outputs=count).phases for count in (3, 4)]
    pixels = 256 * 192
    # A picture that is made, and whether all of it was finite.
    assert found[1]["decode"].most - found[0]["decode"].most == 3 * pixels + 4
    for phase, parts in (("encode", (pixels, 3 * pixels, 2 * 3 * pixels)), ("decode", (3 * pixels, pixels))):
        course = found[0][phase].course
        before = course[0] - parts[0]
        assert course[: len(parts)] == tuple(before + sum(parts[: i + 1]) for i in range(len(parts)))


@pytest.mark.slow
def test_the_unet_alone_stays_where_that_takes_less() -> None:
    """At the text, where most is held, the autoencoder is away; less is read again than of all."""
    rehearsal = Rehearsal(outline("sd2-inpainting"), dtype=torch.float16, device="cuda", movable=True)
    planner = Planner(lambda: rehearsal, device="cuda", dtype="float16", budget=1)
    fields = asked_without_pictures({"width": 512, "height": 512})
    ways = strategies(1)
    taken = [
        rehearsal.usage(height=512, width=512, at_once=1, leaving=one.leaving).peak[1].most for one in ways
    ]
    assert taken == sorted(taken, reverse=True)
    plans = []
    for planner.budget in taken:
        plans.append(planner.plan(fields))
    assert [one.strategy for one in plans] == list(ways)
    again = [one.read_again for one in plans]
    assert again == sorted(set(again))


def test_a_safety_checker_is_foretold(tiny_safety_checkpoint: Path) -> None:
    judged = assert_foretold(tiny_safety_checkpoint, "float32", (64, 64), 2)
    assert tuple(judged.usage.phases) == (*PHASES, "safety")
    assert judged.usage.weights["safety_checker"] > 0
    unjudged = assert_foretold(tiny_safety_checkpoint, "float32", (64, 64), 2, disable_safety_checker=True)
    assert tuple(unjudged.usage.phases) == PHASES


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's count is Linux's")
@pytest.mark.parametrize(
    ("size", "count"),
    [((256, 256), 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (*LARGER, ((1024, 512), 1)))],
)
def test_the_process_holds_that_and_the_reserve(size: tuple[int, int], count: int) -> None:
    assert_resident(pocket_model(), size, count)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's count is Linux's")
@pytest.mark.skipif(not HAS_BFLOAT16, reason="oneDNN has no bfloat16 here")
@pytest.mark.parametrize(("size", "count"), [((256, 256), 1), *LARGER])
def test_the_process_holds_that_in_bfloat16(size: tuple[int, int], count: int) -> None:
    assert_resident(pocket_model(), size, count, dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's count is Linux's")
def test_the_process_holds_no_more_under_a_budget() -> None:
    assert_resident(pocket_model(), (256, 256), 1, budget=120 << 20)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's count is Linux's")
@pytest.mark.parametrize("dtype", FORETOLD)
def test_a_process_of_the_full_size_holds_that_and_the_reserve(
    dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from ritocco_bench.folder import make_folder

    model = make_folder(tmp_path_factory.getbasetemp() / "full", "full")
    assert_resident(model, (256, 256), 1, dtype=dtype)


def assert_resident(
    model: Path, size: tuple[int, int], count: int, budget: int | None = None, dtype: str = "float32"
) -> None:
    given = {"width": size[0], "height": size[1], "num_outputs": count, "num_inference_steps": 3}
    fields, plan = planned(model, given, dtype=dtype, variant=None, tokenizer=None, budget=budget)
    taken = resident(model, fields, dtype=dtype, memory_budget=budget)
    assert taken is not None
    assert tuple(taken) == PHASES
    # While weights are read, the pages of their files are resident too; with a budget they stay mapped.
    peak, phase = max((most, phase) for phase, most in taken.items() if phase != "load")
    mapped = 0 if budget is None else sum(file.stat().st_size for file in model.rglob("*.safetensors"))
    told = plan.usage.phases[phase].most
    beyond = f"{(peak - mapped - told) / 2**20:.1f} MiB beyond a plan of {told / 2**20:.1f}, {phase}"
    assert abs(told + RESERVE_BYTES[dtype] + mapped - peak) <= MOST_BESIDE * peak, beyond


def test_what_was_planned_is_run_however_little_is_free(
    tiny_float16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = asked_without_pictures({"width": 64, "height": 64, "num_inference_steps": 1})
    monkeypatch.setattr("ritocco.free_memory.free_bytes", lambda device: 1000)
    with pytest.raises(BackendError, match="are free, of which"):
        ritocco.load(tiny_float16, device="cpu", dtype="float32", backend="torch")
    assert allocated(tiny_float16, fields, dtype="float32")["load"] > 0


def test_the_high_water_is_of_a_phase() -> None:
    script = """
from ritocco.high_water import HighWater
watch = HighWater()
watch.begin("one")
held = bytearray(64 << 20)
del held
watch.begin("two")
held = bytearray(16 << 20)
watch.begin("one")
watch.end()
print(watch.most["one"], watch.most["two"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    one, two = map(int, done.stdout.split())
    assert 60 << 20 < one < 80 << 20
    assert 12 << 20 < two < 32 << 20


def test_a_process_that_fails_is_an_error(tmp_path: Path) -> None:
    fields = asked_without_pictures({})
    with pytest.raises(BackendError, match=r"failed in a process of its own: .*no such file or folder"):
        resident(tmp_path / "nowhere", fields, dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "whole", "smallest"), [((512, 1), 3.0, 1.85), ((1024, 4), 4.1, 2.1)])
def test_the_full_size_fits_on_small_gpus(asked: tuple[int, int], whole: float, smallest: float) -> None:
    """In GiB, by plan, without the model's weights."""
    side, count = asked
    rehearsal = Rehearsal(outline("sd2-inpainting"), dtype=torch.float16, device="cuda", movable=True)
    ways = strategies(count)
    taken = [
        rehearsal.usage(height=side, width=side, num_outputs=count, at_once=way.at_once, leaving=way.leaving)
        for way in (ways[0], ways[-1])
    ]
    assert [one.peak[1].most <= most * 2**30 for one, most in zip(taken, (whole, smallest), strict=True)] == [
        True,
        True,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("size", [(1024, 1024), (64, 1024), (64, 64)])
def test_the_smallest_strategy_is_bound_by_the_loop(name: str, size: tuple[int, int]) -> None:
    """As large as the UNet, on a GPU: decoding in tiles, which is not exact, would not lower it."""
    rehearsal = Rehearsal(outline(name), dtype=torch.float16, device="cuda", movable=True)
    way = strategies(1)[-1]
    found = rehearsal.usage(
        height=size[0], width=size[1], guided=False, at_once=way.at_once, leaving=way.leaving
    )
    assert found.peak[0] == "denoise"


def test_without_guidance_less_is_held() -> None:
    assert_foretold(pocket_model(), FORETOLD[-1], (256, 256), 1, guidance_scale=1.0)
    checkpoint = open_checkpoint(pocket_model())
    each = [
        usage(checkpoint, dtype=torch.bfloat16, height=256, width=256, guided=guided).phases["denoise"].most
        for guided in (False, True)
    ]
    assert each[0] < each[1]


def test_weights_are_counted_in_the_dtype_that_they_have_there() -> None:
    checkpoint = open_checkpoint(pocket_model())
    stored = {
        name: sum(torch.Size(one.shape).numel() for one in variants[""].values())
        for name, variants in checkpoint.weights.items()
    }
    for dtype in (torch.float32, torch.bfloat16):
        said = usage(checkpoint, dtype=dtype, height=64, width=64)
        assert said.weights == {name: dtype.itemsize * stored[name] for name in said.weights}
    # Used from the mapped file, they take none of the allocator's memory.
    said = usage(checkpoint, dtype=torch.float16, height=64, width=64)
    assert said.phases["load"].most < 200_000


def test_nothing_is_read_or_computed_and_no_rule_of_the_process_changes(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_checkpoint(tiny_checkpoint)
    missing = replace(opened, path=None, weights=_elsewhere(opened))
    monkeypatch.setattr("ritocco.backends.host_memory._glibc", _refused)
    monkeypatch.setattr("ritocco.parameters.safe_open", _refused)
    assert usage(missing, dtype=torch.float32, height=64, width=64).peak[1].most > 0


def _refused(*_: object, **__: object) -> None:
    raise AssertionError("called")


def _elsewhere(checkpoint: Checkpoint) -> Any:
    gone = Path("nowhere.safetensors")
    return {
        network: {
            variant: {name: replace(one, file=gone) for name, one in tensors.items()}  # type: ignore[type-var]
            for variant, tensors in variants.items()
        }
        for network, variants in checkpoint.weights.items()
    }


def test_views_and_sums_in_place_take_nothing() -> None:
    with Live() as live:
        one = torch.zeros(1000)
        assert live.now == 4000
        other = one.view(10, 100)[2:].t()
        one.add_(1)
        assert live.now == live.most == 4000
        third = one + 1
        assert (live.now, live.most, live.moment) == (8000, 8000, "add")
        del one
        assert live.now == 8000  # `other` has it
        del other
        assert live.now == 4000
        live.begin()
        third.mul_(2)
        assert live.most == 4000
    del third
    assert live.now == 0


def test_the_tracker_counts_what_is_allocated_inside() -> None:
    script = """
import torch
from ritocco.track import Tracker
kept = torch.zeros(1000)
with Tracker() as tracker:
    tracker.begin("one")
    a = torch.zeros(1 << 20, dtype=torch.uint8)
    b = torch.zeros(1 << 20, dtype=torch.uint8)
    del a
    tracker.begin("two")
    c = b + 1
    del b
    tracker.begin("one")
    d = torch.zeros(1 << 18, dtype=torch.uint8)
print(*(tracker.most[name] for name in ("one", "two")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # The mark of a phase takes a few bytes itself.
    assert all(2 << 20 <= int(most) < (2 << 20) + 100 for most in done.stdout.split())


def test_the_safety_checker_of_a_known_model_is_counted() -> None:
    """CLIP ViT-L/14's vision tower, with its projection: 303,966,208 numbers."""
    assert outline("sd2-inpainting").safety_checker is None
    known = outline("sd1.5-inpainting")
    assert known.safety_checker is not None
    tensors = known.weights["safety_checker"][""]
    learned = sum(math.prod(one.shape) for name, one in tensors.items() if "_embeds" not in name)
    assert learned == 303_966_208


def test_the_command_says_it_for_people_and_for_programs(tiny_checkpoint: Path) -> None:
    words = [
        "plan",
        "--model",
        str(tiny_checkpoint),
        "--width",
        "64",
        "--height",
        "128",
        "--num-outputs",
        "2",
    ]
    told = CliRunner().invoke(app, [*words, "--dtype", "float32"])
    assert told.exit_code == 0
    lines = told.stdout.splitlines()
    assert lines[0] == "2 pictures of 64 x 128 on torch, cpu, float32"
    assert [line.split()[0] for line in lines[3:9]] == ["phase", *PHASES]
    as_json = CliRunner().invoke(app, [*words, "--json", "--verify"])
    held = json.loads(as_json.stdout)
    assert (held["width"], held["height"], held["num_outputs"]) == (64, 128, 2)
    assert set(held["weights"]) == {"unet", "vae", "text_encoder"}
    assert held["phases"][held["peak_phase"]]["bytes"] == held["peak_bytes"]
    for name, phase in held["phases"].items():
        # Loading takes nothing where the weights are used as they are stored.
        assert name == "load" or phase["measured_bytes"] > 0
        assert phase["measured_bytes"] <= phase["bytes"]
        assert phase["resident_bytes"] > 0
    assert held["resident_reserve_bytes"] == RESERVE_BYTES[held["dtype"]]
    assert held["budget_bytes"] is held["next_larger_budget"] is held["next_smaller_budget"] is None
    assert held["pictures_that_share_a_step"] is None
    assert (held["read_again_bytes"], held["read_again_seconds"]) == (0, 0)


BUDGETED = ["plan", "--width", "64", "--height", "64", "--num-outputs", "2", "--num-inference-steps", "2"]


@pytest.mark.slow
def test_the_command_tells_programs_of_budgets(tiny_float16: Path) -> None:
    """Of the next larger and smaller ones as well, which lead to those strategies."""
    words = [*BUDGETED, "--model", str(tiny_float16), "--dtype", "float32", "--json", "--budget"]

    def told(budget: int) -> dict[str, Any]:
        done = CliRunner().invoke(app, [*words, str(budget)])
        assert done.exit_code == 0, done.exception
        found: dict[str, Any] = json.loads(done.stdout)
        assert found["budget_bytes"] == budget >= found["peak_bytes"]
        return found

    first = told(1 << 34)
    assert first["strategy"] == {"at_once": 2, "leaving": []}
    assert (first["next_larger_budget"], first["read_again_bytes"]) == (None, 0)
    assert first["pictures_that_share_a_step"] == 8
    smaller = first["next_smaller_budget"]
    second = told(first["peak_bytes"] - 1)
    assert second["peak_bytes"] == smaller["bytes"] < first["peak_bytes"]
    assert {"bytes": smaller["bytes"], **second["strategy"]} == smaller
    assert second["next_larger_budget"] == {"bytes": first["peak_bytes"], "at_once": 2, "leaving": []}
    weights, comes = second["weights"], {"text_encoder": 1, "vae": 2, "unet": 1}
    leaving = second["strategy"]["leaving"]
    assert second["read_again_bytes"] == sum(comes[name] * weights[name] for name in leaving)
    assert second["read_again_seconds"] == (None if leaving else 0)


@pytest.mark.slow
def test_the_command_runs_what_keeps_to_a_budget() -> None:
    planned_first = CliRunner().invoke(app, [*BUDGETED, "--dtype", "float32", "--json", "--budget", "1GiB"])
    budget = json.loads(planned_first.stdout)["next_smaller_budget"]["bytes"]
    told = CliRunner().invoke(
        app, [*BUDGETED, "--dtype", "float32", "--json", "--verify", "--budget", str(budget)]
    )
    assert told.exit_code == 0, told.exception
    found = json.loads(told.stdout)
    for phase in found["phases"].values():
        assert phase["measured_bytes"] <= phase["bytes"] <= found["budget_bytes"] == budget
        assert phase["resident_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["--width", "100"], InputError, "input.width is 100"),
        (["--num-outputs", "9"], InputError, "input.num_outputs is 9"),
        (["--scheduler", "euler"], InputError, "input.scheduler is 'euler'"),
        (["--dtype", "int8"], RequestError, "dtype is 'int8'"),
        (["--dtype", "float16"], BackendError, "float16"),
        (["--model", "nowhere"], CheckpointError, "known by name (sd2-inpainting, sd1.5-inpainting)"),
        (
            ["--model", "sd2-inpainting", "--width", "64", "--height", "64", "--verify"],
            RequestError,
            "weights",
        ),
    ],
)
def test_what_can_not_be_planned(words: list[str], error: type[Exception], said: str) -> None:
    result = CliRunner().invoke(app, ["plan", *words])
    assert isinstance(result.exception, error)
    assert said in str(result.exception)


def test_bfloat16_has_no_plan_without_onednn(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ritocco.device.onednn_bfloat16", lambda: False)
    for words, failed in ((["--dtype", "bfloat16"], True), (["--dtype", "float32"], False)):
        result = CliRunner().invoke(app, ["plan", "--model", str(tiny_checkpoint), *words])
        assert isinstance(result.exception, BackendError) == failed
    monkeypatch.undo()
    asked = CliRunner().invoke(app, ["plan", "--model", str(tiny_checkpoint), "--dtype", "bfloat16"])
    assert (asked.exit_code == 0) == HAS_BFLOAT16


def test_graphs_have_no_plan_on_torch(tiny_graphs: Path) -> None:
    with pytest.raises(RequestError, match="exported graphs; see graph_report"):
        planned(tiny_graphs, {}, dtype="auto", variant=None, tokenizer=None)
    with pytest.raises(BackendError, match="memory_budget is for checkpoints on torch"):
        ritocco.load(tiny_graphs, memory_budget="8GiB")
    with (
        ritocco.load(tiny_graphs, backend="onnxruntime") as engine,
        pytest.raises(BackendError, match="this engine has no plans"),
    ):
        engine.plan()
