"""The three networks and the vocabulary, as diffusers and transformers define them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from pocket.data import caption_of
from pocket.subjects import SUBJECTS

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
VOCABULARY = 1152
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def make_vocabulary(folder: Path) -> None:
    """Train the byte-pair vocabulary on the captions; write `vocab.json` and `merges.txt` as CLIP's are."""
    rng = np.random.default_rng(0)
    codes = tuple(SUBJECTS)
    captions = [caption_of(rng, code) for code in codes for _ in range(40)]
    captions += [name for names in SUBJECTS.values() for name in names] * 10 + [
        "background",
        "nothing",
        "empty",
    ] * 20
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 258,
        show_progress=False,
        end_of_word_suffix="</w>",
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [letter + "</w>" for letter in alphabet]
    vocabulary = {word: i for i, word in enumerate(words)}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    for special in (BOS, EOS):
        vocabulary[special] = len(vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "bos_token": BOS,
                "eos_token": EOS,
                "unk_token": EOS,
                "pad_token": EOS,
                "model_max_length": 77,
                "do_lower_case": True,
                "add_prefix_space": False,
            },
            indent=2,
        ),
        encoding="utf-8",
    )
