"""The shapes of the four networks, read from the config.json files of a diffusers folder. No torch here.

Keys missing from a file have the defaults of the class that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ritocco.nets.config import MAX_BLOCKS, MAX_COUNT, MAX_LEVELS, ConfigReader

_UNET_NONE_ONLY = (
    "num_attention_heads",
    "reverse_transformer_layers_per_block",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "class_embed_type",
    "num_class_embeds",
    "projection_class_embeddings_input_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "time_embedding_act_fn",
    "timestep_post_act",
    "time_cond_proj_dim",
    "cross_attention_norm",
)

_UNET_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(_UNET_NONE_ONLY, (None,)),
    "act_fn": ("silu", "swish"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "dual_cross_attention": (False,),
    "class_embeddings_concat": (False,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
}
"""Config keys that change the network in ways not built here, with the values that leave it alone."""

_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("CrossAttnUpBlock2D", "UpBlock2D")


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetSpec:
    """Shape of one UNet; tuples have one entry per resolution, finest first (`up_attention` too).

    heads: attention heads (diffusers calls this number `attention_head_dim`).
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers: tuple[int, ...]
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    transformer_layers: tuple[int, ...]
    heads: tuple[int, ...]
    context_dim: int
    groups: int
    eps: float
    linear_projection: bool
    time_dim: int
    flip_sin_to_cos: bool
    freq_shift: int

    @property
    def size_multiple(self) -> int:
        """What the latents' height and width must be multiples of (cells): they are halved at each level."""
        return 1 << (len(self.channels) - 1)

    @property
    def time_width(self) -> int:
        """Width of all resnets' time vectors side by side, as `UNet.hoist_timesteps` gives them."""
        sides = sum(
            width * (2 * layers + 1) for width, layers in zip(self.channels, self.layers, strict=True)
        )
        return sides + 2 * self.channels[-1]

    @property
    def cross_attentions(self) -> tuple[tuple[int, int], ...]:
        """Heads and head width of every cross-attention, in the order of `UNet.hoist_context`."""
        levels = range(len(self.channels))
        down = [level for level in levels for _ in range(self.layers[level]) if self.down_attention[level]]
        up = [level for level in levels for _ in range(self.layers[level] + 1) if self.up_attention[level]]
        return tuple(
            (self.heads[level], self.channels[level] // self.heads[level])
            for level in (*down, levels[-1], *reversed(up))
            for _ in range(self.transformer_layers[level])
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UNetSpec:
        """Read diffusers' unet/config.json.

        `upcast_attention` is accepted either way: attention scores are float32 here in any case. `dropout`
        and `sample_size` don't matter to inference.
        Raises CheckpointError that names the key, its value and what is supported.
        """
        read = ConfigReader("unet", config)
        read.refuse_unless(_UNET_SUPPORTED)
        channels = read.integers("block_out_channels", (320, 640, 1280, 1280))
        count = len(channels)
        down = read.choices("down_block_types", (*_DOWN[:1] * 3, _DOWN[1]), _DOWN, count=count)
        up = read.choices("up_block_types", (_UP[1], *_UP[:1] * 3), _UP, count=count)
        heads = read.integers("attention_head_dim", 8, most=MAX_COUNT, count=count)
        context_dims = read.integers("cross_attention_dim", 1280, count=count)
        if len(set(context_dims)) > 1:
            raise read.error("cross_attention_dim", "all blocks must have the same")
        groups = read.integer("norm_num_groups", 32)
        for block_channels, block_heads in zip(channels, heads, strict=True):
            read.divides("norm_num_groups", groups, block_channels)
            read.divides("attention_head_dim", block_heads, block_channels)
        read.divides("block_out_channels", 2, channels[0])
        time_dim = channels[0] * 4
        if config.get("time_embedding_dim") is not None:
            time_dim = read.integer("time_embedding_dim", time_dim)
        read.flag("upcast_attention", False)
        layers = read.integers("layers_per_block", 2, most=MAX_COUNT, count=count)
        transformers = read.integers("transformer_layers_per_block", 1, most=MAX_COUNT, count=count)
        if sum(n * (1 + deep) for n, deep in zip(layers, transformers, strict=True)) > MAX_BLOCKS:
            rule = f"with layers_per_block {layers} that makes more than {MAX_BLOCKS} blocks"
            raise read.error("transformer_layers_per_block", rule)
        return cls(
            in_channels=read.integer("in_channels", 4),
            out_channels=read.integer("out_channels", 4),
            channels=channels,
            layers=layers,
            down_attention=tuple(name == _DOWN[0] for name in down),
            up_attention=tuple(name == _UP[0] for name in reversed(up)),
            transformer_layers=transformers,
            heads=heads,
            context_dim=context_dims[0],
            groups=groups,
            eps=read.number("norm_eps", 1e-5),
            linear_projection=read.flag("use_linear_projection", False),
            time_dim=time_dim,
            flip_sin_to_cos=read.flag("flip_sin_to_cos", True),
            freq_shift=read.integer("freq_shift", 0, least=0, most=1),
        )


_VAE_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class VAESpec:
    """Shape of one autoencoder; `channels` has one entry per resolution, finest first.

    scaling_factor: the UNet's latents are the posterior times this.
    """

    in_channels: int
    out_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    layers: int
    groups: int
    scaling_factor: float
    quant_conv: bool
    post_quant_conv: bool
    mid_attention: bool

    @property
    def factor(self) -> int:
        """Pixels per latent cell and side."""
        return 1 << (len(self.channels) - 1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VAESpec:
        """Read diffusers' vae/config.json (AutoencoderKL).

        Raises CheckpointError that names the key, its value and what is supported.
        """
        read = ConfigReader("vae", config)
        read.refuse_unless(_VAE_SUPPORTED)
        channels = read.integers("block_out_channels", (64,))
        count = len(channels)
        read.choices("down_block_types", ("DownEncoderBlock2D",), ("DownEncoderBlock2D",), count=count)
        read.choices("up_block_types", ("UpDecoderBlock2D",), ("UpDecoderBlock2D",), count=count)
        groups = read.integer("norm_num_groups", 32)
        for block_channels in channels:
            read.divides("norm_num_groups", groups, block_channels)
        scaling_factor = read.number("scaling_factor", 0.18215)
        if scaling_factor == 0.0:
            raise read.error("scaling_factor", "it must be above zero")
        return cls(
            in_channels=read.integer("in_channels", 3),
            out_channels=read.integer("out_channels", 3),
            latent_channels=read.integer("latent_channels", 4),
            channels=channels,
            layers=read.integer("layers_per_block", 1, most=MAX_BLOCKS // MAX_LEVELS),
            groups=groups,
            scaling_factor=scaling_factor,
            quant_conv=read.flag("use_quant_conv", True),
            post_quant_conv=read.flag("use_post_quant_conv", True),
            mid_attention=read.flag("mid_block_add_attention", True),
        )


_CLIP_SUPPORTED: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("gelu", "quick_gelu")}


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec:
    """Shape of a stack of CLIP layers. activation: `gelu` or `quick_gelu`."""

    width: int
    inner: int
    layers: int
    heads: int
    activation: str
    eps: float

    @classmethod
    def read(cls, read: ConfigReader, *, width: int, inner: int, heads: int) -> EncoderSpec:
        """The stack of one CLIP tower; width, inner and heads are the defaults of its config class."""
        read.refuse_unless(_CLIP_SUPPORTED)
        spec = cls(
            width=read.integer("hidden_size", width),
            inner=read.integer("intermediate_size", inner),
            layers=read.integer("num_hidden_layers", 12, most=MAX_COUNT),
            heads=read.integer("num_attention_heads", heads, most=MAX_COUNT),
            activation=str(read.config.get("hidden_act", "quick_gelu")),
            eps=read.number("layer_norm_eps", 1e-5),
        )
        read.divides("num_attention_heads", spec.heads, spec.width)
        return spec


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSpec:
    """Shape of one text encoder. positions: the length of a prompt in tokens."""

    encoder: EncoderSpec
    vocabulary: int
    positions: int

    @property
    def width(self) -> int:
        """Width of the context that the UNet attends to."""
        return self.encoder.width

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TextSpec:
        """Read transformers' text_encoder/config.json (CLIPTextModel).

        Raises CheckpointError that names the key, its value and what is supported.
        """
        read = ConfigReader("text_encoder", config)
        return cls(
            encoder=EncoderSpec.read(read, width=512, inner=2048, heads=8),
            vocabulary=read.integer("vocab_size", 49408),
            positions=read.integer("max_position_embeddings", 77),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSpec:
    """Shape of the safety checker's image network. image_size, patch_size: pixels per side."""

    encoder: EncoderSpec
    in_channels: int
    image_size: int
    patch_size: int
    projection_dim: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VisionSpec:
        """Read diffusers' safety_checker/config.json.

        Old files hold the tower twice; `vision_config_dict` wins over `vision_config`, as in transformers.
        Raises CheckpointError that names the key, its value and what is supported.
        """
        tower = config.get("vision_config_dict") or config.get("vision_config") or {}
        if not isinstance(tower, Mapping):
            raise ConfigReader("safety_checker", config).error("vision_config", "it must be a mapping")
        read = ConfigReader("safety_checker", tower)
        spec = cls(
            encoder=EncoderSpec.read(read, width=768, inner=3072, heads=12),
            in_channels=read.integer("num_channels", 3),
            image_size=read.integer("image_size", 224, most=4096),
            patch_size=read.integer("patch_size", 32, most=4096),
            projection_dim=ConfigReader("safety_checker", config).integer("projection_dim", 512),
        )
        if spec.image_size < spec.patch_size:
            raise read.error("patch_size", f"it must not be above image_size, {spec.image_size}")
        return spec
