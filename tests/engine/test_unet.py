"""The lean UNet against diffusers' UNet2DConditionModel, and its hoisted form against its plain one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, cast

import diffusers
import pytest
import torch
from torch import Tensor, nn

from random_networks import randomise, relative_error
from ritocco.errors import CheckpointError
from ritocco.live_memory import Live
from ritocco.nets.blocks import Attention, FeedForward, ResnetBlock
from ritocco.nets.io import unet_io, unet_once_io
from ritocco.nets.unet import UNet, UNetSpec

SD2: dict[str, Any] = {
    "in_channels": 9,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD1: dict[str, Any] = {"in_channels": 9, "attention_head_dim": 8, "cross_attention_dim": 768}
SMALL = {"block_out_channels": [32, 64, 96, 96], "norm_num_groups": 16, "cross_attention_dim": 40}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd2": {**SD2, **SMALL, "attention_head_dim": [1, 2, 4, 4]},
    "sd1": {**SD1, **SMALL, "layers_per_block": 1},
    "pocket": {
        "in_channels": 9,
        "block_out_channels": [32, 64, 96],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": [1, 2, 1],
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 24,
        "attention_head_dim": [1, 2, 3],
        "use_linear_projection": True,
        "upcast_attention": True,
        "norm_num_groups": 32,
        "norm_eps": 1e-4,
    },
    "middle-only": {
        "in_channels": 9,
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "time_embedding_dim": 48,
    },
}


def reference_unet(config: dict[str, Any], seed: int = 0) -> nn.Module:
    make: Any = diffusers.UNet2DConditionModel
    unet: nn.Module = make(**config).eval().requires_grad_(False)
    randomise(unet, seed)
    return unet


def sharing_unet(reference: nn.Module) -> UNet:
    """Our network on the same tensors, built empty as the checkpoint loader does."""
    config: Any = reference.config
    with torch.device("meta"):
        unet = UNet(UNetSpec.from_config(dict(config)))
    unet.load_state_dict(reference.state_dict(), assign=True)
    return unet


def inputs(spec: UNetSpec, rows: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(rows, spec.in_channels, height, width, generator=generator)
    timestep = torch.tensor([999.0, 3.25, 500.0, 1.0])[:rows]
    return sample, timestep, torch.randn(rows, 77, spec.context_dim, generator=generator)


def evaluate(reference: nn.Module, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    result: Tensor = reference(sample, timestep, context, return_dict=False)[0]
    return result


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, UNet]:
    reference = reference_unet(CONFIGS[request.param])
    return reference, sharing_unet(reference)


def test_names_are_those_of_the_checkpoints(pair: tuple[nn.Module, UNet]) -> None:
    reference, unet = pair
    ours = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}


def test_parameters_are_frozen_and_shared(pair: tuple[nn.Module, UNet]) -> None:
    reference, unet = pair
    theirs = {tensor.data_ptr() for tensor in reference.parameters()}
    assert {tensor.data_ptr() for tensor in unet.parameters()} == theirs
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert not list(unet.buffers())


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 8)])
def test_float32_parity(pair: tuple[nn.Module, UNet], height: int, width: int) -> None:
    reference, unet = pair
    arguments = inputs(unet.spec, 3, height, width)
    assert relative_error(unet(*arguments), evaluate(reference, *arguments)) <= 1e-5


def test_channels_last_parity(pair: tuple[nn.Module, UNet]) -> None:
    reference, unet = pair
    sample, timestep, context = inputs(unet.spec, 2, 16, 8)
    truth = evaluate(reference, sample, timestep, context)
    last = sharing_unet(reference)
    for parameter in last.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.to(memory_format=torch.channels_last)
    result = last(sample.to(memory_format=torch.channels_last), timestep, context)
    assert relative_error(result, truth) <= 1e-5


@pytest.mark.parametrize("name", list(CONFIGS))
def test_bfloat16_is_no_worse_than_twice_diffusers(name: str) -> None:
    reference = reference_unet(CONFIGS[name])
    for parameter in reference.parameters():
        parameter.copy_(parameter.bfloat16())
    sample, timestep, context = inputs(sharing_unet(reference).spec, 2, 16, 16)
    sample, context = sample.bfloat16(), context.bfloat16()
    truth = evaluate(reference, sample.float(), timestep, context.float())
    reference.bfloat16()
    theirs = relative_error(evaluate(reference, sample, timestep, context), truth)
    result = sharing_unet(reference)(sample, timestep, context)
    assert result.dtype == torch.bfloat16
    assert relative_error(result, truth) <= 2 * theirs


def test_the_contract_knows_the_hoisted_shapes(pair: tuple[nn.Module, UNet]) -> None:
    unet = pair[1]
    io = unet_once_io(unet.spec, tokens=77, dtype="float32")
    sizes = {"R": 3, "M": 2, "H": 16, "W": 8}
    timesteps, context, condition = (port.resolve(sizes) for port in io.inputs)
    layers = unet.hoist_context(torch.zeros(context))
    found = (
        unet.hoist_timesteps(torch.zeros(timesteps)),
        unet.hoist_condition(torch.zeros(condition)),
        *(tensor for keys_values in layers for tensor in keys_values),
    )
    assert [tuple(tensor.shape) for tensor in found] == [port.resolve(sizes) for port in io.outputs]


def test_step_with_hoisted_parts_is_forward(pair: tuple[nn.Module, UNet]) -> None:
    """Time vectors of a whole table at once, conditions once per image: the same numbers as all at once."""
    _, unet = pair
    sample, timestep, context = inputs(unet.spec, 2, 16, 8)
    table = torch.tensor([7.0, 3.25, 999.0, 42.0])
    result = unet.step(
        sample[:, :4],
        unet.hoist_timesteps(table)[[2, 1]],
        torch.cat([unet.hoist_condition(each[None]) for each in sample[:, 4:]]),
        unet.hoist_context(context),
        None,
    )
    assert relative_error(result, unet(sample, timestep, context)) <= 1e-5


def test_rows_share_their_lane(pair: tuple[nn.Module, UNet]) -> None:
    """Three lanes, the middle one unguided: five rows equal five plain rows of diffusers."""
    reference, unet = pair
    sample, timestep, _ = inputs(unet.spec, 3, 16, 8)
    context = torch.randn(5, 77, unet.spec.context_dim, generator=torch.Generator().manual_seed(2))
    rows = torch.tensor([0, 0, 1, 2, 2])
    result = unet.step(
        sample[:, :4],
        unet.hoist_timesteps(timestep),
        unet.hoist_condition(sample[:, 4:]),
        unet.hoist_context(context),
        rows,
    )
    truth = evaluate(reference, sample[rows], timestep[rows], context)
    assert result.shape == truth.shape
    assert relative_error(result, truth) <= 1e-5
    assert relative_error(result[3], truth[4]) > 1e-3


def test_prefix_is_computed_per_lane() -> None:
    """Two lanes as far as the first self-attention, four rows from the first cross-attention on."""
    unet = sharing_unet(reference_unet(CONFIGS["sd2"]))
    sample, timestep, _ = inputs(unet.spec, 2, 16, 8)
    context = torch.randn(4, 77, unet.spec.context_dim, generator=torch.Generator().manual_seed(2))
    seen: dict[str, int] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, _arguments: tuple[Tensor, ...], result: Tensor) -> None:
            seen[name] = result.shape[0]

        return hook

    watched = [name for name, module in unet.named_modules() if isinstance(module, (ResnetBlock, Attention))]
    for name in watched:
        unet.get_submodule(name).register_forward_hook(remember(name))
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    unet.step(
        sample[:, :4],
        unet.hoist_timesteps(timestep),
        unet.hoist_condition(sample[:, 4:]),
        unet.hoist_context(context),
        torch.tensor([0, 0, 1, 1]),
    )
    assert (seen["down_blocks.0.resnets.0"], seen[f"{block}.attn1"], seen[f"{block}.attn2"]) == (2, 2, 4)
    assert seen["down_blocks.0.resnets.1"] == 4


# Resnets: 2 down, 2 in the middle, 4 up, two norms each; then the last norm. Transformers: 1 + 2, with three
# layer norms each, two of them behind a residual.
CALLS = {
    "groupnorm": 3,
    "groupnorm_silu": 2 * 8 + 1,
    "geglu": 3,
    "layernorm": 3,
    "add_layernorm": 2 * 3,
    "upsample": 1,
}
LATE_CALLS = {
    **CALLS,
    "groupnorm_silu": 4 + 1,
    "joined_groupnorm_silu": 4,
    "shifted_groupnorm_silu": 8,
    "add_bias": 8,
}


@pytest.mark.parametrize(("late", "wanted"), [(False, CALLS), (True, LATE_CALLS)])
def test_ops_of_the_table_are_used(late: bool, wanted: dict[str, int]) -> None:
    """No layer goes round its table; and what comes late is the same."""
    reference = reference_unet(CONFIGS["middle-only"])
    unet = sharing_unet(reference)
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return getattr(unet.ops, name)(*arguments)

        return call

    names = [field.name for field in fields(unet.ops) if field.name != "late"]
    ops = replace(unet.ops, late=late, **{name: counted(name) for name in names})
    counting = UNet(unet.spec, ops)
    counting.load_state_dict(reference.state_dict(), assign=True)
    given = inputs(unet.spec, 1, 8, 8)
    assert torch.allclose(counting(*given), unet(*given), atol=1e-5)
    assert calls == wanted


def test_a_bound_on_feed_forward_layers_changes_rounding_alone() -> None:
    unet = sharing_unet(reference_unet(CONFIGS["pocket"]))
    given = inputs(unet.spec, 2, 16, 8)
    whole = unet(*given)
    layers = [module for module in unet.modules() if isinstance(module, FeedForward)]
    width = cast(nn.Linear, layers[0].net[2]).out_features
    x = torch.rand(2, 60, width, generator=torch.Generator().manual_seed(0))
    peaks = []
    for most in (None, 50 * 8 * width * 4, 1):  # all, 50 tokens at once, one
        if most is not None:
            unet.bound_feed_forward(most)
        assert all(layer.most == most for layer in layers)
        assert relative_error(unet(*given), whole) <= 1e-5
        with Live() as live:
            layers[0](x)
        peaks.append(live.most)
    assert peaks[0] > peaks[1] > peaks[2]


def test_io_describes_the_network() -> None:
    unet = sharing_unet(reference_unet(CONFIGS["pocket"]))
    io = unet_io(unet.spec, tokens=77, dtype="float32")
    assert io.multiples == {"H": 4, "W": 4}
    sizes = {"M": 3, "H": 3 * io.multiples["H"], "W": 2 * io.multiples["W"]}
    dtypes = {"float32": torch.float32}
    arguments = [torch.rand(port.resolve(sizes)).to(dtypes[port.dtype]) for port in io.inputs]
    assert [port.name for port in io.inputs] == ["sample", "timestep", "context"]
    assert tuple(unet(*arguments).shape) == io.outputs[0].resolve(sizes)
    with pytest.raises(KeyError):
        io.inputs[0].resolve({"M": 1})


def test_exports_with_free_batch_height_and_width() -> None:
    """No branch on data or on a size: what the ONNX exporter needs."""
    unet = sharing_unet(reference_unet(CONFIGS["middle-only"]))
    rows = torch.export.Dim("rows", min=1, max=8)
    height, width = torch.export.Dim("height", min=2, max=32), torch.export.Dim("width", min=2, max=32)
    program = torch.export.export(
        unet,
        inputs(unet.spec, 2, 16, 8),
        dynamic_shapes=({0: rows, 2: 2 * height, 3: 2 * width}, {0: rows}, {0: rows}),
    )
    other = inputs(unet.spec, 3, 12, 24)
    assert relative_error(program.module()(*other), unet(*other)) <= 1e-6


def test_specs_of_the_real_checkpoints() -> None:
    sd2, sd1 = UNetSpec.from_config(SD2), UNetSpec.from_config(SD1)
    assert (sd2.heads, sd2.context_dim, sd2.linear_projection) == ((5, 10, 20, 20), 1024, True)
    assert (sd1.heads, sd1.context_dim, sd1.linear_projection) == ((8, 8, 8, 8), 768, False)
    for spec in (sd2, sd1):
        assert spec.channels == (320, 640, 1280, 1280)
        assert spec.down_attention == spec.up_attention == (True, True, True, False)
        assert (spec.layers, spec.size_multiple, spec.time_dim) == ((2, 2, 2, 2), 8, 1280)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in UNet(sd2).parameters()) == 865_925_124


def test_keys_that_do_not_matter_are_ignored() -> None:
    extra = {"sample_size": 64, "dropout": 0.1, "_diffusers_version": "0.10", "nobody_knows": 1}
    assert UNetSpec.from_config({**SD2, **extra}) == UNetSpec.from_config(SD2)
    neutral = {"class_embed_type": None, "only_cross_attention": [False, False, False, False]}
    assert UNetSpec.from_config({**SD2, **neutral}) == UNetSpec.from_config(SD2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_embed_type", "timestep"),
        ("addition_embed_type", "text_time"),
        ("num_attention_heads", 8),
        ("act_fn", "gelu"),
        ("resnet_time_scale_shift", "scale_shift"),
        ("dual_cross_attention", True),
        ("only_cross_attention", True),
        ("only_cross_attention", [True, False, False, False]),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("mid_block_type", None),
        ("encoder_hid_dim", 768),
        ("time_embedding_type", "fourier"),
        ("conv_in_kernel", 5),
        ("conv_in_kernel", True),
        ("center_input_sample", True),
        ("resnet_out_scale_factor", 1.5),
        ("down_block_types", ["AttnDownBlock2D"] * 4),
        ("down_block_types", ["DownBlock2D"] * 3),
        ("up_block_types", "UpBlock2D"),
        ("up_block_types", [["UpBlock2D"]] * 4),
        ("cross_attention_dim", [768, 768, 768, 1024]),
        ("cross_attention_dim", None),
        ("transformer_layers_per_block", [[1, 1], 1, 1, 1]),
        ("block_out_channels", []),
        ("block_out_channels", [320, 640, 1280, -1]),
        ("block_out_channels", [320, 640, 1280, 1300]),
        ("layers_per_block", 10**9),
        ("layers_per_block", [2, 2]),
        ("attention_head_dim", 7),
        ("attention_head_dim", 0),
        ("norm_num_groups", None),
        ("norm_eps", float("nan")),
        ("norm_eps", "small"),
        ("use_linear_projection", 1),
        ("in_channels", 9.0),
        ("upcast_attention", "yes"),
    ],
)
def test_unsupported_configs_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        UNetSpec.from_config({**SD1, key: value})
    message = str(caught.value)
    assert message.startswith("unet config: ")
    assert key.removeprefix("block_out_") in message or "norm_num_groups" in message


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("config", [SD2, SD1], ids=["sd2", "sd1"])
@pytest.mark.parametrize("cells", [32, 64])
def test_full_size_parity(config: dict[str, Any], cells: int) -> None:
    reference = reference_unet(config)
    unet = sharing_unet(reference)
    rows = torch.tensor([0, 0])
    sample, timestep, _ = inputs(unet.spec, 1, cells, cells)
    context = inputs(unet.spec, 2, 8, 8)[2]
    truth = evaluate(reference, sample[rows], timestep[rows], context)
    time, condition = unet.hoist_timesteps(timestep), unet.hoist_condition(sample[:, 4:])
    result = unet.step(sample[:, :4], time, condition, unet.hoist_context(context), rows)
    assert relative_error(result, truth) <= 1e-5
    if cells == 32:
        assert relative_error(unet(sample[rows], timestep[rows], context), truth) <= 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("config", [SD2, SD1], ids=["sd2", "sd1"])
def test_full_size_bfloat16(config: dict[str, Any]) -> None:
    reference = reference_unet(config)
    arguments = inputs(UNetSpec.from_config(config), 1, 32, 32)
    truth = evaluate(reference, *arguments)
    reference.bfloat16()
    unet = sharing_unet(reference)
    sample, timestep, context = arguments[0].bfloat16(), arguments[1], arguments[2].bfloat16()
    theirs = relative_error(evaluate(reference, sample, timestep, context), truth)
    assert relative_error(unet(sample, timestep, context), truth) <= 2 * theirs
