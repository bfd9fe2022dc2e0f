"""Requests of variants in turns: on a machine whose speed changes, only neighbours in time compare."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ritocco_bench.cases import LEAST_PSNR_DB, Bench, Say, refuse_worse_than_peers, row_of, total
from ritocco_bench.environment import Environment
from ritocco_bench.painted import Painted
from ritocco_bench.parity import Execute, Parity, distance
from ritocco_bench.processes import Process, execute
from ritocco_bench.report import Row
from ritocco_bench.worker import Job, Result


class Held(Protocol):
    """As `processes.Process`."""

    def ready(self) -> None:
        """Wait for the end of what it does."""

    def go(self) -> None:
        """Let it do one run."""

    def result(self) -> Result:
        """Wait for its end."""


def turns(
    bench: Bench,
    env: Environment,
    *,
    hold: Callable[[Job], AbstractContextManager[Held]] = Process,
    run: Execute = execute,
    say: Say = print,
) -> list[Row]:
    """A request of each variant in turns, `bench.pairs` times: seconds of each phase.

    A process of each is loaded and warm before the first turn, and they all stay: the memory must hold them
    side by side, and no peak is reported. Before them diffusers paints the request in float32; what each
    paints last must lie within LEAST_PSNR_DB of that, and what ritocco does also as `refuse_worse_than_peers`
    has it. Raises ParityError and BenchError.
    """
    taken: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        files = {variant: Path(folder) / f"{variant}.npz" for variant in ("truth", *bench.variants)}
        exact = replace(bench.job("diffusers-float32"), until="picture", warm=0, runs=1)
        run(replace(exact, painted=str(files["truth"])))
        held = {}
        for variant in bench.variants:
            say(f"turns {variant}: loads and warms up")
            job = replace(bench.job(variant), until="picture", runs=bench.pairs, turns=0)
            held[variant] = stack.enter_context(hold(replace(job, painted=str(files[variant]))))
            held[variant].ready()
        for turn in range(bench.pairs):
            for process in held.values():
                process.go()
                process.ready()
            say(f"turns {turn + 1}/{bench.pairs}")
        truth = Painted.read(files["truth"])
        found: dict[str, Parity] = {}
        for variant, process in held.items():
            process.go()
            for seconds in process.result().seconds:
                derived = {"step": seconds["denoise"] / bench.steps, "total": total(seconds)}
                for phase, one in (seconds | derived).items():
                    taken.setdefault((variant, phase), []).append(one)
            painted = Painted.read(files[variant])
            found[variant] = distance(painted, truth, least_db=LEAST_PSNR_DB, name=variant)
        refuse_worse_than_peers(bench, found)
    case = f"turns-{bench.case}"
    return [
        row_of(case, bench.held(key[0]), key, each, None, found[key[0]], env) for key, each in taken.items()
    ]
