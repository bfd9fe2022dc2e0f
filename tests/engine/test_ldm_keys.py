"""Single files in LDM naming, against diffusers' own conversion of the same tensors.

The names are written down from the original code base's modules (openaimodel.UNetModel, the autoencoder's
Encoder and Decoder, open_clip's text tower), at small widths but with all levels, blocks and layers.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ritocco import ldm_keys
from ritocco.checkpoint import load_network, load_tokenizer, open_checkpoint
from ritocco.checkpoint_report import verify
from ritocco.errors import CheckpointError
from ritocco.parameters import NetworkName

WIDTHS, CONTEXT, VOCABULARY, TEXT_LAYERS = (8, 16, 16, 16), 16, 610, 3
Shapes = dict[str, tuple[int, ...]]


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _conv(name: str, outputs: int, inputs: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def _unet_resnet(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = {
        **_norm(f"{name}.in_layers.0", inputs),
        **_conv(f"{name}.in_layers.2", outputs, inputs),
        **_linear(f"{name}.emb_layers.1", outputs, 4 * WIDTHS[0]),
        **_norm(f"{name}.out_layers.0", outputs),
        **_conv(f"{name}.out_layers.3", outputs, outputs),
    }
    return shapes | (_conv(f"{name}.skip_connection", outputs, inputs, 1) if inputs != outputs else {})


def _unet_attention(name: str, width: int, *, linear: bool) -> Shapes:
    block = f"{name}.transformer_blocks.0"
    shapes = _norm(f"{name}.norm", width)
    for projection in ("proj_in", "proj_out"):
        full = f"{name}.{projection}"
        shapes |= _linear(full, width, width) if linear else _conv(full, width, width, 1)
    for attention, inputs in (("attn1", width), ("attn2", CONTEXT)):
        shapes |= {f"{block}.{attention}.to_q.weight": (width, width)}
        shapes |= {f"{block}.{attention}.to_{x}.weight": (width, inputs) for x in "kv"}
        shapes |= _linear(f"{block}.{attention}.to_out.0", width, width)
    shapes |= _linear(f"{block}.ff.net.0.proj", 8 * width, width) | _linear(
        f"{block}.ff.net.2", width, 4 * width
    )
    for number in (1, 2, 3):
        shapes |= _norm(f"{block}.norm{number}", width)
    return shapes


def _unet_shapes(*, linear: bool, channels: int = 9) -> Shapes:
    width, time = WIDTHS[0], 4 * WIDTHS[0]
    shapes = _linear("time_embed.0", time, width) | _linear("time_embed.2", time, time)
    shapes |= _conv("input_blocks.0.0", width, channels)
    skips, number = [width], 1
    for level, outputs in enumerate(WIDTHS):
        for _ in range(2):
            shapes |= _unet_resnet(f"input_blocks.{number}.0", width, outputs)
            if level < 3:
                shapes |= _unet_attention(f"input_blocks.{number}.1", outputs, linear=linear)
            width = outputs
            skips.append(width)
            number += 1
        if level < 3:
            shapes |= _conv(f"input_blocks.{number}.0.op", width, width)
            skips.append(width)
            number += 1
    shapes |= _unet_resnet("middle_block.0", width, width) | _unet_resnet("middle_block.2", width, width)
    shapes |= _unet_attention("middle_block.1", width, linear=linear)
    number = 0
    for level, outputs in reversed(list(enumerate(WIDTHS))):
        for place in range(3):
            shapes |= _unet_resnet(f"output_blocks.{number}.0", width + skips.pop(), outputs)
            width = outputs
            if level < 3:
                shapes |= _unet_attention(f"output_blocks.{number}.1", width, linear=linear)
            if level > 0 and place == 2:
                shapes |= _conv(f"output_blocks.{number}.{2 if level < 3 else 1}.conv", width, width)
            number += 1
    return shapes | _norm("out.0", width) | _conv("out.2", 4, width)


def _vae_resnet(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", inputs) | _conv(f"{name}.conv1", outputs, inputs)
    shapes |= _norm(f"{name}.norm2", outputs) | _conv(f"{name}.conv2", outputs, outputs)
    return shapes | (_conv(f"{name}.nin_shortcut", outputs, inputs, 1) if inputs != outputs else {})


def _vae_middle(side: str, width: int) -> Shapes:
    shapes = _vae_resnet(f"{side}.mid.block_1", width, width) | _vae_resnet(
        f"{side}.mid.block_2", width, width
    )
    for name in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{side}.mid.attn_1.{name}", width, width, 1)
    return shapes | _norm(f"{side}.mid.attn_1.norm", width)


def _vae_shapes() -> Shapes:
    width = WIDTHS[0]
    shapes = _conv("encoder.conv_in", width, 3)
    for level, outputs in enumerate(WIDTHS):
        for place in range(2):
            shapes |= _vae_resnet(f"encoder.down.{level}.block.{place}", width, outputs)
            width = outputs
        if level < 3:
            shapes |= _conv(f"encoder.down.{level}.downsample.conv", width, width)
    shapes |= (
        _vae_middle("encoder", width) | _norm("encoder.norm_out", width) | _conv("encoder.conv_out", 8, width)
    )
    shapes |= _conv("decoder.conv_in", width, 4) | _vae_middle("decoder", width)
    for level, outputs in reversed(list(enumerate(WIDTHS))):
        for place in range(3):
            shapes |= _vae_resnet(f"decoder.up.{level}.block.{place}", width, outputs)
            width = outputs
        if level > 0:
            shapes |= _conv(f"decoder.up.{level}.upsample.conv", width, width)
    shapes |= _norm("decoder.norm_out", width) | _conv("decoder.conv_out", 3, width)
    return shapes | _conv("quant_conv", 8, 8, 1) | _conv("post_quant_conv", 4, 4, 1)


def _open_clip_shapes() -> Shapes:
    shapes: Shapes = {
        "token_embedding.weight": (VOCABULARY, CONTEXT),
        "positional_embedding": (77, CONTEXT),
        "text_projection": (CONTEXT, CONTEXT),
        "logit_scale": (),
        **_norm("ln_final", CONTEXT),
    }
    for layer in range(24):
        name = f"transformer.resblocks.{layer}"
        shapes |= {
            f"{name}.attn.in_proj_weight": (3 * CONTEXT, CONTEXT),
            f"{name}.attn.in_proj_bias": (3 * CONTEXT,),
        }
        shapes |= _linear(f"{name}.attn.out_proj", CONTEXT, CONTEXT)
        shapes |= _norm(f"{name}.ln_1", CONTEXT) | _norm(f"{name}.ln_2", CONTEXT)
        shapes |= _linear(f"{name}.mlp.c_fc", 4 * CONTEXT, CONTEXT)
        shapes |= _linear(f"{name}.mlp.c_proj", CONTEXT, 4 * CONTEXT)
    return shapes


def _clip_shapes() -> Shapes:
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (VOCABULARY, CONTEXT),
        "text_model.embeddings.position_embedding.weight": (77, CONTEXT),
        **_norm("text_model.final_layer_norm", CONTEXT),
    }
    for layer in range(TEXT_LAYERS):
        name = f"text_model.encoder.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{name}.self_attn.{projection}", CONTEXT, CONTEXT)
        shapes |= _norm(f"{name}.layer_norm1", CONTEXT) | _norm(f"{name}.layer_norm2", CONTEXT)
        shapes |= _linear(f"{name}.mlp.fc1", 4 * CONTEXT, CONTEXT) | _linear(
            f"{name}.mlp.fc2", CONTEXT, 4 * CONTEXT
        )
    return shapes


def _tensors(family: str, channels: int = 9) -> dict[str, torch.Tensor]:
    parts = {
        "model.diffusion_model.": _unet_shapes(linear=family == "sd2", channels=channels),
        "first_stage_model.": _vae_shapes(),
        ("cond_stage_model.model." if family == "sd2" else "cond_stage_model.transformer."): (
            _open_clip_shapes() if family == "sd2" else _clip_shapes()
        ),
    }
    generator = torch.Generator().manual_seed(5)
    tensors = {
        prefix + name: torch.randn(shape, generator=generator)
        for prefix, shapes in parts.items()
        for name, shape in shapes.items()
    }
    # What training leaves in such files.
    tensors |= {
        "alphas_cumprod": torch.zeros(1000),
        "model_ema.decay": torch.zeros(()),
        "betas": torch.zeros(1000),
    }
    if family == "sd15":
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return tensors


def _configs(family: str) -> dict[str, dict[str, Any]]:
    text = {"hidden_size": CONTEXT, "intermediate_size": 4 * CONTEXT, "num_attention_heads": 2}
    layers = 23 if family == "sd2" else TEXT_LAYERS
    shape = {"block_out_channels": list(WIDTHS), "norm_num_groups": 4}
    return {
        "unet": {**shape, "attention_head_dim": 2, "cross_attention_dim": CONTEXT},
        "vae": shape,
        "text_encoder": {**text, "vocab_size": VOCABULARY, "num_hidden_layers": layers},
    }


@pytest.fixture(params=["sd2", "sd15"])
def single(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path: Path
) -> tuple[str, Path, dict[str, torch.Tensor]]:
    """(family, a single file with its tokenizer beside it, its tensors)"""
    tensors = _tensors(request.param)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copytree(tiny_checkpoint / "tokenizer", tmp_path / "tokenizer")
    return request.param, tmp_path / "model.safetensors", tensors


def _converted(
    network: str, family: str, tensors: dict[str, torch.Tensor], config: Any
) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders import single_file_utils as reference

    result: dict[str, torch.Tensor]
    if network == "unet":
        result = reference.convert_ldm_unet_checkpoint(dict(tensors), dict(config))  # type: ignore[no-untyped-call]
    elif network == "vae":
        result = reference.convert_ldm_vae_checkpoint(dict(tensors), dict(config))  # type: ignore[no-untyped-call]
    elif family == "sd2":
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=CONTEXT))
        result = reference.convert_open_clip_checkpoint(model, dict(tensors))  # type: ignore[no-untyped-call]
    else:
        result = reference.convert_ldm_clip_checkpoint(dict(tensors))  # type: ignore[no-untyped-call]
        result.pop("text_model.embeddings.position_ids")
    return result


@pytest.mark.parametrize("network", ["unet", "vae", "text_encoder"])
def test_equal_to_diffusers_conversion(
    single: tuple[str, Path, dict[str, torch.Tensor]], network: NetworkName
) -> None:
    family, file, tensors = single
    opened = open_checkpoint(file, configs=_configs(family))
    state = load_network(opened, network, dtype=torch.float32).state_dict()
    expected = _converted(network, family, tensors, opened.config(network))
    assert set(state) == set(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def test_tokenizer_beside_the_file_and_named(
    single: tuple[str, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    family, file, _ = single
    assert load_tokenizer(open_checkpoint(file, configs=_configs(family))).max_length == 77
    (tmp_path / "tokenizer").rename(tmp_path / "words")
    with pytest.raises(CheckpointError, match="carries no tokenizer"):
        open_checkpoint(file, configs=_configs(family))
    opened = open_checkpoint(file, tokenizer=tmp_path / "words", configs=_configs(family))
    assert load_tokenizer(opened).max_length == 77
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tmp_path / "words" / name, tmp_path / name)
    assert load_tokenizer(open_checkpoint(file, configs=_configs(family))).max_length == 77


def test_four_channels_are_seen_in_the_weights(tmp_path: Path) -> None:
    save_file(_tensors("sd2", channels=4), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="text-to-image"):
        open_checkpoint(tmp_path / "model.safetensors", tokenizer=tmp_path)


def test_a_tensor_that_no_rule_knows_is_unexpected(single: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    family, file, tensors = single
    tensors["model.diffusion_model.input_blocks.99999999.0.in_layers.0.weight"] = torch.zeros(8)
    tensors["model.diffusion_model.control.bias"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"unexpected: .*control\.bias"):
        load_network(open_checkpoint(file, configs=_configs(family)), "unet")


def test_other_families_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = _tensors("sd2")
    no_text = {key: value for key, value in tensors.items() if not key.startswith("cond_stage_model")}
    save_file(no_text, file)
    with pytest.raises(CheckpointError, match="no text encoder"):
        open_checkpoint(file, tokenizer=tmp_path)
    save_file({**no_text, "conditioner.embedders.0.x": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="SDXL"):
        open_checkpoint(file, tokenizer=tmp_path)


def test_shapes_that_do_not_split_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = _tensors("sd2")
    tensors["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"] = torch.zeros(47)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not 3 equal parts"):
        open_checkpoint(
            tmp_path / "model.safetensors", tokenizer=tiny_checkpoint / "tokenizer", configs=_configs("sd2")
        )


@pytest.mark.parametrize("family", ["sd2", "sd15"])
def test_default_configs_are_those_of_the_published_models(family: str) -> None:
    """Parameter counts of the published checkpoints: UNets with nine input channels, VAE, text encoders."""
    from ritocco.parameters import build

    counts = {
        "sd2": {"unet": 865_925_124, "vae": 83_653_863, "text_encoder": 340_387_840},
        "sd15": {"unet": 859_535_364, "vae": 83_653_863, "text_encoder": 123_060_480},
    }
    networks: list[NetworkName] = ["unet", "vae", "text_encoder"]
    for network in networks:
        module = build(network, ldm_keys.DEFAULT_CONFIGS[family][network])
        assert sum(parameter.numel() for parameter in module.parameters()) == counts[family][network]
    assert ldm_keys.DEFAULT_CONFIGS[family]["scheduler"]["steps_offset"] == 1


def test_report_on_a_single_file_of_odd_shapes(single: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    """Without the configs of the test's small widths the weights do not fit the published models'."""
    _, file, _ = single
    errors = [finding for finding in verify(file) if finding.level == "error"]
    assert {finding.subject for finding in errors} == {"unet", "vae", "text_encoder"}
    assert "wrong shape" in errors[0].message
