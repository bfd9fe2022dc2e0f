"""Budgets that nobody named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ritocco
from ritocco import free_memory
from ritocco.checkpoint import Checkpoint, open_checkpoint
from ritocco.errors import BackendError
from ritocco.free_memory import RESERVE_BYTES, ample_bytes, default_budget, free_bytes
from ritocco.known import KNOWN, outline
from ritocco.loading import _weight_bytes, pocket_model
from ritocco.memory import Rehearsal
from ritocco.plans import Planner

CPU = torch.device("cpu")
MIB = 1 << 20


class Rehearsed:
    """A planner whose largest and smallest requests take so much; None has no plans."""

    def __init__(self, most: int | None, least: int = 0) -> None:
        self._most, self._least = most, least

    def most(self) -> int:
        if self._most is None:
            raise BackendError("no plans")
        return self._most

    def least(self) -> int:
        return self._least


@pytest.mark.parametrize(
    ("free", "most", "budget"),
    [
        (None, 0, None),
        (300 * MIB, None, None),
        (300 * MIB, 300 * MIB, None),
        (299 * MIB, 300 * MIB, 299 * MIB),
        (400 * MIB, 10**12, None),  # ample: nothing is planned
        (400 * MIB - 1, 10**12, 400 * MIB - 1),
    ],
)
def test_a_budget_where_the_largest_request_may_not_fit(
    free: int | None, most: int | None, budget: int | None
) -> None:
    planner: Any = Rehearsed(most)
    # The reserve is half of what is free here.
    assert default_budget(planner, 400 * MIB, None if free is None else 2 * free) == budget


def test_the_reserve_is_bound() -> None:
    free = 10 * RESERVE_BYTES
    planner: Any = Rehearsed(free - RESERVE_BYTES + 1)
    assert default_budget(planner, 10**12, free) == free - RESERVE_BYTES


@pytest.mark.parametrize(("least", "budget"), [(30 * MIB, 50 * MIB), (80 * MIB, 80 * MIB), (100 * MIB,) * 2])
def test_the_reserve_shrinks_before_the_smallest_request_is_refused(least: int, budget: int) -> None:
    planner: Any = Rehearsed(10**12, least)
    assert default_budget(planner, 10**12, 100 * MIB) == budget


def test_less_than_the_smallest_request_takes_is_refused() -> None:
    planner: Any = Rehearsed(10**12, 100 * MIB + 1)
    said = r"100\.0 MiB are free, of which 50\.0 MiB .* in reserve; .* takes 100\.1 MiB .*memory_budget="
    with pytest.raises(BackendError, match=said):
        default_budget(planner, 10**12, 100 * MIB)


def outlined(model: str) -> Checkpoint:
    return outline(model) if model in KNOWN else open_checkpoint(pocket_model())


@pytest.mark.parametrize(
    ("model", "device", "dtype"),
    [
        ("pocket", "cpu", torch.float32),
        pytest.param("sd2-inpainting", "cuda", torch.float16, marks=pytest.mark.slow),
        pytest.param("sd1.5-inpainting", "cpu", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_what_is_ample_holds_the_largest_request(model: str, device: str, dtype: torch.dtype) -> None:
    checkpoint = outlined(model)
    planner = Planner(
        lambda: Rehearsal(checkpoint, dtype=dtype, device=device, movable=True),
        device=device,
        dtype="",
        budget=1,
    )
    ample = ample_bytes(checkpoint, _weight_bytes(checkpoint, dtype), dtype.itemsize)
    assert planner.least() < planner.most() <= ample < 4 * planner.most()


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
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 16 * MIB)
    with ritocco.load(tiny_checkpoint, device="cpu", dtype="float32", backend="torch") as engine:
        assert engine.plan(width=64, height=64).budget == 8 * MIB
        logs = engine.predict(ask(width=64, height=64)).logs
    assert "Memory: requests keep to 8.0 MiB of 16.0 MiB that are free on cpu; memory_budget=" in logs
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 1000)
    with pytest.raises(BackendError, match=r"0\.0 MiB are free, of which .*; the smallest request"):
        ritocco.load(tiny_checkpoint, device="cpu", dtype="float32", backend="torch")
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 64 << 30)
    with ritocco.load(tiny_checkpoint, device="cpu", dtype="float32", backend="torch") as engine:
        assert engine.plan(width=64, height=64).budget is None
