"""Paint the pictures of a folder through a Batcher: pictures of one size share its steps.

Each is looked at, painted, written and entered in the manifest by one of a few threads, so only what those
hold is in memory, and only what they hold is painted again after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ritocco.batcher import Batcher
from ritocco.disk import write_whole
from ritocco.errors import BusyError, RitoccoError
from ritocco.folders.pairs import Bad, Pair
from ritocco.prediction import Prediction, timestamp
from ritocco.shown import said
from ritocco.sources import decode_data_uri
from ritocco.tickets import Ticket

THREADS = 16
"""Pictures in hand: two batches of the default capacity, so that the next is ready when one ends."""
_SEEDS = 1 << 32


@dataclass(kw_only=True, slots=True)
class Counts:
    """How a run went. skipped: done before. bad: what failed, and why."""

    painted: int = 0
    skipped: int = 0
    bad: list[Bad] = field(default_factory=list)

    @property
    def ended(self) -> int:
        """In all."""
        return self.painted + self.skipped + len(self.bad)


class Entries(Protocol):
    """See `Manifest`, whose members these are."""

    def done(self, name: str, key: str) -> bool: ...

    def append(self, line: dict[str, Any]) -> None: ...


def output_names(pair: Pair, output_format: str) -> list[str]:
    """Of a picture's files: its stem, with a number where it has several."""
    count = int(pair.given.get("num_outputs") or 1)
    numbers = [""] if count == 1 else [f"-{place}" for place in range(count)]
    return [f"{pair.name}{number}.{output_format}" for number in numbers]


def failed_line(bad: Bad) -> dict[str, Any]:
    """Of the manifest, for what was not painted."""
    line = {"name": bad.name, "image": bad.image.name, "status": "failed", "outputs": [], "error": bad.error}
    return line | {"seconds": 0.0, "completed_at": timestamp()}


class FolderRun:
    """One pass over a folder. `stop` may be called from any thread, and from a signal's handler."""

    def __init__(
        self,
        batcher: Batcher,
        out: Path,
        manifest: Entries,
        *,
        options: dict[str, Any],
        told: Callable[[Counts], None] = lambda counts: None,
    ) -> None:
        """options: ours, as of `Engine.predict`. told: called after each picture, by one thread at a time."""
        self._batcher, self._out, self._manifest = batcher, out, manifest
        self._options, self._told = options, told
        self._counts = Counts()
        self._lock = threading.Lock()
        self._feeding = threading.Lock()
        self._stopped = threading.Event()
        self._error: Exception | None = None
        self._tickets: set[Ticket] = set()

    def stop(self) -> None:
        """Begin nothing more; what is being painted is dropped between two steps."""
        self._stopped.set()
        for ticket in list(self._tickets):
            ticket.cancel()

    def run(self, pairs: Sequence[Pair], bad: Sequence[Bad] = ()) -> Counts:
        """Paint them in this order, and enter those that can't be.

        Raises OSError where nothing can be written any more, RitoccoError where the batcher takes nothing.
        """
        for one in bad:
            self._failed({}, one)
        feed = iter(pairs)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="ritocco-folder") as pool:
            try:
                for work in [pool.submit(self._work, feed) for _ in range(THREADS)]:
                    work.result()
            except BaseException:  # an interruption, which only the main thread hears of
                self.stop()
                raise
        if self._error is not None:
            raise self._error
        return self._counts

    def _work(self, feed: Iterator[Pair]) -> None:
        while not self._stopped.is_set():
            with self._feeding:
                pair = next(feed, None)
            if pair is None:
                return
            try:
                self._one(pair)
            except Exception as error:
                self._error = self._error or error
                self.stop()

    def _one(self, pair: Pair) -> None:
        begun = time.perf_counter()
        given = {**pair.given}
        if given.get("seed") is None:  # ours to choose, so that it can be told
            given["seed"] = secrets.randbelow(_SEEDS)
        line: dict[str, Any] = {"name": pair.name, "image": pair.image.name, "mask": pair.mask.name}
        line |= {"input": given, "options": self._options, "version": self._batcher.version}
        try:
            line["key"] = self._key(pair)
            if self._manifest.done(pair.name, line["key"]):
                self._count(skipped=1)
                return
            prediction = self._painted(pair, given)
        except OSError as error:
            self._failed(line, Bad.of(pair, f"{error.strerror or error}: {str(error.filename)!r}"))
            return
        except Exception as error:
            if not self._batcher.healthy:
                raise
            ours = isinstance(error, RitoccoError)
            why = str(error) if ours else f"{type(error).__name__}: {said(error)}"
            self._failed(line, Bad.of(pair, why))
            return
        if prediction.status == "canceled":
            return
        outputs = self._written(pair, prediction)
        if prediction.status != "succeeded":
            self._failed(line, Bad.of(pair, prediction.error or prediction.status))
            return
        line |= {"status": "succeeded", "outputs": outputs, "error": prediction.error}
        self._enter(line, begun)
        self._count(painted=1)

    def _key(self, pair: Pair) -> str:
        """Of everything that a picture is made from."""
        made = {"given": pair.given, "options": self._options, "version": self._batcher.version}
        digest = hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode())
        for file in (pair.image, pair.mask):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def _painted(self, pair: Pair, given: dict[str, Any]) -> Prediction:
        ticket = self._submitted({"image": pair.image, "mask": pair.mask, **given})
        self._tickets.add(ticket)
        try:
            if self._stopped.is_set():
                ticket.cancel()
            return ticket.result()
        finally:
            self._tickets.discard(ticket)

    def _submitted(self, asked: dict[str, Any]) -> Ticket:
        while True:
            try:
                return self._batcher.submit(asked, **self._options)
            except BusyError as busy:
                self._stopped.wait(busy.retry_after)

    def _written(self, pair: Pair, prediction: Prediction) -> list[str]:
        """Names of its files; where one was flagged, fewer than were asked for."""
        made = [decode_data_uri(uri)[1] for uri in prediction.output or ()]
        names = output_names(pair, self._options.get("output_format") or "png")[: len(made)]
        for name, data in zip(names, made, strict=True):
            write_whole(self._out / name, data)
        return names

    def _failed(self, line: dict[str, Any], bad: Bad) -> None:
        self._enter(line | failed_line(bad), time.perf_counter())
        self._count(bad=bad)

    def _enter(self, line: dict[str, Any], begun: float) -> None:
        line |= {"seconds": round(time.perf_counter() - begun, 3), "completed_at": timestamp()}
        with self._lock:
            self._manifest.append(line)

    def _count(self, *, painted: int = 0, skipped: int = 0, bad: Bad | None = None) -> None:
        with self._lock:
            self._counts.painted += painted
            self._counts.skipped += skipped
            if bad is not None:
                self._counts.bad.append(bad)
            self._told(self._counts)
