"""The safety checker against diffusers' StableDiffusionSafetyChecker and transformers' CLIPImageProcessor."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from ritocco.checkpoint import open_checkpoint
from ritocco.errors import CheckpointError, NonFiniteError
from ritocco.safety import NSFW_ERROR, ImagePreparation, SafetyChecker, flag_embeds

SIZES = [(48, 64), (64, 48), (33, 97), (20, 31), (32, 32), (7, 300)]


def _pictures(count: int, height: int, width: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    values: npt.NDArray[np.uint8] = np.random.default_rng(seed).integers(
        0, 256, (count, height, width, 3), dtype=np.uint8
    )
    return values


def _processor(config: dict[str, object]) -> Any:
    from transformers.models.clip import image_processing_pil_clip

    processor: Any = image_processing_pil_clip.CLIPImageProcessorPil
    return processor(**config)


@pytest.fixture
def safe(tiny_safety_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy whose thresholds may be changed."""
    return Path(shutil.copytree(tiny_safety_checkpoint, tmp_path / "safe"))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        {"size": 40, "crop_size": 32},
        {"size": {"shortest_edge": 20}, "crop_size": {"height": 33, "width": 32}},
        {"size": {"height": 30, "width": 34}, "do_center_crop": False, "resample": 2},
        {"do_resize": False, "crop_size": 24, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
        {"size": 32, "crop_size": 32, "do_normalize": False, "rescale_factor": 1 / 127},
    ],
    ids=lambda config: ",".join(config) or "defaults",
)
def test_preparation_equals_clip_image_processor(config: dict[str, object], size: tuple[int, int]) -> None:
    pictures = _pictures(2, *size)
    ours = ImagePreparation.from_config(config)(pictures)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _processor(config)(images=list(pictures), return_tensors="np")["pixel_values"]
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def _reference(folder: Path, pictures: npt.NDArray[np.uint8]) -> list[bool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        checker: Any = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker")
        checker.eval()
        config = json.loads(
            (folder / "feature_extractor/preprocessor_config.json").read_text(encoding="utf-8")
        )
        pixels = _processor(config)(images=list(pictures), return_tensors="pt")["pixel_values"]
    _, flagged = checker(images=[picture.copy() for picture in pictures], clip_input=pixels)
    return [bool(one) for one in flagged]


def _set_thresholds(folder: Path, concept: torch.Tensor, care: torch.Tensor) -> None:
    file = folder / "safety_checker/model.safetensors"
    tensors = load_file(file)
    tensors |= {"concept_embeds_weights": concept, "special_care_embeds_weights": care}
    save_file(tensors, file, metadata={"format": "pt"})


def _cosines(folder: Path, pictures: npt.NDArray[np.uint8]) -> tuple[torch.Tensor, torch.Tensor]:
    from ritocco.checkpoint import load_network

    opened = open_checkpoint(folder)
    network: Any = load_network(opened, "safety_checker")
    pixels = torch.from_numpy(ImagePreparation.from_config(opened.feature_extractor)(pictures))
    embeds = torch.nn.functional.normalize(network.image_embeds(pixels))
    concepts, care = (
        torch.nn.functional.normalize(t) for t in (network.concept_embeds, network.special_care_embeds)
    )
    return embeds @ concepts.T, embeds @ care.T


@pytest.mark.parametrize("special_care", [False, True])
def test_flags_equal_diffusers(safe: Path, special_care: bool) -> None:
    """Thresholds at which about half of the pictures are flagged, near enough for the 0.01 to matter."""
    pictures = _pictures(24, 40, 48, seed=3)
    pictures[::2] //= 4
    concepts, care = _cosines(safe, pictures)
    thresholds = concepts.amax(dim=0) + 0.02
    thresholds[0] = concepts[:, 0].median() + (0.005 if special_care else 0.0)
    # A threshold that no cosine exceeds switches special care off.
    _set_thresholds(safe, thresholds, care.median(dim=0).values if special_care else torch.ones(3))
    expected = _reference(safe, pictures)
    assert 0 < sum(expected) < len(expected)
    if special_care:
        _set_thresholds(safe, thresholds, torch.ones(3))
        assert _reference(safe, pictures) != expected
        _set_thresholds(safe, thresholds, care.median(dim=0).values)
    checker = SafetyChecker.load(open_checkpoint(safe))
    assert checker.flag(pictures) == expected
    assert [checker.flag(picture[None])[0] for picture in pictures] == expected


def test_nothing_is_flagged_at_threshold_one(tiny_safety_checkpoint: Path) -> None:
    checker = SafetyChecker.load(open_checkpoint(tiny_safety_checkpoint))
    assert checker.flag(_pictures(3, 64, 64)) == [False, False, False]
    assert checker.flag(_pictures(0, 64, 64)) == []


def test_special_care_lowers_the_other_thresholds() -> None:
    axis = np.eye(4, dtype=np.float32)
    image = np.array([[0.6, 0.8, 0.0, 0.0]], np.float32)

    def flagged(threshold: float, care_threshold: float) -> list[bool]:
        limits = np.array([threshold], np.float32), np.array([care_threshold], np.float32)
        return flag_embeds(image, axis[:1], limits[0], axis[1:2], limits[1])

    assert flagged(0.59, 0.9) == [True]
    assert flagged(0.605, 0.9) == [False]
    assert flagged(0.605, 0.7) == [True]
    assert flagged(0.62, 0.7) == [False]
    assert flagged(0.5997, 0.9) == [False]


def test_the_error_is_the_originals() -> None:
    assert NSFW_ERROR == "NSFW content detected. Try running it again, or try a different prompt."


def test_pictures_of_another_kind_are_refused(tiny_safety_checkpoint: Path) -> None:
    checker = SafetyChecker.load(open_checkpoint(tiny_safety_checkpoint))
    with pytest.raises(TypeError, match=r"uint8 \[N,H,W,3\]"):
        checker.flag(_pictures(1, 8, 8)[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", -1),
        ("size", {"longest_edge": 3}),
        ("size", "big"),
        ("size", True),
        ("crop_size", 10**9),
        ("crop_size", [1, 2]),
        ("resample", 99),
        ("resample", [3]),
        ("rescale_factor", 0),
        ("image_mean", [0.5]),
        ("image_mean", "abc"),
        ("image_std", [0.0, 1.0, 1.0]),
        ("image_std", [float("nan")] * 3),
    ],
)
def test_absurd_preparations_are_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"feature_extractor config: {key} is"):
        ImagePreparation.from_config({key: value})


def test_a_crop_that_the_network_does_not_read(safe: Path) -> None:
    (safe / "feature_extractor/preprocessor_config.json").unlink()
    opened = open_checkpoint(safe)
    assert any("feature_extractor" in note for note in opened.notes)
    with pytest.raises(CheckpointError, match="reads 32 x 32"):
        SafetyChecker.load(opened)


@pytest.mark.parametrize("bad", ["embeds", "thresholds", "care_thresholds"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_cannot_be_judged_does_not_pass(bad: str, value: float) -> None:
    arrays = {
        "embeds": np.ones((1, 4), np.float32),
        "concepts": -np.ones((2, 4), np.float32),
        "thresholds": np.ones(2, np.float32),
        "care": -np.ones((1, 4), np.float32),
        "care_thresholds": np.ones(1, np.float32),
    }
    assert flag_embeds(*arrays.values()) == [False]
    arrays[bad].flat[0] = value
    with pytest.raises(NonFiniteError, match="nothing was judged"), np.errstate(invalid="ignore"):
        flag_embeds(*arrays.values())
