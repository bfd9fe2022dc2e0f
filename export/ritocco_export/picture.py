"""The gate's last question: does a whole request on the graphs give torch's picture?"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ritocco.artefacts import Artefacts, open_artefacts
from ritocco.backends.host_memory import give_back_freed_memory
from ritocco.backends.runtime import Runtime
from ritocco.backends.sessions import SessionRuntime
from ritocco.backends.torch_ import TorchRuntime
from ritocco.checkpoint import Checkpoint, load_tokenizer
from ritocco.engine import Engine
from ritocco.errors import CheckpointError
from ritocco.prompt import Tokenizer
from ritocco_export.figures import LEAST_PICTURE_PSNR_DB, Figures
from ritocco_export.frugal import can_run, load_widened, open_session
from ritocco_export.gate import difference

STEPS = 4


def compare_picture(checkpoint: Checkpoint, folder: Path) -> Figures:
    """Paint one picture of the smallest size with torch in float32 and one on the graphs.

    folder: graphs with their manifest. Returns figures over 255. Raises CheckpointError where the pictures
    differ by more than LEAST_PICTURE_PSNR_DB allows.
    """
    artefacts = open_artefacts(folder)
    dtype = artefacts.contract["vae_decoder"].inputs[0].dtype
    if not can_run(dtype):
        return Figures.not_run()
    asked = _request(artefacts)
    wanted = _painted(_torch(checkpoint, dtype), load_tokenizer(checkpoint), checkpoint.scheduler, asked)
    gc.collect()  # parametrised modules are cycles
    give_back_freed_memory()
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    found = _painted(_sessions(artefacts, dtype), tokenizer, artefacts.scheduler, asked)
    error, psnr = difference(found / 255.0, wanted / 255.0, peak=1.0)
    if not psnr >= LEAST_PICTURE_PSNR_DB[dtype]:
        raise CheckpointError(
            f"picture: painted on the {dtype} graphs it departs from torch's by {psnr:.1f} dB, where "
            f"{LEAST_PICTURE_PSNR_DB[dtype]:.0f} dB are asked"
        )
    return Figures(error=error, psnr_db=psnr, arithmetic="float32")


def _torch(checkpoint: Checkpoint, dtype: str) -> TorchRuntime:
    """In float32, on weights rounded to `dtype`."""
    load = partial(load_widened, held=getattr(torch, dtype))
    return TorchRuntime(checkpoint, device=torch.device("cpu"), dtype=torch.float32, load=load)


def _sessions(artefacts: Artefacts, dtype: str) -> SessionRuntime:
    """The graphs as they are written, see `open_session`."""
    sessions = {graph: open_session(artefacts.graph(graph), graph, dtype) for graph in artefacts.contract}
    return SessionRuntime(artefacts, sessions, device="cpu", dtype=dtype)


def _painted(
    runtime: Runtime, tokenizer: Tokenizer, scheduler: Mapping[str, Any], asked: dict[str, Any]
) -> np.ndarray[Any, Any]:
    with Engine(runtime, tokenizer, scheduler) as engine:
        return np.asarray(engine.predict(asked, paste_back=False).images[0])


def _request(artefacts: Artefacts) -> dict[str, Any]:
    ranges = artefacts.contract["vae_decoder"].ranges
    height, width = 8 * ranges["H"][0], 8 * ranges["W"][0]
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : -height // 4, width // 4 : -width // 4] = 255
    return {
        "image": coarse.repeat(32, 0).repeat(32, 1),
        "mask": mask,
        "prompt": "a photograph",
        "width": width,
        "height": height,
        "num_inference_steps": STEPS,
        "scheduler": "DDIM",
        "seed": 0,
    }
