"""Every kernel is code that a GPU's compiler takes, which Triton's interpreter does not tell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    variables = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    script = Path(__file__).with_name("compile_all.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} == {
        *("groupnorm", "shifted", "joined", "upsample", "add_bias", "layernorm", "add_layernorm", "geglu"),
        *("guided_step", "to_model_pixels", "from_model_pixels"),
    }
