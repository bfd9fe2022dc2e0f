"""A store that several servers share: a prediction is one server's at a time; the others answer for it.

A server that has not been seen for a while is gone, and what it left goes to the others: what was waiting
runs there, what was `processing` fails as after a restart, last events that are due are sent. If it was only
paused, everything it writes afterwards is refused, since it owns none of it any more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

from ritocco.errors import BackendError
from ritocco.prediction import Status, new_id, timestamp
from ritocco.server.contents import Table
from ritocco.server.database import AwayError, Connection, StorageError
from ritocco.server.files import Files
from ritocco.server.postgres import Postgres, Statements
from ritocco.server.pulse import Pulse
from ritocco.server.store import (
    CAN_ONLY_FAIL,
    DUE,
    END,
    FROM_THE_BEGINNING,
    INTERRUPTED,
    UNFINISHED,
    Store,
    end,
)

_AT_A_TIME = 8
"""Waiting predictions that one server takes over in one turn, so that the others get some too."""
_ENDS_AT_A_TIME = 200
_IDLE_S = 10.0
"""After which the transaction of a server that stands still in it is ended, since others may wait for it."""
_NOBODYS = "(owner IS NULL OR NOT EXISTS (SELECT 1 FROM servers WHERE servers.id = predictions.owner))"


@dataclass(frozen=True, kw_only=True, slots=True)
class TakenOver:
    """Ids of what is this server's now. waiting: to be run. ended: by this. due: whose last event is."""

    waiting: Sequence[str]
    ended: Sequence[str]
    due: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """ours: whether it is this server's. cancel: whether some server was asked to."""

    ours: bool
    cancel: bool


class SharedStore(Store):
    """A PostgreSQL database. Its methods raise AwayError too, where it can't be reached."""

    has_others = True

    def __init__(self, url: str, *, waiting: int = 64, gone_after_s: float = 10.0) -> None:
        """Makes the tables where there are none, and shows that this server lives.

        waiting: the most predictions of this server that may be unfinished at a time. gone_after_s: seconds
        after which a server that was not seen is gone; the same for all of them.
        Raises BackendError where the database can't be used.
        """
        self._gone_after_s = gone_after_s
        self._postgres = database = Postgres(url, idle_s=min(gone_after_s, _IDLE_S))
        self._contents = Table(database)
        self._hold(database, Files(database, self._contents), waiting, new_id())
        assert self._owner is not None  # noqa: S101 - given above
        try:
            self._pulse = Pulse(database, self._owner, gone_after_s=gone_after_s)
        except AwayError as error:
            database.close()
            raise BackendError(f"--database can't be used: {error}") from None
        self.every_s = self._pulse.every_s
        self._closed = False

    def standing(self, ids: Collection[str]) -> Mapping[str, Standing]:
        """Of predictions that this server runs; those that are gone are left out."""
        with self.database.read() as db:
            asked = f"SELECT id, {self._mine} AS ours, cancel_asked FROM predictions WHERE id = ANY(?)"
            return {
                row["id"]: Standing(ours=bool(row["ours"]), cancel=bool(row["cancel_asked"]))
                for row in db.execute(asked, (list(ids),))
            }

    def tell(self, logs: Mapping[str, str]) -> None:
        """What runs has come to, by id: the other servers show it."""
        asked = f"UPDATE predictions SET logs = ? WHERE id = ? AND status = 'processing' AND {self._mine}"
        with self.database.write() as db:
            db.executemany(asked, [(text, id) for id, text in logs.items()])

    def release(self, ids: Collection[str]) -> None:
        """Leave what has not begun to other servers, at once."""
        change = f"UPDATE predictions SET owner = NULL, {FROM_THE_BEGINNING}"
        with self.database.write() as db:
            asked = f"{change} WHERE id = ANY(?) AND status = 'starting' AND {self._mine}"
            db.execute(asked, (list(ids),))

    def ask_to_cancel(self, id: str) -> None:
        """Have the server that runs it end it, within its next turn."""
        with self.database.write() as db:
            db.execute("UPDATE predictions SET cancel_asked = 1 WHERE id = ? AND ended IS NULL", (id,))

    def take_over(self, *, run: bool) -> TakenOver:
        """What servers left that are gone, or have let go of it. run: whether some of it may run here."""
        with self.database.write() as db:
            if self._pulse.may_judge:
                unseen = "seen < clock_timestamp() - make_interval(secs => ?)"
                db.execute(
                    f"DELETE FROM servers WHERE id <> ? AND {unseen}", (self._owner, self._gone_after_s)
                )
            canceled = self._end(db, "cancel_asked = 1 AND status = 'starting'", "canceled")
            failed = self._end(db, CAN_ONLY_FAIL, "failed", INTERRUPTED, timestamp())
            due = self._take(db, DUE, _ENDS_AT_A_TIME)
            room = min(_AT_A_TIME, self._waiting - self._unfinished(db)) if run else 0
            waiting = self._take(db, "status = 'starting'", room) if room > 0 else []
        return TakenOver(waiting=waiting, ended=[*canceled, *failed], due=due)

    def _take(self, db: Connection, which: str, most: int) -> list[str]:
        """Nobody's, the oldest first; those that another server is taking this moment are passed over."""
        asked = (
            f"SELECT id FROM predictions WHERE {which} AND {_NOBODYS} ORDER BY seq LIMIT ? "
            "FOR UPDATE SKIP LOCKED"
        )
        ids = [row["id"] for row in db.execute(asked, (most,))]
        if ids:
            db.execute("UPDATE predictions SET owner = ? WHERE id = ANY(?)", (self._owner, ids))
        return ids

    def _end(
        self,
        db: Connection,
        which: str,
        status: Status,
        error: str | None = None,
        started_at: str | None = None,
    ) -> list[str]:
        ids = self._take(db, f"{UNFINISHED} AND {which}", _ENDS_AT_A_TIME)
        if ids:
            asked = f"UPDATE predictions SET {END} WHERE id = ANY(?)"
            db.execute(asked, (*end(status, error, started_at), ids))
        return ids

    def _take_turn(self, db: Connection) -> None:
        """So that `seq` is the order in which predictions come to be seen: lists skip none."""
        _statements(db).lock("accept")

    def _may_clean(self, db: Connection) -> bool:
        return _statements(db).try_lock("clean")

    def clean(self, retention_s: float) -> int:
        """See Store. Files without a row go too, once no server can be about to write it."""
        removed = super().clean(retention_s)
        self._contents.sweep()
        return removed

    def close(self) -> None:
        """Let go of everything, and leave what is still this server's to the others, at once."""
        if self._closed:
            return
        self._closed = True
        self._pulse.close()
        with suppress(StorageError), self.database.write() as db:
            db.execute("DELETE FROM servers WHERE id = ?", (self._owner,))
        self.database.close()


def _statements(db: Connection) -> Statements:
    return cast(Statements, db)
