"""What OpenMP keeps of a thread that has computed, where that makes another thread slow.

GNU's OpenMP keeps the workers of every thread that has computed in parallel. Where all of them are more than
the cores, they sleep at each barrier instead of spinning; a small network has hundreds of barriers in a step,
which then takes about twice as long. [GCC's libgomp manual, GOMP_SPINCOUNT]
"""

from __future__ import annotations

import ctypes
import sys

_SOFT = 1  # omp_pause_soft of <omp.h>


def let_go_of_workers() -> None:
    """End the workers that OpenMP keeps for this thread, which gets others when it computes again; nothing
    where GNU's OpenMP is not loaded.
    """
    if not sys.platform.startswith("linux"):
        return
    loaded = ctypes.CDLL(None)
    if hasattr(loaded, "GOMP_parallel") and hasattr(loaded, "omp_pause_resource_all"):
        loaded.omp_pause_resource_all(_SOFT)
