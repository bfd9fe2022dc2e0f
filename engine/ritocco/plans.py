"""What a request will take, and the way of computing it that keeps to a budget of memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ritocco.byte_sizes import mib_down, mib_up
from ritocco.errors import BackendError, RequestError
from ritocco.kept import Kept
from ritocco.policy import buckets
from ritocco.schedules import build

if TYPE_CHECKING:
    from ritocco.memory import Phase, Usage
    from ritocco.schema import PredictionInput

_KEPT_USAGES = 8192  # every size and number of pictures of the schema, in every strategy
_KEPT_COURSES = 32  # of some thousand operations each
_KEPT_PLANS = 8192  # whose usages are kept too
_STEP_COUNTS = (2, 3, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500)
_CAPACITY = 8  # of a Batcher that is not told another
_TABLE_ROWS = (51, 501)  # of lanes that share a step; PNDM has one more than steps
_TEXT, _BESIDE, _ALL = ("text_encoder",), ("text_encoder", "vae"), ("text_encoder", "vae", "unet")
_WHO_STAYS = {  # by who leaves
    (): "all networks in memory",
    _TEXT: "the text encoder in memory for the text alone",
    _BESIDE: "the UNet in memory, the others when they are needed",
    _ALL: "one network at a time in memory",
}
_COMES = {
    "text_encoder": 1,
    "vae": 2,
    "unet": 1,
}  # times in a request: the autoencoder before and after the loop
_LEAST_SIDE, _MOST_SIDE, _STEP = 64, 1024, 64  # of the schema's height and width
_MOST_PICTURES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """How a request is computed; pictures are the same but for rounding.

    at_once: pictures that move together. leaving: networks that leave the device when another is needed.
    """

    at_once: int
    leaving: tuple[str, ...] = ()

    def __str__(self) -> str:
        together = "one picture" if self.at_once == 1 else f"{self.at_once} pictures"
        return f"{_WHO_STAYS[self.leaving]}, {together} at once"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes throughout.

    budget: what was to be kept to, or None. strategy: the first that does, in the order of `strategies`.
    usage: what it takes. read_again: weights that are read, and converted, anew for every request, which is
    what `leaving` costs; read_again_seconds: how long that takes, by what was measured when they came last;
    None where none came yet. more: the least budget at which one of those before it fits, and that one; None
    where this is the first. less: what is taken by the budgets just below `least`, and its strategy; None
    where nothing takes less, or where it was not asked for. together: pictures that may share a step with
    others of their size in a Batcher of eight lanes; None without a budget, or where it was not asked for.
    """

    device: str
    dtype: str
    width: int
    height: int
    num_outputs: int
    budget: int | None
    strategy: Strategy
    usage: Usage
    read_again: int
    read_again_seconds: float | None
    more: tuple[int, Strategy] | None
    less: tuple[int, Strategy] | None
    together: int | None = None

    @property
    def least(self) -> int:
        """What the strategy takes at most."""
        return self.usage.peak[1].most


