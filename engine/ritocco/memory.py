"""How much memory a request will take on the torch runtime: weights, and the most of each phase.

The runtime's own code runs, on tensors without numbers: what it holds at which moment is not written down a
second time. So far on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ritocco.backends.runtime import Lane, LatentSize
from ritocco.backends.torch_ import TorchRuntime
from ritocco.checkpoint import Checkpoint
from ritocco.live_memory import Live
from ritocco.parameters import MemoryTensor, Stored
from ritocco.schedules import StepTable, build

PHASES = ("load", "text", "encode", "denoise", "decode")
_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STANDING_BYTES = 96 << 10  # what oneDNN keeps: 60 to 90 KiB were seen
_STEPS = 2  # the second finds the first one's results


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """most: bytes at once, weights that lie in memory by then included. moment: the operation it is in."""

    most: int
    moment: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Bytes. weights: of each network, as the device holds them. phases: of `PHASES`, in their order.

    A weight that is used straight from its mapped file is among `weights`, and not in any phase.
    """

    weights: Mapping[str, int]
    phases: Mapping[str, Phase]

    @property
    def peak(self) -> tuple[str, Phase]:
        """The phase that takes most."""
        return max(self.phases.items(), key=lambda item: item[1].most)


def usage(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    height: int,
    width: int,
    num_outputs: int = 1,
    guided: bool = True,
    num_inference_steps: int = 50,
    scheduler: str = "DPMSolverMultistep",
) -> Usage:
    """What a request takes on a CPU, beginning with loading; no weight is read and nothing is computed.

    bfloat16 is as oneDNN computes it (see `device.onednn_bfloat16`).

    height, width: pixels. guided: whether guidance is over 1, which takes two rows of the UNet a picture.
    A safety checker is not counted.
    """
    live, found = Live(), dict[str, Phase]()
    size = LatentSize(height=height // 8, width=width // 8)
    table = build(scheduler, num_inference_steps, checkpoint.scheduler)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        hollow = replace(checkpoint, weights=_without_numbers(checkpoint, live))
        with live:
            runtime = TorchRuntime(hollow, device=torch.device("cpu"), dtype=dtype)
            found["load"] = _taken(live)
            tokens = torch.zeros(1 + guided, runtime.text_encoder.spec.positions, dtype=torch.int64)
            context = runtime._encode_text(tokens).float()
            found["text"] = _taken(live)
            encoded = runtime._encode_mean(runtime._image(np.zeros((3, height, width), np.float32))).float()
            found["encode"] = _taken(live)
            _denoise(runtime, size, _lanes(runtime, size, table, guided, num_outputs))
            found["denoise"] = _taken(live)
            latents = np.zeros((runtime.unet.spec.out_channels, size.height, size.width), np.float32)
            # Pictures stay as they were decoded until all are.
            made = [runtime._decoded(latents).float() for _ in range(num_outputs)]
            del made, context, encoded  # all of them to the end
            found["decode"] = _taken(live)
    networks = {"unet": runtime.unet, "vae": runtime.vae, "text_encoder": runtime.text_encoder}
    weights = {name: sum(one.nbytes for one in network.parameters()) for name, network in networks.items()}
    return Usage(weights=weights, phases=found)


def _taken(live: Live) -> Phase:
    """Of the phase that ends here; the next one begins."""
    phase = Phase(most=live.most + _STANDING_BYTES, moment=live.moment)
    live.begin()
    return phase


def _denoise(runtime: TorchRuntime, size: LatentSize, lanes: Sequence[Lane]) -> None:
    batch = runtime.open(size, len(lanes))
    for slot, lane in enumerate(lanes):
        batch.join(slot, lane)
    for row in range(min(_STEPS, len(lanes[0].table))):
        batch.step(dict.fromkeys(range(len(lanes)), row))


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


def _without_numbers(checkpoint: Checkpoint, live: Live) -> Mapping[str, Mapping[str, Mapping[str, Stored]]]:
    """The checkpoint's weights as tensors of the stored dtypes and shapes, made inside a FakeTensorMode."""

    def hollow(stored: Stored) -> Stored:
        tensor = torch.empty(stored.shape, dtype=_TORCH_DTYPES[stored.dtype])
        live.leave_out(tensor)
        return MemoryTensor(stored.key, stored.dtype, stored.shape, tensor)

    return {
        network: {
            variant: {name: hollow(one) for name, one in tensors.items()}
            for variant, tensors in variants.items()
        }
        for network, variants in checkpoint.weights.items()
    }
