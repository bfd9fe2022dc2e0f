"""What a server does about the others on its database, every second: it takes over what they left, lets go of
what they took, ends what they were asked to cancel, and shows them how far its own is.
"""

from __future__ import annotations

import logging
import threading

from ritocco.server.database import AwayError
from ritocco.server.jobs import Jobs
from ritocco.server.live import Live
from ritocco.server.shared_store import SharedStore
from ritocco.server.webhooks import Webhooks

_log = logging.getLogger(__name__)


class Tending:
    """One thread."""

    def __init__(self, store: SharedStore, jobs: Jobs, webhooks: Webhooks) -> None:
        self._store, self._jobs, self._webhooks = store, jobs, webhooks
        self._told: dict[str, str] = {}
        self._unsent: set[str] = set()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ritocco-tend", daemon=True)

    def start(self) -> None:
        """A turn now, and one after the other."""
        self._thread.start()

    def close(self) -> None:
        """No more turns."""
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._wake.is_set():
            try:
                self.turn()
            except AwayError:
                pass  # which was logged when it began
            except Exception:
                _log.exception("tending failed")
            self._wake.wait(self._store.every_s)

    def turn(self) -> None:
        """Raises StorageError."""
        running = self._look()
        self._tell(running)
        self._jobs.run_forgotten()
        self._send_forgotten()
        if not self._jobs.stopping:
            self._take_over()

    def _look(self) -> list[Live]:
        """What is run here and still ours."""
        lives = self._jobs.lives()
        found = self._store.standing([live.record.id for live in lives]) if lives else {}
        ours = []
        for live in lives:
            standing = found.get(live.record.id)
            if standing is None or not standing.ours:
                # What it waits for at a stop was released on purpose.
                if not live.set_aside:
                    _log.warning("taken over by another server", extra={"prediction": live.record.id})
                self._jobs.drop(live)
                continue
            ours.append(live)
            if standing.cancel and not live.canceled:
                self._jobs.end(live)
        return ours

    def _tell(self, lives: list[Live]) -> None:
        logs = {
            live.record.id: live.prediction.logs
            for live in lives
            if live.started and live.prediction is not None
        }
        news = {id: text for id, text in logs.items() if self._told.get(id) != text}
        if news:
            self._store.tell(news)
        self._told = logs

    def _send_forgotten(self) -> None:
        """Last events that are due, and not on their way for two turns: the connection was lost while the
        end was written, or too many waited.
        """
        unsent = {id for id in self._store.due() if not self._webhooks.sends_last(id)}
        self._jobs.send_last(sorted(unsent & self._unsent))
        self._unsent = unsent

    def _take_over(self) -> None:
        taken = self._store.take_over(run=self._jobs.healthy)
        for id in taken.ended:
            self._jobs.tell_end(id)
        self._jobs.send_last(taken.due)
        self._jobs.run(taken.waiting)
        if taken.waiting or taken.ended or taken.due:
            said = {"waiting": len(taken.waiting), "ended": len(taken.ended), "due": len(taken.due)}
            _log.info("taken over", extra=said)
