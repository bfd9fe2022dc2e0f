"""A user's checkpoint beside diffusers, as a report to paste: names no path, only the folder."""

from __future__ import annotations

from collections.abc import Sequence

from ritocco_bench.environment import Environment
from ritocco_bench.parity import Comparison
from ritocco_bench.worker import Job


def parity_report(
    found: Sequence[Comparison], job: Job, env: Environment, *, model: str, version: str
) -> str:
    """Markdown. model: the folder's name. version: of the checkpoint, see `checkpoint.fingerprint`."""
    versions = ", ".join(f"{name} {number}" for name, number in env.versions.items() if number)
    low = job.dtype != "float32"
    head = ["scheduler", "float32 error", *([f"ritocco, {job.dtype}", "diffusers"] if low else []), "verdict"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in found:
        distances = [f"{one.ours_db:.1f} dB", f"{one.theirs_db:.1f} dB"] if low else []
        verdict = "the same picture" if one.problem is None else f"**differs**: {one.problem}"
        lines.append(f"| {' | '.join([one.scheduler, f'{one.error:.1e}', *distances, verdict])} |")
    return "\n".join(
        [
            f"### ritocco beside diffusers: `{model}` ({version[:12]})",
            "",
            f"{job.size} x {job.size}, {job.steps} steps, on {job.device} ({env.machine}); {versions}; "
            f"sources {env.git_sha[:12] + env.git_sha[40:] or 'of the package'}.",
            "",
            *lines,
            "",
            "Error: largest difference of decoded floats over the largest magnitude; dB: PSNR against "
            "diffusers in float32. The pictures' bytes are held beside diffusers' as well.",
        ]
    )
