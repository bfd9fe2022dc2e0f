"""What the gate measures of graphs beside torch, and how far off they may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

# Largest error over the largest value. float32: another order of sums (measured: 3e-6 on the full-size
# networks). float16 and bfloat16: outputs and what passes between graphs are rounded, half an ulp being 5e-4
# and 4e-3.
LARGEST_ERROR: Mapping[str, float] = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 32e-3}
LEAST_PSNR_DB: Mapping[str, float] = {"float32": 90.0, "float16": 55.0, "bfloat16": 37.0}

# Of the picture's 8-bit pixels, raw decode. float32: rounding to bytes is all that differs (51 dB if every
# pixel were one level off). float16 and bfloat16: what passes between graphs is rounded, through four guided
# steps; the embedded model's gave 61 and 44 dB.
LEAST_PICTURE_PSNR_DB: Mapping[str, float] = {"float32": 51.0, "float16": 50.0, "bfloat16": 33.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What the gate measured. error: largest, over the largest value. psnr_db: over the largest value.

    arithmetic: in which the graph was run; empty where it was not.
    """

    error: float
    psnr_db: float
    arithmetic: str

    @classmethod
    def not_run(cls) -> Figures:
        """Of a graph that nothing here runs."""
        return cls(error=math.nan, psnr_db=math.nan, arithmetic="")

    def line(self, dtype: str) -> str:
        """In words. dtype: of the graph's weights."""
        if not self.arithmetic:
            return "valid; not run: of what runs bfloat16 graphs on a CPU, openvino is not installed"
        weights = "" if dtype == self.arithmetic else f" arithmetic on {dtype} weights"
        where = f"{self.arithmetic}{weights}"
        return f"error {self.error:.1e}, PSNR {self.psnr_db:.1f} dB against torch, in {where}"

    def as_json(self) -> dict[str, Any]:
        """For the manifest; null stands for what is not finite: not run, or no error at all."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, held: object) -> Figures | None:
        """From a manifest; None for what are no figures."""
        match held:
            case {"error": None, "psnr_db": None, "arithmetic": ""}:
                return cls.not_run()
            case {
                "error": int() | float() as error,
                "psnr_db": int() | float() | None as psnr,
                "arithmetic": str() as arithmetic,
            }:
                with suppress(OverflowError):  # a whole number that no float holds
                    psnr = math.inf if psnr is None else float(psnr)
                    if arithmetic == "float32" and 0 <= error < math.inf and not isinstance(error, bool):
                        return cls(error=float(error), psnr_db=psnr, arithmetic=arithmetic)
        return None
