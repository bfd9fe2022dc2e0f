"""Tables and plots of a fleet's rows: what follows from them by arithmetic alone is worked out here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ritocco_bench.fleet_mix import DAY_S, MIXES, pictures, pixels
from ritocco_bench.fleet_run import CAPACITY
from ritocco_bench.processes import BenchError

Row = dict[str, Any]
KEYS = (
    "case",
    "mix",
    "painters",
    "route",
    "limit",
    "most_ongoing",
    "load",
    "ongoing",
    "target",
    "down_factor",
    "cold_s",
)
"""What tells rows apart; of two that agree the later counts."""
STORE_KEYS = ("store", "clients", "kept")
KEPT = {
    "pictures": "inputs and pictures",
    "inputs": "inputs, pictures beside it",
    "rows": "neither, URLs of both",
}
"""What lies in the database."""
GB = 1e9
DRAWN_COLD_S = 60.0


def read(file: Path) -> list[Row]:
    """The latest row of each kind, in the order of the file. Raises BenchError where there is none."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    if not lines:
        raise BenchError(
            f"{file} has no rows; run `python -m ritocco_bench.fleet rates` and the others first"
        )
    found: dict[tuple[Any, ...], Row] = {}
    for row in map(json.loads, lines):
        keys = STORE_KEYS if row["case"] == "fleet-store" else KEYS
        # A load that was looked for is a result.
        names = [name for name in keys if not (name in ("load", "ongoing") and "limit" in row)]
        values = [row.get(name) for name in names]
        key = (row["case"], *(value if isinstance(value, str | int | float) else None for value in values))
        found.pop(key, None)
        found[key] = row
    return list(found.values())


def markdown(rows: Sequence[Row], *, price: float, lost_hours: float) -> str:
    """All tables. price: of a GPU's hour. lost_hours: in which one of a thousand GPUs is lost."""
    parts = (
        ("Requests a second", _rates(rows)),
        ("Routes", _routes(rows)),
        ("Waiting", _waiting(rows)),
        ("A day", _days(rows)),
        ("The fluid beside each request", _checks(rows)),
        ("The store, measured", _stores(rows)),
        ("The store, by the fleet", _store_load(rows)),
        ("Network", _network(rows)),
        ("Lost GPUs", _lost(rows, lost_hours)),
        ("Cost", _cost(rows, price)),
    )
    return "\n\n".join(f"{title}\n\n{table}" for title, table in parts if table)


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Two PNGs: routes and company, and the day. Raises BenchError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError("plots need matplotlib; pip install 'ritocco[bench]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, fill in (("fleet-routes", _draw_routes), ("fleet-day", _draw_day)):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        fill(figure.subplots(1, 2), rows)
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1], dpi=110)
    return made


def _draw_routes(panels: Any, rows: Sequence[Row]) -> None:
    for axes, mix in zip(panels, ("mix", "halves"), strict=True):
        held = [
            row for row in _of(rows, "fleet-routes") if row["mix"] == mix and row["most_ongoing"] > CAPACITY
        ]
        for route in dict.fromkeys(row["route"] for row in held):
            line = [(row["load"], row["p95"]) for row in held if row["route"] == route]
            if route != "models, up to three":  # lies on the other one
                axes.plot(*zip(*sorted(line), strict=True), marker="o", markersize=3, label=route)
        title = "the mix" if mix == "mix" else "as many of 512 as of 768"
        axes.set(
            title=f"100 GPUs, {title}",
            xlabel="load, of what one request at a time can take",
            ylabel="p95, times the time alone",
            yscale="log",
            ylim=(0.9, 200),
            yticks=(ticks := (1, 2, 5, 10, 20, 50)),
            yticklabels=ticks,
        )
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8, ncols=2, loc="upper left")


def _draw_day(panels: Any, rows: Sequence[Row]) -> None:
    fixed = [row for row in _of(rows, "fleet-day") if row.get("target") is None][:1]
    scaled = [row for row in _of(rows, "fleet-day") if row.get("target") and row["cold_s"] == DRAWN_COLD_S]
    for row in (*fixed, *scaled):
        label, hours = _short(row), [at / 3600 for at, _ in row["counts"]]
        if row in fixed or (row["target"], row["down_factor"]) in ((0.8, 1), (2, 1), (1.5, 0.2)):
            panels[0].plot(hours, [count for _, count in row["counts"]], label=label)
        at = row["painter_s"] / 3600, 100 * row["over"][0]
        panels[1].plot(*at, "o")
        lifted = 6 if label == "target 1" else -3  # it would hide another
        panels[1].annotate(label, at, xytext=(7, lifted), textcoords="offset points", fontsize=8)
    panels[0].set(
        title="a day, every ten minutes", xlabel="hour", ylabel="GPUs", xlim=(0, 24), ylim=(0, None)
    )
    panels[0].legend(fontsize=8, loc="lower right")
    panels[1].set(xlabel="GPU-hours of the day", ylabel="% over twice the time alone", ylim=(0, None))
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[1].margins(x=0.25)
    panels[1].set_ylim(top=1.1 * panels[1].get_ylim()[1])


