"""A runtime on a virtual clock that a test lets go on turn by turn, so that nothing depends on real time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

import numpy as np

from ritocco.backends.network import NetworkBatch
from ritocco.backends.runtime import Floats, LatentSize, Tokens, Traits
from ritocco.pixels import Kept, Mask, Pixels

PATIENCE = 60.0  # seconds after which a test has gone wrong


class VirtualRuntime:
    """See `Runtime`. Every network takes virtual seconds, and leave of the test where it is held.

    now: the clock. done: what was computed: ("start", -1), ("step", seeds of the lanes), ("finish", -1).
    seconds: of a start, of a finish for each picture; step_seconds: of a step, from latent cells and rows.
    fails: raises what it likes; it is given what is about to be computed.
    """

    def __init__(
        self,
        *,
        step_seconds: Callable[[int, int], float] = lambda cells, rows: 1.0 * rows,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        self.traits = Traits(device="virtual", dtype="float32", lane_timesteps=True, size_multiple=1)
        self.now = 0.0
        self.done: list[tuple[str, tuple[int, ...]]] = []
        self.reached: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.step_seconds, self.seconds = step_seconds, seconds or {"start": 0.0, "finish": 0.0}
        self.fails: Callable[[str, tuple[int, ...]], None] = lambda what, seeds: None
        self.open_capacities: list[int] = []
        self._leave = threading.Semaphore(0)
        self._held = False

    def hold(self) -> None:
        """From now on everything waits for `let`, or `let_all`."""
        self._held = True

    def let(self, count: int = 1) -> None:
        """Let so many networks run."""
        self._leave.release(count)

    def let_all(self) -> None:
        """Let all of them run."""
        self._held = False
        self._leave.release(10**6)

    def arrive(self) -> str:
        """Wait until a network waits for leave, or begins where it needs none: its name."""
        return self.reached.get(timeout=PATIENCE)

    def passes(self, what: str, seeds: tuple[int, ...], seconds: float) -> None:
        """What every network does."""
        held = self._held
        self.reached.put(what)
        if held and not self._leave.acquire(timeout=PATIENCE):
            raise TimeoutError("the test let nobody go on")
        self.fails(what, seeds)
        self.now += seconds
        self.done.append((what, seeds))

    def steps(self) -> list[tuple[int, ...]]:
        """Seeds of the lanes of each step."""
        return [seeds for what, seeds in self.done if what == "step"]

    def encode_text(self, tokens: Tokens) -> Floats:
        """See `Runtime`."""
        self.passes("start", (), self.seconds["start"])
        return np.zeros((len(tokens), 77, 4), np.float32)

    def encode_image(self, pixels: Floats) -> Floats:
        """See `Runtime`."""
        count, _, height, width = pixels.shape
        return np.zeros((count, 4, height // 8, width // 8), np.float32)

    def encode_pixels(self, pixels: Pixels, mask: Mask | None) -> Floats:
        """See `Runtime`."""
        height, width, _ = pixels.shape
        return np.zeros((1, 4, height // 8, width // 8), np.float32)

    def decode(self, latents: Floats) -> Floats:
        """See `Runtime`."""
        count, _, height, width = latents.shape
        return np.zeros((count, 3, 8 * height, 8 * width), np.float32)

    def decode_pixels(self, latents: Floats, kept: Kept | None) -> Pixels:
        """See `Runtime`. The first latent's bytes are in the picture, so that pictures can be compared."""
        self.passes("finish", (), self.seconds["finish"] * len(latents))
        count, _, height, width = latents.shape
        pixels = np.zeros((count, 8 * height, 8 * width, 3), np.uint8)
        pixels[:, :height, : 4 * width, 0] = np.ascontiguousarray(latents[:, 0]).view(np.uint8)
        return pixels

    def open(self, size: LatentSize, capacity: int) -> VirtualBatch:
        """See `Runtime`."""
        self.open_capacities.append(capacity)
        return VirtualBatch(self, size, capacity)


class VirtualBatch(NetworkBatch):
    """See `Batch`."""

    def __init__(self, runtime: VirtualRuntime, size: LatentSize, capacity: int) -> None:
        super().__init__(lambda sample, timestep, context: 0.1 * sample[:, :4], capacity=capacity)
        self._runtime, self._cells = runtime, size.height * size.width

    def step(self, rows: Mapping[int, int]) -> None:
        """See `Batch`."""
        count = sum(1 if self._lanes[slot].unconditional is None else 2 for slot in rows)
        seeds = tuple(sorted(self._lanes[slot].seed for slot in rows))
        self._runtime.passes("step", seeds, self._runtime.step_seconds(self._cells, count))
        super().step(rows)
