"""`ritocco serve`: what it refuses, how it ends, and what is left when it is killed under load."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from hand_batcher import picture
from ritocco import cli
from ritocco.server.store import INTERRUPTED
from ritocco_bench.serving import TOKEN, served

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
SMALL = {"image": picture(0), "mask": picture(255), "width": 64, "height": 64, "num_inference_steps": 2}

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `ritocco serve` with these arguments, none of which lets it begin: (exit status, stderr)."""

    def call(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ritocco", "serve", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        err = capfd.readouterr().err
        assert "Traceback" not in err
        return int(left.value.code or 0), err

    return call


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])  # noqa: S104 - refused
def test_others_are_not_let_in_without_tokens(run: Run, host: str) -> None:
    status, err = run("--host", host)
    assert status == 2
    assert f"--host is {host!r}" in err
    assert "--token-file" in err


def test_options_that_make_no_sense(run: Run, tmp_path: Path) -> None:
    assert run("--token-file", tmp_path / "nowhere")[1].startswith("error: --token-file is ")
    assert "outputs is 'x'" in run("--outputs", "x")[1]
    assert "--log-level is 'x'" in run("--log-level", "x")[1]
    assert "retention_s is -3600" in run("--retention-hours", "-1")[1]
    assert "not a network in CIDR" in run("--allow-network", "x")[1]
    assert run("--port", "70000")[0] == 2
    assert "gone_after_s is 0" in run("--gone-after", "0")[1]


def test_a_databases_url_is_not_shown(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RITOCCO_DATABASE", "mysql://u:secret@h/d")
    status, err = run()
    assert (status, "must start with postgresql://" in err, "secret" in err) == (2, True, False)
    monkeypatch.setenv("RITOCCO_DATABASE", "postgresql://u:secret@h/d")
    status, err = run("--data", tmp_path)
    assert (status, "database and data are both given" in err, "secret" in err) == (2, True, False)


def test_a_database_without_its_packages_names_the_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['psycopg'] = None; from ritocco.server import Settings, create_app; "
    code += "from hand_batcher import HandBatcher; "
    code += "create_app(HandBatcher(), Settings(database='postgresql://u:secret@h/d'))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, "secret" in done.stderr) == (1, False)
    assert 'a database needs psycopg; pip install "ritocco[postgres]"' in done.stderr


@pytest.mark.parametrize("name", ["uvicorn", "fastapi", "prometheus_client"])
def test_the_error_without_the_packages_names_the_extra(name: str) -> None:
    code = f"import sys; sys.modules[{name!r}] = None; sys.argv[1:] = ['serve']; "
    code += "from ritocco import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f'error: the server needs {name}; pip install "ritocco[server]"\n'


def test_the_command_line_needs_none_of_it() -> None:
    code = (
        "import sys, ritocco.cli; print([n for n in ('fastapi', 'starlette', 'uvicorn') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_ends_at_sigterm_and_takes_up_its_queue(tmp_path: Path) -> None:
    many = SMALL | {"num_inference_steps": 100}
    with (
        served(tmp_path, "--dtype", "float32") as server,
        httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client,
    ):
        ids = [client.post("/v1/predictions", json={"input": many}).json()["id"] for _ in range(10)]
        waiting: list[Any] = []
        last = {"input": many, "id": "last"}
        thread = threading.Thread(
            target=lambda: waiting.append(client.post("/predictions", json=last).json())
        )
        thread.start()
        while client.get("/v1/predictions/last").status_code == 404:
            pass
        server.process.send_signal(signal.SIGTERM)
        while (ready := client.get("/readyz")).status_code == 200:
            pass
        assert (ready.status_code, ready.json()) == (503, {"status": "stopping"})
        assert client.get("/v1/predictions/last").status_code == 200, "clients can still ask"
        assert server.process.wait(60) in (0, 143, -signal.SIGTERM)
        server.close()
        thread.join(60)
        assert waiting[0]["status"] == "starting"
        assert not any(TOKEN in line for line in server.log)
    with (
        served(tmp_path, "--dtype", "float32") as server,
        httpx.Client(base_url=server.url, headers=HEADERS, timeout=300) as client,
    ):
        for id in (*ids, "last"):
            client.get(client.get(f"/v1/predictions/{id}").json()["urls"]["stream"])
            assert client.get(f"/v1/predictions/{id}").json()["status"] == "succeeded"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform == "win32", reason="no limit of open files to be raised there")
def test_a_thousand_idle_connections_keep_nobody_out(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))  # as in a shell, for the server
    with served(tmp_path, "--dtype", "float32") as server, ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        host, port = server.url.removeprefix("http://").split(":")
        for number in range(1200):
            idle = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            idle.sendall(b"GET /livez HTTP/1.1\r\n" if number % 2 else b"")
        client = stack.enter_context(httpx.Client(base_url=server.url, headers=HEADERS, timeout=60))
        answer = client.post("/v1/predictions", json={"input": SMALL}, headers={"Prefer": "wait"})
        assert answer.json()["status"] == "succeeded"


