"""Budgets of memory: the strategy that is taken, and that it is kept to."""

from __future__ import annotations

import gc
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import ritocco
from ritocco import BackendError, RequestError
from ritocco.backends.torch_ import TorchRuntime
from ritocco.byte_sizes import mib_down, mib_up, parse_budget
from ritocco.checkpoint import open_checkpoint
from ritocco.cli import app
from ritocco.device_loop import DeviceLoop
from ritocco.memory import Phase, Rehearsal, Usage
from ritocco.parameters import MemoryTensor, without_tensors
from ritocco.plan_report import as_json, as_text, planned
from ritocco.plan_verify import allocated
from ritocco.plans import MemoryPlan, Planner, Strategy, strategies
from ritocco.schema import PredictionInput, parse_input
from ritocco.step_times import StepTimes
from ritocco.track import Tracker
from virtual_runtime import PATIENCE

PIXELS = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
MASK = Image.fromarray(np.where(np.arange(64) < 32, 255, 0).astype(np.uint8)[None].repeat(64, axis=0))
ASKED = {"image": Image.fromarray(PIXELS), "mask": MASK, "prompt": "a cup", "seed": 7}
LARGER = {"width": 128, "height": 192, "num_outputs": 2, "num_inference_steps": 2}


@pytest.mark.parametrize(
    ("budget", "size"),
    [
        (5, 5),
        (np.int64(5), 5),
        (8e9, 8_000_000_000),
        ("1,021.5 MiB", 1_071_120_384),
        ("5", 5),
        ("1TiB", 1 << 40),
        ("8GiB", 8 << 30),
        ("1.5 gb", 1_500_000_000),
        (" 500MB ", 500_000_000),
        ("2kib", 2048),
    ],
)
def test_budgets_in_bytes_and_in_words(budget: float | str, size: int) -> None:
    assert parse_budget(budget) == size


@pytest.mark.parametrize(
    "budget",
    [
        0,
        -1,
        True,
        1.5,
        "",
        "GiB",
        "8 XB",
        "0",
        "-3GB",
        "nan",
        "1e9",
        None,
        float("inf"),
        float("nan"),
        np.True_,
    ],
)
def test_other_budgets_are_refused(budget: Any) -> None:
    with pytest.raises(
        RequestError, match=r"memory_budget is .*; it must be a whole number of bytes"
    ) as caught:
        parse_budget(budget)
    assert caught.value.field == "memory_budget"


@pytest.mark.parametrize("size", [1, 104_857, 266_338_305, 266_338_304, 266_443_162, 1_071_533_000])
def test_what_is_said_to_be_needed_is_enough(size: int) -> None:
    assert 0 <= parse_budget(mib_up(size)) - size < 2**20 / 10
    assert 0 <= size - 2**20 / 10 * round(10 * float(mib_down(size).replace(",", "")[:-4])) < 2**20 / 10


def test_strategies_go_from_the_one_that_costs_nothing_to_the_smallest() -> None:
    found = [(one.at_once, one.leaving) for one in strategies(4)]
    assert found == [(count, leaving) for leaving in (NONE, TEXT, OTHERS, ALL) for count in (4, 2, 1)]
    assert [one.at_once for one in strategies(3)] == [3, 2, 1] * 4
    said = ["the UNet in memory, the others when they are needed", "one network at a time in memory"]
    assert [str(one) for one in strategies(1)[2:]] == [f"{who}, one picture at once" for who in said]


Way = tuple[int, tuple[str, ...]]
NONE: tuple[str, ...] = ()
TEXT = ("text_encoder",)
OTHERS = ("text_encoder", "vae")
ALL = ("text_encoder", "vae", "unet")


