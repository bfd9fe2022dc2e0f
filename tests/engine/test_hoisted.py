"""Hoisted graphs: lanes of all kinds side by side, what they share, sizes, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from random_lanes import random_lane, walk
from ritocco.artefacts import MANIFEST, Artefacts, open_artefacts
from ritocco.backends import open_sessions
from ritocco.backends.hoisted import HoistedBatch
from ritocco.backends.network import NetworkBatch
from ritocco.backends.runtime import Lane, LaneState, LatentSize
from ritocco.backends.sessions import Arrays, Session, SessionRuntime
from ritocco.checkpoint_report import verify
from ritocco.errors import CheckpointError
from ritocco.nets.io import HOISTED, HOISTED_GRAPHS, contract_of, unet_once_io
from ritocco.nets.specs import UNetSpec
from ritocco.noise import normal
from ritocco.schedules import SCHEDULERS

SIZE = LatentSize(height=8, width=12)
# Latents of a few units after a few steps, float32 on both sides; the sums have another order.
TOLERANCE = 2e-4


class Counted:
    """A Session that counts its calls, and keeps the shapes that it was fed."""

    def __init__(self, inner: Session) -> None:
        self.inner, self.dtypes = inner, inner.dtypes
        self.ranks, self.outputs = inner.ranks, inner.outputs
        self.fed: list[dict[str, tuple[int, ...]]] = []

    def run(self, feeds: Arrays) -> Any:
        return self.inner.run(feeds)

    def run_all(self, feeds: Arrays) -> Arrays:
        self.fed.append({name: array.shape for name, array in feeds.items()})
        assert {name: str(array.dtype) for name, array in feeds.items()} == dict(self.dtypes)
        return self.inner.run_all(feeds)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def runtimes(
    request: pytest.FixtureRequest,
    tiny_graphs: Path,
    tiny_hoisted_graphs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[SessionRuntime, SessionRuntime]:
    """The plain and the hoisted export of one checkpoint on one backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RITOCCO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        plain, hoisted = (
            open_sessions(open_artefacts(path), backend=request.param, device="cpu", dtype="float32")[0]
            for path in (tiny_graphs, tiny_hoisted_graphs)
        )
    return plain, hoisted


@pytest.fixture
def counted(runtimes: tuple[SessionRuntime, SessionRuntime]) -> Mapping[str, Counted]:
    """The sessions of the hoisted runtime's UNet, counted from here on."""
    sessions: dict[Any, Any] = runtimes[1]._sessions
    for name in ("unet_once", "unet_step"):
        sessions[name] = Counted(getattr(sessions[name], "inner", sessions[name]))
    return sessions


make_lane = partial(random_lane, cells=(SIZE.height, SIZE.width), width=32)


def mixed_lanes() -> list[Lane]:
    """Every scheduler, other lengths, guidance, prompts and seeds: ten UNet rows, where a call takes four."""
    guidance = (7.5, 1.0, 3.0, 12.0, 1.0, 2.0)
    return [make_lane(scheduler, 3 + i % 3, i, guidance[i]) for i, scheduler in enumerate(sorted(SCHEDULERS))]


def run(runtime: SessionRuntime, lanes: Sequence[Lane]) -> list[LaneState]:
    return walk(runtime, SIZE, lanes)


def apart(ours: Sequence[LaneState], theirs: Sequence[LaneState]) -> float:
    """The largest difference of any latent."""
    assert all(one.broken_row is None for one in (*ours, *theirs))
    return max(
        float(np.abs(a.latents - b.latents).max() / np.abs(b.latents).max())
        for a, b in zip(ours, theirs, strict=True)
    )


def test_mixed_lanes_move_as_with_the_plain_graph(
    runtimes: tuple[SessionRuntime, SessionRuntime], counted: Mapping[str, Counted]
) -> None:
    plain, hoisted = runtimes
    lanes = mixed_lanes()
    assert isinstance(plain.open(SIZE, 1), NetworkBatch)
    assert isinstance(hoisted.open(SIZE, 1), HoistedBatch)
    together = run(hoisted, lanes)
    assert apart(together, run(plain, lanes)) < TOLERANCE
    assert len(counted["unet_once"].fed) == len(lanes)
    # The first step: ten rows of six lanes in three calls.
    first = [(fed["latents"][0], fed["rows"][0]) for fed in counted["unet_step"].fed[:3]]
    assert sum(lanes for lanes, _ in first) == 6
    assert sum(rows for _, rows in first) == 10
    assert all(lanes <= 2 and rows <= 4 for lanes, rows in first)
    assert apart([run(hoisted, [lane])[0] for lane in lanes], together) < TOLERANCE


