"""Painters elsewhere behind the members of a Batcher: the same answers, and what is left when one is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hand_batcher import picture
from local_painters import LocalPainters
from ritocco import Batcher, DeviceLostError, Engine, RequestError, TimeLimitError
from ritocco.checkpoint import load_tokenizer, open_checkpoint
from ritocco.loading import pocket_model
from ritocco.prediction import Prediction
from ritocco.scale.painter import refusal
from ritocco.scale.remote import ATTEMPTS, BROKEN, RemoteBatcher, error_of
from ritocco.schema import parse_input
from ritocco.server import Settings, create_app
from ritocco.server.database import StorageError
from ritocco.server.store import INTERRUPTED
from virtual_runtime import PATIENCE, VirtualRuntime

STEPS = 3
ASKED = {
    "prompt": "a cat",
    "image": picture(0),
    "mask": picture(255),
    "width": 128,
    "height": 64,
    "num_inference_steps": STEPS,
    "scheduler": "K_EULER",
    "seed": 7,
}


@pytest.fixture
def runtime() -> VirtualRuntime:
    return VirtualRuntime()


@pytest.fixture(scope="module")
def engine_on() -> Callable[[VirtualRuntime], Engine]:
    opened = open_checkpoint(pocket_model())
    return lambda runtime: Engine(runtime, load_tokenizer(opened), opened.scheduler)


@pytest.fixture
def painters(
    runtime: VirtualRuntime, engine_on: Callable[[VirtualRuntime], Engine]
) -> Iterator[LocalPainters]:
    made = LocalPainters(Batcher(engine_on(runtime), clock=lambda: runtime.now, time_limit=1000.0))
    yield made
    runtime.let_all()
    made.close()


@pytest.fixture
def remote(painters: LocalPainters) -> RemoteBatcher:
    return RemoteBatcher(painters, painters.painter.version)


def test_the_answer_is_the_batchers(
    remote: RemoteBatcher, painters: LocalPainters, engine_on: Callable[[VirtualRuntime], Engine]
) -> None:
    engine = engine_on(VirtualRuntime())
    alone, told = engine.predict(ASKED, allow_local=False), []
    ticket = remote.submit(
        ASKED,
        id="x",
        created_at="2026-01-01T00:00:00.000Z",
        on_step=lambda done, total: told.append((done, total)),
        allow_local=False,
    )
    prediction = ticket.result(PATIENCE)
    assert (prediction.status, prediction.output) == ("succeeded", alone.output)
    assert (prediction.id, prediction.version) == ("x", engine.version)
    assert prediction.created_at == "2026-01-01T00:00:00.000Z"
    assert prediction.started_at is not None
    assert prediction.metrics.keys() == alone.metrics.keys() | {"waited"}
    assert prediction.logs.count("it/s") == STEPS
    assert told[-1] == (STEPS, STEPS)
    assert painters.sizes == ["128x64"]


def test_what_is_wrong_is_said_as_over_there(remote: RemoteBatcher) -> None:
    ticket = remote.submit(ASKED | {"image": "data:image/png;base64,AAAA"}, allow_local=False)
    with pytest.raises(RequestError, match="image") as caught:
        ticket.result(PATIENCE)
    assert caught.value.field == "input.image"
    assert ticket.prediction.status == "failed"
    with pytest.raises(RequestError, match="width"):
        remote.submit(ASKED | {"width": 100}, allow_local=False)


@pytest.mark.parametrize(
    "error",
    [
        RequestError("a", field="input.seed"),
        TimeLimitError("late"),
        DeviceLostError("gone"),
    ],
)
def test_errors_cross_over(error: Exception) -> None:
    again = error_of(refusal(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_errors_of_others_stay_there() -> None:
    assert type(error_of(refusal(ZeroDivisionError("a secret")))) is RuntimeError
    try:
        parse_input({}, allow_local=False)
    except RequestError as error:
        again = error_of(refusal(error))
    assert type(again) is RequestError


def test_a_painter_that_is_gone_before_it_began_is_replaced(
    remote: RemoteBatcher, painters: LocalPainters
) -> None:
    painters.refuses = ATTEMPTS - 1
    assert remote.submit(ASKED, allow_local=False).result(PATIENCE).status == "succeeded"
    assert len(painters.sizes) == ATTEMPTS
    assert remote.healthy


def test_one_that_no_painter_outlives_ends(remote: RemoteBatcher, painters: LocalPainters) -> None:
    painters.refuses = BROKEN
    with pytest.raises(DeviceLostError, match="gone"):
        remote.submit(ASKED, allow_local=False).result(PATIENCE)
    assert not remote.healthy
    assert remote.submit(ASKED, allow_local=False).result(PATIENCE).status == "succeeded"
    assert remote.healthy
    assert remote.snapshot().outcomes == {"failed": 1, "succeeded": 1}


def test_one_painter_that_takes_many_with_it_is_one(remote: RemoteBatcher) -> None:
    asked_at = time.monotonic()
    for _ in range(BROKEN + 1):
        remote._heard(asked_at, gone=True)
    assert remote.healthy


def test_what_had_begun_has_failed(
    remote: RemoteBatcher, painters: LocalPainters, runtime: VirtualRuntime
) -> None:
    runtime.hold()
    begun = threading.Event()
    ticket = remote.submit(ASKED, on_start=begun.set, allow_local=False)
    assert begun.wait(PATIENCE)
    assert remote.snapshot().running == 1
    painters.streams[0].lose()
    with pytest.raises(DeviceLostError):
        ticket.result(PATIENCE)
    assert ticket.prediction.started_at is not None
    assert len(painters.streams) == 1, "nothing is done twice"


def test_cancelled_while_it_runs(
    remote: RemoteBatcher,
    painters: LocalPainters,
    runtime: VirtualRuntime,
    engine_on: Callable[[VirtualRuntime], Engine],
) -> None:
    here = VirtualRuntime()
    with Batcher(engine_on(here)) as batcher:
        local = canceled_after_a_step(batcher, here)
    prediction = canceled_after_a_step(remote, runtime)
    assert (prediction.status, local.status) == ("canceled", "canceled")
    assert prediction.logs.splitlines()[-1] == f"Canceled after 1 of {STEPS} steps"
    assert prediction.logs.splitlines()[-1] == local.logs.splitlines()[-1]
    assert prediction.logs.count("it/s") == 1
    assert len(prediction.logs.splitlines()) == len(local.logs.splitlines())
    assert prediction.metrics.keys() == local.metrics.keys()
    assert prediction.metrics["predict_time"] > 0
    second = remote.submit(ASKED | {"seed": 8}, allow_local=False)
    assert second.result(PATIENCE).status == "succeeded"
    assert painters.batcher.snapshot().outcomes["canceled"] == 1


def canceled_after_a_step(batcher: Batcher | RemoteBatcher, runtime: VirtualRuntime) -> Prediction:
    """A device that is held after the first step."""
    runtime.hold()
    ticket = batcher.submit(ASKED, on_step=lambda done, total: False, allow_local=False)
    runtime.let(2)  # the start, and a step
    prediction = ticket.result(PATIENCE)
    runtime.let_all()
    return prediction


def test_cancelled_before_the_first_step_it_leaves_as_much(
    remote: RemoteBatcher, runtime: VirtualRuntime
) -> None:
    runtime.hold()
    begun = threading.Event()
    ticket = remote.submit(ASKED, on_start=begun.set, allow_local=False)
    assert begun.wait(PATIENCE)
    ticket.cancel()
    prediction = ticket.result(PATIENCE)
    assert prediction.logs.splitlines()[-1] == f"Canceled after 0 of {STEPS} steps"
    assert prediction.metrics.keys() >= {"inputs", "predict_time"}


def test_cancelled_before_anybody_was_asked(remote: RemoteBatcher, painters: LocalPainters) -> None:
    held = threading.Event()
    asks = painters.__call__

    class Slow:
        def __call__(self, *args: Any, **options: Any) -> Any:
            assert held.wait(PATIENCE)
            return asks(*args, **options)

    slow = RemoteBatcher(Slow(), remote.version)
    ticket = slow.submit(ASKED, allow_local=False)
    canceling = threading.Thread(target=ticket.cancel)
    canceling.start()
    held.set()
    prediction = ticket.result(PATIENCE)
    assert (prediction.status, prediction.logs) == ("canceled", "Canceled after 0 steps\n")
    assert prediction.metrics.keys() == {"predict_time"}
    canceling.join(PATIENCE)


def test_who_is_not_wanted_any_more_is_not_painted(
    remote: RemoteBatcher, painters: LocalPainters, runtime: VirtualRuntime
) -> None:
    runtime.hold()
    ticket = remote.submit(ASKED, on_start=lambda: False, allow_local=False)
    assert ticket.result(PATIENCE).status == "canceled"
    runtime.let_all()
    assert remote.submit(ASKED, allow_local=False).result(PATIENCE).status == "succeeded"
    assert painters.batcher.snapshot().outcomes == {"canceled": 1, "succeeded": 1}


def test_a_store_that_fails_is_the_end_of_it_on_both_sides(
    remote: RemoteBatcher, painters: LocalPainters, runtime: VirtualRuntime
) -> None:
    def refuse() -> bool:
        raise StorageError("the disk is full")

    runtime.hold()
    with pytest.raises(StorageError, match="full"):
        remote.submit(ASKED, on_start=refuse, allow_local=False).result(PATIENCE)
    runtime.let_all()
    assert remote.submit(ASKED, allow_local=False).result(PATIENCE).status == "succeeded"
    assert painters.batcher.snapshot().outcomes == {"canceled": 1, "succeeded": 1}


def test_the_server_on_painters_elsewhere(
    remote: RemoteBatcher, painters: LocalPainters, runtime: VirtualRuntime, tmp_path: Path
) -> None:
    app = create_app(remote, Settings(data=tmp_path, grace_s=0.0))
    client = TestClient(app)
    try:
        done = client.post("/v1/predictions", json={"input": ASKED}, headers={"Prefer": "wait"}).json()
        assert done["status"] == "succeeded"
        assert len(done["output"]) == 1
        runtime.hold()
        made = client.post("/v1/predictions", json={"input": ASKED}).json()
        stream = made["urls"]["stream"]
        while client.get(f"/v1/predictions/{made['id']}").json()["status"] != "processing":
            assert runtime.arrive()
        painters.streams[-1].lose()
        assert "event: error" in client.get(stream).text
        assert client.get(f"/v1/predictions/{made['id']}").json()["error"] == INTERRUPTED
        assert client.get("/readyz").status_code == 200
        assert "ritocco_queue_depth 0.0" in client.get("/metrics").text
    finally:
        runtime.let_all()
        app.close()
