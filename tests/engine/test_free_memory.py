"""Budgets that nobody named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ritocco
from ritocco import free_memory
from ritocco.errors import BackendError
from ritocco.free_memory import RESERVE_BYTES, default_budget, free_bytes

CPU = torch.device("cpu")
MIB = 1 << 20


class Largest:
    """A planner whose largest request takes so much; None has no plans."""

    def __init__(self, least: int | None) -> None:
        self._least = least

    def largest(self) -> Any:
        if self._least is None:
            raise BackendError("no plans")
        return type("Plan", (), {"least": self._least})


@pytest.mark.parametrize(
    ("free", "least", "budget"),
    [
        (None, 0, None),
        (300 * MIB, None, None),
        (300 * MIB, 300 * MIB, None),
        (299 * MIB, 300 * MIB, 299 * MIB),
        (1 * MIB, 300 * MIB, 1 * MIB),
        (300 * MIB + 1, 10**12, None),  # three times the weights: nothing is planned
    ],
)
def test_a_budget_where_the_largest_request_may_not_fit(
    free: int | None, least: int | None, budget: int | None
) -> None:
    planner: Any = Largest(least)
    weights = 100 * MIB if free != 300 * MIB else 101 * MIB
    left = None if free is None else free + RESERVE_BYTES
    assert default_budget(planner, weights, left) == budget


def test_less_than_the_reserve_is_no_budget_of_nothing() -> None:
    planner: Any = Largest(300 * MIB)
    assert default_budget(planner, MIB, RESERVE_BYTES - 1) == 1


def test_what_is_free_is_the_least_of_what_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "_CGROUP", tmp_path)
    assert free_bytes(CPU) is None
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    5000 kB\n")
    assert free_bytes(CPU) == 5000 << 10
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) == 5000 << 10
    (tmp_path / "memory.max").write_text(f"{3 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{2 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {MIB // 2}\n")
    assert free_bytes(CPU) == MIB + MIB // 2
    (tmp_path / "memory.current").write_text(f"{9 * MIB}\n")
    assert free_bytes(CPU) == 0


def test_engines_keep_to_what_is_free(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, ask: Any
) -> None:
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: RESERVE_BYTES + 8 * MIB)
    with ritocco.load(tiny_checkpoint, device="cpu", dtype="float32", backend="torch") as engine:
        assert engine.plan(width=64, height=64).budget == 8 * MIB
        logs = engine.predict(ask(width=64, height=64)).logs
    assert "Memory: requests keep to 8.0 MiB of 776.0 MiB that are free on cpu; memory_budget=" in logs
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: RESERVE_BYTES)
    with pytest.raises(BackendError, match=r"memory_budget is 0\.0 MiB; the smallest request"):
        ritocco.load(tiny_checkpoint, device="cpu", dtype="float32", backend="torch")
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 64 << 30)
    with ritocco.load(tiny_checkpoint, device="cpu", dtype="float32", backend="torch") as engine:
        assert engine.plan(width=64, height=64).budget is None
