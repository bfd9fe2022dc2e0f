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
# Stable Diffusion 1.5's folder has one, of CLIP ViT-L/14; 2's has none.
_SAFETY_CHECKERS: Mapping[str, Mapping[str, object]] = {
    "sd15": {
        "projection_dim": 768,
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "image_size": 224,
            "hidden_act": "quick_gelu",
        },
    }
}


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
    safety = _SAFETY_CHECKERS.get(KNOWN[name])
    if safety is not None:
        networks["safety_checker"] = safety
    return Checkpoint(
        source=name,
        path=None,
        unet=unet,
        vae=configs["vae"],
        text_encoder=configs["text_encoder"],
        scheduler=configs["scheduler"],
        safety_checker=safety,
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
