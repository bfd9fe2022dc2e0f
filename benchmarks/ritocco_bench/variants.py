"""Who is measured, by name. A variant's modules are imported when it is made: they are part of its start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from ritocco_bench.peaks import Peaks
    from ritocco_bench.worker import Job

PAIR = ("ritocco", "diffusers")


class Side(Protocol):
    """A variant, loaded.

    decoded, pictures: float32 [N,3,H,W] and uint8 [N,H,W,3] of its last run, where the job asks for them, or
    None. peaks: told of each phase that begins.
    """

    decoded: Any
    pictures: Any
    peaks: Peaks | None

    def run(self, steps: int, on_step: Callable[[], None], scheduler: str = ...) -> dict[str, float]:
        """One request. Seconds of each of `asked.PHASES`, of `png`, and of the `whole` without that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """made_by: module and class of its Side. needs: packages beside diffusers and transformers. dtype: in
    place of the job's, or empty. timed_start: whether its loading is that of a user. devices, dtypes: what it
    runs on and computes in; empty takes all.
    """

    made_by: str
    needs: tuple[str, ...] = ()
    dtype: str = ""
    timed_start: bool = True
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()

    def load(self, job: Job) -> Side:
        """The variant in this process."""
        module, name = self.made_by.split(":")
        made = getattr(import_module(f"ritocco_bench.{module}"), name)
        return cast(Side, made(replace(job, dtype=self.dtype or job.dtype)))


VARIANTS: dict[str, Variant] = {
    "ritocco": Variant(made_by="ours:Ritocco"),
    "diffusers": Variant(made_by="theirs:Diffusers"),
    "diffusers-float32": Variant(made_by="theirs:Diffusers", dtype="float32"),
    "diffusers-compiled": Variant(made_by="theirs:CompiledDiffusers"),
    "diffusers-autotuned": Variant(made_by="theirs:AutotunedDiffusers"),
    "diffusers-openvino": Variant(
        made_by="their_graphs:OpenVinoDiffusers",
        needs=("openvino",),
        timed_start=False,
        devices=("cpu",),
        dtypes=("bfloat16", "float32"),
    ),
    "diffusers-onnxruntime": Variant(
        made_by="their_graphs:OnnxDiffusers",
        needs=("onnxruntime", "onnxscript"),
        dtype="float32",
        timed_start=False,
    ),
    "diffusers-tensorrt": Variant(
        made_by="their_graphs:TensorRtDiffusers",
        needs=("onnxruntime", "onnxscript"),
        dtype="float32",
        timed_start=False,
    ),
}


def described(name: str) -> Variant:
    """The variant of a name. Raises ValueError for one that is not in VARIANTS."""
    if name not in VARIANTS:
        raise ValueError(f"variant is {name!r}; it must be one of {', '.join(VARIANTS)}")
    return VARIANTS[name]
