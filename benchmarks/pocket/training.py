"""What both training runs share: bfloat16 compute on float32 masters, a moving average, resumable state.

Run by `torchrun --nproc-per-node N`, each process computes its own batches on one thread and the gradients
are averaged. On a busy machine N processes of one thread are far faster than one of N threads: a
convolution's threads wait for each other by spinning, so one thread that loses its core stops the others too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from pocket.muon import Muon


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Learning rate of a run: linear warm-up, constant, linear decay over the last `cooldown` share."""

    steps: int
    peak: float
    warmup: int = 200
    cooldown: float = 0.25
    floor: float = 0.02

    def at(self, step: int) -> float:
        """Learning rate of step `step` (0-based)."""
        left = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return self.peak * min(1.0, (step + 1) / self.warmup, max(self.floor, left))


@dataclass(slots=True)
class Trainer:
    """Trains `modules`, which lie on their device, in bfloat16 against float32 master weights.

    muon: weights that are matrices learn by Muon, the others and a network's first and last layers by AdamW.
    The masters carry the optimiser's precision: updates smaller than a bfloat16 ulp would be lost otherwise.
    """

    modules: dict[str, nn.Module]
    folder: Path
    schedule: Schedule
    ema_decay: float = 0.999
    muon: bool = False
    step: int = 0
    _params: list[nn.Parameter] = field(default_factory=list)
    _masters: list[Tensor] = field(default_factory=list)
    _ema: list[Tensor] = field(default_factory=list)
    _optimizers: list[torch.optim.Optimizer] = field(default_factory=list)

    def __post_init__(self) -> None:
        for module in self.modules.values():
            module.train().requires_grad_(True)
        self._params = [p for m in self.modules.values() for p in m.parameters()]
        self._masters = [p.detach().float().clone() for p in self._params]
        self._ema = [m.clone() for m in self._masters]
        for module in self.modules.values():
            module.to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        names = [name for m in self.modules.values() for name, _ in m.named_parameters()]
        matrices = [
            self.muon and master.dim() > 1 and not name.startswith(("conv_in.", "conv_out."))
            for name, master in zip(names, self._masters, strict=True)
        ]
        others = [m for m, matrix in zip(self._masters, matrices, strict=True) if not matrix]
        self._optimizers = [
            torch.optim.AdamW(others, lr=self.schedule.peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        ]
        if any(matrices):
            mine = [m for m, matrix in zip(self._masters, matrices, strict=True) if matrix]
            self._optimizers.append(Muon(mine, self.schedule.peak))
        self._push()

    def update(self, loss: Tensor) -> None:
        """One optimiser step on `loss`, with the gradient's norm clipped to 1."""
        loss.backward()  # type: ignore[no-untyped-call]
        for master, param in zip(self._masters, self._params, strict=True):
            # Contiguous like the master: the fused optimiser pairs elements by their place in memory.
            master.grad = None if param.grad is None else param.grad.float().contiguous()
            param.grad = None
        if dist.is_initialized():
            flat = torch.cat([m.grad.flatten() for m in self._masters if m.grad is not None])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            grads = [m.grad for m in self._masters if m.grad is not None]
            for grad, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.schedule.at(self.step)
            optimizer.step()
        self.step += 1
        decay = min(self.ema_decay, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(self._ema, self._masters, 1.0 - decay)
        self._push()

    def _push(self) -> None:
        with torch.no_grad():
            for param, master in zip(self._params, self._masters, strict=True):
                param.copy_(master)

    def save(self) -> None:
        """Write the whole state atomically; the newest replaces the last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "masters": self._masters,
            "ema": self._ema,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        torch.save(state, self.folder / "state.tmp")
        (self.folder / "state.tmp").replace(self.folder / "state.pt")

    def resume(self) -> bool:
        """Load the newest state of `folder` if there is one."""
        path = self.folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True, map_location="cpu")
        with torch.no_grad():
            for mine, saved in zip(
                (*self._masters, *self._ema), (*state["masters"], *state["ema"]), strict=True
            ):
                mine.copy_(saved)
        for optimizer, held in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        self.step = state["step"]
        self._push()
        return True

    def averaged(self) -> dict[str, dict[str, Tensor]]:
        """float32 state dicts of the moving average, by module name."""
        weights = iter(self._ema)
        return {
            name: {key: next(weights) for key, _ in module.named_parameters()}
            for name, module in self.modules.items()
        }


def start(device: str = "cpu") -> tuple[int, torch.device]:
    """Join the process group that torchrun made, if any. Returns the rank and the device of this process.

    device: `cpu`, or `cuda` for one GPU a process.
    """
    torch.set_num_threads(1)
    rank = 0
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        rank = dist.get_rank()
    if device == "cuda":
        torch.cuda.set_device(rank)
    return rank, torch.device(device)


def seed(trainer: Trainer, rank: int, before: int = 0) -> tuple[int, int]:
    """Resume, and seed torch for what comes: a run that goes on does not draw again what it drew before.

    before: steps of earlier runs. Returns a seed for the data.
    """
    if trainer.resume() and rank == 0:
        print(f"resumed at step {trainer.step}")
    drawn = before + trainer.step
    torch.manual_seed(drawn * 1009 + rank)
    return rank, drawn


def run(
    trainer: Trainer, batches: Iterator[Any], loss_of: Callable[[Any], tuple[Tensor, dict[str, float]]]
) -> None:
    """Train on to the schedule's end; log a line of JSON every 50 steps, save every 3 minutes."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    trainer.folder.mkdir(parents=True, exist_ok=True)
    curve = trainer.folder / "curve.jsonl"
    if first:
        _cut(curve, trainer.step)
    saved = time.monotonic()
    sums: dict[str, float] = {}
    counted = 0
    with (
        curve.open("a", encoding="utf-8") as log,
        tqdm(total=trainer.schedule.steps, initial=trainer.step, mininterval=10, disable=not first) as bar,
    ):
        while trainer.step < trainer.schedule.steps:
            loss, parts = loss_of(next(batches))
            trainer.update(loss)
            bar.update()
            counted += 1
            for key, value in parts.items():
                sums[key] = sums.get(key, 0.0) + value
            if trainer.step % 50 == 0 and first:
                means = {key: value / counted for key, value in sums.items()}
                bar.set_postfix({k: f"{v:.4f}" for k, v in means.items()})
                log.write(json.dumps({"step": trainer.step, "time": time.time(), **means}) + "\n")
                log.flush()
                sums, counted = {}, 0
            if first and time.monotonic() - saved > 180:
                trainer.save()
                saved = time.monotonic()
    if first:
        trainer.save()


def _cut(curve: Path, step: int) -> None:
    """Drop what was logged after the state that a run goes on from."""
    if curve.exists():
        lines = curve.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        curve.write_text("".join(kept), encoding="utf-8")
