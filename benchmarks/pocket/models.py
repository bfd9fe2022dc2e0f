"""The shapes of the three networks and the schedule, as diffusers and transformers define them."""

from __future__ import annotations

from typing import Any

VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 64, 96, 128),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,  # few: with two channels a group, a norm forgets the colour
    "sample_size": 512,
    "mid_block_add_attention": False,
}
UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 9,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (64, 128, 192),
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": (1, 2, 3),  # heads per level: 64 channels each
    "norm_num_groups": 8,
    "use_linear_projection": True,
}
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "projection_dim": 128,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "clip_sample": False,
}
