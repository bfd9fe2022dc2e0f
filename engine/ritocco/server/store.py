"""Predictions and their queue in a database: accepted once, finished once, whatever happens to the process.

    starting ── processing ── succeeded | failed | canceled

A prediction that was `starting` when its process ended runs after the next start; one that was `processing`
fails with the words on which clients of the original try again. So does one whose pictures were being opened
when two processes ended, since it may be what ended them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from ritocco.errors import BackendError, BusyError, RequestError
from ritocco.fetch import MAX_URL_CHARS
from ritocco.prediction import Status, timestamp
from ritocco.schema import echo
from ritocco.server.contents import Folder
from ritocco.server.damage import columns, parsed
from ritocco.server.database import AnyDatabase, Connection, Database, StorageError
from ritocco.server.files import Files, StoredFile, insert_files

INTERRUPTED = "Prediction interrupted; please retry (code: PA)"
_DAMAGED = "What was kept of it can't be read any more; please retry"
ENDED: tuple[Status, ...] = ("succeeded", "failed", "canceled")
_ATTEMPTS = 2  # of opening its pictures, in as many processes
_DAY_S = 24 * 60 * 60
_KEPT_WITHOUT_DATA_S = 30 * _DAY_S
_BRIEF_CHARS = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One prediction as it lies on disk.

    seq: its place in the order of creation; 0 before it is stored. version: as it was asked for. base: URL
    under which its API was reached, without a slash at the end. stream: random, names its event stream.
    webhook_events: of `start`, `output`, `logs` and `completed`. webhook_due: the last event is still to be
    delivered. digest: of what was asked. key: the client's, of a creation that may be repeated. attempts:
    processes that opened its pictures and did not come to an end with it. damaged: what it asked for can't be
    read any more.
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
    damaged: bool = False


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


class _HeldError(Exception):
    """What is asked for was accepted before."""

    def __init__(self, record: Record) -> None:
        super().__init__(record.id)
        self.record = record


class Store:
    """The data folder: `ritocco.sqlite` and `files/`. Safe to call from several threads.

    Its methods raise StorageError where the disk refuses.
    """

    has_others = False
    """Whether other servers may run what it holds; see SharedStore."""

    def __init__(self, folder: Path, *, waiting: int = 64) -> None:
        """Opens or makes the folder and puts right what an interrupted process left.

        waiting: the most predictions that may be unfinished at a time.
        Raises BackendError where another process has the folder, or it is damaged.
        """
        database = Database(folder)
        try:
            self._hold(database, Files(database, Folder(folder / "files")), waiting)
            self._recover()
        except BaseException as error:
            database.close()
            if isinstance(error, StorageError):
                raise BackendError(f"--data is {str(folder)!r}, which can't be used: {error}") from error
            raise

    def _hold(self, database: AnyDatabase, files: Files, waiting: int, owner: str | None = None) -> None:
        self.database, self.files, self._waiting, self._owner = database, files, waiting, owner
        # Of another server's nothing is changed, and nothing counted.
        self._mine = "TRUE" if owner is None else f"owner = '{owner}'"

    def accept(self, new: Record) -> tuple[Record, bool]:
        """Store a prediction, safely when this returns; or find the one under its key or id.

        Returns the record, and whether it is new. Raises BusyError where `waiting` are unfinished, and
        ConflictError where the key or id stands for another request.
        """
        asked: dict[str, Any] = {name: getattr(new, name) for name in _ASKED}
        asked["webhook_events"] = json.dumps(new.webhook_events)
        if self._owner is not None:
            asked["owner"] = self._owner
        texts = {"inputs": json.dumps(new.input), "briefs": json.dumps(_cut(new.input))}
        insert = f"INSERT INTO predictions ({', '.join(asked)}) VALUES ({_marks(asked)}) RETURNING seq"
        try:
            with self.database.write() as db:
                self._refuse_held(db, new)
                for table, text in texts.items():
                    db.execute(f"INSERT INTO {table} VALUES (?, ?) ON CONFLICT DO NOTHING", (new.id, text))
                self._take_turn(db)
                self._refuse_held(db, new)  # by another server meanwhile
                unfinished = self._unfinished(db)
                if unfinished >= self._waiting:
                    raise BusyError(f"{unfinished} predictions are waiting", retry_after=1.0)
                seq = db.execute(insert, tuple(asked.values())).fetchone()["seq"]
        except _HeldError as held:
            return held.record, False
        return replace(new, seq=seq), True

    def _take_turn(self, db: Connection) -> None:
        """From here to the end of the transaction no other server accepts."""

    def repeated(self, *, key: str | None, id: str | None) -> bool:
        """Whether a creation under this key or id was accepted before."""
        with self.database.read() as db:
            asked = "SELECT 1 FROM predictions WHERE key = ? OR id = ?"
            return db.execute(asked, (key, id)).fetchone() is not None

    def _refuse_held(self, db: Connection, new: Record) -> None:
        row = _row(db, "key", new.key) or _row(db, "id", new.id)
        if row is None:
            return
        held = _record(row)
        if held.digest != new.digest:
            name = "the id" if held.id == new.id else "Idempotency-Key"
            raise ConflictError(f"{name} was used for another request before", field=name)
        raise _HeldError(held)

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
        """How many are starting or processing; of a server among others, its own."""
        with self.database.read() as db:
            return self._unfinished(db)

    def _unfinished(self, db: Connection) -> int:
        asked = f"SELECT count(*) AS n FROM predictions WHERE {UNFINISHED} AND {self._mine}"
        return int(db.execute(asked).fetchone()["n"])

    def count(self) -> int:
        """How many were ever accepted."""
        with self.database.read() as db:
            asked = "SELECT coalesce(max(seq), 0) AS n FROM predictions"
            return int(db.execute(asked).fetchone()["n"])

    def queued(self) -> list[str]:
        """Ids of what is still to run, in order."""
        with self.database.read() as db:
            asked = f"SELECT id FROM predictions WHERE status = 'starting' AND {self._mine} ORDER BY seq"
            return [row["id"] for row in db.execute(asked)]

    def due(self) -> list[str]:
        """Ids of the ended predictions whose last event is still to be delivered."""
        with self.database.read() as db:
            asked = f"SELECT id FROM predictions WHERE {DUE} AND {self._mine} ORDER BY seq"
            return [row["id"] for row in db.execute(asked)]

    def is_due(self, id: str) -> bool:
        """Whether it is one of those."""
        with self.database.read() as db:
            asked = f"SELECT 1 FROM predictions WHERE id = ? AND {DUE} AND {self._mine}"
            return db.execute(asked, (id,)).fetchone() is not None

    def has_ended(self, id: str) -> bool:
        """Whether it has, or is gone."""
        with self.database.read() as db:
            asked = "SELECT 1 FROM predictions WHERE id = ? AND ended IS NULL"
            return db.execute(asked, (id,)).fetchone() is None

    def prepare(self, id: str) -> bool:
        """Its pictures are about to be opened, which is an attempt until `prepared` is said.

        False where it has ended, or is another server's by now.
        """
        change = "attempts = attempts + 1, status = 'starting', started_at = NULL"
        return self._change(change, id, "ended IS NULL")

    def prepared(self, id: str) -> None:
        """The process has outlived that."""
        self._change("attempts = 0", id)

    def start(self, id: str) -> bool:
        """From `starting` to `processing`; False where it is not `starting`, or is another server's."""
        return self._change("status = 'processing', started_at = ?", id, "status = 'starting'", timestamp())

    def requeue(self, id: str) -> bool:
        """Back to where it was accepted: it is run once more, from its beginning. False where it ended."""
        return self._change(FROM_THE_BEGINNING, id, "ended IS NULL")

    def _change(self, change: str, id: str, where: str = "TRUE", *values: Any) -> bool:
        """Of one of ours; False where it is not."""
        asked = f"UPDATE predictions SET {change} WHERE id = ? AND {where} AND {self._mine}"
        with self.database.write() as db:
            return db.execute(asked, (*values, id)).rowcount == 1

    def release(self, ids: Collection[str]) -> None:
        """Leave what has not begun to other servers, at once."""

    def ask_to_cancel(self, id: str) -> None:
        """Have the server that runs it end it."""

    def finish(self, id: str, outcome: Outcome, outputs: Sequence[StoredFile] = ()) -> bool:
        """An end, with its pictures, at once.

        False where it had ended before, or is another server's by now; then the pictures go.
        """
        assert outcome.status in ENDED  # noqa: S101 - our own callers
        started = None if outcome.status == "canceled" else timestamp()
        with self.database.write() as db:
            figures = (outcome.logs, json.dumps(outcome.metrics))
            asked = f"UPDATE predictions SET logs = ?, metrics = ?, {END} WHERE id = ? AND ended IS NULL"
            values = (*figures, *end(outcome.status, outcome.error, started), id)
            ended = db.execute(f"{asked} AND {self._mine}", values).rowcount == 1
            if ended:
                insert_files(db, outputs)
        if not ended:
            self.files.unlink([one.id for one in outputs])
        return ended

    def delivered(self, id: str) -> None:
        """Its last event was delivered, or given up."""
        self._change("webhook_due = 0", id)

    def page(self, *, before: int | None = None, after: int | None = None, size: int = 100) -> Page:
        """Those older than `before`, or the oldest that are newer than `after`; else the latest. Brief."""
        columns = f"SELECT {_COLUMNS}, {_BRIEF} AS input FROM predictions WHERE"
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
        held = "SELECT id FROM predictions WHERE ended < ? AND data_removed = 0"
        with self.database.write() as db:
            if not self._may_clean(db):
                return 0
            ids = [(row["id"],) for row in db.execute(held, (before,)).fetchall()]
            removed = "UPDATE predictions SET data_removed = 1, logs = '', webhook_due = 0 WHERE id = ?"
            db.executemany(removed, ids)
            for table in ("inputs", "briefs"):
                db.executemany(f"DELETE FROM {table} WHERE id = ?", ids)
            files: list[str] = []
            for id in ids:
                gone = db.execute("DELETE FROM files WHERE prediction = ? RETURNING id", id)
                files += [row["id"] for row in gone.fetchall()]
            db.execute("DELETE FROM predictions WHERE ended < ?", (before - _KEPT_WITHOUT_DATA_S,))
        self.files.unlink(files)
        self.files.expire(before)
        return len(ids)

    def _may_clean(self, db: Connection) -> bool:
        """Whether no other server does, until the end of the transaction."""
        return True

    def writable(self) -> bool:
        """Whether the disk takes predictions and files: where it refused the last one, this tries again.

        Raises StorageError where what is kept can't be read.
        """
        self.page(size=1)
        self.files.find("")
        with self.database.read() as db:
            db.execute("SELECT value FROM settings LIMIT 1").fetchone()
        if not (self.database.refused or self.files.refused):
            return True
        try:
            self.files.try_writing()
            with self.database.write() as db:
                asked = "INSERT INTO settings VALUES ('tried', ?) ON CONFLICT (name) DO UPDATE SET value = ?"
                db.execute(asked, (timestamp(), timestamp()))
        except StorageError:
            return False
        return True

    def close(self) -> None:
        """Let go of everything."""
        self.database.close()

    def _recover(self) -> None:
        ended = f"UPDATE predictions SET {END} WHERE {CAN_ONLY_FAIL} OR {_UNKNOWN}"
        with self.database.write() as db:
            db.execute(ended, end("failed", INTERRUPTED, timestamp()))
        self.files.sweep()


