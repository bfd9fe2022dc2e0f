"""The log: lines in order, and progress in the shape that the service's clients parse."""

from __future__ import annotations

import re
import time

import pytest

from ritocco.progress import Log

# Of the official Python client, which takes the last line that matches.
CLIENT = re.compile(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)/(\d+)")


def client_reads(logs: str) -> tuple[int, int, int] | None:
    """Percentage, current, total, as a client reads them."""
    for line in reversed(logs.split("\n")):
        if match := CLIENT.match(line):
            percentage, current, total = map(int, match.groups())
            return percentage, current, total
    return None


def test_lines_come_in_order() -> None:
    log = Log()
    assert log.text() == ""
    log.note("Using seed: 7", "second")
    log.note()
    log.start()
    log.progress(1, 2)
    log.note("last")
    lines = log.text().split("\n")
    assert [*lines[:2], *lines[3:]] == ["Using seed: 7", "second", "last", ""]
    assert lines[2].startswith(" 50%|")


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50, 500])
def test_clients_read_every_line(total: int) -> None:
    log = Log()
    log.start()
    for done in range(1, total + 1):
        log.progress(done, total)
        read = client_reads(log.text())
        assert read is not None
        assert read[1:] == (done, total)
        assert abs(read[0] - 100 * done / total) <= 0.5
    assert client_reads(log.text()) == (100, total, total)
    assert len(log.text().splitlines()) == total


@pytest.mark.parametrize("seconds", [0.0, 1e-7, 59.0, 7200.0, 1e6])
def test_clients_read_any_speed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log = Log()
    now[0] += 5000.0  # what came before the loop does not count
    log.start()
    now[0] += seconds
    log.progress(3, 25)
    (line,) = log.text().splitlines()
    assert client_reads(line) == (12, 3, 25)
    assert "5000" not in line
    if seconds == 7200.0:
        assert "2:00:00<14:40:00" in line
