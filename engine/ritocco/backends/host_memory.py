"""What glibc does with freed blocks, where its rule makes a network slow.

glibc keeps a freed block for the next request up to 32 MiB; a larger one goes back to the kernel at once, and
the next of its size is faulted in page by page again. A full-size network frees and asks for such blocks in
every step (a convolution's rearranged weights, a decoder's activations).
"""

from __future__ import annotations

import ctypes
import os
import sys

LARGEST_KEPT_BYTES = 32 << 20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64-bit platforms
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_* of <malloc.h>
_INT_MAX = 2**31 - 1
_OWN_RULES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Make this process keep the memory it frees, for its next requests. True where that was done.

    Nothing is done where the C library is not glibc, or where the environment already sets glibc's rule.
    Another allocator that was preloaded is not concerned.
    """
    if any(name in os.environ for name in _OWN_RULES):
        return False
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, _INT_MAX))


def give_back_freed_memory() -> None:
    """Let the kernel have all freed memory that glibc holds; nothing with another C library."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _glibc(name: str) -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return getattr(library, name) if hasattr(library, "gnu_get_libc_version") else None
