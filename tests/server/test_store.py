"""The store: accepted once, finished once; and what is left when its process is killed at any moment."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from real_postgres import both_stores
from ritocco.errors import BackendError, BusyError, RequestError
from ritocco.prediction import new_id
from ritocco.server.database import StorageError, setting
from ritocco.server.files import StoredFile
from ritocco.server.store import INTERRUPTED, Outcome, Record, Store

DONE = Outcome(status="succeeded", logs="Using seed: 7\n", metrics={"predict_time": 1.5})


def record(**changes: Any) -> Record:
    made = Record(
        id=new_id(),
        input={"prompt": "a cat"},
        version="v",
        base="http://here/v1",
        stream=new_id(),
        digest="d",
    )
    return replace(made, **changes)


def output(store: Store, id: str, data: bytes = b"picture") -> StoredFile:
    return store.files.write(data, name="out-0.png", content_type="image/png", prediction=id, place=0)


Open = Callable[..., Store]


@pytest.fixture
def store(open_store: Open) -> Store:
    return open_store(waiting=5)


def reopened(store: Store, open_store: Open) -> Store:
    output(store, "nobody's")  # a file without a row, as a process leaves that was killed between the two
    store.close()
    return open_store(waiting=5)


@both_stores
def test_a_predictions_way(store: Store) -> None:
    new, fresh = store.accept(record(webhook="http://there/", webhook_events=("completed",)))
    assert fresh
    assert store.queued() == [new.id]
    assert store.start(new.id)
    assert not store.start(new.id)
    assert store.queued() == []
    assert store.finish(new.id, DONE, [output(store, new.id)])
    held = store.get(new.id)
    assert held is not None
    assert (held.status, held.logs, held.metrics, held.input) == (
        "succeeded",
        DONE.logs,
        DONE.metrics,
        {"prompt": "a cat"},
    )
    assert held.created_at <= (held.started_at or "") <= (held.completed_at or "")
    assert store.by_stream(new.stream) == held
    assert [store.files.read(one) for one in store.files.outputs(new.id)] == [b"picture"]
    assert store.due() == [new.id]
    store.delivered(new.id)
    assert store.due() == []


@both_stores
def test_an_end_comes_once(store: Store) -> None:
    new, _ = store.accept(record())
    assert store.finish(new.id, Outcome(status="canceled"))
    late = output(store, new.id)
    assert not store.finish(new.id, DONE, [late])
    held = store.get(new.id)
    assert held is not None
    assert (held.status, held.started_at) == ("canceled", None)
    assert not store.files.there(late)
    assert store.files.outputs(new.id) == []


@both_stores
def test_the_queue_is_bounded(store: Store) -> None:
    made = [store.accept(record())[0] for _ in range(5)]
    with pytest.raises(BusyError) as refused:
        store.accept(record())
    assert refused.value.retry_after > 0
    store.start(made[0].id)
    with pytest.raises(BusyError):
        store.accept(record())
    store.finish(made[0].id, DONE)
    assert store.accept(record())[1]
    assert store.unfinished() == 5


@both_stores
def test_a_repeated_creation_is_the_same_prediction(store: Store) -> None:
    first, _ = store.accept(record(key="k"))
    assert store.accept(record(key="k")) == (first, False)
    assert store.accept(record(id=first.id)) == (first, False)
    assert store.repeated(key="k", id=None)
    assert not store.repeated(key="other", id=None)
    with pytest.raises(RequestError, match="Idempotency-Key was used for another request"):
        store.accept(record(key="k", digest="other"))
    with pytest.raises(RequestError, match="the id was used for another request"):
        store.accept(record(id=first.id, digest="other"))
    assert store.queued() == [first.id]


@both_stores
def test_a_repeated_creation_passes_a_full_queue(store: Store) -> None:
    first, _ = store.accept(record(key="k"))
    for _ in range(4):
        store.accept(record())
    assert store.accept(record(key="k")) == (first, False)


@both_stores
def test_pages(open_store: Open) -> None:
    with_room = open_store()
    ids = [with_room.accept(record())[0].id for _ in range(5)][::-1]
    first = with_room.page(size=2)
    assert ([one.id for one in first.records], first.newer, first.older) == (ids[:2], False, True)
    second = with_room.page(before=first.records[-1].seq, size=2)
    assert ([one.id for one in second.records], second.newer, second.older) == (ids[2:4], True, True)
    third = with_room.page(before=second.records[-1].seq, size=2)
    assert ([one.id for one in third.records], third.older) == (ids[4:], False)
    back = with_room.page(after=second.records[0].seq, size=1)
    assert ([one.id for one in back.records], back.newer) == ([ids[1]], True)


@both_stores
def test_lists_and_streams_read_no_whole_input(store: Store) -> None:
    uri, text = "data:image/png;base64," + "A" * 1000, "a" * 9000
    new, _ = store.accept(record(input={"image": uri, "prompt": text, "seed": 1}))
    assert store.get(new.id) == new
    with store.database.write() as db:
        db.execute("UPDATE inputs SET json = 'no JSON'")
    cut = {"image": uri[:60] + "...", "prompt": text[:8189] + "...", "seed": 1}
    assert [one.input for one in store.page().records] == [cut]
    for found in (store.get(new.id, brief=True), store.by_stream(new.stream)):
        assert found is not None
        assert found.input == cut
    store.start(new.id)
    now = store.now(new)
    assert now is not None
    assert (now.input, now.status) == (new.input, "processing")


@both_stores
def test_inputs_that_an_earlier_version_stored(store: Store) -> None:
    store.accept(record(input={"image": "data:," + "A" * 1000}))
    with store.database.write() as db:
        db.execute("DELETE FROM briefs")
    assert [len(one.input["image"]) for one in store.page().records] == [63]


@both_stores
def test_after_a_restart_queued_ones_run_and_running_ones_fail(store: Store, open_store: Open) -> None:
    queued, running, done, again = (
        store.accept(record(webhook="http://there/", id=f"{i}"))[0] for i in range(4)
    )
    store.start(running.id)
    store.start(again.id)
    store.requeue(again.id)
    store.finish(done.id, DONE, [output(store, done.id)])
    store = reopened(store, open_store)
    assert store.queued() == [queued.id, again.id]
    held = store.get(running.id)
    assert held is not None
    assert (held.status, held.error) == ("failed", INTERRUPTED)
    assert held.completed_at is not None
    assert store.due() == [running.id, done.id]
    assert [store.files.read(one) for one in store.files.outputs(done.id)] == [b"picture"]


@both_stores
def test_what_was_being_prepared_when_two_processes_ended_failed(store: Store, open_store: Open) -> None:
    guilty, outlived, requeued, waiting = (store.accept(record(webhook="http://there/"))[0] for _ in range(4))
    for one in (guilty, outlived, requeued):
        store.prepare(one.id)
    store = reopened(store, open_store)
    assert store.queued() == [guilty.id, outlived.id, requeued.id, waiting.id]
    assert [getattr(store.get(id), "attempts", None) for id in store.queued()] == [1, 1, 1, 0]
    store.prepared(outlived.id)
    assert store.requeue(requeued.id)
    for one in (guilty, outlived, requeued):
        store.prepare(one.id)
    store = reopened(store, open_store)
    assert store.queued() == [outlived.id, requeued.id, waiting.id]
    held = store.get(guilty.id)
    assert held is not None
    assert (held.status, held.error) == ("failed", INTERRUPTED)
    assert held.started_at is not None
    assert store.due() == [guilty.id]
    assert not store.requeue(guilty.id)
    store.close()


def test_one_process_at_a_time(store: Store, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="another process is using"):
        Store(tmp_path / "data")


def test_a_folder_of_a_later_version(store: Store, tmp_path: Path) -> None:
    with store.database.write() as db:
        db.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(BackendError, match="of format 99"):
        Store(tmp_path / "data")


def test_a_folder_of_the_first_version(store: Store, tmp_path: Path) -> None:
    new, _ = store.accept(record())
    with store.database.write() as db:
        db.execute("ALTER TABLE predictions DROP COLUMN attempts")
        db.execute("PRAGMA user_version = 1")
    store.close()
    for _ in range(2):
        again = Store(tmp_path / "data")
        assert again.get(new.id) == new
        again.close()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BackendError, match="can't be used"):
        Store(tmp_path / "file")


@both_stores
def test_retention(store: Store) -> None:
    old, _ = store.accept(record(webhook="http://there/"))
    store.finish(old.id, DONE, [output(store, old.id)])
    upload = store.files.write(b"mask", name="mask.png", content_type="image/png")
    store.files.record(upload)
    waiting, _ = store.accept(record())
    assert store.clean(3600) == 0
    (held,) = store.files.outputs(old.id)
    assert store.clean(-1) == 1
    with store.database.read() as db:
        assert [row["id"] for row in db.execute("SELECT id FROM briefs")] == [waiting.id]
    assert store.clean(-1) == 0
    left = store.get(old.id)
    assert left is not None
    assert (left.status, left.data_removed, left.input, left.logs) == ("succeeded", True, {}, "")
    assert store.files.outputs(old.id) == []
    assert store.files.find(upload.id) is None
    assert [one for one in (held, upload) if store.files.there(one)] == []
    assert store.due() == []
    assert store.get(waiting.id) == waiting
    assert store.clean(-31 * 24 * 3600) == 0
    assert store.get(old.id) is None
    assert store.get(waiting.id) == waiting


def test_retention_frees_a_full_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = store.accept(record())
    held = output(store, old.id)
    store.finish(old.id, DONE, [held])
    upload = store.files.write(b"mask", name="mask.png", content_type="image/png")
    store.files.record(upload)
    later, _ = store.accept(record())
    write = store.database.write

    def full() -> Any:
        if any(store.files.there(one) for one in (held, upload)):
            raise StorageError("nothing can be stored: database or disk is full")
        return write()

    monkeypatch.setattr(store.database, "write", full)
    with pytest.raises(StorageError):
        store.clean(3600)
    assert store.files.there(held)
    assert store.clean(-1) == 1
    left = store.get(old.id)
    assert left is not None
    assert left.data_removed
    assert store.files.find(upload.id) is None
    assert store.get(later.id) == later


def test_an_upload_whose_row_is_refused_leaves_nothing(store: Store) -> None:
    made = store.files.write(b"mask", name="a", content_type="b", metadata='{"a": "' + "a" * 20_000 + '"}')
    with store.database.write() as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match="full"):
        store.files.record(made)
    assert not store.files.there(made)


def test_a_damaged_file_is_the_disks_fault(store: Store) -> None:
    for open_ in (store.database.read, store.database.write):
        with pytest.raises(StorageError, match="malformed"), open_():
            raise sqlite3.DatabaseError("database disk image is malformed")
        with pytest.raises(sqlite3.IntegrityError), open_():
            raise sqlite3.IntegrityError("UNIQUE constraint failed")


@both_stores
@pytest.mark.parametrize(("events", "due"), [((), 1), (("start", "completed"), 1), (("start", "output"), 0)])
def test_a_last_event_is_due_where_it_is_asked_for(store: Store, events: tuple[str, ...], due: int) -> None:
    new, _ = store.accept(record(webhook="http://there/", webhook_events=events))
    store.finish(new.id, DONE)
    assert len(store.due()) == due


@both_stores
def test_uploads_are_deleted_and_outputs_are_not(store: Store) -> None:
    new, _ = store.accept(record())
    made = output(store, new.id)
    store.finish(new.id, DONE, [made])
    upload = store.files.write(b"mask", name="mask.png", content_type="image/png")
    store.files.record(upload)
    assert store.files.delete(upload.id)
    assert not store.files.delete(upload.id)
    assert not store.files.there(upload)
    assert not store.files.delete(made.id)
    assert store.files.there(made)


def test_a_disk_that_refuses(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = store.accept(record())
    with store.database.write() as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match="full"):
        store.accept(record(input={"prompt": "a cat " * 10000}))
    assert store.queued() == [first.id]
    monkeypatch.setattr(
        "ritocco.server.contents.write_whole", lambda *_: os.open("/dev/null/nowhere", os.O_RDONLY)
    )
    with pytest.raises(StorageError, match="nothing can be stored"):
        output(store, first.id)


def test_files_without_a_row_go(store: Store, open_store: Open) -> None:
    folder = store.files.path(output(store, "nobody's"))
    assert folder is not None
    store = reopened(store, open_store)
    assert list(folder.parent.iterdir()) == []


@both_stores
def test_secrets_are_kept(store: Store, open_store: Open) -> None:
    assert setting(store.database, "secret", "a") == "a"
    store = reopened(store, open_store)
    assert setting(store.database, "secret", "b") == "a"
    store.close()


# Forks workers on one folder and kills each at a random moment; a client repeats what was not acknowledged.
KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from ritocco.prediction import new_id
from ritocco.server.store import Outcome, Record, Store

folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)

def work(pipe, first):
    store = Store(folder, waiting=10**6)
    def say(*words):
        os.write(pipe, (" ".join(words) + "\\n").encode())
    say("open")
    number = first
    while True:
        new = Record(id=new_id(), input={"prompt": f"{number}"}, version="v", base="", stream=new_id(),
                     digest=f"{number}", key=f"{number}")
        held, _ = store.accept(new)
        say("accepted", str(number), held.id)
        number += 1
        for id in store.queued()[:2]:
            store.start(id)
            say("started", id)
            data = id.encode() * 50
            kind = {"content_type": "image/png", "prediction": id}
            made = [store.files.write(data, name=f"out-{i}.png", place=i, **kind) for i in range(2)]
            if store.finish(id, Outcome(status="succeeded"), made):
                say("finished", id)

said, following, opened = [], 0, 0
for _ in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            work(writer, following)
        finally:
            os._exit(9)
    os.close(writer)
    os.read(reader, 1) if chance.random() < 0.7 else None
    time.sleep(chance.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status
    with os.fdopen(reader) as stream:
        lines = [line.split() for line in stream.read().splitlines()]
    said += [line for line in lines if len(line) > 1]
    following = max([following - 1, *(int(line[1]) for line in said if line[0] == "accepted")]) + 1
store = Store(folder)
rows = store.page(size=10**6).records
print(json.dumps({
    "said": said,
    "rows": [[row.key, row.id, row.status, row.error] for row in rows],
    "outputs": {row.id: [store.files.read(one).decode() for one in store.files.outputs(row.id)]
                for row in rows},
    "files": sorted(path.name for path in (folder / "files").iterdir()),
    "known": sorted(one.id for row in rows for one in store.files.outputs(row.id)),
}))
"""


