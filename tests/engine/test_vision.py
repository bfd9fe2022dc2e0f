"""The safety checker's image network against diffusers' StableDiffusionSafetyChecker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors import safe_open
from torch import Tensor

from random_networks import randomise, relative_error
from ritocco.errors import CheckpointError
from ritocco.nets.vision import SafetyVision, VisionSpec

TOWER: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 60,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
REAL: dict[str, Any] = {
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
}


def reference_checker(config: dict[str, Any]) -> Any:
    make: Any = StableDiffusionSafetyChecker
    checker = make(transformers.CLIPConfig(**config)).eval().requires_grad_(False)
    randomise(checker, 0)
    return checker


def disk_name(name: str) -> str:
    """transformers 5 drops the second prefix in memory; checkpoints have both."""
    tower = name.removeprefix("vision_model.").removeprefix("vision_model.")
    return f"vision_model.vision_model.{tower}" if name.startswith("vision_model.") else name


def sharing_vision(reference: Any) -> SafetyVision:
    """Our network on the same tensors, built empty as the checkpoint loader does."""
    with torch.device("meta"):
        vision = SafetyVision(VisionSpec.from_config(reference.config.to_dict()))
    vision.load_state_dict(
        {disk_name(name): tensor for name, tensor in reference.state_dict().items()}, assign=True
    )
    return vision


def pixels(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def reference_embeds(reference: Any, images: Tensor) -> Tensor:
    embeds: Tensor = reference.visual_projection(reference.vision_model(images)[1])
    return embeds


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def reference(request: pytest.FixtureRequest) -> Any:
    return reference_checker({"projection_dim": 40, "vision_config": {**TOWER, "hidden_act": request.param}})


def test_names_are_those_of_the_checkpoints(reference: Any, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        names = {disk_name(key) for key in stored.keys()}  # noqa: SIM118
    vision = sharing_vision(reference)
    assert set(vision.state_dict()) == names - {"vision_model.vision_model.embeddings.position_ids"}
    assert "vision_model.vision_model.pre_layrnorm.weight" in names
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in vision.state_dict().values())


def test_float32_parity(reference: Any) -> None:
    vision = sharing_vision(reference)
    result = vision.image_embeds(pixels(60))
    assert result.shape == (2, 40)
    assert relative_error(result, reference_embeds(reference, pixels(60))) <= 1e-5


def test_concepts_are_the_checkpoints(reference: Any) -> None:
    vision = sharing_vision(reference)
    for name, shape in {
        "concept_embeds": (17, 40),
        "concept_embeds_weights": (17,),
        "special_care_embeds": (3, 40),
        "special_care_embeds_weights": (3,),
    }.items():
        assert tuple(getattr(vision, name).shape) == shape
        assert torch.equal(getattr(vision, name), getattr(reference, name))


def test_old_configs_that_hold_the_tower_twice() -> None:
    """Old files repeat the tower; the second copy, with its own defaults, wins over the first."""
    config = {
        "projection_dim": 40,
        "vision_config": {**TOWER, "hidden_size": 64},
        "vision_config_dict": TOWER,
    }
    assert VisionSpec.from_config(config).encoder.width == 48
    alone = VisionSpec.from_config({"projection_dim": 40, "vision_config": TOWER, "vision_config_dict": None})
    assert alone == VisionSpec.from_config(config)
    real = VisionSpec.from_config(REAL)
    assert (real.image_size, real.patch_size, real.projection_dim, real.encoder.layers) == (224, 14, 768, 24)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("num_attention_heads", 5),
        ("patch_size", 100),
        ("image_size", [224, 224]),
        ("num_hidden_layers", 0),
    ],
)
def test_unsupported_configs_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"^safety_checker config: {key}"):
        VisionSpec.from_config({"vision_config": {**TOWER, key: value}})


def test_config_without_a_tower_mapping_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^safety_checker config: vision_config"):
        VisionSpec.from_config({"vision_config": 3})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_full_size_parity() -> None:
    reference = reference_checker(REAL)
    truth = reference_embeds(reference, pixels(224))
    assert relative_error(sharing_vision(reference).image_embeds(pixels(224)), truth) <= 1e-5