class Made:
    """Of a runtime whose weights take 100, without the text encoder 85, the UNet and who is needed beside it
    78, one network 60, and each picture 10 of what is computed.
    """

    WEIGHTS: Mapping[tuple[str, ...], int] = {NONE: 100, TEXT: 85, OTHERS: 78, ALL: 60}

    def __init__(self) -> None:
        self.asked = 0

    def usage(
        self, *, num_outputs: int, at_once: int | None = None, leaving: tuple[str, ...] = (), **_: Any
    ) -> Usage:
        self.asked += 1
        most = self.WEIGHTS[leaving] + 10 * (at_once or num_outputs)
        weights = {"unet": 60, "vae": 10, "text_encoder": 30}
        return Usage(weights=weights, phases={"denoise": Phase(most=most, moment="cat")})

    def together(self, *, lanes: int, rows: int, leaving: tuple[str, ...], **_: Any) -> Phase:
        self.asked += 1
        most = self.WEIGHTS[leaving] + (12 + rows // 50) * lanes
        return Phase(most=most, moment="cat")


def asked_for(**given: Any) -> PredictionInput:
    return parse_input({**ASKED, **given}, allow_local=True)[0]


@pytest.mark.parametrize(
    ("budget", "strategy", "more", "less"),
    [
        (140, (4, NONE), None, (120, (2, NONE))),
        (139, (2, NONE), (140, (4, NONE)), (110, (1, NONE))),
        (119, (1, NONE), (120, (2, NONE)), (105, (2, TEXT))),
        (109, (2, TEXT), (110, (1, NONE)), (95, (1, TEXT))),
        (104, (1, TEXT), (105, (2, TEXT)), (88, (1, OTHERS))),
        (94, (1, OTHERS), (95, (1, TEXT)), (80, (2, ALL))),
        (87, (2, ALL), (88, (1, OTHERS)), (70, (1, ALL))),
        (70, (1, ALL), (80, (2, ALL)), None),
    ],
)
def test_the_first_strategy_that_fits_is_taken(
    budget: int, strategy: Way, more: tuple[int, Way] | None, less: tuple[int, Way] | None
) -> None:
    made = Made()
    seconds: dict[str, float] = {}
    planner = Planner(lambda: made, device="cpu", dtype="float32", budget=budget, came_in=lambda: seconds)
    fields, *_ = parse_input({**ASKED, "num_outputs": 4}, allow_local=True)
    plan = planner.explained(fields)
    assert (plan.strategy.at_once, plan.strategy.leaving) == strategy
    for found, said in ((plan.more, more), (plan.less, less)):
        assert (found and (found[0], (found[1].at_once, found[1].leaving))) == said
    assert plan.read_again == {NONE: 0, TEXT: 30, OTHERS: 50, ALL: 110}[strategy[1]]
    assert plan.read_again_seconds == (0 if strategy[1] == NONE else None)
    seconds.update(text_encoder=0.5, vae=1, unet=2)
    before = made.asked
    again = planner.plan(fields)
    assert made.asked == before
    assert again.strategy == plan.strategy
    assert again.read_again_seconds == {NONE: 0, TEXT: 0.5, OTHERS: 2.5, ALL: 4.5}[strategy[1]]
    for one, told in (
        (plan, "request, which an engine times when they come first"),
        (again, f"request, which took {again.read_again_seconds} s when they came last"),
    ):
        assert (told in as_text(one)) == (strategy[1] != NONE)
    calls = 4 // strategy[0]
    assert (f"cost: a step is {calls} calls of the UNet instead of one" in as_text(plan)) == (calls > 1)
    assert as_json(plan)["calls_per_step"] == calls
    planner.explained(fields)
    assert made.asked == before


@pytest.mark.parametrize(
    ("device", "budget", "graphs"), [("cuda", None, True), ("cuda", 140, False), ("cpu", None, None)]
)
def test_it_is_said_whether_steps_are_captured(device: str, budget: int | None, graphs: bool | None) -> None:
    planner = Planner(Made, device=device, dtype="float16", budget=budget)
    plan = planner.explained(asked_for())
    assert as_json(plan)["cuda_graphs"] is graphs
    told = {True: "CUDA graphs: on", False: "CUDA graphs: off, as under every budget"}
    assert [line for line in as_text(plan).splitlines() if line.startswith("CUDA graphs")] == (
        [] if graphs is None else [told[graphs]]
    )


def test_the_reserve_is_said_where_a_process_was_measured() -> None:
    plan = Planner(Made, device="cpu", dtype="float32").explained(asked_for())
    said = "resident: 32.0 MiB beyond the allocator's are expected, which is no bound"
    assert said not in as_text(plan, {"denoise": 1})
    assert said in as_text(plan, {"denoise": 1}, {"denoise": 2})


@pytest.mark.parametrize(
    ("budget", "given", "most"),
    [
        (204, {}, 8),
        (203, {}, 4),
        (283, {"num_inference_steps": 51}, 8),
        (204, {"num_inference_steps": 51}, 4),
        (152, {}, 4),
        (151, {}, 2),
        (125, {}, 1),
        (152, {"num_outputs": 3}, 4),
        (151, {"num_outputs": 3}, 2),
        (129, {"num_outputs": 3}, 1),
        (70, {}, 1),
        (69, {}, 1),
    ],
    ids=str,
)
def test_as_many_lanes_share_a_step_as_the_budget_bears(
    budget: int, given: dict[str, Any], most: int
) -> None:
    made = Made()
    planner = Planner(lambda: made, device="cpu", dtype="float32", budget=budget)
    fields = asked_for(**given)
    assert planner.together(fields, 8) == most
    asked = made.asked
    assert planner.together(fields, 8) == most
    assert made.asked == asked, "kept"
    if budget > 69:  # where it fits at all
        told = planner.explained(fields)
        assert told.together == most
        alone = f"a step of up to {most} pictures" if most > fields.num_outputs else "no step"
        assert f"in a Batcher it shares {alone} with others of its size" in as_text(told)
    planner.budget = None
    assert planner.together(fields, 8) == 8


def test_who_is_planned_already_is_followed_while_another_is_planned() -> None:
    followed: list[int] = []
    begun, go = threading.Event(), threading.Event()
    made = Made()
    planner = Planner(
        lambda: made,
        device="cpu",
        dtype="float32",
        budget=204,
        follow=lambda height, width, way: followed.append(height),
    )
    planner.plan(asked_for(height=64))

    def slow(**_: Any) -> Phase:
        begun.set()
        assert go.wait(60)
        return Phase(most=1, moment="cat")

    made.together = slow  # type: ignore[method-assign]
    company = threading.Thread(target=planner.together, args=(asked_for(height=64), 8))
    company.start()
    try:
        assert begun.wait(60)
        planner.follow(asked_for(height=64))
        assert followed == [64]
    finally:
        go.set()
        company.join(60)


def test_requests_that_share_a_step_are_followed_as_one() -> None:
    """All lanes at once; away is what any of them has to have away."""
    followed: list[tuple[int, int, Strategy]] = []
    planner = Planner(
        lambda: Made(),
        device="cpu",
        dtype="float32",
        budget=125,
        follow=lambda height, width, way: followed.append((height, width, way)),
    )
    one, pair, four = (asked_for(num_outputs=count, width=128, height=64) for count in (1, 2, 4))
    planner.follow(four)
    planner.follow(one, pair)
    planner.budget = 108
    planner.follow(one, pair)
    assert followed == [
        (64, 128, Strategy(at_once=2)),
        (64, 128, Strategy(at_once=3)),
        (64, 128, Strategy(at_once=3, leaving=TEXT)),
    ]


def test_plans_of_other_step_counts_are_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made()
    planner = Planner(lambda: made, device="cpu", dtype="float32", budget=140)
    for steps, asked in ((31, 1), (50, 1), (47, 1), (51, 2), (500, 3), (301, 3), (1, 4), (2, 4)):
        fields, *_ = parse_input({**ASKED, "num_inference_steps": steps}, allow_local=True)
        planner.plan(fields)
        assert made.asked == asked
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    planner.plan(fields)
    assert made.asked == 5


def test_schedules_of_few_steps_are_planned(tiny: Path) -> None:
    """Steps are rounded up to more than the schedule takes."""
    schedule = {"num_train_timesteps": 80, "prediction_type": "sample"}
    checkpoint = replace(open_checkpoint(tiny), scheduler=schedule)
    planner = Planner(
        lambda: Rehearsal(checkpoint, dtype=torch.float32, movable=True),
        device="cpu",
        dtype="float32",
        budget=1 << 40,
        schedule=schedule,
    )
    size = {"width": 64, "height": 64, "scheduler": "DDIM"}
    taken = [planner.plan(asked_for(**size, num_inference_steps=steps)).least for steps in (2, 80)]
    assert taken[0] < taken[1]
    assert planner.together(asked_for(**size, num_inference_steps=80), 2) == 2
    for steps, scheduler, rule in (
        (81, "DDIM", "num_inference_steps is 81; it is a whole number from 1 to .*, 80"),
        (2, "K_EULER_ANCESTRAL", "this checkpoint's prediction_type is 'sample'"),
    ):
        with pytest.raises(RequestError, match=rule):
            planner.plan(asked_for(**{**size, "scheduler": scheduler}, num_inference_steps=steps))


def test_a_row_that_rounding_adds_is_planned() -> None:
    asked = []
    made = Made()

    def usage(**given: Any) -> Usage:
        asked.append(given["num_inference_steps"])
        return Made.usage(made, **given)

    made.usage = usage  # type: ignore[method-assign]
    schedule = {"num_train_timesteps": 502, "timestep_spacing": "trailing"}
    planner = Planner(lambda: made, device="cpu", dtype="float32", schedule=schedule)
    for scheduler in ("DDIM", "PNDM", "DPMSolverMultistep"):
        asked.clear()
        planner.plan(asked_for(scheduler=scheduler, num_inference_steps=50))
        assert asked == [75], "51 rows"


def test_what_fits_in_no_way_is_refused() -> None:
    made = Made()
    planner = Planner(lambda: made, device="cpu", dtype="float32", budget=69)
    fields, *_ = parse_input({**ASKED, "num_outputs": 4}, allow_local=True)
    for _ in range(2):
        with pytest.raises(RequestError, match=r"4 pictures of 512 x 512 need at least .*\. No picture fits"):
            planner.plan(fields)
        asked = made.asked
    assert made.asked == asked
    with pytest.raises(BackendError, match="the smallest request, one picture of 64 x 64, unguided, takes"):
        planner.refuse_too_little()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in float16, so that weights take memory in float32."""
    from ritocco_bench.folder import make_folder

    return make_folder(tmp_path_factory.mktemp("plans") / "tiny", "tiny")


@pytest.fixture(scope="module")
def switching(tiny: Path) -> dict[Strategy, int]:
    """What each strategy needs for the larger request on the tiny model."""
    rehearsal = Rehearsal(open_checkpoint(tiny), dtype=torch.float32, movable=True)
    found = {}
    for one in strategies(2):
        usage = rehearsal.usage(
            width=128,
            height=192,
            num_outputs=2,
            num_inference_steps=2,
            at_once=one.at_once,
            leaving=one.leaving,
        )
        found[one] = usage.peak[1].most
    return found


def plan_for(model: Path, budget: int) -> tuple[PredictionInput, MemoryPlan]:
    return planned(model, LARGER, dtype="float32", budget=budget, variant=None, tokenizer=None)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_budgets_on_both_sides_of_each_switch_are_kept(tiny: Path, switching: dict[Strategy, int]) -> None:
    assert len(set(switching.values())) > 2
    for budget in sorted({size + change for size in switching.values() for change in (0, -1)}):
        if budget < min(switching.values()):
            with pytest.raises(RequestError, match="pictures of 128 x 192 need at least"):
                plan_for(tiny, budget)
            continue
        fields, plan = plan_for(tiny, budget)
        assert switching[plan.strategy] <= budget
        taken = allocated(tiny, fields, dtype="float32", memory_budget=budget)
        assert max(taken.values()) <= budget


@pytest.mark.slow
def test_the_smallest_budget_is_kept_and_paints_the_same(tiny: Path, switching: dict[Strategy, int]) -> None:
    budget = min(switching.values())
    whole = ritocco.load(tiny, device="cpu", dtype="float32", backend="torch").predict({**ASKED, **LARGER})
    with ritocco.load(tiny, device="cpu", dtype="float32", memory_budget=budget) as engine:
        plan = engine.plan(**LARGER)
        assert plan.strategy.leaving == ALL
        assert plan.least <= budget
        assert engine.plan(width=64, height=64).strategy != plan.strategy
        with Tracker() as tracker:
            tracker.begin("all of it")
            made = engine.predict({**ASKED, **LARGER})
    assert tracker.most["all of it"] <= budget
    assert f"Memory: {plan.strategy}, at most" in (made.logs or "")
    for ours, theirs in zip(made.images, whole.images, strict=True):
        assert np.abs(np.asarray(ours, np.int16) - np.asarray(theirs, np.int16)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lanes", "leaving", "size"),
    [(4, NONE, {"width": 64, "height": 64}), (2, ALL, {"width": 128, "height": 192})],
    ids=["all-stay", "one-at-a-time"],
)
def test_requests_share_steps_within_a_budget(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, lanes: int, leaving: tuple[str, ...], size: dict[str, int]
) -> None:
    """Lanes come and go between steps; what is told is enough, and a byte less is for half as many. The
    tracker sees what comes after it: weights that stay and came before are added.
    """
    rehearsal = Rehearsal(open_checkpoint(tiny), dtype=torch.float32, movable=True)
    budget = rehearsal.together(**size, lanes=lanes, rows=51, leaving=leaving).most
    requests = [{**ASKED, **size, "num_inference_steps": 3, "seed": seed} for seed in range(lanes + 2)]
    tracker, run = Tracker(), DeviceLoop.run

    held: list[int] = []

    def tracked(loop: DeviceLoop) -> None:
        runtime: Any = engine.runtime
        held.extend(
            parameter.nbytes
            for name in runtime.residence._here.difference(leaving)
            for parameter in getattr(runtime, name).parameters()
        )
        with tracker:
            tracker.begin("all of it")
            run(loop)

    monkeypatch.setattr(DeviceLoop, "run", tracked)
    monkeypatch.setattr(StepTimes, "tried", lambda *_: True)
    monkeypatch.setattr(StepTimes, "due", lambda *_: False)
    monkeypatch.setattr(StepTimes, "step", lambda *_: 1.0)  # company costs nothing
    with ritocco.load(tiny, device="cpu", dtype="float32", memory_budget=budget - 1) as engine:
        assert engine.together(asked_for(**size), 8) == lanes // 2
    with ritocco.load(tiny, device="cpu", dtype="float32", memory_budget=budget) as engine:
        assert engine.plan(**size).strategy.leaving == leaving
        assert engine.together(asked_for(**size), 8) == lanes
        pictures = [engine.predict(one).images[0] for one in requests]
        with ritocco.Batcher(engine, capacity=8) as batcher:
            tickets = [batcher.submit(one) for one in requests]
            made = [ticket.result(PATIENCE).images[0] for ticket in tickets]
            shared = batcher.snapshot().steps
    assert max(shared) == lanes
    assert sum(held) == (0 if leaving else sum(rehearsal.weights.values()))
    assert 0.9 * budget < sum(held) + tracker.most["all of it"] <= budget
    for ours, theirs in zip(made, pictures, strict=True):
        assert np.abs(np.asarray(ours, np.int16) - np.asarray(theirs, np.int16)).max() <= 1


def test_a_budget_that_holds_nothing_is_refused_before_weights_are_read(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("ritocco.parameters.safe_open", refused)
    with pytest.raises(BackendError, match=r"memory_budget is 0\.1 MiB; the smallest request"):
        ritocco.load(tiny, device="cpu", dtype="float32", memory_budget=110_000)


@pytest.mark.slow
def test_requests_of_many_sizes_take_no_more_and_more(tiny: Path, switching: dict[Strategy, int]) -> None:
    """The later rounds hold what the first did; networks that came for one request leave for the next."""
    budget = switching[Strategy(at_once=1, leaving=ALL)]
    sizes: list[dict[str, int]] = [{"width": 64, "height": 64, "num_outputs": 1}, dict(LARGER)]
    sizes += [{"width": 192, "height": 64, "num_outputs": 2}]
    with ritocco.load(tiny, device="cpu", dtype="float32", memory_budget=budget) as engine:
        assert engine.memory == {"budget": budget}
        for size in sizes:
            engine.plan(**{"num_inference_steps": 2, **size})
        with Tracker() as tracker:  # one for all: another would take what is left behind for its ground
            for number in range(3):
                tracker.begin(f"round {number}")
                for size in sizes:
                    engine.predict({**ASKED, "num_inference_steps": 2, **size})
                gc.collect()
                tracker.begin(f"after {number}")
                torch.zeros(1)  # for the tracker to see what is held
    most, held = ([tracker.most[f"{what} {number}"] for number in range(3)] for what in ("round", "after"))
    assert max(most) <= budget
    # The marks of phases take a few bytes themselves.
    assert held[2] - held[1] < 1000
    assert most[2] <= 1.01 * most[1]


def test_plans_are_of_whatever_loads(tiny: Path) -> None:
    """Tensors that no network uses, of a kind that none computes with; a scheduler config that is mended."""
    opened = open_checkpoint(tiny)
    odd = MemoryTensor("position_ids", "I64", (1, 77), torch.zeros(1, 77, dtype=torch.int64))
    text = {"": {**opened.weights["text_encoder"][""], "text_model.embeddings.position_ids": odd}}
    checkpoint = replace(
        opened,
        weights={**opened.weights, "text_encoder": text},
        scheduler={**opened.scheduler, "skip_prk_steps": False},
    )
    rehearsal = Rehearsal(checkpoint, dtype=torch.float32)
    assert rehearsal.usage(width=64, height=64, scheduler="PNDM", num_inference_steps=4).peak[1].most > 0
    outline = without_tensors(checkpoint.weights)["text_encoder"][""]["text_model.embeddings.position_ids"]
    assert isinstance(outline, MemoryTensor)
    assert outline.tensor.device.type == "meta"


def test_a_network_that_came_in_part_leaves(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    runtime = TorchRuntime(open_checkpoint(tiny), device=cpu, dtype=torch.float32, movable=True)

    def fails_in_the_middle(module: nn.Module, **where: Any) -> None:
        next(module.parameters()).data = torch.zeros(())
        raise torch.OutOfMemoryError("no memory")

    homes = [parameter.data_ptr() for parameter in runtime.vae.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr("ritocco.backends.residence.place", fails_in_the_middle)
        with pytest.raises(BackendError, match="cpu has not the memory for the networks"):
            runtime.need("vae")
    assert [parameter.data_ptr() for parameter in runtime.vae.parameters()] == homes
    runtime.need("vae")
    assert {parameter.dtype for parameter in runtime.vae.parameters()} == {torch.float32}


def test_budgets_are_of_torch(tiny: Path) -> None:
    with pytest.raises(BackendError, match="memory_budget is for checkpoints on torch"):
        ritocco.load(tiny, backend="openvino", memory_budget="8GiB")
    with pytest.raises(RequestError, match="memory_budget is 'much'"):
        ritocco.load(tiny, memory_budget="much")


def test_plans_for_a_gpu_need_none(tiny: Path) -> None:
    words = ["plan", "--model", str(tiny), "--width", "64", "--height", "64", "--device", "cuda"]
    told = CliRunner().invoke(app, [*words, "--budget", "8GiB"])
    assert told.exit_code == 0, told.exception
    assert told.stdout.splitlines()[0] == "1 picture of 64 x 64 on torch, cuda, float16"
    assert "budget: 8,192.0 MiB; all networks in memory, one picture at once" in told.stdout
    assert "workspaces of cuDNN and cuBLAS" in told.stdout
    assert "C library" not in told.stdout
    assert CliRunner().invoke(app, [*words, "--verify"]).exit_code == 2


def test_a_bad_budget_of_the_command_is_called_by_its_name() -> None:
    words = ["plan", "--width", "64", "--height", "64", "--dtype", "float32", "--budget"]
    for budget, rule in (
        ("0", "--budget is '0'; it must be"),
        ("1MiB", "--budget is 1.0 MiB; one picture of"),
    ):
        result = CliRunner().invoke(app, [*words, budget])
        assert isinstance(result.exception, RequestError)
        assert str(result.exception).startswith(rule)
        assert result.exception.field == "--budget"
