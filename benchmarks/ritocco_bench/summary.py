"""`ritocco bench report`: Markdown and plots from the rows that benchmarks wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ritocco_bench.asked import PHASES
from ritocco_bench.processes import BenchError
from ritocco_bench.report import Row, ratios

Held = Mapping[str, Any]


def read(files: Iterable[Path]) -> tuple[list[Row], list[Held], list[Held]]:
    """Rows of phases, rungs of the ladder, and kernels, whichever a file holds.

    Raises BenchError that names the file and line of anything else.
    """
    rows: list[Row] = []
    rungs: list[Held] = []
    kernels: list[Held] = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BenchError(f"{file}: can't be read ({error})") from error
        for number, line in enumerate(lines, 1):
            try:
                held = json.loads(line)
                if not isinstance(held, dict):
                    raise TypeError("not an object")
                if "rung" in held or "op" in held:
                    str(held["environment"]["utc"])
                if "rung" in held:
                    rungs.append(held)
                elif "op" in held:
                    kernels.append(held)
                else:
                    rows.append(Row.from_json(line))
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise BenchError(f"{file}, line {number}: no row of a benchmark ({error})") from error
    return rows, rungs, kernels


def markdown(rows: Sequence[Row], rungs: Sequence[Held], kernels: Sequence[Held]) -> str:
    """A section for each run: rows of one case, model, machine and time."""
    parts = [_section(group) for group in _runs(rows).values()]
    parts += [_ladder(group) for group in _grouped(rungs, "case").values()]
    parts += [_kernels(group) for group in _grouped(kernels).values()]
    return "\n\n".join(parts) + "\n"


def plots(rows: Sequence[Row], rungs: Sequence[Held], folder: Path) -> list[Path]:
    """A picture for each run: bars of its variants' phases, or of the ladder's rungs. Returns the files.

    Raises BenchError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError("plots need matplotlib; pip install 'ritocco[bench]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [(key[0], key[-1], _bars_of(group)) for key, group in _runs(rows).items()]
    for (when, case), group in _grouped(rungs, "case").items():
        bars = {str(one["rung"]): {"step": float(one["p50_ms"])} for one in group}
        drawn.append((case, when, bars))
    files = []
    for case, when, bars in drawn:
        figure = Figure(figsize=(8, 1.2 + 0.5 * len(bars)), layout="constrained")
        axes = figure.subplots()
        left = dict.fromkeys(bars, 0.0)
        for phase in dict.fromkeys(phase for each in bars.values() for phase in each):
            widths = [each.get(phase, 0.0) for each in bars.values()]
            axes.barh(list(bars), widths, left=list(left.values()), label=phase)
            left = {name: left[name] + width for name, width in zip(bars, widths, strict=True)}
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds, median")
        axes.set_title(case)
        axes.legend(fontsize="small")
        safe = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in f"{case}-{when}")
        files.append(folder / f"{safe}.png")
        figure.savefig(files[-1], dpi=100)
    return files


def _runs(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row.case, row.model, row.device, row.environment.machine, row.environment.utc)
        groups.setdefault(key, []).append(row)
    return groups


def _grouped(held: Sequence[Held], *keys: str) -> dict[tuple[str, ...], list[Held]]:
    """By the time of their run, then by what else is named."""
    groups: dict[tuple[str, ...], list[Held]] = {}
    for one in held:
        group = (str(one["environment"]["utc"]), *(str(one[key]) for key in keys))
        groups.setdefault(group, []).append(one)
    return groups


def _bars_of(group: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Variant -> phase -> milliseconds, phases side by side where they add up to the total."""
    phases = {row.phase for row in group}
    if "first_picture" in phases:
        wanted = {"first_picture"}
    elif set(PHASES) <= phases:
        wanted = set(PHASES)
    else:
        wanted = phases & {"total"} or phases
    bars: dict[str, dict[str, float]] = {}
    for row in group:
        if row.phase in wanted:
            bars.setdefault(row.variant, {})[row.phase] = row.p50_ms
    return bars


def _section(group: Sequence[Row]) -> str:
    first = group[0]
    env = first.environment
    ours = {row.phase: row for row in group if row.variant == "ritocco"}
    lines = [
        f"### {first.case}, `{first.model}`, {first.device}, {first.dtype}",
        "",
        f"{env.machine}, {env.cores} cores; torch {env.versions.get('torch', '')}; sources "
        f"{env.git_sha[:12]}{env.git_sha[40:]}; {env.utc}. Gate: {first.parity_psnr_db:.1f} dB.",
        "",
        "| variant | phase | median | 20 to 80 % | n | over ritocco | at most | FLOP/s | of a product's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in group:
        base = ours.get(row.phase)
        over = ""
        if base is not None and base is not row and len(base.each_ms) == len(row.each_ms):
            over = f"{statistics.median(ratios(base, row)):.2f}"
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB"
        spread = f"{_time(row.p20_ms)} to {_time(row.p80_ms)}"
        rate, share = _rate(row)
        cells = (row.variant, row.phase, _time(row.p50_ms), spread, str(row.samples), over, peak, rate, share)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ladder(group: Sequence[Held]) -> str:
    env = group[0]["environment"]
    lines = [
        f"### {group[0]['case']}",
        "",
        f"{env['machine']}; torch {env['versions'].get('torch', '')}; {env['utc']}. Each rung has the "
        "flags of those above it.",
        "",
        "| rung | a step | least to most | at most |",
        "|---|---|---|---|",
    ]
    for one in group:
        each = one["each_ms"]
        peak = f"{one['peak_bytes'] / 2**20:.0f} MiB"
        lines.append(
            f"| {one['rung']} | {_time(one['p50_ms'])} | {_time(min(each))} to {_time(max(each))} | {peak} |"
        )
    return "\n".join(lines)


def _kernels(held: Sequence[Held]) -> str:
    env = held[0]["environment"]
    lines = [
        "### Kernels",
        "",
        f"{env['machine']}; {env['utc']}.",
        "",
        "| operation | shape | dtype | kernel | reference | bytes | of a copy's speed |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in held:
        shape = " × ".join(map(str, one["shape"]))
        kernel, reference = (statistics.median(one[key]) for key in ("each_ms", "reference_each_ms"))
        ceiling = one.get("copy_bytes_per_s")
        share = f"{1000 * one['bytes'] / kernel / ceiling:.0%}" if ceiling and kernel else ""
        cells = (one["op"], shape, one["dtype"], _time(kernel), _time(reference), f"{one['bytes']:,}", share)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rate(row: Row) -> tuple[str, str]:
    """FLOP per second, and their share of what a large product reached in the same run."""
    if row.flop_per_s is None:
        return "", ""
    rate = row.flop_per_s
    text = f"{rate / 1e12:.3g} T" if rate >= 1e12 else f"{rate / 1e9:.3g} G"
    return text, f"{rate / row.matmul_flop_per_s:.0%}" if row.matmul_flop_per_s else ""


def _time(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{milliseconds:.3g} ms" if milliseconds >= 1 else f"{1000 * milliseconds:.3g} µs"
