"""Predictions and their queue on disk: accepted once, finished once, whatever happens to the process.

    starting ── processing ── succeeded | failed | canceled

A prediction that was `starting` when its process ended runs after the next start; one that was `processing`
fails with the words on which clients of the original try again. So does one whose pictures were being opened
when two processes ended, since it may be what ended them.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ritocco.errors import BusyError, RequestError
from ritocco.fetch import MAX_URL_CHARS
from ritocco.prediction import Status, timestamp
from ritocco.server.database import Database, StorageError
from ritocco.server.files import Files, StoredFile, insert_files

INTERRUPTED = "Prediction interrupted; please retry (code: PA)"
ENDED: tuple[Status, ...] = ("succeeded", "failed", "canceled")
_ATTEMPTS = 2  # of opening its pictures, in as many processes
_DAY_S = 24 * 60 * 60
_KEPT_WITHOUT_DATA_S = 30 * _DAY_S
_BRIEF_CHARS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One prediction as it lies on disk.

    seq: its place in the order of creation; 0 before it is stored. version: as it was asked for. base: URL
    under which its API was reached, without a slash at the end. stream: random, names its event stream.
    webhook_events: of `start`, `output`, `logs` and `completed`. webhook_due: the last event is still to be
    delivered. digest: of what was asked. key: the client's, of a creation that may be repeated. attempts:
    processes that opened its pictures and did not come to an end with it.
    """

    id: str
    input: Mapping[str, Any]
    version: str
    base: str
    stream: str
    digest: str
    seq: int = 0
    key: str | None = None
    status: Status = "starting"
    webhook: str | None = None
    webhook_events: tuple[str, ...] = ()
    webhook_due: bool = False
    logs: str = ""
    error: str | None = None
    created_at: str = field(default_factory=timestamp)
    started_at: str | None = None
    completed_at: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    data_removed: bool = False
    attempts: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a prediction ended."""

    status: Status
    logs: str = ""
    error: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Predictions, the latest first. newer, older: whether there are some beyond."""

    records: Sequence[Record]
    newer: bool
    older: bool


class ConflictError(RequestError):
    """An id or key that stands for another request."""


