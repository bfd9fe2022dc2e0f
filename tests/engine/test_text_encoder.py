"""The lean text encoder against transformers' CLIPTextModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from random_networks import randomise, relative_error
from ritocco.errors import CheckpointError
from ritocco.nets.io import text_encoder_io
from ritocco.nets.text_encoder import TextEncoder, TextSpec

SD2: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
SD1: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "layer_norm_eps": 1e-4,
}
CONFIGS = {"sd2": {**SD2, **SMALL}, "sd1": {**SD1, **SMALL}}


def reference_text_encoder(config: dict[str, Any]) -> Any:
    make: Any = transformers.CLIPTextModel
    encoder = make(transformers.CLIPTextConfig(**config)).eval().requires_grad_(False)
    randomise(encoder, 0)
    return encoder


def disk_name(name: str) -> str:
    """transformers 5 drops this prefix in memory; checkpoints have it."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def sharing_text_encoder(reference: Any) -> TextEncoder:
    """Our network on the same tensors, built empty as the checkpoint loader does."""
    with torch.device("meta"):
        encoder = TextEncoder(TextSpec.from_config(reference.config.to_dict()))
    encoder.load_state_dict(
        {disk_name(name): tensor for name, tensor in reference.state_dict().items()}, assign=True
    )
    return encoder


def tokens(vocabulary: int, rows: int = 3) -> Tensor:
    return torch.randint(0, vocabulary, (rows, 77), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_names_are_those_of_the_checkpoints(name: str, tmp_path: Path) -> None:
    reference = reference_text_encoder(CONFIGS[name])
    reference.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        names = {disk_name(key) for key in stored.keys()}  # noqa: SIM118
    encoder = sharing_text_encoder(reference)
    assert set(encoder.state_dict()) == names - {"text_model.embeddings.position_ids"}
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not list(encoder.buffers())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_float32_parity(name: str) -> None:
    reference = reference_text_encoder(CONFIGS[name])
    ids = tokens(300)
    assert relative_error(sharing_text_encoder(reference)(ids), reference(ids)[0]) <= 1e-5


@pytest.mark.parametrize("name", list(CONFIGS))
def test_bfloat16_is_no_worse_than_twice_transformers(name: str) -> None:
    reference = reference_text_encoder(CONFIGS[name])
    for parameter in reference.parameters():
        parameter.copy_(parameter.bfloat16())
    ids = tokens(300)
    truth = reference(ids)[0]
    reference.bfloat16()
    result = sharing_text_encoder(reference)(ids)
    assert result.dtype == torch.bfloat16
    assert relative_error(result, truth) <= 2 * relative_error(reference(ids)[0], truth)


def test_a_token_does_not_see_later_ones() -> None:
    encoder = sharing_text_encoder(reference_text_encoder(CONFIGS["sd2"]))
    ids = tokens(300, rows=1).repeat(2, 1)
    ids[1, 40] = (ids[1, 40] + 1) % 300
    first, second = encoder(ids)
    assert relative_error(first[:40], second[:40]) <= 1e-6
    assert relative_error(first[40:], second[40:]) > 1e-3


def test_io_describes_the_network() -> None:
    encoder = sharing_text_encoder(reference_text_encoder(CONFIGS["sd1"]))
    io = text_encoder_io(encoder.spec, dtype="float32")
    assert (io.inputs[0].name, io.inputs[0].dtype, io.outputs[0].name) == ("tokens", "int64", "context")
    result = encoder(torch.zeros(io.inputs[0].resolve({"N": 2}), dtype=torch.int64))
    assert tuple(result.shape) == io.outputs[0].resolve({"N": 2}) == (2, 77, 48)


def test_specs_of_the_real_checkpoints() -> None:
    sd2, sd1 = TextSpec.from_config(SD2), TextSpec.from_config(SD1)
    assert (sd2.width, sd2.encoder.layers, sd2.encoder.activation) == (1024, 23, "gelu")
    assert (sd1.width, sd1.encoder.layers, sd1.encoder.activation) == (768, 12, "quick_gelu")
    assert (sd2.vocabulary, sd2.positions) == (49408, 77)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in TextEncoder(sd2).parameters()) == 340_387_840
        assert sum(parameter.numel() for parameter in TextEncoder(sd1).parameters()) == 123_060_480


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("hidden_act", None),
        ("num_attention_heads", 5),
        ("num_hidden_layers", 10**9),
        ("hidden_size", "768"),
        ("vocab_size", -1),
        ("layer_norm_eps", None),
    ],
)
def test_unsupported_configs_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"^text_encoder config: {key}"):
        TextSpec.from_config({**SD1, key: value})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("config", [SD2, SD1], ids=["sd2", "sd1"])
def test_full_size_parity(config: dict[str, Any]) -> None:
    reference = reference_text_encoder(config)
    ids = tokens(49408, rows=2)
    truth = reference(ids)[0]
    assert relative_error(sharing_text_encoder(reference)(ids), truth) <= 1e-5
    reference.bfloat16()
    theirs = relative_error(reference(ids)[0], truth)
    assert relative_error(sharing_text_encoder(reference)(ids), truth) <= 2 * theirs
