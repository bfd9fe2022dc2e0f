"""How much memory a request will take on the torch runtime: weights, and the most of each phase.

The runtime's own code runs, on tensors without numbers: what it holds at which moment is not written down a
second time. A GPU's part runs on a CPU too, its fused kernels without their work.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ritocco.backends.fast_path import FastPath
from ritocco.backends.runtime import Floats, Lane, LatentSize
from ritocco.backends.torch_ import TorchRuntime
from ritocco.checkpoint import REQUIRED, Checkpoint
from ritocco.live_memory import ON_CPU, ON_CUDA, Live
from ritocco.parameters import MemoryTensor, Stored
from ritocco.safety import SafetyChecker
from ritocco.schedules import StepTable, build
from ritocco_kernels.hollow import HOLLOW
from ritocco_kernels.ops import Ops

PHASES = ("load", "text", "encode", "denoise", "decode")
"""Where a safety checker judges the results, `safety` follows."""
_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What oneDNN keeps: 60 to 90 KiB were seen; cuBLAS and cuDNN on an H200: 32 to 54 MiB, rounding included.
_STANDING_BYTES = {"cpu": 96 << 10, "cuda": 56 << 20}
_WORKSPACES = {"cpu": ON_CPU, "cuda": ON_CUDA}
_STEPS = 2  # the second finds the first one's results


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """most: bytes at once, weights that lie in memory by then included. moment: the operation it is in.
    course: bytes that each operation reached, in their order, where that was asked for.
    """

    most: int
    moment: str
    course: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Bytes. weights: of each network, as the device holds them. phases: of `PHASES`, in their order.

    A weight that is used straight from its mapped file is among `weights`, and not in any phase. `load` is of
    what comes before the request; the other phases are of a request that follows an equal one, which bounds
    the first: by then every weight has come that stays.
    """

    weights: Mapping[str, int]
    phases: Mapping[str, Phase]

    @property
    def peak(self) -> tuple[str, Phase]:
        """The phase that takes most."""
        return max(self.phases.items(), key=lambda item: item[1].most)


