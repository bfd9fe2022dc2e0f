"""How many steps a GPU may have before it, with a clock of events that stands in for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from random_lanes import random_lane
from ritocco.backends.runtime import LatentSize
from ritocco.backends.steps_ahead import StepsAhead
from ritocco.backends.torch_ import TorchBatch, TorchRuntime
from ritocco.checkpoint import open_checkpoint


class Device:
    """Does nothing until somebody waits for it. ahead: steps that are queued and not done, at each step."""

    def __init__(self) -> None:
        self.queued = self.done = 0
        self.ahead: list[int] = []

    def step(self, *_: object) -> None:
        self.queued += 1
        self.ahead.append(self.queued - self.done)


def events_of(device: Device) -> type:
    class Event:
        def record(self, stream: object) -> None:
            self.place = device.queued

        def synchronize(self) -> None:
            device.done = max(device.done, self.place)

    return Event


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Event", events_of(made))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return made


def test_two_steps_are_in_flight(
    tiny_checkpoint: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    runtime = TorchRuntime(open_checkpoint(tiny_checkpoint), device=cpu, dtype=torch.float32)
    batch: Any = runtime.open(LatentSize(height=4, width=8), 1)
    batch.join(0, random_lane("DDIM", 7, 1, cells=(4, 8), width=32))
    monkeypatch.setattr(TorchBatch, "_move", device.step)
    batch._ahead = StepsAhead(torch.device("cuda"))
    for row in range(7):
        batch.step({0: row})
    assert device.ahead == [1, 2, 2, 2, 2, 2, 2]


def test_a_cpu_has_none_before_it(device: Device) -> None:
    ahead = StepsAhead(torch.device("cpu"))
    for _ in range(5):
        ahead.wait()
        device.step()
        ahead.queued()
    assert device.done == 0
