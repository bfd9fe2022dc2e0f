"""How many GPUs for how many requests, and what stands around them: a simulation of fleets.

    python -m ritocco_bench.fleet rates     # requests a second that 1 to 1000 GPUs serve in time
    python -m ritocco_bench.fleet routes    # which painter a request goes to, and how full steps are
    python -m ritocco_bench.fleet waiting   # one painter with so many requests in its house
    python -m ritocco_bench.fleet day       # a day's curve, fleets of a fixed size and scaled ones
    python -m ritocco_bench.fleet check     # the day's fluid beside the simulation of each request
    python -m ritocco_bench.fleet store     # real: transactions of the store, here, and bytes
    python -m ritocco_bench.fleet page      # tables and plots of the rows that are there

A painter is one `Batcher` on one GPU, with its own policy and the step times of one H200 (`batching_times`).
Rows go to `--out`. What no row has is an assumption, and an option or a constant here.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ritocco.batcher import AGEING
from ritocco.errors import RitoccoError
from ritocco_bench import fleet_report, store_times
from ritocco_bench.autoscaling import Autoscaler
from ritocco_bench.batching_times import of_ladder
from ritocco_bench.fleet_day import SLOW, WARM, Day, Table, flow, table
from ritocco_bench.fleet_mix import MIXES, Kind, alone, of_day, pictures, poisson, varying
from ritocco_bench.fleet_routes import ROUTES
from ritocco_bench.fleet_run import CAPACITY, MOST_ONGOING, Plan, Ran, run
from ritocco_bench.painter import Painter
from ritocco_bench.processes import BenchError
from ritocco_bench.rows import append
from ritocco_bench.simulation import Given

OUT = Path("benchmarks/results/fleet.jsonl")
SIZES = (512, 768, 1024)
FLEETS = (1, 10, 100, 1000)
LEAST_REQUESTS = 30_000
LATE = 0.05
"""Share of requests that may be later than a limit: its p95."""
CLOSE = 1.02
"""A rate is looked for until the bounds are this near."""
TABLE_PAINTERS = 100
FEW_ONGOING = 8
"""For a painter that takes no more than one full batch."""
ROUTE_LOADS = (0.5, 0.7, 0.9, 1.0, 1.1)
WAITING = (1, 2, 4, 8, 16, 32, 64)
CHECKED = (19.6, 20.6)
"""Hours of the day that are simulated request by request, with the evening's rush in them."""
CHECKED_COLD_S = 60.0
RUSH_PAINTERS = 20
DAY_PAINTERS = 1000
SCALERS = ((0.8, 1.0), (1.0, 1.0), (1.5, 1.0), (2.0, 1.0), (1.0, 0.2), (1.5, 0.2), (2.0, 0.2))
"""Ongoing requests of a painter, and what part of the way down is gone at once. 2 and 1 are Ray Serve's
defaults.
"""
COLD_S = (10.0, 60.0, 300.0)
"""Assumptions, since no row has it on a GPU: a process on a machine that is there, from files that are in
its memory or elsewhere, and a machine that has to be got.
"""


def spread(ran: Ran) -> dict[str, float]:
    """Of a run's requests but the first tenth: times slower than alone, and seconds."""
    skipped = round(WARM * len(ran.waits))
    slower, waits = np.asarray(ran.slower)[skipped:], np.asarray(ran.waits)[skipped:]
    found = {f"p{at}": float(np.percentile(slower, at)) for at in (50, 95, 99)}
    found |= {f"p{at}_s": float(np.percentile(waits, at)) for at in (50, 95, 99)}
    return found | {
        name: float(getattr(ran, name)) for name in ("fill", "shared", "busy", "ongoing", "started")
    }


def stationary(
    mix: Sequence[Kind], times: Given, plan: Plan, load: float, *, requests: int, seed: int
) -> dict[str, float]:
    """`spread` at a load of what one request at a time can take on so many painters."""
    rate = load * plan.painters / alone(mix, times)
    asked = poisson(mix, rate, requests / rate, seed=seed)
    ran = run(asked, times, plan, seed=seed)
    return {"load": load, "per_second": rate, "requests": len(asked), **spread(ran)}


