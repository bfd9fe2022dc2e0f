"""Measurements that were cut short: rows are there at once, and what is there is not measured again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ritocco.backends.torch_ import TorchRuntime
from ritocco.pixels import from_model
from ritocco_bench import __main__ as command
from ritocco_bench import (
    asked,
    cases,
    ceilings,
    environment,
    folder,
    gpu_memory,
    gpu_plans,
    ladder,
    report,
    turns,
    worker,
)
from ritocco_bench.painted import Painted
from ritocco_bench.parity import Parity, ParityError
from ritocco_bench.processes import BenchError

CPU = torch.device("cpu")
TRUTH = np.linspace(-0.9, 0.9, 3 << 8).reshape(1, 1, 3, 16, 16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny folder of random weights."""
    return folder.make_folder(tmp_path_factory.mktemp("resuming") / "tiny", "tiny")


@pytest.fixture(autouse=True)
def _uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "flops", lambda checkpoint, **case: {"step": 1.0})


class Processes:
    """`processes.execute` of made-up times. off: of what a variant paints. ends: the one that never comes."""

    def __init__(self, **off: float) -> None:
        self.off, self.ends, self.asked = off, "", list[str]()

    def __call__(self, job: worker.Job) -> tuple[worker.Result, float]:
        self.asked.append(job.variant)
        if job.variant == self.ends:
            raise BenchError(f"{job.variant}: exit status -15")
        decoded = TRUTH + self.off.get(job.variant.replace("-", "_"), 0.0)
        Painted(decoded=decoded, pictures=from_model(decoded[0])[None]).write(job.painted)
        seconds = dict.fromkeys((*asked.PHASES, "png", "whole"), 0.25)
        return worker.Result(loaded=1.0, stepped=2.0, seconds=[seconds] * job.runs, peak_bytes=1), 0.0


def bench(model: Path, *peers: str, pairs: int = 1) -> cases.Bench:
    return cases.Bench(
        model=model,
        device="cpu",
        dtype="bfloat16",
        pairs=pairs,
        size=64,
        steps=2,
        variants=("ritocco", "diffusers", *peers),
    )


def steps(held: cases.Bench, run: Processes) -> list[list[str]]:
    """The variants whose rows were kept, in the order and the company that they were."""
    kept: list[list[str]] = []
    machine = ceilings.Ceilings(matmul_flop_per_s=1e12, copy_bytes_per_s=1e10)
    env = environment.environment("cpu")

    def keep(rows: list[Any]) -> None:
        kept.append(sorted({row.variant for row in rows}))

    try:
        cases.steps(held, env, machine=machine, keep=keep, run=run, say=lambda line: None)
    except (ParityError, BenchError) as error:
        kept.append([str(error)])
    return kept


def test_rows_of_steps_are_kept_when_they_are_judged(tiny: Path) -> None:
    run = Processes(ritocco=0.01, diffusers=0.01)
    assert steps(bench(tiny, pairs=2), run) == [["ritocco"], ["diffusers"]]
    run.ends = "diffusers"
    (said,) = steps(bench(tiny), run)
    assert said == ["diffusers: exit status -15"], "ritocco waits for a peer of its dtype"
    run.ends = "diffusers-compiled"
    kept = steps(bench(tiny, "diffusers-compiled"), run)
    assert kept == [["ritocco"], ["diffusers"], ["diffusers-compiled: exit status -15"]]


def test_no_row_of_steps_is_kept_of_a_worse_picture(tiny: Path) -> None:
    ((said,),) = steps(bench(tiny), Processes(ritocco=0.05, diffusers=0.01))
    assert said.startswith("ritocco: 31.1 dB from the float32 truth, diffusers 45.1 dB; at most 6 dB")


def test_turns_hold_ritocco_beside_its_peer(tiny: Path) -> None:
    run = Processes(ritocco=0.05, diffusers=0.01)

    class Turn:
        def __init__(self, job: worker.Job) -> None:
            self._done = run(job)[0]

        def __enter__(self) -> Turn:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def ready(self) -> None:
            pass

        def go(self) -> None:
            pass

        def result(self) -> worker.Result:
            return self._done

    env = environment.environment("cpu")
    with pytest.raises(ParityError, match=r"ritocco: 31\.1 dB .* diffusers 45\.1 dB"):
        turns.turns(bench(tiny), env, hold=Turn, run=run, say=lambda line: None)
    run.off["ritocco"] = 0.01
    rows = turns.turns(bench(tiny), env, hold=Turn, run=run, say=lambda line: None)
    assert {row.variant for row in rows} == {"ritocco", "diffusers"}


