"""Budgets that nobody named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ritocco
from ritocco import free_memory
from ritocco.backends.recorded import KEPT_SHAPES
from ritocco.checkpoint import Checkpoint, open_checkpoint
from ritocco.errors import BackendError
from ritocco.free_memory import (
    CAPTURED_TIMES,
    RESERVE_BYTES,
    ample_bytes,
    captured_bytes,
    default_budget,
    free_bytes,
)
from ritocco.known import KNOWN, outline
from ritocco.loading import _weight_bytes, pocket_model
from ritocco.memory import Rehearsal
from ritocco.plans import Planner

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
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
    if device == "cuda":
        weights = _weight_bytes(checkpoint, dtype)
        most = captured_bytes(planner.most(), weights)
        assert most <= ample_bytes(checkpoint, weights, dtype.itemsize, captured=True) < 2 * most


def gpu_rows() -> list[dict[str, Any]]:
    lines = (RESULTS / "gpu-memory.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["path"] == "graphs"]


@pytest.mark.slow
def test_what_graphs_and_search_keep_is_within_the_bound() -> None:
    """As measured on a GPU, and what seven more sizes keep that stay captured beside the largest."""
    checkpoint = outline("sd2-inpainting")
    rehearsal = Rehearsal(checkpoint, dtype=torch.float16, device="cuda", movable=True)
    plan = rehearsal.usage(height=1024, width=1024, num_outputs=4, at_once=4).peak[1].most
    bound = captured_bytes(plan, _weight_bytes(checkpoint, torch.float16))
    reserved = [
        max(phase["reserved"] for phases in row["requests"].values() for phase in phases.values())
        for row in gpu_rows()
    ]
    stays = [
        row["requests"]["third"]["text"]["held"] - row["requests"]["first"]["text"]["held"]
        for row in gpu_rows()
    ]
    workspace = 33 * MIB  # of cuBLAS for captures, once
    assert len(reserved) == 6
    assert plan + RESERVE_BYTES < max(reserved)
    assert max(reserved) + (KEPT_SHAPES - 1) * (max(stays) - workspace) <= bound


@pytest.mark.parametrize(("free", "budget"), [(140, None), (139, 139)])
def test_graphs_and_search_count_where_they_come(free: int, budget: int | None) -> None:
    """60 of weights, 20 that are computed."""
    planner: Any = Rehearsed(80 * MIB)
    taken = default_budget(planner, 10**12, 2 * free * MIB, 60 * MIB)
    assert CAPTURED_TIMES == 4
    assert taken == (None if budget is None else budget * MIB)
    assert default_budget(planner, 10**12, 2 * 80 * MIB) is None


def test_what_torch_keeps_without_a_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this device, and of no graph's pool."""

    def segment(device: int, total: int, active: int, pool: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        return {"device": device, "total_size": total, "active_size": active, "segment_pool_id": pool}

    segments = [segment(1, 50, 20), segment(1, 7, 0), segment(0, 1000, 0), segment(1, 400, 0, (0, 3))]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000 * (device.index or 0), 99_999))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    assert free_bytes(torch.device("cuda", 1)) == 10_037
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert free_bytes(torch.device("cuda", 1)) == 10_000


@pytest.mark.parametrize(("beyond", "budgeted"), [(0, False), (-2, True)])
def test_a_gpu_has_a_budget_where_graphs_would_not_fit(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, beyond: int, budgeted: bool
) -> None:
    """Of the driver's count, up to where weights would go to the device."""
    checkpoint = open_checkpoint(tiny_checkpoint)
    weights, most = _weight_bytes(checkpoint, torch.float16), 100 * MIB
    free = 2 * captured_bytes(most, weights) + beyond  # half of which is the reserve
    assert free // 2 < RESERVE_BYTES
    started: list[bool] = []

    def starts(*_: object, movable: bool, **__: object) -> None:
        started.append(movable)
        raise BackendError("no such device")

    monkeypatch.setattr("ritocco.backends.torch_.TorchRuntime", starts)
    monkeypatch.setattr("ritocco.device._device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(free_memory, "ample_bytes", lambda *_, captured, **__: 10**12 if captured else 0)
    monkeypatch.setattr("ritocco.plans.Planner.most", lambda self: most)
    monkeypatch.setattr("ritocco.plans.Planner.least", lambda self: MIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", list)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    with pytest.raises(BackendError, match="no such device"):
        ritocco.load(tiny_checkpoint, device="cuda", backend="torch")
    assert started == [budgeted]


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


def test_a_schedule_of_few_steps_may_have_such_a_budget(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    config = model / "scheduler" / "scheduler_config.json"
    schedule = json.loads(config.read_text(encoding="utf-8")) | {"num_train_timesteps": 100}
    config.write_text(json.dumps(schedule), encoding="utf-8")
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 16 * MIB)
    with ritocco.load(model, device="cpu", dtype="float32", backend="torch") as engine:
        assert engine.budgeted