def _short(row: Row) -> str:
    if row.get("target") is None:
        return "fixed"
    down = "" if row["down_factor"] == 1 else f", down by {row['down_factor']:g}"
    return f"target {row['target']:g}{down}"


def _rates(rows: Sequence[Row]) -> str:
    return _table(
        (
            "mix",
            "GPUs",
            "p95 within",
            "requests/s",
            "each GPU",
            "busy",
            "pictures a step",
            "p50, p95",
            "p95, another seed",
        ),
        (
            (
                row["mix"],
                f"{row['painters']:,}",
                f"{row['limit']:g} times alone",
                f"{row['per_second']:,.{1 if row['painters'] < 100 else 0}f}",
                f"{row['per_second'] / row['painters']:.2f}",
                f"{100 * row['busy']:.0f} %",
                f"{row['fill']:.2f}",
                f"{row['p50_s']:.2f}, {row['p95_s']:.2f} s",
                f"{row['p95_other_seed']:.2f}",
            )
            for row in _of(rows, "fleet-rates")
        ),
    )


def _routes(rows: Sequence[Row]) -> str:
    held = _of(rows, "fleet-routes")
    loads = sorted({row["load"] for row in held})
    lines = []
    for mix, most in dict.fromkeys((row["mix"], row["most_ongoing"]) for row in held):
        for route in dict.fromkeys(row["route"] for row in held):
            cells = []
            for load in loads:
                found = [
                    row
                    for row in held
                    if (row["mix"], row["most_ongoing"], row["route"], row["load"])
                    == (mix, most, route, load)
                ]
                cells.append(f"{found[-1]['p95']:.2f} ({found[-1]['shared']:.2f})" if found else "")
            lines.append((mix, str(most), route, *cells))
    return _table(("mix", "at most in a house", "route", *(f"load {load:g}" for load in loads)), lines)


def _waiting(rows: Sequence[Row]) -> str:
    return _table(
        ("mix", "in the house", "requests/s", "of one at a time", "pictures a step", "requests a step"),
        (
            (
                row["mix"],
                str(row["ongoing"]),
                f"{row['per_second']:.2f}",
                f"{row['per_second'] * row['alone_s']:.2f}",
                f"{row['fill']:.2f}",
                f"{row['shared']:.2f}",
            )
            for row in _of(rows, "fleet-waiting")
        ),
    )


def _days(rows: Sequence[Row]) -> str:
    return _table(
        (
            "fleet",
            "peak, requests/s",
            "requests",
            "GPU-hours",
            "GPUs at most",
            "over 2 times alone",
            "over 4 times",
        ),
        (
            (
                _fixed(row) if row.get("target") is None else _scaled(row),
                f"{row['peak_per_second']:,.0f}",
                f"{row['requests'] / 1e6:.1f} million",
                f"{row['painter_s'] / 3600:,.0f}",
                f"{row['most']:,}",
                *(f"{100 * share:.1f} %" for share in row["over"]),
            )
            for row in _of(rows, "fleet-day")
        ),
    )


def _checks(rows: Sequence[Row]) -> str:
    return _table(
        ("fleet", "requests", "over 2 times: each, fluid", "over 4 times", "GPU-hours", "GPUs at most"),
        (
            (
                f"fixed, {row['painters']}" if row["target"] is None else _scaled(row),
                f"{row['requests']:,}",
                *(
                    f"{100 * each:.1f}, {100 * fluid:.1f} %"
                    for each, fluid in zip(row["over"], row["fluid"]["over"], strict=True)
                ),
                f"{row['painter_s'] / 3600:.1f}, {row['fluid']['painter_s'] / 3600:.1f}",
                f"{row['most']}, {row['fluid']['most']}",
            )
            for row in _of(rows, "fleet-check")
        ),
    )


def _stores(rows: Sequence[Row]) -> str:
    return _table(
        (
            "store",
            "in the database",
            "at a time",
            "predictions/s",
            "transactions/s",
            "log, of each",
            "kept, of each",
        ),
        (
            (
                row["store"],
                KEPT[row["kept"]],
                str(row["clients"]),
                f"{row['per_second']:.0f}",
                f"{row['per_second'] * row['transactions']:.0f}",
                f"{row['written_bytes'] / 1000:.1f} kB" if row["written_bytes"] else "not counted",
                f"{row['stored_bytes'] / 1000:.1f} kB",
            )
            for row in _of(rows, "fleet-store")
        ),
    )