def test_steps_go_on_with_the_peers_that_are_missing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Processes(ritocco=0.01, diffusers=0.01, diffusers_compiled=0.01)
    monkeypatch.setattr(command, "execute", run)
    monkeypatch.setattr(command, "gate", lambda job, run: Parity(error=0.0, psnr_db=80.0))
    monkeypatch.setattr(ceilings, "ON_CPU", (32, 4096))
    out = tmp_path / "rows.jsonl"
    words = ["steps", "--model", str(tiny), "--device", "cpu", "--dtype", "bfloat16", "--size", "64"]
    words += ["--pairs", "1", "--peers", "diffusers-compiled", "--out", str(out), "--resume"]

    def totals() -> list[str]:
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        return [row["variant"] for row in rows if row["phase"] == "total"]

    run.ends = "diffusers-compiled"
    assert command.main(words) == 1
    assert totals() == ["ritocco", "diffusers"]
    run.ends, run.asked = "", []
    assert command.main(words) == 0
    assert run.asked == ["diffusers-float32", "ritocco", "diffusers-compiled"]
    assert totals() == ["ritocco", "diffusers", "ritocco", "diffusers-compiled"]
    run.asked = []
    assert command.main(words) == 0
    assert run.asked == []
    assert command.main([*words, "--outputs", "2"]) == 0
    assert len(run.asked) == 4, "another case is not there"


def test_turns_go_on_with_the_requests_that_are_missing(tiny: Path, tmp_path: Path) -> None:
    out, env = tmp_path / "rows.jsonl", environment.environment("cpu")
    both = [replace(bench(tiny), outputs=count) for count in (1, 2)]
    parity = Parity(error=0.0, psnr_db=80.0)
    for name in ("ritocco", "diffusers"):
        assert command._left(both, "turns", out, env) == both
        key = (name, "total")
        report.append_rows(
            out, [cases.row_of(f"turns-{both[0].case}", both[0], key, [1.0], None, parity, env)]
        )
    assert command._left(both, "turns", out, env) == both[1:]
    assert command._left(both, "steps", out, env) == both, "rows of turns are none of steps"
    assert command._left(both, "turns", out, replace(env, driver="another")) == both


def test_only_what_can_go_on_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--out", str(tmp_path / "rows.jsonl"), "--resume"]
    assert command.main(["startup", "--model", str(tmp_path), *words]) == 1
    assert "--resume is for steps and turns; startup starts anew" in capsys.readouterr().err


def test_memory_is_measured_case_by_case(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def peak(work: Any) -> dict[str, int]:
        work()
        done.append("")
        return dict.fromkeys(("allocated", "requested", "reserved", "held"), 1 << 20)

    monkeypatch.setattr(gpu_memory, "_peak", peak)
    out, env = tmp_path / "rows.jsonl", environment.environment("cpu")
    wanted = [("plain", "64x64@1"), ("plain", "64x64@2")]
    for held in (wanted[:1], wanted, wanted):
        gpu_memory.measure(held, tiny, "float32", out, env, CPU, True)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["path"], row["case"], row["model"]) for row in rows] == [
        ("plain", "memory-64x64@1", "tiny"),
        ("plain", "memory-64x64@2", "tiny"),
    ]
    phases = {request: list(found) for request, found in rows[1]["requests"].items()}
    after = ["text", "encode", "denoise", "decode"]
    assert phases == {"first": ["load", *after], "second": after, "third": after}
    assert len(done) == 2 * 13
    told = capsys.readouterr().out
    assert told.count("is there") == 3
    assert "second: text 1, encode 1, denoise 1, decode 1, reserved 1 MiB" in told
    gpu_memory.measure(wanted[:1], tiny, "float32", out, env, CPU, False)
    assert len(done) == 3 * 13, "nobody asked to go on"


