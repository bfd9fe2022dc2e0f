"""A batcher in the test's hand: runs wait for `step`, `succeed` and `fail`, or end by themselves."""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from starlette.testclient import TestClient

from ritocco.batcher import Snapshot
from ritocco.errors import BusyError
from ritocco.images import data_uri
from ritocco.prediction import Prediction, timestamp
from ritocco.schema import parse_input

Make = Callable[..., TestClient]
"""Makes a client of an app with these settings; `by_itself` as of HandBatcher."""


def picture(shade: int) -> str:
    """A data URI of 8 x 8 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(file, "PNG")
    return data_uri(file.getvalue())


class Run:
    """A ticket in the test's hand."""

    def __init__(self, input: Mapping[str, Any], id: str, on_start: Any, on_step: Any) -> None:
        self.id, self.input, self.on_start, self.on_step = id, input, on_start, on_step
        self.prediction = Prediction(id=id)
        self.canceled = False
        self.preview: Any = None
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Any], object]] = []
        self._lock = threading.Lock()

    def begin(self) -> None:
        """As the batcher does before a device works on it."""
        if self.on_start() is False:
            self.cancel()
            return
        self.prediction.status, self.prediction.started_at = "processing", timestamp()
        self.prediction.logs = "Using seed: 7\n"

    def step(self, done: int, total: int) -> None:
        """As the batcher does after a step."""
        if self.prediction.status == "starting":
            self.begin()
        if self._done.is_set():
            return
        percent = 100 * done // total
        self.prediction.logs += f"{percent:3d}%|{'█' * done}| {done}/{total} [00:00<00:00,  9.90it/s]\n"
        self.on_step(done, total)

    def succeed(self, outputs: int = 1) -> None:
        """Some pictures."""
        self.prediction.output = [picture(40 * i) for i in range(outputs)]
        self.prediction.metrics = {"predict_time": 0.5}
        self._end("succeeded")

    def fail(self, error: BaseException | str) -> None:
        """A prediction that failed, or an exception from `result`."""
        if isinstance(error, BaseException):
            self._error = error
        else:
            self.prediction.error = error
        self._end("failed")

    def cancel(self) -> None:
        self.canceled = True
        if not self._done.is_set():
            self._end("canceled")

    def result(self, timeout: float | None = None) -> Prediction:
        if not self._done.wait(timeout):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self.prediction

    def look(self) -> Any:
        """What the test put there."""
        return self.preview

    def done(self) -> bool:
        return self._done.is_set()

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(fn)
                return
        fn(self)

    def _end(self, status: Any) -> None:
        self.prediction.status, self.prediction.completed_at = status, timestamp()
        with self._lock:
            self._done.set()
        for fn in self._callbacks:
            fn(self)


class HandBatcher:
    """runs: those submitted. by_itself: whether they end without the test. busy: how many to refuse."""

    version = "c" * 64

    def __init__(self, *, by_itself: bool = True) -> None:
        self.by_itself = by_itself
        self.busy = 0
        self.healthy = True
        self.lost = False
        self.runs: queue.Queue[Run] = queue.Queue()
        self.seen: list[Run] = []

    def submit(
        self, input: Any, *, on_start: Any, on_step: Any, id: str, created_at: str, allow_local: bool
    ) -> Run:
        assert not allow_local
        parse_input(input, allow_local=False)
        if self.busy:
            self.busy -= 1
            raise BusyError("full", retry_after=0.01)
        run = Run(input, id, on_start, on_step)
        self.seen.append(run)
        self.runs.put(run)
        if self.by_itself:
            threading.Thread(target=self._run, args=(run,), daemon=True).start()
        return run

    def snapshot(self) -> Snapshot:
        """Three steps of one picture, one of four."""
        return Snapshot(
            waiting=0,
            set_aside=2,
            running=0,
            lanes=0,
            steps={1: 3, 4: 1},
            step_seconds=[{(768, 512, 2): 0.25}],
            outcomes={},
            healthy=self.healthy,
            engines=int(self.healthy),
            memory=[{"peak": 2**30}],
        )

    def next(self) -> Run:
        """The next that was submitted, waited for."""
        return self.runs.get(timeout=30)

    def close(self, **_: Any) -> None:
        """Nothing to do."""

    def _run(self, run: Run) -> None:
        for done in (1, 2):
            run.step(done, 2)
        if not run.done():
            run.succeed(int(run.input.get("num_outputs") or 1))
