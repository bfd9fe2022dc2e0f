"""Single-file checkpoints in the original LDM naming, as parameters of the networks in `nets/`.

The original code base (CompVis latent-diffusion, Stability-AI stablediffusion) numbers the UNet's blocks in
one row, counts the decoder's levels from the outside in, and keeps OpenCLIP's packed query-key-value
matrices. This table says where each of them is found under the names of the diffusers layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ritocco.errors import CheckpointError
from ritocco.weight_files import StoredTensor

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."
OPEN_CLIP_PREFIX = "cond_stage_model.model."

Config = Mapping[str, Any]
_Rule = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]

_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPEN_CLIP_ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}

_SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "scaling_factor": 0.18215,
    "sample_size": 512,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_UNET: dict[str, Any] = {
    "in_channels": 9,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "sample_size": 64,
}
_TEXT: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5}

# Published configurations of the two inpainting models in diffusers layout; a single file carries none.
DEFAULT_CONFIGS: Mapping[str, Mapping[str, Config]] = MappingProxyType(
    {
        "sd2": {
            "unet": {
                **_UNET,
                "attention_head_dim": [5, 10, 20, 20],
                "cross_attention_dim": 1024,
                "use_linear_projection": True,
            },
            "vae": _VAE,
            "text_encoder": {
                **_TEXT,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 23,
                "hidden_act": "gelu",
            },
            "scheduler": _SCHEDULER,
        },
        "sd15": {
            "unet": {
                **_UNET,
                "attention_head_dim": 8,
                "cross_attention_dim": 768,
                "use_linear_projection": False,
            },
            "vae": _VAE,
            "text_encoder": {
                **_TEXT,
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_attention_heads": 12,
                "num_hidden_layers": 12,
                "hidden_act": "quick_gelu",
            },
            "scheduler": _SCHEDULER,
        },
    }
)


def family(header: Mapping[str, StoredTensor], source: str) -> str:
    """'sd2' or 'sd15', by the text encoder in the file. Raises CheckpointError for anything else."""
    has = {p: any(key.startswith(p) for key in header) for p in (UNET_PREFIX, OPEN_CLIP_PREFIX, CLIP_PREFIX)}
    if any(key.startswith("conditioner.embedders.") for key in header):
        raise CheckpointError(
            f"{source}: an SDXL checkpoint; ritocco runs Stable Diffusion 1.5 and 2 inpainting models"
        )
    if not has[UNET_PREFIX]:
        raise CheckpointError(
            f"{source}: not a whole Stable Diffusion checkpoint (no tensor named {UNET_PREFIX}…); for one "
            "file of a "
            "diffusers folder, name the folder instead"
        )
    if has[OPEN_CLIP_PREFIX] == has[CLIP_PREFIX]:
        raise CheckpointError(
            f"{source}: holds no text encoder (neither {OPEN_CLIP_PREFIX}… nor {CLIP_PREFIX}…); use the "
            "full checkpoint"
        )
    return "sd2" if has[OPEN_CLIP_PREFIX] else "sd15"


def unet_tensors(header: Mapping[str, StoredTensor], config: Config) -> dict[str, StoredTensor]:
    """The UNet's parameters. config: `layers_per_block` says how the numbered blocks fall into levels."""
    rules = _unet_rules(int(config["layers_per_block"]))
    return _renamed(header, UNET_PREFIX, rules)


def vae_tensors(header: Mapping[str, StoredTensor], config: Config) -> dict[str, StoredTensor]:
    """The VAE's parameters; its attention's 1 x 1 convolutions become matrices."""
    tensors = _renamed(header, VAE_PREFIX, _vae_rules(len(config["block_out_channels"])))
    return {name: t.taking(flatten=True) if ".attentions." in name else t for name, t in tensors.items()}


def text_tensors(header: Mapping[str, StoredTensor], config: Config) -> dict[str, StoredTensor]:
    """The text encoder's parameters, whichever of the two encoders the file holds.

    SD 2 reads OpenCLIP's penultimate layer [Rombach et al., Stable Diffusion 2.0 release], so of its 24
    blocks the last is never run and is left out, as are the projection and logit scale of CLIP's training
    objective.
    """
    if not any(key.startswith(OPEN_CLIP_PREFIX) for key in header):
        inner = {k.removeprefix(CLIP_PREFIX): t for k, t in header.items() if k.startswith(CLIP_PREFIX)}
        return {k if k.startswith("text_model.") else f"text_model.{k}": t for k, t in inner.items()}
    layers = int(config["num_hidden_layers"])
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in header.items():
        if key.startswith(OPEN_CLIP_PREFIX):
            tensors |= _open_clip(key.removeprefix(OPEN_CLIP_PREFIX), tensor, layers)
    return tensors


