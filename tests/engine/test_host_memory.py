"""glibc's rule for freed memory: what `keep_freed_memory` changes, and when it keeps its hands off."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch

import ritocco
from ritocco.backends import host_memory
from ritocco.backends.host_memory import give_back_freed_memory, keep_freed_memory
from ritocco.backends.torch_ import TorchRuntime
from ritocco.checkpoint import open_checkpoint

# Page faults of a 64 MiB block that is asked for, filled and freed three times.
FAULTS = """
import ctypes, resource, sys
from ritocco.backends.host_memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(64 << 20)))
    libc.memset(block, 1, ctypes.c_size_t(64 << 20))
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, *[use() for _ in range(3)])
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")


def faults(mode: str, **environment: str) -> tuple[bool, list[int]]:
    roots = [str(Path(__file__).parents[2] / root) for root in ("engine", "kernels")]
    own = {name: value for name, value in os.environ.items() if name not in host_memory._OWN_RULES}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode],
        capture_output=True,
        text=True,
        check=True,
        env={**own, "PYTHONPATH": os.pathsep.join(roots), **environment},
    )
    kept, *counts = done.stdout.split()
    return kept == "True", [int(count) for count in counts]


@glibc
def test_a_large_block_is_faulted_in_once() -> None:
    kept, (first, *later) = faults("keep")
    assert kept
    assert first > 100 + 10 * max(later)


@glibc
def test_without_it_every_use_faults() -> None:
    _, (first, *later) = faults("leave")
    assert min(later) > first // 2


@glibc
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_environment_wins(name: str) -> None:
    value = "glibc.malloc.trim_threshold=1000000" if name == "GLIBC_TUNABLES" else "1000000"
    kept, (first, *later) = faults("keep", **{name: value})
    assert not kept
    assert min(later) > first // 2


@pytest.mark.parametrize("elsewhere", ["win32", "darwin"])
def test_nothing_is_done_elsewhere(elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", elsewhere)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("a library was opened"))
    assert not keep_freed_memory()
    give_back_freed_memory()


@pytest.mark.parametrize(("limit", "asked"), [(1000, True), (1 << 30, False)])
def test_only_large_networks_ask_for_it(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, limit: int, asked: bool
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr("ritocco.loading.LARGEST_KEPT_BYTES", limit)
    monkeypatch.setattr("ritocco.loading.keep_freed_memory", lambda: calls.append(True))
    ritocco.load(tiny_checkpoint, device="cpu", dtype="float32", backend="torch").close()
    assert bool(calls) is asked


def test_the_decoder_is_converted_when_it_is_needed(tiny_checkpoint: Path) -> None:
    runtime = TorchRuntime(open_checkpoint(tiny_checkpoint), device=torch.device("cpu"), dtype=torch.bfloat16)
    decoder = cast(torch.nn.Module, runtime.vae.decoder)
    stored = {weight.dtype for weight in decoder.parameters()}
    assert {weight.dtype for weight in runtime.vae.encoder.parameters()} == {torch.bfloat16}
    assert torch.bfloat16 not in stored
    latents = torch.zeros(1, 4, 2, 2).numpy()
    first = runtime.decode(latents)
    assert {weight.dtype for weight in runtime.vae.parameters()} == {torch.bfloat16}
    assert (runtime.decode(latents) == first).all()