def most(
    measure: Callable[[float], dict[str, float]], limit: float, low: float, high: float
) -> dict[str, float]:
    """What is measured at the highest load whose p95 is within the limit, between two loads.

    Raises BenchError where the lower one is not within it.
    """
    best = measure(low)
    if best["p95"] > limit:
        raise BenchError(
            f"at a load of {low:g} p95 is {best['p95']:.2f} times the time alone, over {limit:g}"
        )
    while high / low > CLOSE:
        middle = (low * high) ** 0.5
        found = measure(middle)
        if found["p95"] <= limit:
            low, best = middle, found
        else:
            high = middle
    return best


def closed(mix: Sequence[Kind], times: Given, ongoing: int, *, requests: int, seed: int) -> dict[str, float]:
    """One painter that never has fewer or more requests in its house."""
    asked = poisson(mix, 1.0, float(requests), seed=seed)
    painter, now, key = Painter(times, capacity=CAPACITY, ageing=AGEING), 0.0, 0
    for key in range(ongoing):
        painter.submit(key, replace(asked[key], at=now), now)
    while key + 1 < len(asked):
        now = painter.until
        if painter.advance() is not None:
            key += 1
            painter.submit(key, replace(asked[key], at=now), now)
    done = len(asked) - ongoing
    return {
        "ongoing": ongoing,
        "per_second": done / now,
        "pictures_per_second": done * pictures(mix) / now,
        "fill": painter.moved / painter.taken,
        "shared": painter.joined / painter.taken,
    }