UNFINISHED = "status IN ('starting', 'processing')"
DUE = "webhook_due = 1 AND ended IS NOT NULL"
FROM_THE_BEGINNING = "status = 'starting', started_at = NULL, attempts = 0, logs = ''"
_UNKNOWN = f"status NOT IN {get_args(Status)}"
# Of what nobody runs any more.
CAN_ONLY_FAIL = f"(status = 'processing' OR status = 'starting' AND attempts >= {_ATTEMPTS})"
# No filter is the original's default, which has it.
_LAST_EVENT_IS_ASKED_FOR = (
    """(webhook IS NOT NULL AND (webhook_events = '[]' OR webhook_events LIKE '%"completed"%'))"""
)
END = (
    "status = ?, error = ?, completed_at = ?, ended = ?, started_at = coalesce(started_at, ?), "
    f"webhook_due = CASE WHEN {_LAST_EVENT_IS_ASKED_FOR} THEN 1 ELSE 0 END"
)
_NAMES = (
    *("seq", "id", "key", "digest", "status", "version", "base", "stream", "webhook", "webhook_events"),
    *("webhook_due", "logs", "error", "created_at", "started_at", "completed_at", "metrics", "data_removed"),
    "attempts",
)
_ASKED = ("id", "key", "digest", "status", "version", "base", "stream", "webhook", "created_at")
_COLUMNS = ", ".join(_NAMES)
_WHOLE = "(SELECT json FROM inputs WHERE inputs.id = predictions.id)"
_BRIEF = f"coalesce((SELECT json FROM briefs WHERE briefs.id = predictions.id), {_WHOLE})"


