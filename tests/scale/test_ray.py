"""A real fleet on a cluster of this machine: clients see one server, whoever is killed behind it."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import ritocco
from real_postgres import real_postgres
from ritocco.server.store import INTERRUPTED
from ritocco.sources import decode_data_uri
from ritocco_bench.ray_fleet import Fleet, fleet
from ritocco_bench.server_load import request
from ritocco_bench.serving import TOKEN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE_S = 180.0
ENDED = ("succeeded", "failed", "canceled")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two fronts, two painters and a PostgreSQL database."""
    folder = tmp_path_factory.mktemp("fleet")
    with (
        real_postgres() as postgres,
        fleet(folder, database=postgres.new_database(), fronts=2, painters=2) as made,
    ):
        yield made


@pytest.fixture
def http(run: Fleet) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=run.url, headers=headers, timeout=PATIENCE_S) as client:
        yield client


def pixels(uri: str) -> npt.NDArray[np.int16]:
    """Of a data URI."""
    return np.asarray(Image.open(io.BytesIO(decode_data_uri(uri)[1])), np.int16)


def ended(http: httpx.Client, id: str) -> dict[str, Any]:
    """The prediction, asked after until it has ended. A front that is killed costs an answer."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            answer = http.get(f"/v1/predictions/{id}")
        except httpx.TransportError:
            continue
        if answer.status_code < 500:
            held: dict[str, Any] = answer.raise_for_status().json()
            if held["status"] in ENDED:
                return held
        time.sleep(0.2)
    raise AssertionError(f"{id} has not ended")


def settled(run: Fleet, deployment: str, count: int, killed: int) -> None:
    """Wait until `count` replicas are there, and that of process `killed` is none of them."""
    until = time.monotonic() + PATIENCE_S
    found: list[int] = []
    while time.monotonic() < until:
        found = run.replicas(deployment)
        if killed not in found and len(found) >= count:
            return
        time.sleep(0.5)
    raise AssertionError(f"{count} replicas of {deployment} wanted, without {killed}: {found}")


def test_the_answer_is_the_librarys(http: httpx.Client) -> None:
    body = request(128, 3)
    with ritocco.load(backend="torch") as engine:
        alone = engine.predict(body)
    answer = http.post("/v1/predictions", json={"input": body}, headers={"Prefer": "wait"}).json()
    assert (answer["status"], answer["error"]) == ("succeeded", None)
    here, there = (pixels(one["output"][0]) for one in (alone.model_dump(), answer))
    # Other threads add in another order.
    assert np.abs(here - there).max() <= 1
    assert answer["version"] == alone.version


def test_errors_and_cancels_cross_over(http: httpx.Client) -> None:
    bad = request(128, 3) | {"image": "data:image/png;base64,AAAA"}
    made = http.post("/v1/predictions", json={"input": bad}).json()
    assert "input.image" in ended(http, made["id"])["error"]
    long = http.post("/v1/predictions", json={"input": request(256, 500)}).json()
    while http.get(f"/v1/predictions/{long['id']}").json()["status"] == "starting":
        time.sleep(0.1)
    http.post(f"/v1/predictions/{long['id']}/cancel").raise_for_status()
    left = ended(http, long["id"])
    assert left["status"] == "canceled"
    assert re.search(r"^Canceled after \d+ of 50[01] steps$", left["logs"], re.MULTILINE), left["logs"]
    assert left["metrics"]["predict_time"] > 0


def test_without_a_token_nobody_is_answered(run: Fleet) -> None:
    assert httpx.get(f"{run.url}/v1/predictions", timeout=PATIENCE_S).status_code == 401


@pytest.mark.parametrize("deployment", ["painters", "fronts"])
def test_killed_under_load_nothing_is_lost_and_nothing_done_twice(
    run: Fleet, http: httpx.Client, deployment: str
) -> None:
    """Clients that come again where an answer is lost, as Replicate's do, under a key of their own."""
    replicas, random_ = len(run.replicas(deployment)), random.Random(deployment)  # noqa: S311
    accepted: dict[str, str] = {}
    lock, stop = threading.Lock(), threading.Event()

    def client(number: int) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        count = 0
        with httpx.Client(base_url=run.url, headers=headers, timeout=PATIENCE_S) as own:
            while not stop.is_set():
                count += 1
                key = f"{deployment}-{number}-{count}"
                body = request(random_.choice((64, 128)), random_.choice((2, 4, 8)))
                while True:
                    try:
                        answer = own.post(
                            "/v1/predictions", json={"input": body}, headers={"Idempotency-Key": key}
                        )
                    except httpx.TransportError:
                        continue
                    if answer.is_success:
                        break
                    assert answer.status_code in (429, 500, 502, 503, 504), answer.text
                    time.sleep(0.2)
                with lock:
                    assert accepted.setdefault(key, answer.json()["id"]) == answer.json()["id"]
                time.sleep(0.3)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            time.sleep(3.0 + random_.random())
            killed = random_.choice(run.replicas(deployment))
            os.kill(killed, signal.SIGKILL)
            settled(run, deployment, replicas, killed)
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert len(accepted) > 8
    assert len(set(accepted.values())) == len(accepted)
    statuses = {id: ended(http, id) for id in accepted.values()}
    for held in statuses.values():
        assert held["status"] == "succeeded" or (held["status"], held["error"]) == ("failed", INTERRUPTED), (
            held
        )
    assert sum(held["status"] == "succeeded" for held in statuses.values()) > len(accepted) // 2
    listed, page = [], http.get("/v1/predictions").json()
    while True:
        listed += [one["id"] for one in page["results"]]
        if page["next"] is None:
            break
        page = http.get(page["next"]).json()
    assert len(set(listed)) == len(listed)
    assert set(statuses) <= set(listed)
