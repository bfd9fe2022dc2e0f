"""What the harness tells: the sub-command, a checkpoint beside diffusers, and reports of rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from made_rows import in_process, row
from ritocco.cli import _add_plugins, app
from ritocco_bench import __main__ as command
from ritocco_bench import asked, folder, ours, parity, summary, worker
from ritocco_bench.environment import Environment
from ritocco_bench.parity_report import parity_report
from ritocco_bench.processes import BenchError
from ritocco_bench.variants import PAIR

ENVIRONMENT = Environment(
    machine="A machine", cores=2, driver="", versions={"torch": "2", "none": ""}, git_sha="a" * 40, utc="now"
)
RUNG = {
    "case": "ladder-8x8", "rung": "plain", "each_ms": [3.0, 1.0, 2.0], "p50_ms": 2.0, "peak_bytes": 1 << 20,
    "environment": {"machine": "A GPU", "versions": {"torch": "2"}, "utc": "now"},
}  # fmt: skip
KERNEL = {
    "op": "geglu", "shape": [2, 8], "dtype": "float16", "each_ms": [0.0125], "reference_each_ms": [0.5],
    "bytes": 1024, "environment": RUNG["environment"],
}  # fmt: skip


def job(model: Path, **changes: Any) -> worker.Job:
    made = worker.Job(
        variant="ritocco",
        model=str(model),
        device="cpu",
        dtype="float32",
        size=64,
        steps=4,
        schedulers=tuple(asked.DIFFUSERS_CLASSES),
    )
    return replace(made, **changes)


def test_ritocco_bench_is_the_harness() -> None:
    _add_plugins()
    done = CliRunner().invoke(app, ["bench", "--help"])
    assert done.exit_code == 0
    assert "usage: ritocco bench" in done.stdout
    done = CliRunner().invoke(app, ["bench", "report", "nowhere.jsonl"])
    assert done.exit_code == 1


def test_every_scheduler_is_held_beside_diffusers(tmp_path: Path) -> None:
    model = folder.make_folder(tmp_path / "tiny", "tiny")
    found = parity.compare(job(model), in_process)
    assert [one.scheduler for one in found] == list(asked.DIFFUSERS_CLASSES)
    assert all(one.problem is None and one.error < 1e-4 and one.ours_db > 20 for one in found), found
    text = parity_report(found, job(model), ENVIRONMENT, model="tiny", version="b" * 64)
    assert text.count("the same picture") == 6
    assert str(tmp_path) not in text
    assert "torch 2; sources aaaaaaaaaaaa." in text


def test_another_picture_turns_the_report_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder.make_folder(tmp_path / "tiny", "tiny")

    def broken(self: ours.Ritocco, steps: int, on_step: Any, scheduler: str = "DDIM") -> dict[str, float]:
        seconds: dict[str, float] = honest(self, steps, on_step, scheduler)
        if scheduler == "PNDM":
            assert self.decoded is not None
            self.decoded = self.decoded * 1.01
        return seconds

    honest = ours.Ritocco.run
    monkeypatch.setattr(ours.Ritocco, "run", broken)
    monkeypatch.setattr(command, "execute", in_process)
    asked = ["parity", "--model", str(model), "--size", "64", "--dtype", "float32"]
    assert command.main(asked) == 1
    said = capsys.readouterr().out
    (line,) = (one for one in said.splitlines() if "**differs**" in one)
    assert line.startswith("| PNDM |")
    assert "at most 1e-04 is allowed" in line


def test_fewer_steps_than_every_scheduler_can_take_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["parity", "--model", str(tmp_path), "--steps", "3"]) == 1
    assert "--steps is 3; parity needs at least 4, which diffusers' PNDM takes" in capsys.readouterr().err


def test_a_report_has_every_row_and_their_ratios(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [row("ritocco"), row("diffusers", each=(30.0, 60.0, 80.0))]
    lines = [*(one.to_json() for one in rows), json.dumps(RUNG), json.dumps(KERNEL)]
    file.write_text("\n".join(lines), encoding="utf-8")
    held = summary.read([file])
    assert [len(part) for part in held] == [2, 1, 1]
    text = summary.markdown(*held)
    assert "| ritocco | total | 20 ms | 10 ms to 40 ms | 3 |  | 3 MiB |" in text
    assert "| diffusers | total | 60 ms | 30 ms to 80 ms | 3 | 3.00 | 3 MiB |" in text
    assert "| plain | 2 ms | 1 ms to 3 ms | 1 MiB |" in text
    later = json.loads(json.dumps(RUNG).replace('"now"', '"later"'))
    again = summary.markdown(held[0], [RUNG, later], held[2])
    assert again.count("### ladder-8x8") == 2, "a section for each run"
    assert "| geglu | 2 × 8 | float16 | 12.5 µs | 500 µs | 1,024 |  |" in text
    measured = KERNEL | {"copy_bytes_per_s": 2e8}
    assert "| 1,024 | 41% |" in summary.markdown([], [], [measured])


def test_plots_are_pictures_of_each_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(name, phase) for name in PAIR for phase in (*asked.PHASES, "total")]
    files = summary.plots(rows, [RUNG], tmp_path / "plots")
    assert len(files) == 2
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert summary._bars_of(rows)["ritocco"] == dict.fromkeys(asked.PHASES, 20.0)


@pytest.mark.parametrize(
    "line", ["", "[]", "{", '{"case": "x"}', '"rung"', "1", '{"rung": "a"}', '{"op": "a"}']
)
def test_what_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{row('ritocco').to_json()}\n{line or ' '}\n", encoding="utf-8")
    with pytest.raises(BenchError, match=r"rows\.jsonl, line 2: no row of a benchmark"):
        summary.read([file])
    with pytest.raises(BenchError, match="nowhere: can't be read"):
        summary.read([tmp_path / "nowhere"])