def test_what_does_not_change_is_computed_once_and_shared(
    runtimes: tuple[SessionRuntime, SessionRuntime], counted: Mapping[str, Counted]
) -> None:
    lane = make_lane("DDIM", 4, 1, 5.0)
    outputs = [replace(lane, seed=seed, latents=normal(seed, 0, (4, 8, 12))) for seed in range(3)]
    assert apart(run(runtimes[1], outputs), run(runtimes[0], outputs)) < TOLERANCE
    assert len(counted["unet_once"].fed) == 1
    assert counted["unet_once"].fed[0]["timesteps"] == (4,)
    assert counted["unet_once"].fed[0]["context"][0] == 2
    # One lane has other words: its own call, and the others keep theirs.
    other = replace(outputs[2], context=-lane.context)
    assert apart(run(runtimes[1], [*outputs[:2], other]), run(runtimes[0], [*outputs[:2], other])) < TOLERANCE
    assert len(counted["unet_once"].fed) == 3


def test_lanes_that_come_and_go(runtimes: tuple[SessionRuntime, SessionRuntime]) -> None:
    """A lane joins in the middle, another one leaves and rejoins elsewhere, a slot is used again."""
    plain, hoisted = runtimes
    a, b, c = make_lane("PNDM", 5, 1, 4.0), make_lane("K_EULER_ANCESTRAL", 4, 2), make_lane("KLMS", 4, 3, 2.0)
    first, second = hoisted.open(SIZE, 2), hoisted.open(SIZE, 3)
    first.join(1, a)
    first.step({1: 0})
    first.join(0, b)
    first.step({0: 0, 1: 1})
    first.step({1: 2, 0: 1})
    half = first.leave(1)
    first.join(1, c)
    first.step({1: 0, 0: 2})
    second.join(2, replace(a, latents=half.latents, history=half.history))
    for index in range(3, len(a.table)):
        second.step({2: index})
    first.step({0: 3, 1: 1})
    done_b = first.leave(0)
    first.step({1: 2})
    first.step({1: 3})
    assert apart([second.leave(2), done_b, first.leave(1)], run(plain, [a, b, c])) < TOLERANCE


def test_lanes_are_held_in_one_copy(runtimes: tuple[SessionRuntime, SessionRuntime]) -> None:
    batch = runtimes[1].open(SIZE, 2)
    assert isinstance(batch, HoistedBatch)
    for slot in range(2):
        batch.join(slot, make_lane("DDIM", 3, slot, 2.0))
    batch.step({0: 0, 1: 0})
    (group,) = batch._groups.values()
    for held in batch._hoisted.values():
        assert all(
            np.shares_memory(mine, all_of_them)
            for mine, all_of_them in zip(held.keys_values, group.keys_values, strict=True)
        )
        assert np.shares_memory(held.condition, group.condition)


@pytest.mark.parametrize("seat", ["taken", "outside"])
def test_slots_that_are_not_free(runtimes: tuple[SessionRuntime, SessionRuntime], seat: str) -> None:
    batch = runtimes[1].open(SIZE, 1)
    batch.join(0, make_lane("DDIM", 3, 1))
    with pytest.raises(ValueError, match="it must be a free one below 1"):
        batch.join(0 if seat == "taken" else 1, make_lane("DDIM", 3, 2))


@pytest.mark.parametrize(
    "wrong",
    [{"latents": np.zeros((4, 8, 8))}, {"condition": np.zeros((5, 12, 8))}],
    ids=["latents", "condition"],
)
def test_another_size_is_refused(
    runtimes: tuple[SessionRuntime, SessionRuntime], wrong: dict[str, Any]
) -> None:
    batch = runtimes[1].open(SIZE, 1)
    with pytest.raises(ValueError, match=r"this batch takes latents of \(4, 8, 12\)"):
        batch.join(0, replace(make_lane("DDIM", 3, 1), **wrong))
    batch.join(0, make_lane("DDIM", 3, 1))


