"""Models that plans know by name: their published shapes, without a folder and without weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ritocco.checkpoint import REQUIRED, Checkpoint
from ritocco.errors import CheckpointError
from ritocco.ldm_keys import DEFAULT_CONFIGS
from ritocco.parameters import MemoryTensor, NetworkName, Stored, build
from ritocco.shown import shown

KNOWN: Mapping[str, str] = MappingProxyType({"sd2-inpainting": "sd2", "sd1.5-inpainting": "sd15"})
"""Name -> family of `ldm_keys.DEFAULT_CONFIGS`."""

_STORED = "F16"  # as both are published


def outline(name: str) -> Checkpoint:
    """A checkpoint of the model's shapes, stored in float16; its tensors are on the meta device.

    Raises CheckpointError for a name that is not in `KNOWN`.
    """
    if name not in KNOWN:
        rule = f"no such file or folder, and of the models known by name ({', '.join(KNOWN)}) it is none"
        raise CheckpointError(f"{shown(name)}: {rule}")
    configs = DEFAULT_CONFIGS[KNOWN[name]]
    unet = {**configs["unet"], "in_channels": 9}
    networks: dict[NetworkName, Mapping[str, object]] = {
        one: unet if one == "unet" else configs[one] for one in REQUIRED
    }
    return Checkpoint(
        source=name,
        path=None,
        unet=unet,
        vae=configs["vae"],
        text_encoder=configs["text_encoder"],
        scheduler=configs["scheduler"],
        safety_checker=None,
        feature_extractor=None,
        tokenizer=Path(),
        weights={one: {"": _tensors(one, config)} for one, config in networks.items()},
        variant=None,
        notes=(),
    )


def _tensors(network: NetworkName, config: Mapping[str, object]) -> dict[str, Stored]:
    return {
        name: MemoryTensor(name, _STORED, tuple(tensor.shape), tensor)
        for name, tensor in build(network, config).state_dict().items()
    }
