"""A fleet on Ray Serve under load: one painter beside two, on this machine, in turns.

    python -m ritocco_bench.ray_load                     # 8 clients, the embedded model, a store in a folder
    python -m ritocco_bench.ray_load --database URL      # two fronts on PostgreSQL

A painter computes with `--cpus` threads. Clients are those of `server_load`, which share the machine. Rows go
to `--out`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ritocco_bench.ray_fleet import fleet
from ritocco_bench.rows import append
from ritocco_bench.server_load import load, request, spread

OUT = Path("benchmarks/results/server.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where a prediction did not succeed."""
    given = _parser().parse_args(arguments)
    body, broken = request(given.size, given.steps), 0
    rates: dict[int, list[float]] = {}
    for _ in range(given.rounds):
        for painters in (int(one) for one in given.painters.split(",")):
            row = _measured(given, body, painters)
            append(given.out, row)
            rates.setdefault(painters, []).append(row["per_second"])
            broken += row["predictions"] - row["succeeded"]
            print(f"{painters} painters: {row['per_second']:.2f} predictions a second", flush=True)
    least = rates[min(rates)]
    for painters, found in rates.items():
        ratios = sorted(one / other for one, other in zip(found, least, strict=True))
        print(f"{painters} painters / {min(rates)}: {ratios[0]:.2f} to {ratios[-1]:.2f}")
    return 1 if broken else 0


def _measured(given: argparse.Namespace, body: dict[str, Any], painters: int) -> dict[str, Any]:
    store = {"database": given.database, "fronts": 2} if given.database else {}
    with (
        tempfile.TemporaryDirectory() as folder,
        fleet(Path(folder), painters=painters, cpus=given.cpus, **store) as made,
    ):
        load(made.url, body, given.clients, 2.0)  # each painter has met it
        begun = time.perf_counter()
        seen = load(made.url, body, given.clients, given.seconds)
        seconds = time.perf_counter() - begun
    row = {"case": "ray-load", "painters": painters, "cpus": given.cpus, "clients": given.clients}
    row |= {"size": given.size, "steps": given.steps, "fronts": store.get("fronts", 1)}
    row |= {
        "predictions": len(seen.wholes),
        "refused": seen.refused,
        "per_second": len(seen.wholes) / seconds,
    }
    row |= {"succeeded": sum(status == "succeeded" for status in seen.statuses.values())}
    return row | {"create_s": spread(seen.creates), "whole_s": spread(seen.wholes)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ritocco_bench.ray_load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--painters", default="1,2", help="how many, one measurement each")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--clients", type=int, default=8, help="how many at a time")
    parser.add_argument("--seconds", type=float, default=30.0, help="that clients begin anew")
    parser.add_argument("--cpus", type=int, default=1, help="of each painter")
    parser.add_argument("--size", type=int, default=128, help="pixels per side")
    parser.add_argument("--steps", type=int, default=8, help="of each prediction")
    parser.add_argument("--database", help="of the fronts: postgresql://...; default: SQLite")
    parser.add_argument("--out", type=Path, default=OUT, help="JSONL file that rows are added to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
