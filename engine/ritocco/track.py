"""What torch's allocator really handed out on a CPU, phase by phase: the truth for `memory.Rehearsal`."""

from __future__ import annotations

import json
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "ritocco phase "


class Tracker(AbstractContextManager["Tracker"]):
    """Inside, the allocator's events are recorded; outside again, `most` holds each phase's peak in bytes.

    Memory that was allocated before is not counted, nor is what torch does not ask its allocator for. It
    slows down what it looks at, and keeps all events until the end. From torch's profiler.
    """

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._phase: record_function | None = None

    def __enter__(self) -> Tracker:
        self._profile.start()
        return self

    def begin(self, phase: str) -> None:
        """What comes belongs to this phase; a name that comes again is the same phase."""
        self._end()
        self._phase = record_function(_MARK + phase)
        self._phase.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._profile.stop()
        if kind is None:
            self.most = self._peaks()

    def _end(self) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None

    def _peaks(self) -> dict[str, int]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(file))
            events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
        cpu = torch._C._autograd.DeviceType.CPU.value
        memory = [
            (float(one["ts"]), int(one["args"]["Total Allocated"]), int(one["args"]["Bytes"]))
            for one in events
            if one.get("name") == "[memory]"
            and one["args"]["Device Type"] == cpu
            and one["args"]["Total Allocated"]  # a mapped file's event has none
        ]
        memory.sort()
        before = memory[0][1] - memory[0][2] if memory else 0
        most: dict[str, int] = {}
        for one in events:
            name = str(one.get("name"))
            if not name.startswith(_MARK) or one.get("ph") != "X":
                continue
            phase, start = name.removeprefix(_MARK), float(one["ts"])
            end = start + float(one["dur"])
            standing = [total for at, total, _ in memory if at < start][-1:]
            inside = [total for at, total, _ in memory if start <= at <= end]
            most[phase] = max([most.get(phase, 0), *(total - before for total in (*standing, *inside))])
        return most