def _open_clip(key: str, tensor: StoredTensor, layers: int) -> dict[str, StoredTensor]:
    if key in _OPEN_CLIP_ENDS:
        return {_OPEN_CLIP_ENDS[key]: tensor}
    found = re.fullmatch(r"transformer\.resblocks\.(\d{1,4})\.(.+?)[._](weight|bias)", key)
    if found is None or int(found[1]) >= layers:
        return {}
    layer = f"text_model.encoder.layers.{found[1]}"
    if found[2] == "attn.in_proj":
        return {
            f"{layer}.self_attn.{name}_proj.{found[3]}": tensor.taking(part=(k, 3))
            for k, name in enumerate("qkv")
        }
    return {f"{layer}.{_OPEN_CLIP_LAYER.get(found[2], found[2])}.{found[3]}": tensor}


def _unet_rules(layers: int) -> tuple[_Rule, ...]:
    run = layers + 1

    def resnet(tail: str) -> str:
        stem, _, kind = tail.rpartition(".")
        return f"{_UNET_RESNET.get(stem, stem)}.{kind}"

    def down(found: re.Match[str]) -> str:
        level, place = divmod(int(found[1]) - 1, run)
        if found[3].startswith("op."):
            return f"down_blocks.{level}.downsamplers.0.conv.{found[3].removeprefix('op.')}"
        if found[2] == "0":
            return f"down_blocks.{level}.resnets.{place}.{resnet(found[3])}"
        return f"down_blocks.{level}.attentions.{place}.{found[3]}"

    def up(found: re.Match[str]) -> str:
        level, place = divmod(int(found[1]), run)
        # A level without attention keeps its upsampler where the others keep attention, so the name decides.
        if found[3].startswith("conv."):
            return f"up_blocks.{level}.upsamplers.0.{found[3]}"
        if found[2] == "0":
            return f"up_blocks.{level}.resnets.{place}.{resnet(found[3])}"
        return f"up_blocks.{level}.attentions.{place}.{found[3]}"

    def middle(found: re.Match[str]) -> str:
        tail = found[2] if found[1] == "1" else resnet(found[2])
        return f"{_UNET_MIDDLE[found[1]]}.{tail}"

    ends = "|".join(map(re.escape, _UNET_ENDS))
    return (
        (re.compile(rf"({ends})\.(weight|bias)"), lambda found: f"{_UNET_ENDS[found[1]]}.{found[2]}"),
        (re.compile(r"input_blocks\.([1-9]\d{0,3})\.([01])\.(.+)"), down),
        (re.compile(r"output_blocks\.(\d{1,4})\.([012])\.(.+)"), up),
        (re.compile(r"middle_block\.([012])\.(.+)"), middle),
    )


def _vae_rules(levels: int) -> tuple[_Rule, ...]:
    def block(found: re.Match[str]) -> str:
        side, way, level, place, tail = found.groups()
        # LDM counts the decoder's levels from the picture inwards, diffusers in the order they run.
        number = int(level) if way == "down" else levels - 1 - int(level)
        return f"{side}.{way}_blocks.{number}.resnets.{place}.{tail.replace('nin_shortcut', 'conv_shortcut')}"

    def resample(found: re.Match[str]) -> str:
        side, way, level, tail = found.groups()
        number = int(level) if way == "down" else levels - 1 - int(level)
        return f"{side}.{way}_blocks.{number}.{way}samplers.0.{tail}"

    def mid_resnet(found: re.Match[str]) -> str:
        tail = found[3].replace("nin_shortcut", "conv_shortcut")
        return f"{found[1]}.mid_block.resnets.{int(found[2]) - 1}.{tail}"

    def mid_attention(found: re.Match[str]) -> str:
        return f"{found[1]}.mid_block.attentions.0.{_VAE_ATTENTION.get(found[2], found[2])}.{found[3]}"

    return (
        (re.compile(r"(encoder|decoder)\.(down|up)\.(\d{1,4})\.block\.(\d{1,4})\.(.+)"), block),
        (re.compile(r"(encoder|decoder)\.(down|up)\.(\d{1,4})\.(?:down|up)sample\.(.+)"), resample),
        (re.compile(r"(encoder|decoder)\.mid\.block_([12])\.(.+)"), mid_resnet),
        (re.compile(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(weight|bias)"), mid_attention),
        (
            re.compile(r"(encoder|decoder)\.norm_out\.(.+)"),
            lambda found: f"{found[1]}.conv_norm_out.{found[2]}",
        ),
        (re.compile(r"(?:(?:en|de)coder\.conv_(?:in|out)|(?:post_)?quant_conv)\..+"), lambda found: found[0]),
    )


def _renamed(
    header: Mapping[str, StoredTensor], prefix: str, rules: tuple[_Rule, ...]
) -> dict[str, StoredTensor]:
    """Every tensor under the prefix by its new name; what no rule knows keeps its own and is reported as
    unexpected.
    """
    tensors = {}
    for key, tensor in header.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        for pattern, rename in rules:
            if found := pattern.fullmatch(name):
                name = rename(found)
                break
        tensors[name] = tensor
    return tensors
