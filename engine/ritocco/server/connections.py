"""Connections that send no request: they are let go of, and never keep others out."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 30.0
"""For the headers of a request to come, from the connection's begin or the end of the answer before."""


def limited(most: int, *, seconds: float = HEADERS_S) -> type[H11Protocol]:
    """Uvicorn's protocol with at most so many connections: one more takes the place of the one that has been
    without a request longest, or is closed where none is. seconds: that a connection may be without one.
    """

    class Limited(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        @property
        def idle(self) -> bool:
            """Whether no request is under way."""
            return self.cycle is None or self.cycle.response_complete

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()
            if len(self.connections) > most:
                held = (one for one in self.connections if isinstance(one, Limited) and one._timer)
                min((one for one in held if one.idle), key=Limited.ends, default=self).let_go()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def ends(self) -> float:
            """When it will be let go of, in the loop's seconds."""
            return float("inf") if self._timer is None else self._timer.when()

        def let_go(self) -> None:
            """Close it, where no request has come meanwhile."""
            if self.idle:
                self.transport.abort()
                self.connections.discard(self)

        def _watch(self) -> None:
            if not self.idle:
                self._unwatch()
            elif self._timer is None:
                self._timer = self.loop.call_later(seconds, self.let_go)

        def _unwatch(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Limited
