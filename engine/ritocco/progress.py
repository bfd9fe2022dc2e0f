"""A prediction's log: what was decided, then progress in tqdm's shape, which clients parse."""

from __future__ import annotations

import time

from tqdm import tqdm


class Log:
    """Lines of one prediction, in order. Belongs to one thread."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._started = time.perf_counter()

    def note(self, *lines: str) -> None:
        """Add lines."""
        self._lines += lines

    def start(self) -> None:
        """Progress is timed from here."""
        self._started = time.perf_counter()

    def progress(self, done: int, total: int) -> None:
        """Add a line such as `  8%|▊         | 2/25 [00:00<00:02,  9.90it/s]`."""
        elapsed = time.perf_counter() - self._started
        self._lines.append(tqdm.format_meter(done, total, elapsed, ncols=60))

    def text(self) -> str:
        """Everything so far."""
        return "".join(f"{line}\n" for line in self._lines)
