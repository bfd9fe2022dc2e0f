"""The server under load: clients that poll, as Replicate's do, beside the engine without a server.

    python -m ritocco_bench.server_load                   # 1, 4, 16 and 64 clients, the embedded model
    python -m ritocco_bench.server_load --clients 4,100   # more than the queue takes

Each client creates a prediction, asks after it every half second until it has ended, and begins again. Client
and server share the machine. Rows go to `--out`.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

import ritocco
from ritocco.images import data_uri
from ritocco_bench.batching_times import asked_of
from ritocco_bench.rows import append
from ritocco_bench.serving import TOKEN, served

OUT = Path("benchmarks/results/server.jsonl")
POLL_S = 0.5
"""The `replicate` client's own interval."""
TIMEOUT_S = 600.0


@dataclass
class Seen:
    """What clients saw. creates, gets: seconds of answers. wholes: seconds from the first try to the end."""

    creates: list[float] = field(default_factory=list)
    gets: list[float] = field(default_factory=list)
    wholes: list[float] = field(default_factory=list)
    refused: int = 0
    statuses: dict[str, str] = field(default_factory=dict)


def request(size: int, steps: int) -> dict[str, Any]:
    """A client's input: pictures as data URIs."""
    made = asked_of(size, steps, 1)
    for name in ("image", "mask"):
        made[name] = _picture(made[name])
    return made


def _picture(pixels: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return data_uri(file.getvalue())


def load(url: str, body: dict[str, Any], clients: int, seconds: float) -> Seen:
    """So many clients, until so many seconds are over and what they began has ended."""
    seen, lock = Seen(), threading.Lock()
    until = time.perf_counter() + seconds

    def client() -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S) as http:
            while time.perf_counter() < until:
                begun = time.perf_counter()
                _one(http, body, seen, lock)
                with lock:
                    seen.wholes.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def _one(http: httpx.Client, body: dict[str, Any], seen: Seen, lock: threading.Lock) -> None:
    while True:
        begun = time.perf_counter()
        answer = http.post("/v1/predictions", json={"input": body})
        if answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
            break
        with lock:
            seen.refused += 1
        time.sleep(float(answer.headers["Retry-After"]))
    answer.raise_for_status()
    with lock:
        seen.creates.append(time.perf_counter() - begun)
    held = answer.json()
    while held["status"] in ("starting", "processing"):
        time.sleep(POLL_S)
        begun = time.perf_counter()
        held = http.get(f"/v1/predictions/{held['id']}").raise_for_status().json()
        with lock:
            seen.gets.append(time.perf_counter() - begun)
    with lock:
        seen.statuses[held["id"]] = held["status"]


def alone(body: dict[str, Any], seconds: float) -> float:
    """Predictions a second of the engine by itself, one after the other, after one that warms it."""
    with ritocco.load(backend="torch") as engine:
        engine.predict(body)
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            engine.predict(body)
            count += 1
        return count / (time.perf_counter() - begun)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where a prediction did not succeed."""
    given = _parser().parse_args(arguments)
    body, broken = request(given.size, given.steps), 0
    by_itself = alone(body, given.seconds)
    print(f"{given.size} x {given.size}, {given.steps} steps; the engine by itself: {by_itself:.2f} a second")
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as server:
        load(server.url, body, 1, 1.0)
        for clients in (int(one) for one in given.clients.split(",")):
            begun = time.perf_counter()
            seen = load(server.url, body, clients, given.seconds)
            rate = len(seen.wholes) / (time.perf_counter() - begun)
            broken += sum(status != "succeeded" for status in seen.statuses.values())
            row: dict[str, Any] = {"case": "server-load", "clients": clients, "size": given.size}
            row |= {"steps": given.steps, "predictions": len(seen.wholes), "refused": seen.refused}
            row |= {"per_second": rate, "engine_per_second": by_itself}
            row |= {f"{name}_s": spread(getattr(seen, f"{name}s")) for name in ("create", "get", "whole")}
            append(given.out, row)
            print(_said(row), flush=True)
    return 1 if broken else 0


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and most."""
    found = (
        statistics.quantiles(seconds, n=20, method="inclusive") if len(seconds) > 1 else list(seconds) * 19
    )
    return {"p50": found[9], "p95": found[18], "most": max(seconds)} if seconds else {}


def _said(row: dict[str, Any]) -> str:
    parts = [f"{row['clients']} clients: {row['per_second']:.2f} predictions a second"]
    for name, words in (("create", "accepted in"), ("get", "told in"), ("whole", "done in")):
        held = row[f"{name}_s"]
        if held:
            parts.append(f"{words} {held['p50']:.3f} s (95 %: {held['p95']:.3f}, most {held['most']:.3f})")
    return ", ".join([*parts, f"{row['predictions']} done, {row['refused']} told to come again"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ritocco_bench.server_load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clients", default="1,4,16,64", help="how many at a time, one round each")
    parser.add_argument("--seconds", type=float, default=60.0, help="that clients begin anew")
    parser.add_argument("--size", type=int, default=128, help="pixels per side")
    parser.add_argument("--steps", type=int, default=4, help="of each prediction")
    parser.add_argument("--out", type=Path, default=OUT, help="JSONL file that rows are added to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
