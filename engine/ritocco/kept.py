"""Results that are kept: who asks for one that is there waits for nobody who makes another."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Those that were asked for last. Safe to use from several threads."""

    def __init__(self, most: int, making: AbstractContextManager[Any] | None = None) -> None:
        """most: how many. making: held while one is made, where that must not go on twice at once."""
        self._most, self._making = most, making or nullcontext()
        self._held: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The result of `make`, now or before. Raises what it raises, and keeps nothing then."""
        if found := self._found(key):
            return found[0]
        with self._making:
            if found := self._found(key):  # somebody made it meanwhile
                return found[0]
            value = make()
            with self._lock:
                self._held[key] = value
                while len(self._held) > self._most:
                    self._held.popitem(last=False)
            return value

    def _found(self, key: Hashable) -> tuple[Value] | None:
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return (self._held[key],)
