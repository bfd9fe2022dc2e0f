"""The model, its version, health and figures."""

from __future__ import annotations

import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from hand_batcher import HandBatcher, Make
from ritocco.prediction import MODEL, VERSION
from ritocco.schema import PredictionInput
from ritocco.server.gate import PREFIXES


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("id", [VERSION, HandBatcher.version])
def test_a_version(open_client: TestClient, prefix: str, id: str) -> None:
    held = open_client.get(f"{prefix}/models/{MODEL}/versions/{id}").json()
    assert {"id", "created_at", "cog_version", "openapi_schema"} <= held.keys()
    assert held["id"] == id
    schemas = held["openapi_schema"]["components"]["schemas"]
    # Clients make an iterator of an output that says so, and LangChain takes the first input for the prompt.
    assert schemas["Output"]["type"] == "array"
    assert "x-cog-array-type" not in schemas["Output"]
    inputs = sorted(schemas["Input"]["properties"].items(), key=lambda one: one[1]["x-order"])
    assert [name for name, _ in inputs][:-1] == sorted(
        PredictionInput.model_fields, key=[name for name, _ in inputs].index
    )
    assert inputs[0][0] == "prompt"
    assert schemas["Input"]["required"] == ["image", "mask"]
    assert schemas["Input"]["properties"]["width"]["enum"] == list(range(64, 1025, 64))


def test_the_model(make: Make, asked: dict[str, Any]) -> None:
    client = make()
    client.post("/predictions", json={"input": asked})
    held = client.get(f"/v1/models/{MODEL}").json()
    assert f"{held['owner']}/{held['name']}" == MODEL
    assert held["url"] == f"http://testserver/v1/models/{MODEL}"
    assert (held["run_count"], held["visibility"]) == (1, "private")
    assert held["latest_version"]["id"] == HandBatcher.version
    listed = client.get(f"/v1/models/{MODEL}/versions").json()
    assert [one["id"] for one in listed["results"]] == [HandBatcher.version]


def test_other_models_are_not_there(open_client: TestClient) -> None:
    for path in (
        "someone/else",
        f"{MODEL}/versions/{'0' * 64}",
        "someone/else/versions",
        "someone/else/versions/x",
    ):
        assert open_client.get(f"/v1/models/{path}").status_code == 404


def test_health(open_client: TestClient) -> None:
    assert open_client.get("/livez").json() == {"status": "ok"}
    assert open_client.get("/readyz").json() == {"status": "ok"}
    assert open_client.get("/health-check").json()["status"] == "READY"
    assert open_client.get("/health-check").json()["setup"]["status"] == "succeeded"


def test_a_server_that_stops_is_not_ready(make: Make, asked: dict[str, Any]) -> None:
    client = make()
    client.app.begin_stop()  # type: ignore[attr-defined]
    assert client.get("/livez").status_code == 200
    assert (client.get("/readyz").status_code, client.get("/readyz").json()["status"]) == (503, "stopping")
    assert client.get("/health-check").json()["status"] == "DEFUNCT"
    got = client.post("/v1/predictions", json={"input": asked})
    assert (got.status_code, got.headers["retry-after"]) == (503, "5")


def figure(text: str, name: str) -> float:
    (found,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found)


def test_figures(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client = make(by_itself=False)
    client.post("/v1/predictions", json={"input": asked | {"num_outputs": 3}})
    run = batcher.next()
    text = client.get("/metrics").text
    assert figure(text, "ritocco_queue_depth") == 1
    assert figure(text, "ritocco_predictions_running") == 0
    run.step(1, 2)
    run.step(2, 2)
    text = client.get("/metrics").text
    assert figure(text, "ritocco_queue_depth") == 0
    assert figure(text, "ritocco_predictions_running") == 1
    assert figure(text, "ritocco_lanes") == 3
    assert figure(text, "ritocco_step_seconds_count") == 1
    run.succeed()
    client.get(client.get(f"/v1/predictions/{run.id}").json()["urls"]["stream"])
    client.post("/v1/predictions", json={})
    text = client.get("/metrics").text
    assert figure(text, 'ritocco_predictions_ended_total{status="succeeded"}') == 1
    assert figure(text, 'ritocco_requests_refused_total{status="422"}') == 1
    assert figure(text, "ritocco_predictions_accepted_total") == 1
    assert figure(text, "process_resident_memory_bytes") > 0
    assert figure(text, 'ritocco_steps_total{pictures="4"}') == 1
    measured = 'ritocco_measured_step_seconds{engine="0",height="512",rows="2",width="768"}'
    assert figure(text, measured) == 0.25
    assert figure(text, 'ritocco_memory_bytes{engine="0",kind="peak"}') == 2**30
    assert figure(text, "ritocco_batch_fill") == 7 / 4
    assert figure(text, "ritocco_set_aside") == 2
    assert figure(text, "ritocco_healthy") == 1


def test_without_an_engine_it_is_not_ready(make: Make, batcher: HandBatcher) -> None:
    client = make()
    assert client.get("/readyz").status_code == 200
    batcher.healthy = False
    got = client.get("/readyz")
    assert (got.status_code, got.json()) == (503, {"status": "engine"})
    assert client.get("/health-check").json()["status"] == "DEFUNCT"
    assert client.get("/livez").status_code == 200
    assert figure(client.get("/metrics").text, "ritocco_healthy") == 0


def test_the_secret_of_webhooks(open_client: TestClient) -> None:
    key = open_client.get("/v1/webhooks/default/secret").json()["key"]
    assert key.startswith("whsec_")
    assert len(key.split("_")) == 2