def lost_and_doubled(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-c", KILLED, str(folder), str(kills), str(seed)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout))


def check_killed(found: dict[str, Any]) -> None:
    said = found["said"]
    accepted = [(key, id) for what, key, id in (line for line in said if line[0] == "accepted")]
    finished = [line[1] for line in said if line[0] == "finished"]
    rows = {id: (key, status, error) for key, id, status, error in found["rows"]}
    assert len(accepted) > 5
    lost = [id for key, id in accepted if rows.get(id, ("",))[0] != key]
    doubled = len(found["rows"]) - len({key for key, *_ in found["rows"]})
    doubled += len(finished) - len(set(finished))
    assert (lost, doubled) == ([], 0)
    # A key that was repeated is one prediction, whichever answer got through.
    assert len({id for _, id in accepted}) == len({key for key, _ in accepted})
    assert all(rows[id][1] == "succeeded" for id in finished)
    for id, (_, status, error) in rows.items():
        if status == "succeeded":
            assert found["outputs"][id] == [id * 50] * 2
        else:
            assert (status, error) in (("failed", INTERRUPTED), ("starting", None))
            assert found["outputs"][id] == []
    assert found["files"] == found["known"]


def test_a_process_that_is_killed_at_any_moment(tmp_path: Path) -> None:
    check_killed(lost_and_doubled(tmp_path / "data", kills=40, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_process_that_is_killed_very_often(tmp_path: Path, seed: int) -> None:
    check_killed(lost_and_doubled(tmp_path / "data", kills=400, seed=seed))


def test_a_damaged_folder_is_let_go_of(tmp_path: Path) -> None:
    (tmp_path / "files").write_text("no folder")
    with pytest.raises(BackendError, match=r"--data is .*, which can't be used"):
        Store(tmp_path)
    (tmp_path / "files").unlink()
    store = Store(tmp_path)
    store.accept(record())
    store.close()
    file = tmp_path / "ritocco.sqlite"
    whole = file.read_bytes()
    for start in (0, 4096):  # nothing of SQLite's; a page of it
        file.write_bytes(whole[:start] + bytes(len(whole) - start))
        with pytest.raises(BackendError, match=r"--data is .*, which can't be used"):
            Store(tmp_path)
    file.write_bytes(whole)
    store = Store(tmp_path)
    assert len(store.queued()) == 1
    store.close()


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """A folder that somebody uses for something else may be named, or the database be taken away."""
    folder = tmp_path / "files"
    folder.mkdir()
    strangers = [folder / name for name in ("thesis.docx", "a" * 25, ".hidden", "A" * 26)]
    ours = [folder / new_id(), folder / f".{new_id()}.0123456789abcdef.part"]
    for file in (*strangers, *ours):
        file.write_text("words")
    Store(tmp_path).close()
    assert sorted(folder.iterdir()) == sorted(strangers)
