"""What the server asks of whatever paints: a Batcher, or one that stands for Batchers elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ritocco.batcher import Snapshot
from ritocco.tickets import Ticket


class Dispatch(Protocol):
    """See `Batcher`, whose members these are."""

    @property
    def version(self) -> str: ...

    @property
    def healthy(self) -> bool: ...

    @property
    def lost(self) -> bool: ...

    def snapshot(self) -> Snapshot: ...

    def submit(
        self,
        input: Mapping[str, Any],
        *,
        on_start: Callable[[], bool | None] | None = None,
        on_step: Callable[[int, int], bool | None] | None = None,
        id: str | None = None,
        created_at: str | None = None,
        **options: Any,
    ) -> Ticket: ...