class Store:
    """The data folder: `ritocco.sqlite` and `files/`. Safe to call from several threads.

    Its methods raise StorageError where the disk refuses.
    """

    def __init__(self, folder: Path, *, waiting: int = 64) -> None:
        """Opens or makes the folder and puts right what an interrupted process left.

        waiting: the most predictions that may be unfinished at a time.
        Raises BackendError where another process has the folder.
        """
        self.database = Database(folder)
        self.files = Files(self.database, folder / "files")
        self._waiting = waiting
        self._recover()

    def accept(self, new: Record) -> tuple[Record, bool]:
        """Store a prediction, on the disk when this returns; or find the one under its key or id.

        Returns the record, and whether it is new. Raises BusyError where `waiting` are unfinished, and
        ConflictError where the key or id stands for another request.
        """
        whole, brief = json.dumps(new.input), json.dumps(_cut(new.input))
        with self.database.write() as db:
            if (held := self._accepted_before(db, new)) is not None:
                return held, False
            unfinished = _unfinished(db)
            if unfinished >= self._waiting:
                raise BusyError(f"{unfinished} predictions are waiting", retry_after=1.0)
            asked = (
                "INSERT INTO predictions (id, key, digest, status, version, base, stream, webhook, "
                "webhook_events, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            )
            events = json.dumps(new.webhook_events)
            ours = (new.id, new.key, new.digest, new.status, new.version, new.base, new.stream, new.webhook)
            seq = db.execute(asked, (*ours, events, new.created_at)).lastrowid
            db.execute("INSERT INTO inputs VALUES (?, ?)", (new.id, whole))
            db.execute("INSERT INTO briefs VALUES (?, ?)", (new.id, brief))
        return replace(new, seq=seq or 0), True

    def repeated(self, *, key: str | None, id: str | None) -> bool:
        """Whether a creation under this key or id was accepted before."""
        with self.database.read() as db:
            asked = "SELECT 1 FROM predictions WHERE key = ? OR id = ?"
            return db.execute(asked, (key, id)).fetchone() is not None

    def _accepted_before(self, db: sqlite3.Connection, new: Record) -> Record | None:
        row = _row(db, "key", new.key) or _row(db, "id", new.id)
        held = None if row is None else _record(row)
        if held is not None and held.digest != new.digest:
            name = "the id" if held.id == new.id else "Idempotency-Key"
            raise ConflictError(f"{name} was used for another request before", field=name)
        return held

    def get(self, id: str, *, brief: bool = False) -> Record | None:
        """The prediction of an id, or None. brief: with the long texts of its input cut."""
        with self.database.read() as db:
            row = _row(db, "id", id, _BRIEF if brief else _WHOLE)
        return None if row is None else _record(row, brief=brief)

    def now(self, record: Record) -> Record | None:
        """A prediction as it stands, its input taken over; None where it is gone."""
        with self.database.read() as db:
            row = _row(db, "id", record.id, "NULL")
        held = None if row is None else _record(row)
        return held if held is None or held.data_removed else replace(held, input=record.input)

    def by_stream(self, stream: str) -> Record | None:
        """The prediction whose event stream has this name, or None; brief."""
        with self.database.read() as db:
            row = _row(db, "stream", stream, _BRIEF)
        return None if row is None else _record(row, brief=True)

    def unfinished(self) -> int:
        """How many are starting or processing."""
        with self.database.read() as db:
            return _unfinished(db)

    def count(self) -> int:
        """How many were ever accepted."""
        with self.database.read() as db:
            return int(db.execute("SELECT coalesce(max(seq), 0) FROM predictions").fetchone()[0])

    def queued(self) -> list[str]:
        """Ids of what is still to run, in order."""
        with self.database.read() as db:
            asked = "SELECT id FROM predictions WHERE status = 'starting' ORDER BY seq"
            return [row["id"] for row in db.execute(asked)]

    def due(self) -> list[str]:
        """Ids of the ended predictions whose last event is still to be delivered."""
        with self.database.read() as db:
            asked = "SELECT id FROM predictions WHERE webhook_due AND ended IS NOT NULL ORDER BY seq"
            return [row["id"] for row in db.execute(asked)]

    def prepare(self, id: str) -> None:
        """Its pictures are about to be opened, which is an attempt until `prepared` is said."""
        with self.database.write() as db:
            db.execute("UPDATE predictions SET attempts = attempts + 1 WHERE id = ?", (id,))

    def prepared(self, id: str) -> None:
        """The process has outlived that."""
        with self.database.write() as db:
            db.execute("UPDATE predictions SET attempts = 0 WHERE id = ?", (id,))

    def start(self, id: str) -> bool:
        """From `starting` to `processing`; False where it is not `starting`."""
        change = "UPDATE predictions SET status = 'processing', started_at = ?"
        asked = f"{change} WHERE id = ? AND status = 'starting'"
        with self.database.write() as db:
            return db.execute(asked, (timestamp(), id)).rowcount == 1

    def requeue(self, id: str) -> bool:
        """Back to where it was accepted: it is run once more, from its beginning. False where it ended."""
        change = "UPDATE predictions SET status = 'starting', started_at = NULL, attempts = 0"
        asked = f"{change} WHERE id = ? AND ended IS NULL"
        with self.database.write() as db:
            return db.execute(asked, (id,)).rowcount == 1

    def finish(self, id: str, outcome: Outcome, outputs: Sequence[StoredFile] = ()) -> bool:
        """An end, with its pictures, at once; False where it had ended before, and then the pictures go."""
        assert outcome.status in ENDED  # noqa: S101 - our own callers
        asked = (
            "UPDATE predictions SET status = ?, logs = ?, error = ?, metrics = ?, completed_at = ?, "  # noqa: S608
            "ended = ?, started_at = coalesce(started_at, ?), "
            f"webhook_due = {_LAST_EVENT_IS_ASKED_FOR} WHERE id = ? AND ended IS NULL"
        )
        now = timestamp()
        figures = (outcome.status, outcome.logs, outcome.error, json.dumps(outcome.metrics), now, time.time())
        started = None if outcome.status == "canceled" else now
        with self.database.write() as db:
            ended = db.execute(asked, (*figures, started, id)).rowcount == 1
            if ended:
                insert_files(db, outputs)
        if not ended:
            self.files.unlink([one.id for one in outputs])
        return ended

    def delivered(self, id: str) -> None:
        """Its last event was delivered, or given up."""
        with self.database.write() as db:
            db.execute("UPDATE predictions SET webhook_due = 0 WHERE id = ?", (id,))

    def page(self, *, before: int | None = None, after: int | None = None, size: int = 100) -> Page:
        """Those older than `before`, or the oldest that are newer than `after`; else the latest. Brief."""
        columns = f"SELECT {_COLUMNS}, {_BRIEF} AS input FROM predictions WHERE"  # noqa: S608
        with self.database.read() as db:
            if after is not None:
                rows = db.execute(f"{columns} seq > ? ORDER BY seq LIMIT ?", (after, size + 1)).fetchall()
            else:
                asked = f"{columns} seq < ? ORDER BY seq DESC LIMIT ?"
                rows = db.execute(asked, (2**62 if before is None else before, size + 1)).fetchall()
        more, records = len(rows) > size, [_record(row, brief=True) for row in rows[:size]]
        if after is not None:
            return Page(records=records[::-1], newer=more, older=True)
        return Page(records=records, newer=before is not None, older=more)

    def clean(self, retention_s: float) -> int:
        """Remove inputs, logs, outputs and uploads older than so many seconds; says of how many predictions.

        What is left of a prediction, its status and times, goes after thirty days more. Deleting rows takes
        some room: where there is none, files go first; a prediction without its own is as good as removed.
        """
        before = time.time() - retention_s
        try:
            return self._clean(before)
        except StorageError:
            self.files.unlink(self._expired_files(before))
            return self._clean(before)

    def _expired_files(self, before: float) -> list[str]:
        asked = (
            "SELECT id FROM files WHERE prediction IS NULL AND created < ? "
            "OR prediction IN (SELECT id FROM predictions WHERE ended < ?)"
        )
        with self.database.read() as db:
            return [row["id"] for row in db.execute(asked, (before, before))]

    def _clean(self, before: float) -> int:
        held = "SELECT id FROM predictions WHERE ended < ? AND NOT data_removed"
        with self.database.write() as db:
            ids = [(row["id"],) for row in db.execute(held, (before,)).fetchall()]
            removed = "UPDATE predictions SET data_removed = 1, logs = '', webhook_due = 0 WHERE id = ?"
            db.executemany(removed, ids)
            for table in ("inputs", "briefs"):
                db.executemany(f"DELETE FROM {table} WHERE id = ?", ids)  # noqa: S608
            files: list[str] = []
            for id in ids:
                gone = db.execute("DELETE FROM files WHERE prediction = ? RETURNING id", id)
                files += [row["id"] for row in gone.fetchall()]
            db.execute("DELETE FROM predictions WHERE ended < ?", (before - _KEPT_WITHOUT_DATA_S,))
        self.files.unlink(files)
        self.files.expire(before)
        return len(ids)

    def writable(self) -> bool:
        """Whether the disk takes predictions and files: where it refused the last one, this tries again."""
        if not (self.database.refused or self.files.refused):
            return True
        try:
            self.files.try_writing()
            with self.database.write() as db:
                db.execute("INSERT OR REPLACE INTO settings VALUES ('tried', ?)", (timestamp(),))
        except StorageError:
            return False
        return True

    def close(self) -> None:
        """Let go of the folder."""
        self.database.close()

    def _recover(self) -> None:
        ended = (
            "UPDATE predictions SET status = 'failed', error = ?, completed_at = ?, ended = ?, "  # noqa: S608
            f"started_at = coalesce(started_at, ?), webhook_due = {_LAST_EVENT_IS_ASKED_FOR} "
            "WHERE status = 'processing' OR status = 'starting' AND attempts >= ?"
        )
        now = timestamp()
        with self.database.write() as db:
            db.execute(ended, (INTERRUPTED, now, time.time(), now, _ATTEMPTS))
        self.files.sweep()


# No filter is the original's default, which has it.
_LAST_EVENT_IS_ASKED_FOR = (
    """(webhook IS NOT NULL AND (webhook_events = '[]' OR webhook_events LIKE '%"completed"%'))"""
)
_NAMES = (
    *("seq", "id", "key", "digest", "status", "version", "base", "stream", "webhook", "webhook_events"),
    *("webhook_due", "logs", "error", "created_at", "started_at", "completed_at", "metrics", "data_removed"),
    "attempts",
)
_COLUMNS = ", ".join(_NAMES)
_WHOLE = "(SELECT json FROM inputs WHERE inputs.id = predictions.id)"
_BRIEF = f"coalesce((SELECT json FROM briefs WHERE briefs.id = predictions.id), {_WHOLE})"  # noqa: S608


def _row(db: sqlite3.Connection, column: str, value: str | None, input: str = _WHOLE) -> sqlite3.Row | None:
    asked = f"SELECT {_COLUMNS}, {input} AS input FROM predictions WHERE {column} = ?"  # noqa: S608
    found: sqlite3.Row | None = None if value is None else db.execute(asked, (value,)).fetchone()
    return found


def _record(row: sqlite3.Row, *, brief: bool = False) -> Record:
    held: dict[str, Any] = dict(row)
    for name in ("input", "metrics"):
        held[name] = json.loads(held[name] or "{}")
    if brief:  # those that an earlier version stored are not
        held["input"] = _cut(held["input"])
    held["webhook_events"] = tuple(json.loads(held["webhook_events"] or "[]"))
    for name in ("webhook_due", "data_removed"):
        held[name] = bool(held[name])
    return Record(**held)


def _cut(input: Mapping[str, Any]) -> dict[str, Any]:
    """Without what makes an input megabytes long: a data URI's bytes, and texts longer than any URL."""

    def short(value: Any) -> Any:
        if not isinstance(value, str) or len(value) <= _BRIEF_CHARS:
            return value
        if value[:5].lower() == "data:":
            return f"{value[:60]}..."
        return value if len(value) <= MAX_URL_CHARS else f"{value[: MAX_URL_CHARS - 3]}..."

    return {name: short(value) for name, value in input.items()}


def _unfinished(db: sqlite3.Connection) -> int:
    asked = "SELECT count(*) FROM predictions WHERE status IN ('starting', 'processing')"
    return int(db.execute(asked).fetchone()[0])
