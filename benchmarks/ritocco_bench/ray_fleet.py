"""Ritocco on Ray Serve as `serve run` starts it, on a cluster of this machine alone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ritocco_bench.serving import TOKEN

START_S = 120.0
STOP_S = 120.0
_CORES = 16
# As many cores as the replicas ask for, whatever the machine has; `serve run` takes the cluster there is.
_RUN = """
import sys, ray
from ray.serve.scripts import cli
ray.init(num_cpus=int(sys.argv[2]), include_dashboard=False)
cli(["run", sys.argv[1]])
"""
_REPLICA = re.compile(r"ray::ServeReplica:ritocco:(painters|fronts)")


@dataclass
class Fleet:
    """url: where its fronts answer, behind Ray's proxy, with TOKEN."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def replicas(self, deployment: str) -> list[int]:
        """Process ids of the living `painters`, or `fronts`, of this machine."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    title = (entry / "cmdline").read_bytes().decode("utf-8", "replace")
                except OSError:  # it has just ended
                    continue
                if (named := _REPLICA.match(title)) and named[1] == deployment:
                    found.append(int(entry.name))
        return sorted(found)

    def stop(self) -> None:
        """As Ctrl-C does; killed where that takes too long."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def fleet(folder: Path, *, deployments: Sequence[dict[str, Any]] = (), **arguments: Any) -> Iterator[Fleet]:
    """A fleet that takes requests. folder: for its configuration and log. deployments: what Ray is to do
    otherwise, as in its YAML files. arguments: of `scale.serve.Fleet`.

    Raises RuntimeError where it does not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens = folder / "tokens.txt"
    tokens.write_text(f"{TOKEN}\n", encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    application = {
        "name": "ritocco",
        "import_path": "ritocco.scale.serve:app",
        "deployments": list(deployments),
        "args": {"token_file": str(tokens), "data": str(folder / "data"), **arguments},
    }
    config = folder / "ritocco.yaml"  # JSON is YAML
    config.write_text(
        json.dumps({"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}),
        encoding="utf-8",
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local"}
    log = folder / "serve.log"
    with log.open("wb") as stream:
        command = [sys.executable, "-c", _RUN, str(config), str(_CORES)]
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=env, start_new_session=True)
    made = Fleet(process, f"http://127.0.0.1:{port}", log)
    try:
        _await(made)
        yield made
    finally:
        made.stop()


def _await(made: Fleet) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and made.process.poll() is None:
        try:
            if httpx.get(f"{made.url}/readyz", timeout=5).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the fleet is not up:\n{made.log.read_text(errors='replace')[-5000:]}")
