"""How many pixels the threads of a process may have open at a time: pictures are far larger than what is made
of them, and many requests are looked at side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class PixelBudget:
    """Who comes first is served first; a picture of more than all of it is opened alone."""

    def __init__(self, pixels: int) -> None:
        self._pixels, self._open = pixels, 0
        self._turn, self._changed = threading.Lock(), threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until so many more may be open; they are until the block ends. Not twice in one thread."""
        with self._turn, self._changed:
            self._changed.wait_for(lambda: not self._open or self._open + pixels <= self._pixels)
            self._open += pixels
        try:
            yield
        finally:
            with self._changed:
                self._open -= pixels
                self._changed.notify_all()
