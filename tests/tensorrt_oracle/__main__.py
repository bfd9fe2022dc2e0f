"""`PYTHONPATH=tests python -m tensorrt_oracle GRAPHS`: NVIDIA's parser and builder on a folder of graphs.

Each graph has a process of its own, whose memory is returned before the next one's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ritocco.artefacts import open_artefacts
from ritocco.errors import RitoccoError
from tensorrt_oracle.library import UnusableError
from tensorrt_oracle.oracle import Question, Verdict, allowed, ask


def main() -> int:
    """0: every graph is taken without a word. 1: one is not. 2: it can't be said."""
    parser = argparse.ArgumentParser(prog="python -m tensorrt_oracle", description=__doc__)
    parser.add_argument("graphs", type=Path, help="a folder that `ritocco export` wrote")
    parser.add_argument("--graph", action="append", help="only this one; may be repeated")
    parser.add_argument("--no-build", action="store_true", help="parse only: seconds, and little memory")
    options = parser.parse_args()
    try:
        artefacts = open_artefacts(options.graphs)
        names = options.graph or list(artefacts.contract)
        if unknown := set(names) - set(artefacts.contract):
            parser.error(
                f"--graph is {', '.join(sorted(unknown))}; there are {', '.join(artefacts.contract)}"
            )
        taken = True
        _row("graph", "verdict", "layers", "engine MiB", "seconds")
        for name in names:
            io, profiles = artefacts.contract[name], artefacts.profiles(name)
            question = Question.of(artefacts.graph(name), io, profiles, build=not options.no_build)
            (verdict,) = ask([question])
            _report(name, verdict)
            taken = taken and not verdict.objections
    except (RitoccoError, UnusableError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0 if taken else 1


def _report(name: str, verdict: Verdict) -> None:
    size = f"{verdict.engine_bytes / 2**20:.1f}" if verdict.engine_bytes else "none"
    _row(name, "refused" if verdict.objections else "taken", str(verdict.layers), size, str(verdict.seconds))
    for text in verdict.errors:
        sys.stdout.write(f"    error: {text}\n")
    for text in verdict.warnings:
        sys.stdout.write(f"    {'allowed' if allowed(text) else 'warning'}: {text}\n")
    sys.stdout.flush()


def _row(*cells: str) -> None:
    sys.stdout.write("  ".join(f"{cell:<13}" for cell in cells).rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
