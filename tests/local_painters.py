"""Painters in this process: their events come through a queue, as Ray's do, and one can be lost."""

from __future__ import annotations

import asyncio
import pickle
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from ritocco.batcher import Batcher
from ritocco.scale.painter import Event, Painter

PATIENCE = 60.0


class LostError(Exception):
    """What Ray raises where a process is gone, in other words."""


class LocalStream:
    """See `Stream`."""

    def __init__(self, painters: LocalPainters, call: dict[str, Any]) -> None:
        self.events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._lost = False
        self._task = asyncio.run_coroutine_threadsafe(self._follow(painters.painter, call), painters.loop)

    async def _follow(self, painter: Painter, call: dict[str, Any]) -> None:
        try:
            async for event in painter.paint(call.pop("asked"), **call):
                self.events.put(pickle.loads(pickle.dumps(event)))  # noqa: S301 - ours
        finally:
            self.events.put(None)

    def __iter__(self) -> Iterator[Event]:
        while (event := self.events.get(timeout=PATIENCE)) is not None:
            yield event
        if self._lost or self._task.cancelled():
            raise LostError("this painter's process has ended")
        self._task.result(PATIENCE)

    def cancel(self) -> None:
        self._task.cancel()

    def lose(self) -> None:
        """As if its process were killed."""
        self._lost = True
        self.events.put(None)


class LocalPainters:
    """See `Painters`: one painter of a batcher. sizes: of the calls. refuses: so many of them get none."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher, self.painter = batcher, Painter(batcher)
        self.loop = asyncio.new_event_loop()
        self.sizes: list[str] = []
        self.streams: list[LocalStream] = []
        self.refuses = 0
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def __call__(
        self, size: str, asked: Mapping[str, Any], *, id: str, created_at: str, options: Mapping[str, Any]
    ) -> LocalStream:
        self.sizes.append(size)
        if self.refuses:
            self.refuses -= 1
            raise LostError("no painter")
        call = {"asked": asked, "id": id, "created_at": created_at, "options": options}
        self.streams.append(LocalStream(self, call))
        return self.streams[-1]

    def close(self) -> None:
        self.painter.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE)
        self.loop.close()