def _row(db: Connection, column: str, value: str | None, input: str = _WHOLE) -> Any:
    asked = f"SELECT {_COLUMNS}, {input} AS input FROM predictions WHERE {column} = ?"
    return None if value is None else db.execute(asked, (value,)).fetchone()


def _record(row: Any, *, brief: bool = False) -> Record:
    held = columns(row)
    for name, kind in (("input", dict), ("metrics", dict), ("webhook_events", list)):
        text = held[name] or ""
        held[name] = parsed(text, kind)
        if name == "input":
            held["damaged"] = bool(text) and held[name] is None
        held[name] = held[name] or kind()
    if brief:  # those that an earlier version stored are not
        held["input"] = _cut(held["input"])
    held["webhook_events"] = tuple(held["webhook_events"])
    for name in ("webhook_due", "data_removed"):
        held[name] = bool(held[name])
    held["metrics"] = echo(held["metrics"])
    if held["status"] not in get_args(Status):
        _log.error("damaged", extra={"prediction": held["id"]})
        held |= {"status": "failed", "error": _DAMAGED}
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


def end(status: Status, error: str | None, started_at: str | None) -> tuple[Any, ...]:
    """The values of `END`. started_at: where it had not begun."""
    return status, error, timestamp(), time.time(), started_at


def _marks(values: Collection[Any]) -> str:
    return ", ".join("?" * len(values))