def demo() -> tuple[dict[str, Any], bytes]:
    """The demo's request as a client sends it, and an output's bytes: its photograph at 512 x 512, as PNG."""
    from PIL import Image

    from ritocco.images import data_uri

    folder = files("ritocco") / "assets"
    photo, mask = ((folder / name).read_bytes() for name in ("coffee.jpg", "coffee-mask.png"))
    with Image.open(io.BytesIO(photo)) as opened:
        made = io.BytesIO()
        opened.convert("RGB").resize((512, 512)).save(made, "PNG")
    asked = {"prompt": "a vase of sunflowers on the table, photograph", "num_inference_steps": 25}
    return asked | {"image": data_uri(photo), "mask": data_uri(mask)}, made.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; 1 where something is missing."""
    given = _parser().parse_args(arguments)
    try:
        _COMMANDS[given.command](given)
    except (BenchError, RitoccoError, OSError) as error:
        print(f"{type(error).__name__}: {error}\nNothing is reported.", file=sys.stderr)
        return 1
    return 0


def _rates(given: argparse.Namespace) -> None:
    times = of_ladder(sizes=SIZES)
    for name, fleets in ((given.mix, _numbers(given.fleets)), ("traces", [TABLE_PAINTERS])):
        mix, near = MIXES[name], dict[float, float]()
        for painters in fleets:
            plan = Plan(painters=painters, route=given.route)
            requests = max(given.requests, 100 * painters)
            measure = _remembered(partial(stationary, mix, times, plan, requests=requests, seed=given.seed))
            for limit in SLOW:
                low, high = (0.95 * near[limit], 1.1 * near[limit]) if painters > 100 else (0.02, 1.4)
                found = most(measure, limit, low, high)
                near[limit] = found["load"]
                again = stationary(mix, times, plan, found["load"], requests=requests, seed=given.seed + 1)
                row = {"case": "fleet-rates", "mix": name, "painters": painters, "route": given.route}
                row |= {"limit": limit, "alone_s": alone(mix, times), "pictures": pictures(mix), **found}
                _add(given, row | {"p95_other_seed": again["p95"]})


def _routes(given: argparse.Namespace) -> None:
    times = of_ladder(sizes=SIZES)
    for name in ("mix", "halves"):
        for most_ongoing in (MOST_ONGOING, FEW_ONGOING):
            for load in ROUTE_LOADS:
                for route in ROUTES:
                    plan = Plan(painters=TABLE_PAINTERS, route=route, most_ongoing=most_ongoing)
                    found = stationary(
                        MIXES[name], times, plan, load, requests=given.requests, seed=given.seed
                    )
                    row = {"case": "fleet-routes", "mix": name, "painters": TABLE_PAINTERS, "route": route}
                    _add(given, row | {"most_ongoing": most_ongoing, **found})


def _waiting(given: argparse.Namespace) -> None:
    times = of_ladder(sizes=SIZES)
    for name in ("mix", "halves"):
        for ongoing in WAITING:
            requests = max(given.requests // 5, 20 * ongoing)
            found = closed(MIXES[name], times, ongoing, requests=requests, seed=given.seed)
            _add(given, {"case": "fleet-waiting", "mix": name, "alone_s": alone(MIXES[name], times), **found})


def _day(given: argparse.Namespace) -> None:
    looked = _table(given)
    row = {"case": "fleet-table", "mix": given.mix, "painters": TABLE_PAINTERS, "route": given.route}
    _add(given, row | asdict(looked))
    base = {"case": "fleet-day", "mix": given.mix, "route": given.route}
    for which, limit in enumerate(SLOW):
        peak = DAY_PAINTERS * looked.rate(which, LATE)
        day = flow(looked, _of_day(peak), painters=DAY_PAINTERS, step_s=given.step)
        _add_day(given, base | {"limit": limit, "peak_per_second": peak}, day)
    peak = DAY_PAINTERS * looked.rate(0, LATE)
    begin = round(peak * of_day(0.0) / looked.rate(0, LATE))
    for target, factor in SCALERS:
        for cold_s in COLD_S:
            scaler = Autoscaler(target=target, down_factor=factor, least=10, most=DAY_PAINTERS)
            day = flow(looked, _of_day(peak), painters=begin, scaler=scaler, cold_s=cold_s, step_s=given.step)
            row = base | {"peak_per_second": peak, "target": target, "down_factor": factor}
            _add_day(given, row | {"cold_s": cold_s}, day)


def _of_day(peak: float) -> Callable[[float], float]:
    return lambda at: peak * of_day(at)


def _check(given: argparse.Namespace) -> None:
    """The rush of the evening, request by request and as a fluid."""
    looked, times, mix = _table(given), of_ladder(sizes=SIZES), MIXES[given.mix]
    begin, end = (3600 * hour for hour in CHECKED)
    peak = RUSH_PAINTERS * looked.rate(0, LATE)
    for target, factor in ((None, 1.0), (0.8, 1.0), (1.0, 1.0), (2.0, 1.0), (1.5, 0.2)):

        def rate(at: float) -> float:
            return peak * of_day(begin + at)

        def scaler(target: float | None = target, factor: float = factor) -> Autoscaler:
            return Autoscaler(target=target or 1.0, down_factor=factor, least=2, most=RUSH_PAINTERS)

        asked = varying(mix, rate, peak, end - begin, seed=given.seed)
        painters = RUSH_PAINTERS if target is None else round(rate(0.0) / looked.rate(0, LATE))
        plan = Plan(painters=painters, scaled=scaler if target else None, cold_s=CHECKED_COLD_S)
        ran = run(asked, times, plan, seed=given.seed)
        day = flow(
            looked,
            rate,
            painters=painters,
            scaler=scaler() if target else None,
            cold_s=CHECKED_COLD_S,
            seconds=end - begin,
        )
        slower = np.asarray(ran.slower)
        row = {"case": "fleet-check", "mix": given.mix, "target": target}
        row |= {"down_factor": factor, "cold_s": CHECKED_COLD_S}
        row |= {"painters": painters, "peak_per_second": peak, "requests": len(asked)}
        row |= {"over": [float(np.mean(slower > limit)) for limit in SLOW], "painter_s": ran.painter_s}
        row |= {"most": max(count for _, count in ran.counts)}
        row |= {"fluid": {"over": day.over, "painter_s": day.painter_s, "most": day.most}}
        _add(given, row)


def _store(given: argparse.Namespace) -> None:
    asked, output = demo()
    base = {"case": "fleet-store", "input_bytes": len(json.dumps(asked)), "output_bytes": len(output)}
    for clients in (1, 4):
        lived = store_times.sqlite(asked, output, clients=clients, seconds=given.seconds)
        _add(given, base | {"store": "sqlite", "clients": clients, "kept": "inputs"} | _lived(lived))
    elsewhere = asked | dict.fromkeys(("image", "mask"), f"https://pictures.example/{'0' * 32}.jpg")
    held = {"pictures": (asked, output), "inputs": (asked, output), "rows": (elsewhere, b"")}
    with store_times.server(given.postgres) as url:
        for kept, (input, made) in held.items():
            for clients in (1, 4, 16):
                lived = store_times.postgres(
                    url, input, made, clients=clients, seconds=given.seconds, pictures=kept == "pictures"
                )
                _add(given, base | {"store": "postgresql", "clients": clients, "kept": kept} | _lived(lived))


def _page(given: argparse.Namespace) -> None:
    rows = fleet_report.read(given.out)
    print(fleet_report.markdown(rows, price=given.price, lost_hours=given.lost_hours))
    if given.plots is not None:
        for file in fleet_report.draw(rows, given.plots):
            print(file)


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "rates": _rates,
    "routes": _routes,
    "waiting": _waiting,
    "day": _day,
    "check": _check,
    "store": _store,
    "page": _page,
}


def _table(given: argparse.Namespace) -> Table:
    plan = Plan(painters=TABLE_PAINTERS, route=given.route)
    times = of_ladder(sizes=SIZES)
    return table(MIXES[given.mix], times, plan, requests=given.requests, seed=given.seed)


def _add_day(given: argparse.Namespace, row: dict[str, Any], day: Day) -> None:
    held = asdict(day)
    held["counts"] = [(round(at), count) for at, count in day.counts[::10]]
    _add(given, row | held)


def _lived(lived: store_times.Lived) -> dict[str, float]:
    return asdict(lived) | {"per_second": lived.per_second, "load_average": os.getloadavg()[0]}


def _remembered(measure: Callable[[float], dict[str, float]]) -> Callable[[float], dict[str, float]]:
    held: dict[float, dict[str, float]] = {}

    def remember(load: float) -> dict[str, float]:
        if load not in held:
            held[load] = measure(load)
        return held[load]

    return remember


def _add(given: argparse.Namespace, row: dict[str, Any]) -> None:
    append(given.out, row | {"seed": given.seed})
    print(
        ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.items()
            if isinstance(value, str | int | float)
        ),
        flush=True,
    )


def _numbers(texts: str) -> list[int]:
    return [int(one) for one in texts.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ritocco_bench.fleet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=tuple(_COMMANDS), help="see above")
    parser.add_argument(
        "--mix",
        choices=tuple(MIXES),
        default="mix",
        help="rates, day, check: what is asked for: sizes, steps and pictures; default: %(default)s",
    )
    parser.add_argument(
        "--route",
        choices=tuple(ROUTES),
        default="two choices",
        help="rates, day, check: which painter a request goes to; default: %(default)s",
    )
    parser.add_argument("--fleets", default=",".join(map(str, FLEETS)), help="rates: numbers of GPUs")
    parser.add_argument("--requests", type=int, default=LEAST_REQUESTS, help="of each run, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the requests that are drawn")
    parser.add_argument("--step", type=float, default=1.0, help="day: seconds of the fluid's step")
    parser.add_argument("--seconds", type=float, default=10.0, help="store: of each measurement")
    parser.add_argument(
        "--postgres",
        type=Path,
        default=store_times.BINARIES,
        help="store: the folder of PostgreSQL's programs",
    )
    parser.add_argument("--price", type=float, default=2.0, help="page: of a GPU's hour, an example")
    parser.add_argument(
        "--lost-hours", type=float, default=24.0, help="page: in which one of a thousand GPUs is lost"
    )
    parser.add_argument("--plots", type=Path, help="page: a folder for PNGs")
    parser.add_argument("--out", type=Path, default=OUT, help="JSONL file that rows are added to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
