"""What a request will take, and the way of computing it that keeps to a budget of memory."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ritocco.errors import BackendError, RequestError
from ritocco.shown import shown

if TYPE_CHECKING:
    from ritocco.memory import Usage
    from ritocco.schema import PredictionInput

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_KEPT_PLANS = 64
_LEAST_SIDE, _MOST_SIDE, _STEP = 64, 1024, 64  # of the schema's height and width


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """How a request is computed; pictures are the same but for rounding.

    at_once: pictures that move together. alone: whether a network leaves the device when another comes.
    """

    at_once: int
    alone: bool

    def __str__(self) -> str:
        together = "one picture" if self.at_once == 1 else f"{self.at_once} pictures"
        where = "one network at a time" if self.alone else "all networks"
        return f"{where} in memory, {together} at once"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes throughout.

    budget: what was to be kept to, or None. strategy: the first that does, in the order of `strategies`.
    usage: what it takes. read_again: weights that are read, and converted, anew for every request, which is
    what `alone` costs. more: the least budget at which a faster strategy fits, and that strategy; None where
    this is the fastest. Below `least` another strategy is needed, or nothing fits.
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
    more: tuple[int, Strategy] | None

    @property
    def least(self) -> int:
        """What the strategy takes at most."""
        return self.usage.peak[1].most


def strategies(num_outputs: int) -> tuple[Strategy, ...]:
    """From the one that costs nothing to the one that takes least: fewer pictures at once go before networks
    that leave, whose weights are read again in every request.
    """
    counts = [num_outputs]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    return tuple(Strategy(at_once=count, alone=alone) for alone in (False, True) for count in counts)


def parse_budget(budget: int | str) -> int:
    """Bytes of a number, or of words such as `8GiB`, `500 MB`. Raises RequestError."""
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    found = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([A-Za-z]{0,3})\s*", str(budget))
    if isinstance(budget, str) and found is not None and found[2].upper() in _UNITS:
        size = int(float(found[1]) * _UNITS[found[2].upper()])
        if size > 0:
            return size
    rule = "it must be a number of bytes, or one with a unit, as 8GiB or 500MB"
    raise RequestError(f"memory_budget is {shown(budget)}; {rule}", field="memory_budget")


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
    do as a strategy says, at a height and width in pixels; needed with a budget.
    """

    def __init__(
        self,
        rehearse: Callable[[], Any],
        *,
        device: str,
        dtype: str,
        budget: int | None = None,
        follow: Callable[[int, int, Strategy], None] | None = None,
    ) -> None:
        self.budget = budget
        self._rehearse, self._follow = rehearse, follow
        self._device, self._dtype = device, dtype
        self._rehearsal: Any = None
        self._plans: OrderedDict[tuple[Any, ...], MemoryPlan] = OrderedDict()
        self._lock = threading.Lock()

    def plan(self, fields: PredictionInput) -> MemoryPlan:
        """For a request. Raises RequestError where no strategy keeps to the budget."""
        asked = {
            "height": fields.height,
            "width": fields.width,
            "num_outputs": fields.num_outputs,
            "guided": fields.guidance_scale > 1,
            "num_inference_steps": fields.num_inference_steps,
            "scheduler": fields.scheduler,
        }
        key = tuple(asked.values())
        with self._lock:
            plan = self._plans.pop(key, None) or self._made(asked)
            self._plans[key] = plan
            while len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        return plan

    def follow(self, fields: PredictionInput) -> MemoryPlan | None:
        """Make the runtime ready for a request, where there is a budget. Raises RequestError as `plan`."""
        if self.budget is None or self._follow is None:
            return None
        plan = self.plan(fields)
        self._follow(fields.height, fields.width, plan.strategy)
        return plan

    def refuse_too_little(self) -> None:
        """Raises BackendError where the budget holds not even the smallest request."""
        least = self._usage(_smallest(), Strategy(at_once=1, alone=True)).peak[1].most
        if self.budget is not None and least > self.budget:
            raise BackendError(
                f"memory_budget is {mib(self.budget)}; the smallest request, one picture of {_LEAST_SIDE} x "
                f"{_LEAST_SIDE}, unguided, takes {mib(least)} with one network at a time in memory"
            )

    def _made(self, asked: Mapping[str, Any]) -> MemoryPlan:
        if self.budget is None:
            usage = self._usage(asked, None)
            return self._plan(asked, Strategy(at_once=asked["num_outputs"], alone=False), usage, None)
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
            f"memory_budget is {mib(self.budget)}; {what} at least {mib(least)}. {self._largest(asked)}",
            field="memory_budget",
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
            # The autoencoder comes twice: before the loop and behind it.
            read_again=sum(usage.weights.values()) + usage.weights["vae"] if strategy.alone else 0,
            more=more,
        )

    def _usage(self, asked: Mapping[str, Any], strategy: Strategy | None) -> Usage:
        if self._rehearsal is None:
            self._rehearsal = self._rehearse()
        given = {} if strategy is None else {"at_once": strategy.at_once, "alone": strategy.alone}
        usage: Usage = self._rehearsal.usage(**asked, **given)
        return usage

    def _largest(self, asked: Mapping[str, Any]) -> str:
        """The largest square that the budget holds, in words."""
        fits = 0
        low, high = 1, _MOST_SIDE // _STEP
        while low <= high:
            middle = (low + high) // 2
            square = {**asked, "height": middle * _STEP, "width": middle * _STEP, "num_outputs": 1}
            if self._usage(square, Strategy(at_once=1, alone=True)).peak[1].most <= (self.budget or 0):
                fits, low = middle, middle + 1
            else:
                high = middle - 1
        side = fits * _STEP
        held = f"One picture of {side} x {side}" if fits else "No picture"
        return f"{held} is the largest square that it holds" if fits else f"{held} fits"


def mib(size: float) -> str:
    """For people."""
    return f"{size / 2**20:,.1f} MiB"


def _smallest() -> dict[str, Any]:
    return {
        "height": _LEAST_SIDE,
        "width": _LEAST_SIDE,
        "num_outputs": 1,
        "guided": False,
        "num_inference_steps": 2,
        "scheduler": "DPMSolverMultistep",
    }