def test_a_lane_whose_first_graph_fails_is_not_in_the_batch(
    runtimes: tuple[SessionRuntime, SessionRuntime],
    counted: Mapping[str, Counted],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(feeds: Arrays) -> Arrays:
        raise MemoryError("no memory")

    batch = runtimes[1].open(SIZE, 1)
    monkeypatch.setattr(counted["unet_once"], "run_all", broken)
    with pytest.raises(MemoryError):
        batch.join(0, make_lane("DDIM", 3, 1))
    monkeypatch.undo()
    batch.join(0, make_lane("DDIM", 3, 1))
    batch.step({0: 0})
    assert np.isfinite(batch.leave(0).latents).all()


class Recorded:
    """A Session of fixed sizes: `unet_once` tells what it was fed, `unet_step` the lane of each row."""

    def __init__(self, artefacts: Artefacts, name: Any) -> None:
        self.io = artefacts.contract[name]
        self.dtypes = {port.name: port.dtype for port in self.io.inputs}
        self.ranks = {port.name: len(port.shape) for port in self.io.inputs}
        self.outputs = [{port.name} for port in self.io.outputs]
        self.fed: list[Arrays] = []

    def run(self, feeds: Arrays) -> Any:
        raise AssertionError

    def run_all(self, feeds: Arrays) -> Arrays:
        self.fed.append(feeds)
        sizes = {"R": 0, "N": 0, "M": 0, "H": SIZE.height, "W": SIZE.width}
        for port in self.io.inputs:
            for symbol, size in zip(port.shape, feeds[port.name].shape, strict=True):
                if isinstance(symbol, str) and symbol not in "HW":
                    least, _, most = self.io.ranges[symbol]
                    assert least <= size <= most, (port.name, symbol, size)
                    assert sizes[symbol] in (0, size), (port.name, symbol, size)
                    sizes[symbol] = size
        out = {port.name: np.zeros(port.resolve(sizes), np.float32) for port in self.io.outputs}
        if "timesteps" in feeds:
            out[HOISTED[0]][:] = feeds["timesteps"][:, None]
        else:
            told = feeds[HOISTED[0]][feeds["rows"], 0] + 10000 * feeds["latents"][feeds["rows"], 0, 0, 0]
            out["noise"][:] = told[:, None, None, None]
        return out


@pytest.mark.parametrize("fixed", [(4, 8), (1, 2), (2, 4)], ids=str)
def test_fixed_sizes_are_filled_up_and_long_tables_go_in_parts(
    tiny_hoisted_graphs: Path, fixed: tuple[int, int]
) -> None:
    """Graphs of one size: 4 table rows, two prompts, so many lanes and rows. Every shape is checked."""
    lanes, rows = fixed
    opened = open_artefacts(tiny_hoisted_graphs)
    contract = dict(opened.contract)
    cells = {symbol: (size, size, size) for symbol, size in (("H", SIZE.height), ("W", SIZE.width))}
    contract["unet_once"] = replace(contract["unet_once"], ranges={"R": (4, 4, 4), "M": (2, 2, 2), **cells})
    contract["unet_step"] = replace(
        contract["unet_step"], ranges={"N": (lanes,) * 3, "M": (rows,) * 3, **cells}
    )
    artefacts = replace(opened, contract=contract, manifest=None)
    sessions: dict[Any, Any] = {name: Recorded(artefacts, name) for name in contract}
    runtime = SessionRuntime(artefacts, sessions, device="cpu", dtype="float32")
    wanted = [
        make_lane("DDIM", steps, seed, guidance, latents=np.full((4, 8, 12), seed, np.float32))
        for steps, seed, guidance in ((6, 1, 5.0), (3, 2, 1.0), (4, 3, 1.0), (9, 4, 2.0), (4, 5, 3.0))
    ]
    batch = runtime.open(SIZE, len(wanted))
    seen: list[Any] = []
    outputs = batch._outputs
    batch._outputs = lambda *args: seen.append(outputs(*args)) or seen[-1]  # type: ignore
    for slot, lane in enumerate(wanted):
        batch.join(slot, lane)
    assert [len(one.fed) for one in (sessions["unet_once"], sessions["unet_step"])] == [2 + 1 + 1 + 3 + 1, 0]
    assert isinstance(batch, HoistedBatch)
    assert [len(held.time) for held in batch._hoisted.values()] == [len(lane.table) for lane in wanted]
    indices = {0: 5, 1: 2, 2: 0, 3: 8, 4: 3}
    batch.step(indices)
    expected = [
        lane.table.timesteps[index] + 10000 * lane.seed
        for lane, index in zip(wanted, indices.values(), strict=True)
        for _ in range(1 if lane.unconditional is None else 2)
    ]
    assert seen[0][:, 0, 0, 0].tolist() == expected


def lose(graph: str) -> Any:
    return lambda folder: (folder / graph / "model.onnx").unlink()


def edit(**changes: object) -> Any:
    def change(folder: Path) -> None:
        held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        (folder / MANIFEST).write_text(json.dumps(held | changes), encoding="utf-8")

    return change


def swap(folder: Path) -> None:
    files = [folder / graph / "model.onnx" for graph in ("unet_once", "unet_step")]
    first, second = (file.read_bytes() for file in files)
    files[0].write_bytes(second)
    files[1].write_bytes(first)


def add_plain(folder: Path) -> None:
    shutil.copyfile(folder / "unet_step" / "model.onnx", folder / "unet" / "model.onnx")


DAMAGES: dict[str, tuple[Any, str]] = {
    "no first": (lose("unet_once"), r"unet_once.model\.onnx: missing"),
    "no step": (lose("unet_step"), r"unet_step.model\.onnx: missing"),
    "swapped": (swap, "unet_once/model.onnx changed since it was exported"),
    "a plain one beside": (add_plain, "unet/model.onnx does not belong"),
    "not hoisted": (edit(hoisted=False), "says nothing of the sizes of unet;"),
    "no word": (edit(hoisted="yes"), "no manifest of an export"),
    "Optimum's": (edit(layout="optimum"), "no manifest of an export"),
    "ranges": (edit(ranges={"unet": {}}), "says nothing of the sizes of text_encoder"),
    "contract": (edit(contract="0" * 64), "other inputs and outputs"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(tiny_hoisted_graphs: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(tiny_hoisted_graphs, tmp_path / "graphs")
    assert open_artefacts(folder).hoisted
    spoil, said = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(CheckpointError, match=said):
        open_artefacts(folder)


def test_a_plain_export_that_says_hoisted_is_refused(tiny_graphs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_graphs, tmp_path / "graphs")
    assert not open_artefacts(folder).hoisted
    edit(hoisted=True)(folder)
    with pytest.raises(CheckpointError, match="says nothing of the sizes of unet_once"):
        open_artefacts(folder)


def test_doctor_knows_hoisted_graphs(tiny_hoisted_graphs: Path) -> None:
    findings = {finding.subject: finding.message for finding in verify(tiny_hoisted_graphs)}
    assert findings["graphs"].startswith("ritocco layout, hoisted, float32, 64 to 256 pixels wide")


def test_the_ports_between_the_graphs_fit(tiny_hoisted_graphs: Path) -> None:
    opened = open_artefacts(tiny_hoisted_graphs)
    assert tuple(opened.contract) == HOISTED_GRAPHS
    once, step = opened.contract["unet_once"], opened.contract["unet_step"]
    given = {port.name: port.shape[1:] for port in once.outputs}
    assert given == {port.name: port.shape[1:] for port in step.inputs[2:]}
    kinds = Counter(name.rpartition("_")[0] for name in given)
    assert kinds["keys"] == kinds["values"] == len(opened.unet.cross_attentions) == 4
    plain = contract_of(opened.unet, opened.vae, opened.text, dtype="float32")
    assert "unet_step" not in plain


def test_what_a_full_size_lane_keeps() -> None:
    """The README's figures: 512 x 512 pixels, 50 steps, guidance, float32."""
    config = {"in_channels": 9, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}
    io = unet_once_io(UNetSpec.from_config(config), tokens=77, dtype="float32")
    sizes = {"R": 50, "M": 2, "H": 64, "W": 64}
    mebibytes = [4 * float(np.prod(port.resolve(sizes))) / 2**20 for port in io.outputs]
    assert len(mebibytes) == 2 + 2 * 16
    assert round(mebibytes[0], 1) == 3.8
    assert round(mebibytes[1], 1) == 5.0
    assert round(sum(mebibytes[2:]), 1) == 14.7
    assert round(sum(mebibytes), 1) == 23.5
