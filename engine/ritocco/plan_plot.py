"""The course of a request's memory, drawn: what every operation reaches, phase by phase."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ritocco.errors import BackendError

if TYPE_CHECKING:
    from ritocco.plans import MemoryPlan

_GIB = 2**30
_COLOURS = ("#9aa5b1", "#4c78a8", "#72b7b2", "#f2a13c", "#b279a2", "#7f7f7f")


def draw(plan: MemoryPlan, file: Path) -> None:
    """Write a PNG. plan: of `Engine.plan` or `Planner.explained`, which keep the course.

    One step of the loop is drawn after another, as it was rehearsed: two, whatever the request asks for.
    Raises BackendError where matplotlib is missing, OSError where the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendError('a plot needs matplotlib; pip install "ritocco[plot]"') from error
    phases = plan.usage.phases
    ends = [0, *accumulate(len(one.course) for one in phases.values())]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, phase), (begin, end), colour in zip(phases.items(), pairwise(ends), _COLOURS, strict=False):
        course = [one / _GIB for one in phase.course]
        axes.fill_between(range(begin, end), course, step="post", color=colour, alpha=0.85, linewidth=0)
        if end - begin > ends[-1] / 40:
            axes.text((begin + end) / 2, -0.02, name, ha="center", va="top", transform=_below(axes))
    name, peak = plan.usage.peak
    # What is held before the first operation may be the most.
    reached = peak.course.index(peak.most) if peak.most in peak.course else 0
    position = ends[list(phases).index(name)] + reached
    axes.annotate(
        f"{peak.most / _GIB:.2f} GiB, {name}, in {peak.moment}",
        (position, peak.most / _GIB),
        xytext=(0, 8),
        textcoords="offset points",
        ha="right" if position > ends[-1] / 2 else "left",
    )
    axes.plot([position], [peak.most / _GIB], "k.", markersize=6)
    if plan.budget is not None:
        axes.axhline(plan.budget / _GIB, color="#c0392b", linewidth=1, linestyle="--")
        axes.text(
            0, plan.budget / _GIB, f" budget {plan.budget / _GIB:.2f} GiB", color="#c0392b", va="bottom"
        )
    count = f"{plan.num_outputs} picture{'s' if plan.num_outputs > 1 else ''}"
    size = f"{plan.width} x {plan.height}"
    axes.set_title(f"{count} of {size}, {plan.device}, {plan.dtype}: {plan.strategy}", fontsize=10)
    axes.set_ylabel("GiB")
    axes.set_xticks([])
    axes.set_xlim(0, ends[-1])
    axes.set_ylim(0, 1.15 * max(peak.most, plan.budget or 0) / _GIB)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, format="png", dpi=110)


def _below(axes: Any) -> Any:
    """Across in operations, down in the axes' height."""
    return axes.get_xaxis_transform()
