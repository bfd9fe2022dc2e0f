"""What a request really takes on the CPU, by running it: the truth that plans are held against."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ritocco.errors import BackendError
from ritocco.plan_report import planned
from ritocco.plans import asked_without_pictures
from ritocco.schema import PredictionInput
from ritocco.shown import said

_BEGINS = {
    "follow": "load",
    "encode_text": "text",
    "encode_pixels": "encode",
    "open": "denoise",
    "decode_pixels": "decode",
}
_FIRST_STEPS = 2
# Blocks that are freed go back to the kernel, so that what is resident is what is held.
_NOTHING_KEPT = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_ARENA_MAX": "2"}


def allocated(model: Path, fields: PredictionInput, *, dtype: str, **where: Any) -> dict[str, int]:
    """Most bytes that torch's allocator held in each phase, by running the whole request in this process, and
    before it one like it: see `memory.Usage`.

    where: variant, tokenizer and memory_budget, as for `load_as_planned`.
    """
    from ritocco.track import Tracker

    gc.collect()  # what went away in the middle would be missing from a later phase
    with Tracker() as tracker:
        _run(model, fields, tracker, dtype=dtype, **where)
    return tracker.most


def resident(model: Path, fields: PredictionInput, *, dtype: str, **where: Any) -> dict[str, int] | None:
    """Most bytes that a fresh process had resident in each phase, as of `allocated`, beyond what it holds
    before it loads; freed blocks go back to the kernel at once. Pages of mapped weights count while they are
    read, in `load` above all, and with a budget, under which files stay mapped, from then on: the kernel may
    take them back. None where the system does not tell.

    where: as for `allocated`. Raises BackendError where the process fails.
    """
    given = fields.model_dump(mode="json", exclude={"image", "mask"}, exclude_none=True)
    options = {name: str(one) if isinstance(one, Path) else one for name, one in where.items()}
    asked = {"model": str(model), "given": given, "dtype": dtype, "where": options}
    command = [sys.executable, "-m", "ritocco.plan_verify"]
    done = subprocess.run(  # noqa: S603
        command, input=json.dumps(asked), capture_output=True, text=True, env={**os.environ, **_NOTHING_KEPT}
    )
    if done.returncode:
        raise BackendError(f"the request failed in a process of its own: {said(RuntimeError(done.stderr))}")
    found: dict[str, int] | None = json.loads(done.stdout.splitlines()[-1])
    return found


def _run(model: Path, fields: PredictionInput, watch: Any, **how: Any) -> None:
    from ritocco.loading import load_as_planned

    given = fields.model_dump(exclude={"image", "mask"})
    given |= {"image": fields.image, "mask": fields.mask, "seed": 0}
    watch.begin("load")
    with load_as_planned(model, **how) as engine:
        runtime: Any = engine.runtime
        for method, phase in _BEGINS.items():
            setattr(runtime, method, _heard(watch, phase, getattr(runtime, method)))
        checker: Any = engine._safety
        if checker is not None:
            checker.embeds = _heard(watch, "safety", checker.embeds)
        # Under a budget, another count of steps might be computed in another way.
        steps = (
            fields.num_inference_steps if engine.budgeted else min(_FIRST_STEPS, fields.num_inference_steps)
        )
        engine.predict(given | {"num_inference_steps": steps})
        engine.predict(given)


def _heard(watch: Any, phase: str, original: Any) -> Any:
    def heard(*arguments: Any, **options: Any) -> Any:
        watch.begin(phase)
        return original(*arguments, **options)

    return heard


def _main() -> None:
    """The process of `resident`: what is asked comes as JSON, what is found goes out as a line of it."""
    from ritocco.high_water import HighWater

    asked: Mapping[str, Any] = json.load(sys.stdin)
    fields = asked_without_pictures(asked["given"])
    _warm_up(asked["dtype"])
    where = asked["where"]
    model, dtype, budget = Path(asked["model"]), asked["dtype"], where.get("memory_budget")
    if budget is not None:  # what the planner itself keeps is no request's
        tokenizer = Path(where["tokenizer"]) if where.get("tokenizer") else None
        planned(
            model,
            asked["given"],
            dtype=dtype,
            variant=where.get("variant"),
            tokenizer=tokenizer,
            budget=budget,
        )
    watch = HighWater()
    _run(model, fields, watch, dtype=dtype, **where)
    watch.end()
    sys.stdout.write(json.dumps(watch.most) + "\n")


def _warm_up(dtype: str) -> None:
    """Let libraries and threads come before anything is counted, and what computes in this dtype."""
    import torch

    import ritocco.backends.torch_
    import ritocco.loading  # noqa: F401

    given = {"dtype": getattr(torch, dtype)}
    with torch.inference_mode():
        torch.nn.functional.conv2d(torch.zeros(1, 8, 16, 16, **given), torch.zeros(8, 8, 3, 3, **given))
        torch.nn.functional.linear(torch.zeros(64, 64, **given), torch.zeros(64, 64, **given))


if __name__ == "__main__":
    _main()