class Rehearsal:
    """The torch runtime on tensors without numbers: requests take no memory, and almost no time."""

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: str = "cpu", movable: bool = False
    ) -> None:
        """Load; no weight is read. device: `cpu`, or `cuda`, which is rehearsed with fused kernels, packed
        projections and no graphs; bfloat16 is as oneDNN computes it (see `device.onednn_bfloat16`). movable:
        see `TorchRuntime`; a safety checker stays.
        """
        self._live = Live(_WORKSPACES[device])
        self._standing, self._shared = _STANDING_BYTES[device], device == "cpu"
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        path = None if device == "cpu" else _HollowPath(kernels=True, packed=True, graphs=False, search=False)
        with self._mode, torch.inference_mode():
            # What goes to a GPU is a copy whatever its dtype: none is stored in float64.
            stored = None if device == "cpu" else torch.float64
            hollow = replace(checkpoint, weights=_without_numbers(checkpoint, self._live, stored))
            self._live.course = []
            with self._live:
                self._runtime = TorchRuntime(
                    hollow, device=torch.device("cpu"), dtype=dtype, path=path, movable=movable
                )
                self._checker: SafetyChecker | None = None
                if checkpoint.safety_checker is not None:
                    self._checker = SafetyChecker.load(hollow, device="cpu", dtype=dtype)
                self._loading = self._taken()
                if not movable:
                    self._runtime._bring_decoder()
        self._coming: dict[frozenset[str], Phase] = {}  # of networks that stay, by who does not
        networks: dict[str, nn.Module] = {name: getattr(self._runtime, name) for name in REQUIRED}
        if self._checker is not None:
            networks["safety_checker"] = self._checker.network
        self.weights = {
            name: dtype.itemsize * sum(one.numel() for one in network.parameters())
            for name, network in networks.items()
        }

    def usage(
        self,
        *,
        height: int,
        width: int,
        num_outputs: int = 1,
        guided: bool = True,
        num_inference_steps: int = 50,
        scheduler: str = "DPMSolverMultistep",
        checked: bool = True,
        at_once: int | None = None,
        leaving: Collection[str] = (),
        course: bool = False,
    ) -> Usage:
        """What a request takes. height, width: pixels. guided: whether guidance is over 1, which takes two
        rows of the UNet a picture. checked: by the safety checker, where there is one. at_once, leaving: of a
        movable runtime, see `TorchRuntime.follow`. course: keep what every operation reaches. Any number of
        steps up to 1000 will do, whatever the checkpoint's schedule takes.
        """
        live, runtime = self._live, self._runtime
        size = LatentSize(height=height // 8, width=width // 8)
        table = _table(scheduler, num_inference_steps)
        with self._mode, torch.inference_mode(), live:
            load = self._loading if at_once is None else self._settled(size, at_once, leaving)
            found = {"load": load if course else replace(load, course=())}
            live.course = [] if course else None
            live.begin()
            runtime.need("text_encoder")
            tokens = torch.zeros(1 + guided, runtime.text_encoder.spec.positions, dtype=torch.int64)
            context = runtime._encode_text(tokens).float()
            found["text"] = self._taken()
            runtime.need("vae")
            encoded = _encoded(runtime, height, width)
            found["encode"] = self._taken()
            states = _denoise(runtime, size, _lanes(runtime, size, table, guided, num_outputs))
            if not self._shared:
                states.clear()
            found["denoise"] = self._taken()
            runtime.need("vae")
            latents = np.zeros((runtime.unet.spec.out_channels, size.height, size.width), np.float32)
            made = _pictures(runtime, latents, num_outputs)
            found["decode"] = self._taken()
            del made, states, context, encoded  # all of them to the end
            if checked and self._checker is not None:
                self._live.begin()
                side = self._checker.side
                self._checker.embeds(np.zeros((num_outputs, 3, side, side), np.float32))
                found["safety"] = self._taken()
        return Usage(weights=self.weights, phases=found)

    def together(
        self, *, height: int, width: int, lanes: int, rows: int, leaving: Collection[str] = ()
    ) -> Phase:
        """What steps take that so many lanes share, guided, each of another request; of a movable runtime.
        One of them gives its place to another on the way. rows: of each lane's table.
        """
        runtime, live = self._runtime, self._live
        size = LatentSize(height=height // 8, width=width // 8)
        # With noise in every row.
        table = _table("K_EULER_ANCESTRAL", rows)
        with self._mode, torch.inference_mode(), live:
            self._settled(size, lanes, leaving)
            live.begin()
            # Nothing is shared but what is the same object.
            alike = [_lanes(runtime, size, replace(table), True, 1)[0] for _ in range(lanes + 1)]
            on_host = [_as_computed(lane) for lane in alike] if self._shared else []
            batch = runtime.open(size, lanes)
            for slot, lane in enumerate(alike[:-1]):
                batch.join(slot, lane)
            batch.step(dict.fromkeys(range(lanes), 0))
            batch._scatter()
            batch._seats.pop(0)
            batch.join(0, alike[-1])
            batch.step(dict.fromkeys(range(lanes), 1))
            batch._scatter()
            taken = self._taken()
            del batch, on_host
        return taken

    def _settled(self, size: LatentSize, at_once: int, leaving: Collection[str]) -> Phase:
        """Networks are where an equal request leaves them; returns what their coming took."""
        runtime, who = self._runtime, frozenset(leaving)
        if who not in self._coming:
            runtime.follow(size, at_once=at_once, leaving=REQUIRED)
            runtime.need("vae")
            self._live.course = []
            self._live.begin()
            runtime.follow(size, at_once=at_once, leaving=leaving)
            self._coming[who] = self._taken()
        self._live.course = None
        runtime.follow(size, at_once=at_once, leaving=leaving)
        runtime.need("vae")
        return self._coming[who]

    def _taken(self) -> Phase:
        """Of the phase that ends here; the next one begins."""
        live = self._live
        course: tuple[int, ...] = ()
        if live.course is not None:
            course = tuple(one + self._standing for one in live.course)
            live.course = []
        phase = Phase(most=live.most + self._standing, moment=live.moment, course=course)
        live.begin()
        return phase


class _HollowPath(FastPath):
    """A GPU's fast path without its kernels."""

    def ops(self) -> Ops:
        return HOLLOW


def _table(scheduler: str, steps: int) -> StepTable:
    """By diffusers' defaults: memory knows of a schedule how many rows it has, and which draw noise."""
    return build(scheduler, steps, {})


def _encoded(runtime: TorchRuntime, height: int, width: int) -> Tensor:
    """The latents of a picture. On a GPU it comes as bytes, and so does the mask, which stays meanwhile."""
    if not runtime.path.kernels:
        return runtime._encode_mean(runtime._image(np.zeros((3, height, width), np.float32))).float()
    mask = torch.empty(1, height, width, dtype=torch.bool)
    pixels = torch.empty(1, height, width, 3, dtype=torch.uint8)
    model = torch.empty(1, 3, height, width, dtype=runtime.dtype, memory_format=torch.channels_last)
    del pixels
    latents = runtime._encode_mean(model).float()
    del mask
    return latents


def _pictures(runtime: TorchRuntime, latents: Floats, count: int) -> list[Tensor]:
    """They stay as they were decoded until all are; on a GPU as bytes, beside those of picture and mask."""
    if not runtime.path.kernels:
        return [runtime._decoded(latents).float() for _ in range(count)]
    height, width = (8 * one for one in latents.shape[1:])
    kept = [torch.empty(height, width, 3, dtype=torch.uint8), torch.empty(height, width, dtype=torch.bool)]
    made: list[Tensor] = []
    for _ in range(count):
        decoded = runtime._decoded(latents)
        made += [torch.empty(height, width, 3, dtype=torch.uint8), torch.empty(1, dtype=torch.int32)]
        del decoded
    del kept
    return made


def _denoise(runtime: TorchRuntime, size: LatentSize, lanes: Sequence[Lane]) -> list[tuple[Tensor, Tensor]]:
    """Latents and history of each lane: on a CPU they share memory with what the host gets of them, and a
    batcher keeps both until the pictures are decoded.
    """
    batch = runtime.open(size, len(lanes))
    for slot, lane in enumerate(lanes):
        batch.join(slot, lane)
    for row in range(min(_STEPS, len(lanes[0].table))):
        batch.step(dict.fromkeys(range(len(lanes)), row))
    batch._scatter()
    return [(seat.latents, seat.history) for seat in batch._seats.values()]


def _as_computed(lane: Lane) -> list[Tensor]:
    """What a CPU's memory holds of a lane besides its seat, as its request left it there."""
    arrays = (lane.context, lane.unconditional, lane.condition)
    return [torch.empty(one.shape) for one in arrays if one is not None]


def _lanes(runtime: TorchRuntime, size: LatentSize, table: StepTable, guided: bool, count: int) -> list[Lane]:
    """As the engine makes them of one request."""
    spec = runtime.unet.spec
    cells = (size.height, size.width)
    context = np.zeros((runtime.text_encoder.spec.positions, spec.context_dim), np.float32)
    condition = np.zeros((spec.in_channels - spec.out_channels, *cells), np.float32)
    unconditional = np.zeros_like(context) if guided else None
    return [
        Lane(
            table=table,
            seed=seed,
            guidance=7.5 if guided else 1.0,
            latents=np.zeros((spec.out_channels, *cells), np.float32),
            context=context,
            unconditional=unconditional,
            condition=condition,
        )
        for seed in range(count)
    ]


def _without_numbers(
    checkpoint: Checkpoint, live: Live, dtype: torch.dtype | None
) -> Mapping[str, Mapping[str, Mapping[str, Stored]]]:
    """The checkpoint's weights as tensors of the stored shapes, and dtypes where none is named; made inside a
    FakeTensorMode.
    """

    def hollow(stored: Stored) -> Stored:
        tensor = torch.empty(stored.shape, dtype=dtype or _TORCH_DTYPES.get(stored.dtype, torch.float32))
        live.leave_out(tensor)
        return MemoryTensor(stored.key, stored.dtype, stored.shape, tensor)

    return {
        network: {
            variant: {name: hollow(one) for name, one in tensors.items()}
            for variant, tensors in variants.items()
        }
        for network, variants in checkpoint.weights.items()
    }
