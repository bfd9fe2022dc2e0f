"""The same command once more in the same process, where a device is lost to the one that runs.

The listening socket stays open: clients that come meanwhile wait. Nobody above sees another process.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time

_SOCKET = "RITOCCO_LISTENING_SOCKET"
_TIMES = "RITOCCO_STARTED_AGAIN"
_LASTED_S = 600.0
_MOST_WAIT_S = 60.0
EX_SOFTWARE = 70

Listener = socket.socket

_log = logging.getLogger(__name__)
_began = time.monotonic()


def inherited() -> Listener | None:
    """The socket that the process before listened on; None where there was none."""
    number = os.environ.pop(_SOCKET, None)
    return None if number is None else socket.socket(fileno=int(number))


def start(listener: Listener) -> None:
    """Does not return. Waits longer each time, up to a minute, where it did not last for ten minutes.

    Raises SystemExit on Windows, where a process can't become another.
    """
    if os.name != "posix":
        raise SystemExit(EX_SOFTWARE)
    lasted = time.monotonic() - _began >= _LASTED_S
    times = 0 if lasted else int(os.environ.get(_TIMES, "0"))
    _log.warning("starting again", extra={"times": times + 1})
    time.sleep(min(2.0**times, _MOST_WAIT_S))
    listener.set_inheritable(True)
    os.environ |= {_SOCKET: str(listener.fileno()), _TIMES: str(times + 1)}
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - no shell