def _planned(rows: Sequence[Row]) -> list[Row]:
    """The rates that the rest is worked out for."""
    return [row for row in _of(rows, "fleet-rates") if row["mix"] == "mix" and row["limit"] == 2]


def _store_load(rows: Sequence[Row]) -> str:
    held = [row for row in _of(rows, "fleet-store") if row["store"] == "postgresql"]
    if not held:
        return ""
    lines = []
    for kept, name in KEPT.items():
        fastest = max((one for one in held if one["kept"] == kept), key=lambda one: float(one["per_second"]))
        for row in _planned(rows):
            rate = row["per_second"]
            more = (pixels(MIXES[row["mix"]]) - 1) * fastest["output_bytes"] * (kept == "pictures")
            written, stored = (rate * (fastest[each] + more) for each in ("written_bytes", "stored_bytes"))
            lines.append(
                (
                    name,
                    f"{row['painters']:,}",
                    f"{rate:,.1f}",
                    f"{rate * fastest['transactions']:,.0f}",
                    f"{written / 1e6:,.1f}",
                    f"{stored * DAY_S / GB:,.0f}",
                    f"{rate / fastest['per_second']:.2f}",
                )
            )
    return _table(
        (
            "in the database",
            "GPUs",
            "predictions/s",
            "transactions/s",
            "log, MB/s",
            "GB a day",
            "times what was measured",
        ),
        lines,
    )


def _network(rows: Sequence[Row]) -> str:
    stores = _of(rows, "fleet-store")
    if not stores:
        return ""
    asked, output = stores[-1]["input_bytes"], stores[-1]["output_bytes"]
    lines = []
    for row in _planned(rows):
        rate, made = row["per_second"], output * pixels(MIXES[row["mix"]])
        uri = made * 4 / 3
        amounts = (asked, asked, uri, asked + uri)
        lines.append(
            (f"{row['painters']:,}", f"{rate:,.1f}", *(f"{8 * rate * one / GB:,.2f}" for one in amounts))
        )
    return _table(
        (
            "GPUs",
            "predictions/s",
            "client to front, Gbit/s",
            "front to painter",
            "painter to front",
            "front to client, each answer with data URIs",
        ),
        lines,
    )


def _lost(rows: Sequence[Row], lost_hours: float) -> str:
    lines = []
    for row in _planned(rows):
        lost = row["painters"] / 1000 * 24 / lost_hours
        failed, day = lost * row["started"], row["per_second"] * DAY_S
        lines.append(
            (
                f"{row['painters']:,}",
                f"{lost:.3g}",
                f"{row['started']:.2f}",
                f"{failed:.3g}",
                f"{day / 1e6:,.2f} million",
                f"1 of {day / failed / 1e6:,.0f} million" if failed else "none",
            )
        )
    return _table(
        (
            "GPUs",
            "lost a day",
            "worked on at a time, each",
            "fail for it, a day",
            "predictions a day",
            "share",
        ),
        lines,
    )


def _cost(rows: Sequence[Row], price: float) -> str:
    held = [
        (
            f"{row['painters']:,}, p95 within {row['limit']:g} times alone",
            row["painters"] / row["per_second"] / row["pictures"],
        )
        for row in _of(rows, "fleet-rates")
        if row["mix"] == "mix"
    ]
    for row in _of(rows, "fleet-day"):
        name = f"a day, {_fixed(row)}" if row.get("target") is None else f"a day, {_scaled(row)}"
        held.append((name, row["painter_s"] / row["requests"] / pictures(MIXES[row["mix"]])))
    return _table(
        ("GPUs", "GPU-seconds a picture", f"1,000 pictures, at {price:g} an hour (an example)"),
        ((name, f"{seconds:.3f}", f"{1000 * seconds * price / 3600:.3f}") for name, seconds in held),
    )


def _fixed(row: Row) -> str:
    return f"fixed, p95 of the peak within {row['limit']:g} times alone"


def _scaled(row: Row) -> str:
    return f"{_short(row)}, cold {row['cold_s']:g} s"


def _of(rows: Sequence[Row], case: str) -> list[Row]:
    return [row for row in rows if row["case"] == case]


def _table(names: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    held = [" | ".join(line) for line in lines]
    head = [" | ".join(names), "|".join("---" for _ in names)]
    return (
        "\n".join(f"| {line} |" if line != head[1] else f"|{line}|" for line in [*head, *held])
        if held
        else ""
    )
