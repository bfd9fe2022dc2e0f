"""Does NVIDIA take a graph? Its own parser and builder are asked, in a process of their own.

A process may be asked many graphs. Where it ends too early, the graph that it was at is refused with its
last words, and another process goes on with the rest.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ritocco.nets.io import NetworkIO, Ranges
from tensorrt_oracle.library import UNUSABLE, Sizes, UnusableError

ALLOWED: Mapping[str, str] = {
    r"Make sure input (tokens|input_ids) has Int64 binding": (
        "the text encoder's tokens are int64 in our contract and in Optimum's; TensorRT binds int64 as it is"
    ),
}
"""Warnings that say nothing against a graph, and why: every other one counts as an error."""
_CHILD = (sys.executable, "-m", "tensorrt_oracle.child")
_LAST_WORDS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A graph. profiles: each has shapes of the inputs that move. build: an engine too, not parsing alone."""

    file: Path
    profiles: Sequence[Mapping[str, Sizes]] = ()
    build: bool = True

    @classmethod
    def of(
        cls, file: Path, io: NetworkIO, profiles: Sequence[Ranges] | None = None, *, build: bool = True
    ) -> Question:
        """About a graph with a contract. profiles: None takes the contract's ranges as the only one."""
        shapes = [io.shapes(ranges) for ranges in profiles or [io.ranges]]
        return cls(file=file, profiles=[one for one in shapes if one], build=build)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What TensorRT-RTX makes of a graph.

    warnings: its own, and the casts that it made without one. layers: of the parsed network, 0 where it can't
    be parsed. engine_bytes: 0 where no engine was built.
    """

    errors: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    layers: int = 0
    engine_bytes: int = 0
    seconds: float = 0

    @property
    def objections(self) -> tuple[str, ...]:
        """Errors, and warnings that are not among `ALLOWED`. None of them: the graph is taken as it is."""
        return (*self.errors, *(text for text in self.warnings if not allowed(text)))


def allowed(warning: str) -> bool:
    """Whether a warning is one of those that say nothing against a graph."""
    return any(re.search(pattern, warning) for pattern in ALLOWED)


def ask(questions: Sequence[Question], *, child: Sequence[str] = _CHILD) -> list[Verdict]:
    """The verdict on each graph. Raises UnusableError where TensorRT-RTX can't be called on this machine."""
    verdicts: list[Verdict] = []
    while len(verdicts) < len(questions):
        rest = questions[len(verdicts) :]
        done = subprocess.run(
            child,
            input="".join(_line(question) for question in rest),
            env=os.environ | {"PYTHONPATH": _with_this_folder()},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == UNUSABLE:
            raise UnusableError(done.stderr.strip())
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        verdicts += [
            Verdict(**{**held, "errors": tuple(held["errors"]), "warnings": tuple(held["warnings"])})
            for held in answers
        ]
        if len(answers) < len(rest):
            words = done.stderr.strip()[-_LAST_WORDS:] or "nothing"
            ended = f"TensorRT-RTX ended its process, exit status {done.returncode}; its last words: {words}"
            verdicts.append(Verdict(errors=(ended,)))
    return verdicts


def _line(question: Question) -> str:
    return json.dumps({**asdict(question), "file": str(question.file.resolve())}) + "\n"


def _with_this_folder() -> str:
    here = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
