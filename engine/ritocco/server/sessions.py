"""Who may enter: tokens, and the sessions of browsers that showed one.

A session is a random value in a cookie. It opens what lies under the page's path, never the API.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

PAGE = "/ui"
LOGIN, LOGOUT = f"{PAGE}/login", f"{PAGE}/logout"
COOKIE = "ritocco_ui"
SESSION_S = 12 * 60 * 60.0
_MOST = 1000
_LONGEST = 256


class Tokens:
    """Those of the settings. True where there are some."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._known = [_digest(token) for token in tokens]

    def __bool__(self) -> bool:
        return bool(self._known)

    def hold(self, token: str) -> bool:
        """Whether it is one. All are looked at, and all of each: the time taken tells nothing."""
        digest, found = _digest(token), False
        for known in self._known:
            found |= hmac.compare_digest(known, digest)
        return found


class Sessions:
    """Values that are good until they expire, are closed, or a thousand later ones were opened.

    They are gone with the process. Only their digests are kept. Safe to use from several threads.
    """

    def __init__(
        self, tokens: Tokens, *, seconds: float = SESSION_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.tokens, self.seconds, self._clock = tokens, seconds, clock
        self.has_page = False
        """Whether there is a page to enter."""
        self._ends: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, token: str) -> str | None:
        """A session's value for a token; None for what is none."""
        if not self.tokens.hold(token):
            return None
        value, now = secrets.token_urlsafe(32), self._clock()
        with self._lock:
            for old in [one for one, end in self._ends.items() if end <= now]:
                del self._ends[old]
            self._ends[_digest(value)] = now + self.seconds
            while len(self._ends) > _MOST:
                self._ends.popitem(last=False)
        return value

    def admit(self, value: str | None) -> bool:
        """Whether it is a session's value."""
        if not value or len(value) > _LONGEST:
            return False
        with self._lock:
            end = self._ends.get(_digest(value))
        return end is not None and self._clock() < end

    def close(self, value: str | None) -> None:
        """Nobody enters with it any more."""
        with self._lock:
            self._ends.pop(_digest(value or ""), None)


def is_page(path: str) -> bool:
    """Whether a path, inside the app, belongs to the page."""
    return path == PAGE or path.startswith(f"{PAGE}/")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", errors="replace")).digest()