LOSES_ITS_DEVICE = """
import os
import ritocco.engine
from ritocco import cli
from ritocco.seats import Seats

if "RITOCCO_STARTED_AGAIN" not in os.environ:
    step, taken = Seats.step, []

    def fail(self, entries):
        taken.append(entries)
        if len(taken) > 3:
            ritocco.engine.responds = lambda name: False
            raise RuntimeError("unspecified launch failure")
        step(self, entries)

    Seats.step = fail
cli.main()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform == "win32", reason="a process can't become another there")
def test_a_lost_device_starts_it_again_in_its_place(tmp_path: Path) -> None:
    many = SMALL | {"num_inference_steps": 20}
    with (
        served(tmp_path, "--dtype", "float32", script=LOSES_ITS_DEVICE) as server,
        httpx.Client(base_url=server.url, headers=HEADERS, timeout=120) as client,
    ):
        first = client.post("/v1/predictions", json={"input": many}, headers={"Prefer": "wait"}).json()
        assert (first["status"], first["error"]) == ("failed", INTERRUPTED)
        again = {"input": many, "id": "again"}
        # As a client that asks again, and is refused or waits until the next process listens.
        while True:
            with suppress(httpx.TransportError):
                answer = client.put("/predictions/again", json=again)
                if answer.status_code != 503:
                    break
        assert answer.json()["status"] == "succeeded"
        assert client.get(f"/v1/predictions/{first['id']}").json()["status"] == "failed"
        assert server.process.poll() is None, "the process that was started"
        said = [json.loads(line) for line in server.log if line.startswith("{")]
        assert [one["message"] for one in said].count("device lost") == 1
        assert [one["times"] for one in said if one["message"] == "starting again"] == [1]
        assert server.end(signal.SIGTERM) in (0, 143, -signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            client.get("/livez")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_under_load_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    chance = random.Random(5)  # noqa: S311
    known: dict[str, str] = {}
    number = 0
    for _ in range(6):
        with (
            served(tmp_path, "--dtype", "float32") as server,
            httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client,
        ):
            # What was not answered is asked again, under its key.
            until = time.monotonic() + chance.uniform(0.2, 4)
            while time.monotonic() < until:
                body = {"input": SMALL | {"seed": number}}
                key = {"Idempotency-Key": f"key-{number}"}
                answer = client.post("/v1/predictions", json=body, headers=key)
                if answer.status_code == 201:
                    known[f"key-{number}"] = answer.json()["id"]
                    number += chance.random() < 0.8
            server.end(signal.SIGKILL)
    with (
        served(tmp_path, "--dtype", "float32") as server,
        httpx.Client(base_url=server.url, headers=HEADERS, timeout=600) as client,
    ):
        assert len(known) > 5
        assert len(set(known.values())) == len(known)
        for id in known.values():
            client.get(client.get(f"/v1/predictions/{id}").json()["urls"]["stream"])
            held = client.get(f"/v1/predictions/{id}").json()
            if held["status"] == "succeeded":
                assert held["output"][0].startswith("data:image/png")
            else:
                assert (held["status"], held["error"]) == ("failed", INTERRUPTED)
        listed: list[str] = []
        page = client.get("/v1/predictions").json()
        while True:
            listed += [one["id"] for one in page["results"]]
            if page["next"] is None:
                break
            page = client.get(page["next"]).json()
        assert sorted(listed) == sorted(known.values())