def strategies(num_outputs: int) -> tuple[Strategy, ...]:
    """From the one that costs nothing to the one that takes least: fewer pictures at once go before networks
    that leave, whose weights are read again in every request. Of counts that need as many calls of the UNet
    for a step, the least.
    """
    counts = sorted({-(-num_outputs // calls) for calls in range(1, num_outputs + 1)}, reverse=True)
    return tuple(Strategy(at_once=count, leaving=leaving) for leaving in _WHO_STAYS for count in counts)


def asked_without_pictures(given: Mapping[str, Any]) -> PredictionInput:
    """The fields of a request whose picture and mask may be missing: no plan depends on them. Raises
    RequestError for bad ones.
    """
    import numpy as np
    from PIL import Image

    from ritocco.schema import parse_input

    grey = Image.fromarray(np.full((64, 64), 255, np.uint8))
    return parse_input({"image": grey, "mask": grey, **given}, allow_local=True)[0]


class Planner:
    """Plans for one model on one device; safe to call from several threads.

    rehearse: makes what `Rehearsal.usage` is a method of, when it is first needed. follow: makes the runtime
    do as a strategy says, at a height and width in pixels; needed with a budget. came_in: seconds that each
    network took when it came to the device last. name: what errors call the budget. schedule: the
    checkpoint's scheduler config, as `schedules.build` takes it; None takes any number of steps.

    Plans of a size are kept. Steps are rounded up to one of a few counts, whether the schedule takes that or
    not: of them a plan knows no more than how many rows their table has.
    """

    def __init__(
        self,
        rehearse: Callable[[], Any],
        *,
        device: str,
        dtype: str,
        budget: int | None = None,
        follow: Callable[[int, int, Strategy], None] | None = None,
        came_in: Callable[[], Mapping[str, float]] | None = None,
        name: str = "memory_budget",
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        self.budget, self._name, self._schedule = budget, name, schedule
        self._rehearse, self._follow, self._came_in = rehearse, follow, came_in
        self._device, self._dtype = device, dtype
        self._rehearsal: Any = None
        rehearsing = threading.Lock()  # for one at a time
        self._plans: Kept[MemoryPlan] = Kept(_KEPT_PLANS)
        self._usages: Kept[Usage] = Kept(_KEPT_USAGES, rehearsing)
        self._courses: Kept[Usage] = Kept(_KEPT_COURSES, rehearsing)
        self._crowds: Kept[int] = Kept(_KEPT_USAGES, rehearsing)
        self._lengths: Kept[int] = Kept(_KEPT_PLANS)

    def plan(self, fields: PredictionInput) -> MemoryPlan:
        """For a request. Raises RequestError where no strategy keeps to the budget, and where the schedule
        does not take its steps.
        """
        return self._made(self._asked(fields))

    def explained(self, fields: PredictionInput) -> MemoryPlan:
        """The same, with the strategy of the next smaller budget, and what every operation reaches."""
        asked = self._asked(fields)
        plan = self._made(asked)
        usage = self._usage(asked, None if self.budget is None else plan.strategy, course=True)
        if self.budget is None:
            return replace(plan, usage=usage)
        less, together = self._less(asked, plan), self._together(asked, _CAPACITY)
        return replace(plan, usage=usage, less=less, together=together)

    def most(self) -> int:
        """Bytes of the largest request of the schema, with all networks in memory and all pictures at once.

        Of networks that come and go, as `least`.
        """
        return self._most(_largest(), Strategy(at_once=_MOST_PICTURES))

    def least(self) -> int:
        """Bytes of the smallest request of the schema, in the strategy that takes least."""
        return self._most(_smallest(), _smallest_way())

    def together(self, fields: PredictionInput, capacity: int) -> int:
        """How many lanes may share a step with those of a request: the most of `buckets(capacity)` that fit
        beside the networks which stay for it; 1 where its own don't move together. Requests of one size may
        share a step of as many as each of them bears.

        They are planned as guided lanes that have nothing in common. 1, too, for a request that does not fit.
        """
        if self.budget is None:
            return capacity
        return self._together(self._asked(fields), capacity)

    def follow(self, *requests: PredictionInput) -> None:
        """Where there is a budget, make the runtime ready for a request, or for a step that several of one
        size share, as many as `together` allows. Raises RequestError as `plan`.
        """
        if self.budget is None or self._follow is None:
            return
        ways = [self.plan(fields).strategy for fields in requests]
        way = max(ways, key=lambda one: len(one.leaving))
        if len(ways) > 1:
            way = replace(way, at_once=sum(fields.num_outputs for fields in requests))
        self._follow(requests[0].height, requests[0].width, way)

    def refuse_too_little(self) -> None:
        """Raises BackendError where the budget holds not even the smallest request."""
        least = self.least()
        if self.budget is not None and least > self.budget:
            raise BackendError(f"{self._name} is {mib_down(self.budget)}; {smallest_takes(least)}")

    def _asked(self, fields: PredictionInput) -> dict[str, Any]:
        """What a plan depends on."""
        return {
            "height": fields.height,
            "width": fields.width,
            "num_outputs": fields.num_outputs,
            "guided": fields.guidance_scale > 1,
            "num_inference_steps": _rounded(self._steps(fields), _STEP_COUNTS),
            "scheduler": fields.scheduler,
            "checked": not fields.disable_safety_checker,
        }

    def _steps(self, fields: PredictionInput) -> int:
        """Of a request; one more where its schedule rounds to a row too many."""
        steps, scheduler, schedule = fields.num_inference_steps, fields.scheduler, self._schedule
        if schedule is None:
            return steps
        rows = self._lengths.get((scheduler, steps), lambda: len(build(scheduler, steps, schedule)))
        return max(steps, rows - (scheduler == "PNDM"))  # whose repeated row every table of it has

    def _made(self, asked: Mapping[str, Any]) -> MemoryPlan:
        plan = self._plans.get((*asked.values(), self.budget, _threads()), lambda: self._chosen(asked))
        return replace(plan, read_again_seconds=self._seconds(plan.strategy.leaving))

    def _chosen(self, asked: Mapping[str, Any]) -> MemoryPlan:
        if self.budget is None:
            usage = self._usage(asked, None)
            return self._plan(asked, Strategy(at_once=asked["num_outputs"]), usage, None)
        refused: list[tuple[int, Strategy]] = []
        for strategy in strategies(asked["num_outputs"]):
            usage = self._usage(asked, strategy)
            if usage.peak[1].most <= self.budget:
                more = min(refused, key=lambda one: one[0], default=None)
                return self._plan(asked, strategy, usage, more)
            refused.append((usage.peak[1].most, strategy))
        count, least = asked["num_outputs"], min(needed for needed, _ in refused)
        what = f"one picture of {asked['width']} x {asked['height']} needs"
        if count > 1:
            what = f"{count} pictures of {asked['width']} x {asked['height']} need"
        raise RequestError(
            f"{self._name} is {mib_down(self.budget)}; {what} at least {mib_up(least)}. "
            f"{self._largest_square(asked)}",
            field=self._name,
        )

    def _plan(
        self,
        asked: Mapping[str, Any],
        strategy: Strategy,
        usage: Usage,
        more: tuple[int, Strategy] | None,
    ) -> MemoryPlan:
        return MemoryPlan(
            device=self._device,
            dtype=self._dtype,
            width=asked["width"],
            height=asked["height"],
            num_outputs=asked["num_outputs"],
            budget=self.budget,
            strategy=strategy,
            usage=usage,
            read_again=sum(_COMES[one] * usage.weights[one] for one in strategy.leaving),
            read_again_seconds=None,
            more=more,
            less=None,
        )

    def _less(self, asked: Mapping[str, Any], plan: MemoryPlan) -> tuple[int, Strategy] | None:
        """What is taken where the budget is just below what the plan takes, and what that takes."""
        for strategy in strategies(asked["num_outputs"]):
            most = self._most(asked, strategy)
            if most < plan.least:
                return most, strategy
        return None

    def _most(self, asked: Mapping[str, Any], strategy: Strategy) -> int:
        return self._usage(asked, strategy).peak[1].most

    def _usage(self, asked: Mapping[str, Any], strategy: Strategy | None, *, course: bool = False) -> Usage:
        given = {} if strategy is None else {"at_once": strategy.at_once, "leaving": strategy.leaving}

        def usage() -> Usage:
            made: Usage = self._rehearsed().usage(**asked, **given, **({"course": True} if course else {}))
            return made

        return (self._courses if course else self._usages).get((*asked.values(), strategy, _threads()), usage)

    def _together(self, asked: Mapping[str, Any], capacity: int) -> int:
        own, most = asked["num_outputs"], 1
        try:
            strategy = self._made(asked).strategy
        except RequestError:
            return 1
        for count in buckets(capacity) if strategy.at_once == own else ():
            if count > own and self._crowd(asked, strategy.leaving, count) > (self.budget or 0):
                break
            most = count
        return most

    def _crowd(self, asked: Mapping[str, Any], leaving: tuple[str, ...], lanes: int) -> int:
        """Bytes of a step that so many lanes of several requests share."""
        rows = _rounded(asked["num_inference_steps"] + 1, _TABLE_ROWS)
        size = {"height": asked["height"], "width": asked["width"]}

        def most() -> int:
            phase: Phase = self._rehearsed().together(**size, lanes=lanes, rows=rows, leaving=leaving)
            return phase.most

        return self._crowds.get((*size.values(), lanes, rows, leaving, _threads()), most)

    def _rehearsed(self) -> Any:
        if self._rehearsal is None:
            self._rehearsal = self._rehearse()
        return self._rehearsal

    def _seconds(self, leaving: tuple[str, ...]) -> float | None:
        """What the networks' coming takes in a request, where all of them came before."""
        seconds = self._came_in() if self._came_in is not None else {}
        if not all(one in seconds for one in leaving):
            return None
        return sum(_COMES[one] * seconds[one] for one in leaving)

    def _largest_square(self, asked: Mapping[str, Any]) -> str:
        """The largest square that the budget holds, in words."""
        fits = 0
        low, high = 1, _MOST_SIDE // _STEP
        while low <= high:
            middle = (low + high) // 2
            square = {**asked, "height": middle * _STEP, "width": middle * _STEP, "num_outputs": 1}
            if self._most(square, _smallest_way()) <= (self.budget or 0):
                fits, low = middle, middle + 1
            else:
                high = middle - 1
        side = fits * _STEP
        held = f"One picture of {side} x {side}" if fits else "No picture"
        return f"{held} is the largest square that it holds" if fits else f"{held} fits"


def _threads() -> int:
    """Each has blocks of its own in attention."""
    import torch  # late: plans of exported graphs need none

    return torch.get_num_threads()


def _smallest_way() -> Strategy:
    return Strategy(at_once=1, leaving=_ALL)


def smallest_takes(least: int) -> str:
    """In words, for errors."""
    side = f"{_LEAST_SIDE} x {_LEAST_SIDE}"
    return (
        f"the smallest request, one picture of {side}, unguided, takes {mib_up(least)} with one network at a "
        "time in memory"
    )


def _rounded(number: int, counts: tuple[int, ...]) -> int:
    """Up to one of the counts; itself beyond them."""
    return next((one for one in counts if one >= number), number)


def _largest() -> dict[str, Any]:
    return {
        "height": _MOST_SIDE,
        "width": _MOST_SIDE,
        "num_outputs": _MOST_PICTURES,
        "guided": True,
        "num_inference_steps": _STEP_COUNTS[-1],
        "scheduler": "K_EULER_ANCESTRAL",  # whose steps draw noise
        "checked": True,
    }


def _smallest() -> dict[str, Any]:
    return {
        "height": _LEAST_SIDE,
        "width": _LEAST_SIDE,
        "num_outputs": 1,
        "guided": False,
        "num_inference_steps": 2,
        "scheduler": "DPMSolverMultistep",
        "checked": False,
    }
