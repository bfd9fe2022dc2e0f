"""The benchmark of the server under load: it measures what it says, on a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ritocco_bench import server_load
from ritocco_bench.serving import served


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_more_clients_than_the_queue_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(server_load, "served", lambda folder: served(folder, "--waiting", 2))
    arguments = ["--clients", "1,6", "--seconds", "4", "--size", "64", "--steps", "2", "--out", str(out)]
    assert server_load.main(arguments) == 0
    few, many = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert (few["clients"], many["clients"]) == (1, 6)
    assert few["predictions"] >= 1
    assert many["predictions"] >= 6
    assert few["refused"] == 0 < many["refused"]
    for row in (few, many):
        assert 0 < row["create_s"]["p50"] <= row["create_s"]["p95"] <= row["create_s"]["most"]
        assert row["whole_s"]["p50"] > row["get_s"]["p50"]
        assert row["engine_per_second"] > 0
    assert "6 clients: " in capsys.readouterr().out