def test_plans_of_a_gpu_go_on_and_say_what_they_did_not_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[int] = []

    class Painter:
        """Takes 4 MiB less than it may, or 1 MiB more where that is 80 MiB."""

        def __init__(self, budget: int) -> None:
            self.budget = budget

        def __enter__(self) -> Painter:
            ran.append(self.budget >> 20)
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def plan(self, **fields: Any) -> Any:
            assert fields["width"] == 64
            return type(
                "Plan",
                (),
                {"least": self.budget, "strategy": "a way", "dtype": "float16", "read_again_seconds": 0.0},
            )

        def predict(self, given: dict[str, Any]) -> Any:
            return type("Painted", (), {"images": [given["image"]]})

    def stats() -> dict[str, int]:
        most = (81 if ran[-1] == 80 else ran[-1] - 4) << 20
        return {f"{name}_bytes.all.peak": most for name in ("requested", "allocated", "reserved")}

    monkeypatch.setattr("ritocco.load", lambda *_, memory_budget, **how: Painter(memory_budget))
    monkeypatch.setattr(gpu_plans, "open_checkpoint", lambda model: None)
    wanted = [100 << 20, 90 << 20]
    monkeypatch.setattr(gpu_plans, "budgets", lambda checkpoint, given: list(wanted))
    for name in ("reset_peak_memory_stats", "empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_stats", stats)
    monkeypatch.setattr(gpu_plans, "choose", lambda device: type("Choice", (), {"device": CPU}))
    out = tmp_path / "plans.jsonl"
    words = ["plans", "--model", "somewhere", "--cases", "64x64@1", "--out", str(out), "--resume"]
    monkeypatch.setattr(sys, "argv", words)
    assert gpu_plans.main() == 0
    assert ran == [100, 90]
    wanted.append(80 << 20)
    assert gpu_plans.main() == 1
    assert ran == [100, 90, 100, 80], "the first again, for its picture"
    assert "NOT KEPT" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["budget"] >> 20 for row in rows] == [100, 90, 80]
    assert [row["allocated"] >> 20 for row in rows] == [96, 86, 81]
    assert gpu_plans.main() == 0, "all are there"
    assert len(ran) == 4


def test_a_ladder_goes_on_and_a_broken_rung_has_no_row(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest, off = ladder._runtime, 0.01

    def runtime(*given: Any) -> TorchRuntime:
        made = honest(*given)
        with torch.no_grad():
            for weight in made.unet.parameters() if made.path.packed else ():
                weight.mul_(1 + off)
        return made

    monkeypatch.setattr(ladder, "_runtime", runtime)
    monkeypatch.setattr(ladder, "choose", lambda device: type("Choice", (), {"device": CPU}))
    monkeypatch.setattr(ladder, "timed", lambda runtime, size, lanes, repeats: [0.25, 0.5, 0.75])
    monkeypatch.setattr(ladder, "profile", lambda runtime, size, lanes: f"{len(lanes)}\n")
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1 << 20)
    out = tmp_path / "rows.jsonl"
    words = ["--model", str(tiny), "--size", "64", "--lanes", "1", "--dtype", "bfloat16", "--resume"]
    words += ["--rungs", "plain,packed", "--out", str(out), "--profile", str(tmp_path / "profile.txt")]
    monkeypatch.setattr(sys, "argv", ["ladder", *words])

    def rungs() -> list[tuple[str, str]]:
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        return [(row["rung"], row["case"]) for row in rows]

    plain, packed = ((rung, "ladder-64x64-1x") for rung in ("plain", "packed"))
    off = 0.2
    assert ladder.main() == 1
    assert "packed: " in capsys.readouterr().out
    assert rungs() == [plain]
    assert not (tmp_path / "profile-1x.txt").exists()
    off = 0.0
    assert ladder.main() == 0
    assert rungs() == [plain, packed]
    assert (tmp_path / "profile-4x.txt").read_text(encoding="utf-8") == "4\n"
    assert ladder.main() == 0
    assert "every rung is there" in capsys.readouterr().out
    assert rungs() == [plain, packed]
    (tmp_path / "profile-4x.txt").unlink()
    assert ladder.main() == 0
    assert rungs() == [plain, packed]
    assert (tmp_path / "profile-4x.txt").exists()
    env = environment.environment("cpu")
    there = ladder.left_out(out, env, "tiny", "bfloat16")
    assert there == {(case, rung) for rung, case in rungs()}
    assert ladder.left_out(out, env, "other", "bfloat16") == set()
    assert ladder.left_out(out, env, "tiny", "float16") == set()
    assert ladder.left_out(out, replace(env, sources="0" * 12), "tiny", "bfloat16") == set()
