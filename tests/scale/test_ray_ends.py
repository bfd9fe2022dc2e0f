"""A fleet that grows, shrinks and ends, with predictions in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from real_postgres import real_postgres
from ritocco_bench.ray_fleet import fleet
from ritocco_bench.server_load import request
from ritocco_bench.serving import TOKEN, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE_S = 180.0
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
QUICKLY = {"upscale_delay_s": 1, "downscale_delay_s": 3, "metrics_interval_s": 1, "look_back_period_s": 2}


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


def create(http: httpx.Client, body: dict[str, Any]) -> str:
    return str(http.post("/v1/predictions", json={"input": body}).raise_for_status().json()["id"])


def status(http: httpx.Client, id: str) -> str:
    return str(http.get(f"/v1/predictions/{id}").raise_for_status().json()["status"])


def test_painters_come_with_work_and_finish_it_before_they_go(tmp_path: Path) -> None:
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, **QUICKLY}
    quick = [{"name": "painters", "autoscaling_config": scaling}]
    with (
        fleet(tmp_path, deployments=quick, painters=1, most_painters=2) as made,
        httpx.Client(base_url=made.url, headers=HEADERS, timeout=PATIENCE_S) as http,
    ):
        assert len(made.replicas("painters")) == 1
        ids = [create(http, request(128, 30)) for _ in range(16)]
        until(lambda: len(made.replicas("painters")) == 2, "a second painter")
        ids += [create(http, request(256, 60)) for _ in range(2)]
        until(lambda: len(made.replicas("painters")) == 1, "one painter again")
        until(lambda: all(status(http, id) == "succeeded" for id in ids), "all succeeded")


def test_what_an_ended_fleet_leaves_another_server_finishes(tmp_path: Path) -> None:
    with real_postgres() as postgres:
        database = postgres.new_database()
        with (
            fleet(tmp_path / "fleet", database=database, fronts=2, capacity=1, grace=2.0) as made,
            httpx.Client(base_url=made.url, headers=HEADERS, timeout=PATIENCE_S) as http,
        ):
            ids = [create(http, request(128, 60)) for _ in range(2)]
            ids += [create(http, request(64, 2)) for _ in range(20)]
            until(lambda: any(status(http, id) == "processing" for id in ids), "one begins")
            made.stop()
        with (
            served(tmp_path / "served", database=database) as server,
            httpx.Client(base_url=server.url, headers=HEADERS, timeout=PATIENCE_S) as http,
        ):
            until(lambda: all(status(http, id) in ("succeeded", "failed") for id in ids), "all ended")
            # It was asked to end, so nothing was cut off.
            assert [status(http, id) for id in ids] == ["succeeded"] * len(ids)
