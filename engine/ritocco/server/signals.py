"""From a batcher's thread to whoever awaits a change, in whatever event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress


class Signal:
    """Something changed; wakes everybody who awaits it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    def notify(self) -> None:
        """From any thread."""
        with self._lock:
            waiting = list(self._waiting.items())
        for event, loop in waiting:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(event.set)

    async def until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until a condition holds, looked at after every change; False where the time is up before."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        event = asyncio.Event()
        with self._lock:
            self._waiting[event] = asyncio.get_running_loop()
        try:
            while not condition():
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                try:
                    async with asyncio.timeout(left):
                        await event.wait()
                except TimeoutError:
                    return condition()
                event.clear()
            return True
        finally:
            with self._lock:
                del self._waiting[event]
