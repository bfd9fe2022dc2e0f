"""The parity tests again, beside the oldest transformers that is supported, and a diffusers that takes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2", "diffusers==0.39.0")
FILES = ("test_prompt", "test_text_encoder", "test_vision", "test_checkpoint", "test_pipeline_parity")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_parity_beside_transformers_4(tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, *PACKAGES)
    subprocess.run(pip, check=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    say = "import transformers, diffusers; print(transformers.__version__, diffusers.__version__)"
    found = subprocess.check_output([sys.executable, "-c", say], env=env, cwd=tmp_path, text=True)
    assert found.split() == ["4.57.6", "0.39.0"]
    # The old packages warn of the new ones around them.
    options = ("-q", "-m", "not slow and not gpu", "-W", "ignore", "-p", "no:cacheprovider")
    files = [f"tests/engine/{name}.py" for name in FILES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
