"""A deliberately broken operation turns the gates red: of a request beside diffusers, of a kernel alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from made_rows import in_process
from ritocco.backends import fast_path, torch_, torch_group
from ritocco.pixels import from_model
from ritocco.steps import advance
from ritocco_bench import __main__ as command
from ritocco_bench import environment, folder, kernel_floors, kernel_gate
from ritocco_bench.ceilings import Ceilings
from ritocco_bench.kernel_gate import LARGEST_DISTANCE, PLAIN, Kernels, buffers, refuse_apart
from ritocco_bench.parity import ParityError
from ritocco_kernels.ops import REFERENCE

CPU = torch.device("cpu")
SHAPES = {"layernorm": (2, 8, 32), "add_layernorm": (2, 8, 32), "geglu": (2, 8, 64)}
CASES = [(name, SHAPES.get(name, (1, 32, 8, 8))) for name in kernel_floors.MOVED if "pixels" not in name]
CASES += [("to_model_pixels", (1, 3, 16, 16)), ("from_model_pixels", (1, 3, 16, 16))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny folder of random weights."""
    return folder.make_folder(tmp_path_factory.mktemp("gates") / "tiny", "tiny")


def _norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        return REFERENCE.groupnorm_silu(x, weight, bias, groups, eps) * 1.01

    monkeypatch.setattr(fast_path, "REFERENCE", replace(REFERENCE, groupnorm_silu=broken))


def _update(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        latents, history = advance(*arguments)
        return latents * 1.01, history

    monkeypatch.setattr(torch_group, "advance", broken)


def _bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_, "from_model", lambda decoded: from_model(decoded) + np.uint8(1))


@pytest.mark.parametrize(
    ("broken", "said"),
    [(_norm, "relative error"), (_update, "relative error"), (_bytes, "bytes are not diffusers'")],
)
def test_no_row_is_written_of_a_broken_operation(
    broken: Callable[[pytest.MonkeyPatch], None],
    said: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "execute", in_process)
    broken(monkeypatch)
    out = tmp_path / "rows.jsonl"
    words = ["steps", "--model", str(tiny), "--device", "cpu", "--dtype", "float32", "--size", "64"]
    assert command.main([*words, "--pairs", "1", "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert (told.out, out.exists()) == ("", False)
    assert "ParityError: float32: " in told.err
    assert said in told.err


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_every_reference_passes_its_own_gate(name: str, shape: tuple[int, ...]) -> None:
    assert 0 <= refuse_apart(PLAIN, name, buffers(shape, device=CPU)) <= LARGEST_DISTANCE


def _with(name: str, operation: Callable[..., Any]) -> Kernels:
    changed: dict[str, Any] = {name: operation}
    if name.endswith("_pixels"):
        return replace(PLAIN, **changed)
    return replace(PLAIN, ops=replace(REFERENCE, **changed))


def _second_nan(*given: Any) -> tuple[Tensor, Tensor]:
    total, norm = REFERENCE.add_layernorm(*given)
    return total, norm * torch.nan


def _one_off(decoded: Tensor, pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    made, finite = PLAIN.from_model_pixels(decoded, pixels, mask)
    made[0, 3, 5, 1] ^= 1  # 255 has nothing above it
    return made, finite


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("geglu", lambda x: REFERENCE.geglu(x) * 1.05, r"geglu \(2, 8, 64\): [45]\.\de-02 from its reference"),
    ("geglu", lambda x: REFERENCE.geglu(x) * torch.nan, "geglu .*: nan from its reference; at most 4e-03"),
    (
        "geglu",
        lambda x: REFERENCE.geglu(x)[:1],
        r"the result is \(1, 8, 32\); its reference's is \(2, 8, 32\)",
    ),
    ("add_layernorm", _second_nan, "add_layernorm .*: nan from"),
    ("from_model_pixels", _one_off, r"from_model_pixels .*: 1\.0e\+00 from its reference; at most 0e\+00"),
]


@pytest.mark.parametrize(("name", "wrong", "said"), WRONG)
def test_a_kernel_that_is_another_operation_is_refused(
    name: str, wrong: Callable[..., Any], said: str
) -> None:
    held = buffers(dict(CASES)[name], device=CPU)
    with pytest.raises(ParityError, match=said):
        refuse_apart(_with(name, wrong), name, held)


def test_an_operation_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="operation is 'gelu'; it must be one"):
        kernel_gate.make_call(PLAIN, "gelu", [buffers((2, 8, 64), device=CPU)])(0)


def test_a_kernels_row_is_written_at_once_behind_its_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of three is broken; mended, the run goes on where it stopped, with other sources from the
    start.
    """
    cases = [case for case in CASES if case[0] in ("groupnorm_silu", "geglu", "add_bias")]
    monkeypatch.setattr(kernel_floors, "CASES", cases)
    assert [name for name, _ in cases] == ["groupnorm_silu", "geglu", "add_bias"]
    out, env = tmp_path / "kernels.jsonl", environment.environment("cpu")

    def floors() -> dict[str, float]:
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert len({row["op"] for row in rows}) == len(rows)
        return {row["op"]: row["floor_ms"] for row in rows}

    def clock(call: Callable[[int], object], sets: int) -> list[float]:
        assert all(call(index) is not None for index in range(sets))
        return [0.5, 0.25, 1.0]

    def run(kernels: Kernels) -> None:
        machine = Ceilings(matmul_flop_per_s=1e12, copy_bytes_per_s=1e9)
        left = kernel_floors.left(out, env)
        kernel_floors.measure(
            left, kernels, out, env, device=CPU, machine=machine, clock=clock, rotated=1 << 10
        )

    with pytest.raises(ParityError, match="geglu"):
        run(_with("geglu", lambda x: REFERENCE.geglu(x) * torch.nan))
    assert floors() == {"groupnorm_silu": pytest.approx(2048 * 2 * 2 / 1e6)}
    assert "geglu" not in capsys.readouterr().out
    with out.open("a", encoding="utf-8") as stream:
        stream.write('{"op": "geglu", "shape": [2, 8\n')
    assert kernel_floors.left(out, env) == cases[1:], "a torn line is no row"
    out.write_text(out.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    run(PLAIN)
    moved = {"groupnorm_silu": 2048 * 2 * 2, "geglu": 1024 * 2 * 1.5, "add_bias": 2048 * 2 * 3}
    assert floors() == pytest.approx({name: count / 1e6 for name, count in moved.items()})
    assert kernel_floors.left(out, env) == []
    for other in (replace(env, sources="0" * 12), replace(env, sources=""), replace(env, machine="another")):
        assert kernel_floors.left(out, other) == cases
