"""A model folder with seeded random weights: the shape of Stable Diffusion 2 inpainting, or a tiny one.

Loading and speed do not depend on what the weights are, only on how many there are and how they are stored:
float16 safetensors, the published parameter names, a tokenizer of CLIP's layout and size.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ritocco.errors import CheckpointError
from ritocco.parameters import NetworkName, build
from ritocco.prompt import BOS, EOS, MAX_LENGTH
from ritocco.weight_files import read_json

_FILES: Mapping[NetworkName, str] = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
_SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
}
_INDEX = {
    "_class_name": "StableDiffusionInpaintPipeline",
    "_diffusers_version": "0.35.0",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _configs(
    *, unet: tuple[int, ...], heads: tuple[int, ...], vae: tuple[int, ...], text: tuple[int, ...], groups: int
) -> dict[NetworkName, dict[str, Any]]:
    """Configs of SD 2's kind; what is left out is the default of diffusers and transformers.

    unet, vae: channels per resolution. text: width, inner width, layers, heads, vocabulary.
    """
    width, inner, layers, text_heads, vocabulary = text
    return {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "in_channels": 9,
            "sample_size": 64,
            "block_out_channels": unet,
            "attention_head_dim": heads,
            "cross_attention_dim": width,
            "use_linear_projection": True,
            "norm_num_groups": groups,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "sample_size": 512,
            "block_out_channels": vae,
            "layers_per_block": 2,
            "down_block_types": ["DownEncoderBlock2D"] * len(vae),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae),
            "norm_num_groups": groups,
        },
        "text_encoder": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "hidden_act": "gelu",
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": text_heads,
            "vocab_size": vocabulary,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": 0,
        },
    }


SIZES: Mapping[str, Mapping[NetworkName, dict[str, Any]]] = {
    "full": _configs(
        unet=(320, 640, 1280, 1280),
        heads=(5, 10, 20, 20),
        vae=(128, 256, 512, 512),
        text=(1024, 4096, 23, 16, 49408),
        groups=32,
    ),
    "tiny": _configs(
        unet=(16, 32, 32, 32), heads=(2, 4, 4, 4), vae=(8, 16, 16, 16), text=(32, 64, 2, 4, 1024), groups=8
    ),
}


def make_folder(out: Path, size: str = "full") -> Path:
    """Write a diffusers folder of random weights, `full` (2.6 GB) or `tiny`. Returns `out`.

    The same size gives the same bytes. Memory: one tensor for each processor. A complete folder of this size
    is kept.
    Raises ValueError for another size, CheckpointError where `out` holds a folder of another shape.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; it must be one of {', '.join(SIZES)}")
    index = out / "model_index.json"
    if index.is_file():
        if read_json(out / "unet" / "config.json") != json.loads(json.dumps(SIZES[size]["unet"])):
            raise CheckpointError(f"{out}: holds another model; name an empty folder for the {size} one")
        return out
    for network, config in SIZES[size].items():
        _write_json(out / network / "config.json", config)
        _write_weights(out / network / _FILES[network], network, config)
    _write_tokenizer(out / "tokenizer", SIZES[size]["text_encoder"]["vocab_size"])
    _write_json(out / "scheduler" / "scheduler_config.json", _SCHEDULER)
    _write_json(index, _INDEX)  # last: it says that the folder is complete
    return out


def _write_weights(file: Path, network: NetworkName, config: Mapping[str, Any]) -> None:
    """Stream a safetensors file: 8 bytes of length, a JSON header, then the tensors."""
    shapes = {name: tuple(t.shape) for name, t in build(network, config).state_dict().items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        with ThreadPoolExecutor() as pool:
            names, at_once = iter(shapes), os.cpu_count() or 1
            while some := list(itertools.islice(names, at_once)):
                seeds = [zlib.crc32(f"{network}/{name}".encode()) for name in some]
                for values in pool.map(_values, some, [shapes[name] for name in some], seeds):
                    stream.write(values.tobytes())
    partial.replace(file)


def _values(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float16]:
    """Uniform within 1 / sqrt(inputs), as torch starts its layers; norms near 1, biases near 0."""
    random = np.random.default_rng(seed).random(shape, dtype=np.float32) * np.float32(2) - np.float32(1)
    scale = 0.1 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
    centre = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    random *= np.float32(scale)
    random += np.float32(centre)
    return random.astype("<f2")


def _letters() -> list[str]:
    """The 256 letters that stand for bytes in CLIP's vocabulary, in its order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in [*printable, *range(256, 512 - len(printable))]]


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """CLIP's layout: byte letters, the same at a word's end, merges that fill up, the special tokens."""
    letters = _letters()
    ends = [letter + "</w>" for letter in letters]
    pairs = itertools.product(letters, [*ends, *letters])
    merges = list(itertools.islice(pairs, vocabulary - 2 * len(letters) - 2))
    tokens = [*letters, *ends, *(a + b for a, b in merges), BOS, EOS]
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    named = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": "!"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, **named}
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", named)


def _write_json(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
