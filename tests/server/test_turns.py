"""Whose webhooks are delivered next."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from hand_batcher import Make
from ritocco.fetch import Fetcher
from ritocco.server import turns
from ritocco.server.turns import PROMPT_S, Lane, Turns


def told(made: Turns, host: str, seconds: float) -> None:
    """A delivery that took so long."""
    made.add((host, 0))
    assert made.take() == (host, 0)
    made.done((host, 0), seconds)


def taken(made: Turns) -> list[Lane]:
    found = []
    while (lane := made.take()) is not None:
        found.append(lane)
    return found


def test_the_oldest_first() -> None:
    made = Turns(8)
    told(made, "prompt", 0.1)
    told(made, "slow", PROMPT_S)
    lanes = [("new", 0), ("slow", 0), ("prompt", 0), ("slow", 1)]
    for lane in lanes:
        made.add(lane)
    assert len(made) == 4
    assert taken(made) == lanes
    assert len(made) == 0


def test_new_and_slow_hosts_have_their_share() -> None:
    made = Turns(8)
    told(made, "prompt", 0.1)
    for number in range(8):
        told(made, f"slow-{number}", 28.0)
    for number in range(8):
        made.add((f"slow-{number}", 0))
    assert taken(made) == [("slow-0", 0), ("slow-1", 0)]
    for number in range(8):
        made.add((f"new-{number}", 0))
    assert taken(made) == [("new-0", 0), ("new-1", 0)]
    made.add(("prompt", 0))
    made.add(("prompt", 1))
    assert taken(made) == [("prompt", 0), ("prompt", 1)]
    made.done(("new-0", 0), 0.1)
    assert taken(made) == [("new-2", 0)]
    made.done(("slow-0", 0), 0.0)
    assert taken(made) == [("slow-2", 0)]


def test_a_host_is_what_it_was_last_time() -> None:
    made = Turns(4)
    for seconds, most in ((28.0, 1), (0.1, 3), (0.0, 3), (28.0, 1)):
        told(made, "host", seconds)
        for number in range(3):
            made.add(("host", number))
        found = taken(made)
        assert len(found) == most
        while found:
            made.done(found.pop(), 0.0)
            found += taken(made)


def test_hosts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_MOST_HOSTS", 3)
    made = Turns(4)
    for number in range(5):
        told(made, f"{number}", 0.1)
    assert set(made._hosts) == {"2", "3", "4"}


def test_silent_hosts_hold_up_no_prompt_one(
    make: Make, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, released = threading.Semaphore(0), threading.Event()
    silent: list[str] = []

    def post(_: Fetcher, url: str, *__: Any, **___: Any) -> int:
        if "silent" in url:
            silent.append(url)
            assert released.wait(60)
        else:
            arrived.release()
        return 200

    monkeypatch.setattr(Fetcher, "post", post)
    client = make(waiting=1000)

    def create(host: str) -> None:
        body = {"input": asked, "webhook": f"http://{host}/", "webhook_events_filter": ["completed"]}
        client.post("/predictions", json=body)

    create("prompt")
    assert arrived.acquire(timeout=30)
    for number in range(40):
        create(f"silent-{number}")
    for _ in range(3):
        create("prompt")
        assert arrived.acquire(timeout=30)
    assert len(silent) <= 16
    released.set()
