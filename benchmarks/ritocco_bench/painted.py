"""What requests painted, in a file between two processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Painted:
    """decoded: the decoder's floats, [R,N,3,H,W] of R requests. pictures: what the requests gave, the kept
    pixels not put back, uint8 [R,N,H,W,3].
    """

    decoded: npt.NDArray[np.floating[Any]]
    pictures: npt.NDArray[np.uint8]

    def write(self, file: str | Path) -> None:
        """As .npz, whatever the file's name."""
        with Path(file).open("wb") as stream:
            np.savez(stream, decoded=self.decoded, pictures=self.pictures)

    @classmethod
    def read(cls, file: str | Path) -> Painted:
        """What `write` wrote; floats as float64."""
        with np.load(file) as held:
            return cls(decoded=held["decoded"].astype(np.float64), pictures=held["pictures"])

    def request(self, index: int) -> Painted:
        """One request's alone."""
        return Painted(decoded=self.decoded[index : index + 1], pictures=self.pictures[index : index + 1])
