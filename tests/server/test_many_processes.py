"""`ritocco serve`, several on one database: killed, paused, stopped and without the database under load."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from hand_batcher import picture
from real_postgres import PASSWORD, RealPostgres
from ritocco.server.store import INTERRUPTED
from ritocco_bench.serving import TOKEN, Served, served
from webhook_receiver import Receiver, receiving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
SMALL = {"image": picture(0), "mask": picture(255), "width": 64, "height": 64, "num_inference_steps": 2}
LONG = SMALL | {"num_inference_steps": 60}
GONE_S = 3


class Fleet:
    """Servers on one database, and who has to hear of the ends of their predictions."""

    def __init__(self, folder: Path, database: str, receiver: Receiver, stack: ExitStack) -> None:
        self._folder, self._database, self._receiver, self._stack = folder, database, receiver, stack
        self.all: list[Served] = []
        self.up: list[Served] = []
        self.known: dict[str, str] = {}
        self._lock = threading.Lock()

    def start(self) -> Served:
        options = ("--dtype", "float32", "--gone-after", GONE_S, "--allow-network", "127.0.0.0/8")
        made = self._stack.enter_context(
            served(self._folder / str(len(self.all)), *options, "--grace", 0, database=self._database)
        )
        self.all.append(made)
        self.up.append(made)
        return made

    def ask(self, key: str, input: dict[str, Any], among: list[Served] | None = None) -> str:
        """As a client that asks, under its key, until it has an answer, at whatever server is there."""
        body = {"input": input, "webhook": self._receiver.url, "webhook_events_filter": ["completed"]}
        while True:
            url = random.choice(among or self.up).url  # noqa: S311
            try:
                named = HEADERS | {"Idempotency-Key": key}
                answer = httpx.post(f"{url}/v1/predictions", json=body, headers=named, timeout=10)
            except httpx.TransportError:
                continue
            if answer.status_code == 201:
                id = str(answer.json()["id"])
                with self._lock:
                    assert self.known.setdefault(key, id) == id
                return id
            assert answer.status_code in (429, 503), answer.text
            time.sleep(0.1)

    def get(self, id: str, at: Served | None = None) -> dict[str, Any]:
        url = (at or random.choice(self.up)).url  # noqa: S311
        held = dict(httpx.get(f"{url}/v1/predictions/{id}", headers=HEADERS, timeout=60).json())
        held.pop("urls", None)  # they are of the server that was asked
        return held

    def ended(self, id: str, at: Served | None = None) -> dict[str, Any]:
        """Once it has, as some server tells it."""
        while (held := self.get(id, at)).get("status") in ("starting", "processing"):
            time.sleep(0.1)
        return held

    def check(self, *, interrupted: bool, twice: int = 0) -> dict[str, dict[str, Any]]:
        """Everything accepted has ended, once, and any server says so. interrupted: whether some may be.
        twice: last events of which a server could not know that they had been sent.
        """
        held = {id: self.ended(id) for id in self.known.values()}
        for id, one in held.items():
            if one["status"] == "succeeded":
                assert one["output"][0].startswith("data:image/png")
            else:
                assert (interrupted, one["status"], one["error"]) == (True, "failed", INTERRUPTED), one
            assert self.get(id)["status"] == one["status"]
        assert sorted(self._listed()) == sorted(self.known.values())
        assert len(set(self.known.values())) == len(self.known)
        self._check_told(held, twice)
        said = [json.loads(line) for server in self.all for line in server.log if line.startswith("{")]
        ends = Counter(line["prediction"] for line in said if line["message"] == "prediction")
        assert not [id for id, times in ends.items() if times > 1]
        assert not [line for server in self.all for line in server.log if PASSWORD in line or TOKEN in line]
        return held

    def _listed(self) -> list[str]:
        found: list[str] = []
        url = f"{self.up[0].url}/v1/predictions"
        while url:
            page = httpx.get(url, headers=HEADERS, timeout=60).json()
            found += [one["id"] for one in page["results"]]
            url = page["next"]
        return found

    def _check_told(self, held: dict[str, dict[str, Any]], twice: int) -> None:
        told: dict[str, set[tuple[str, str]]] = defaultdict(set)
        count = 0
        while count < len(held) or not self._receiver.got.empty():
            headers, body = self._receiver.next()
            count += body["id"] not in told
            twice -= body["id"] in told
            told[body["id"]].add((headers["webhook-id"], body["status"]))
        assert twice >= 0
        assert set(told) == set(held)
        assert {id: {status for _, status in one} for id, one in told.items()} == {
            id: {one["status"]} for id, one in held.items()
        }
        assert {len(one) for one in told.values()} == {1}, "repetitions have the same webhook-id"


Start = Callable[[int], Fleet]


@pytest.fixture
def start(tmp_path: Path, database: str) -> Iterator[Start]:
    """Starts so many servers."""
    with receiving() as receiver, ExitStack() as stack:

        def call(count: int) -> Fleet:
            fleet = Fleet(tmp_path, database, receiver, stack)
            for _ in range(count):
                fleet.start()
            return fleet

        yield call


def load(fleet: Fleet, over: threading.Event, clients: int = 3) -> list[threading.Thread]:
    """Clients that ask on and on."""

    def work(client: int) -> None:
        number = 0
        while not over.is_set():
            fleet.ask(f"{client}-{number}", SMALL | {"seed": number})
            number += 1
            over.wait(0.1)

    threads = [threading.Thread(target=work, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize(("count", "seed"), [(2, 1), (3, 2)])
def test_killed_under_load_nothing_is_lost_or_doubled(start: Start, count: int, seed: int) -> None:
    chance, fleet, over, kills = random.Random(seed), start(count), threading.Event(), 4  # noqa: S311
    clients = load(fleet, over)
    try:
        for _ in range(kills):
            time.sleep(chance.uniform(0.2, 4))
            fleet.start()  # so that some server is always there
            victim = fleet.up.pop(chance.randrange(count))
            victim.end(signal.SIGKILL)
    finally:
        over.set()
        for client in clients:
            client.join(300)
    assert len(fleet.known) > 20
    held = fleet.check(interrupted=True, twice=2 * kills)
    assert sum(one["status"] == "succeeded" for one in held.values()) > 10


def test_a_server_that_was_only_paused_writes_nothing(start: Start) -> None:
    fleet = start(2)
    paused, other = fleet.up
    longer = LONG | {"num_inference_steps": 200}  # none ends before
    ids = [fleet.ask(str(number), longer, [paused]) for number in range(12)]
    while fleet.get(ids[0], paused)["status"] == "starting":
        time.sleep(0.02)
    paused.process.send_signal(signal.SIGSTOP)
    try:
        held = {id: fleet.ended(id, other) for id in ids}
        assert {one["error"] for one in held.values()} == {None, INTERRUPTED}
        assert fleet.ask("meanwhile", SMALL, [other]) is not None
    finally:
        paused.process.send_signal(signal.SIGCONT)
    while not any("taken over by another server" in line for line in paused.log):
        time.sleep(0.1)
    assert {id: fleet.get(id, paused) for id in ids} == {id: fleet.get(id, other) for id in ids}
    fleet.ask("afterwards", SMALL, [paused])
    after = fleet.check(interrupted=True)
    assert {id: after[id]["status"] for id in ids} == {id: one["status"] for id, one in held.items()}


def test_a_stop_hands_everything_on(start: Start) -> None:
    fleet = start(2)
    leaving, other = fleet.up
    ids = [fleet.ask(str(number), LONG, [leaving]) for number in range(12)]
    answers: list[Any] = []

    def wait() -> None:
        named = HEADERS | {"Prefer": "wait=60"}
        body = {"input": LONG, "id": "last"}
        answers.append(httpx.put(f"{other.url}/predictions/last", json=body, headers=named, timeout=90))

    fleet.up.remove(leaving)
    leaving.process.send_signal(signal.SIGTERM)
    waiting = threading.Thread(target=wait)
    waiting.start()
    assert leaving.process.wait(60) in (0, 143, -signal.SIGTERM)
    leaving.close()
    assert {fleet.ended(id)["status"] for id in ids} == {"succeeded"}
    waiting.join(120)
    assert answers[0].json()["status"] == "succeeded"
    fleet.known["last"] = "last"
    assert sorted(fleet._listed()) == sorted(fleet.known.values())


def test_without_their_database_for_a_while(start: Start, postgres: RealPostgres) -> None:
    fleet, over = start(2), threading.Event()
    clients = load(fleet, over)
    ids = [fleet.ask(f"long-{number}", LONG) for number in range(4)]
    try:
        for at_once in (False, True):
            time.sleep(2)
            postgres.stop(at_once=at_once)
            try:
                while any(httpx.get(f"{one.url}/readyz", timeout=60).status_code == 200 for one in fleet.up):
                    time.sleep(0.1)
                time.sleep(GONE_S + 1)  # all are unseen for that long, and none is gone
            finally:
                postgres.start()
    finally:
        over.set()
        for client in clients:
            client.join(300)
    held = fleet.check(interrupted=False)
    assert {held[id]["status"] for id in ids} == {"succeeded"}
