"""OpenMP's workers: none stay behind in a thread that has loaded or painted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's OpenMP, and /proc")

BEGIN = """
import os
import torch
from ritocco.backends.host_threads import let_go_of_workers

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
"""
COMPUTED = """
before = threads()
torch.relu(torch.ones(1 << 20))
assert threads() == before + 1, "a worker stays"
let_go_of_workers()
while threads() > before:
    pass
torch.relu(torch.ones(1 << 20))
assert threads() == before + 1, "another comes when it is needed"
"""
PAINTED = """
import time
import numpy as np
import ritocco

def settled():
    # What has been told to end may take a moment.
    least = threads()
    for _ in range(20):
        time.sleep(0.05)
        least = min(least, threads())
    return least

def none_stays():
    left = settled()
    torch.relu(torch.ones(1 << 20))
    assert threads() == left + 1

engine = ritocco.load(device="cpu", backend="torch", dtype="float32")
none_stays()
let_go_of_workers()
pixels = np.zeros((64, 64, 3), np.uint8)
asked = {"image": pixels, "mask": pixels + 255, "width": 64, "height": 64, "num_inference_steps": 1}
engine.predict(asked)
none_stays()
"""


@pytest.mark.parametrize("script", [COMPUTED, PAINTED], ids=["computed", "painted"])
def test_no_worker_stays(script: str) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", BEGIN + script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
