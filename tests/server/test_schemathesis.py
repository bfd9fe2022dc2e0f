"""Schemathesis, in an environment of its own, holds the server against its own OpenAPI document."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path

import pytest

from ritocco_bench.serving import TOKEN, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
# Of the document's example, which is created; almost nothing else is.
EXAMPLE = 64 * 64
# An answer that is refused for want of room is no violation, but it is a positive case that was not accepted.
NOT_HELD = "positive_data_acceptance"


def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    scripts = tmp_path / "env" / "bin"
    pip = (
        scripts / "python",
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "schemathesis==4.32.5",
    )
    subprocess.run(pip, check=True)
    with served(tmp_path / "server", "--waiting", 10000, "--max-work", EXAMPLE) as server:
        command = [str(scripts / "schemathesis"), "run", f"{server.url}/openapi.json", "--seed", "1"]
        command += ["--header", f"Authorization: Bearer {TOKEN}", "--max-examples", "25"]
        command += ["--exclude-checks", NOT_HELD, "--exclude-path-regex", "/stream/"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
