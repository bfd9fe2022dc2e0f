"""The optional safety checker, as diffusers' `StableDiffusionSafetyChecker` decides.

An image is flagged when its CLIP embedding is closer to one of 17 concepts than that concept's threshold
allows; when it is close to one of three special-care concepts, the other thresholds drop by 0.01.
Preparation of the pictures is that of transformers' `CLIPImageProcessor`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ritocco.checkpoint import Checkpoint, load_network
from ritocco.errors import CheckpointError, NonFiniteError
from ritocco.shown import shown

if TYPE_CHECKING:
    import torch

    from ritocco.nets.vision import SafetyVision

NSFW_ERROR = "NSFW content detected. Try running it again, or try a different prompt."
"""The error of a prediction all of whose images were flagged; the original's own words."""

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_SPECIAL_CARE_ADJUSTMENT = np.float32(0.01)
_LARGEST_SIDE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePreparation:
    """How pictures become the network's input; a `preprocessor_config.json`, resolved.

    resize: (shortest edge,) or (height, width) in pixels, None for no resizing. crop: (height, width) or
    None.
    resample: Pillow's number of the filter. rescale, mean, std: None where that part is switched off.
    """

    resize: tuple[int, ...] | None = (224,)
    crop: tuple[int, int] | None = (224, 224)
    resample: int = int(Image.Resampling.BICUBIC)
    rescale: float | None = 1 / 255
    mean: tuple[float, ...] | None = _CLIP_MEAN
    std: tuple[float, ...] | None = _CLIP_STD

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> ImagePreparation:
        """Read a `preprocessor_config.json`; None means CLIP's own values, and so does a key that is missing.

        Sizes may be numbers (older files) or mappings. Raises CheckpointError that names the key and its
        value.
        """
        config = config or {}
        default = cls()
        normalise = bool(config.get("do_normalize", True))
        resample = config.get("resample", default.resample)
        if not isinstance(resample, int) or resample not in {int(r) for r in Image.Resampling}:
            raise _refused("resample", resample, "the number of a Pillow filter, 0 to 5")
        return cls(
            resize=_resize_of(config.get("size", 224)) if config.get("do_resize", True) else None,
            crop=_crop_of(config.get("crop_size", 224)) if config.get("do_center_crop", True) else None,
            resample=int(resample),
            rescale=_factor_of(config.get("rescale_factor", 1 / 255))
            if config.get("do_rescale", True)
            else None,
            mean=_three_of("image_mean", config.get("image_mean", _CLIP_MEAN)) if normalise else None,
            std=_three_of("image_std", config.get("image_std", _CLIP_STD)) if normalise else None,
        )

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """[N,H,W,3] uint8 -> [N,3,h,w] float32, normalised."""
        return np.stack([self._one(Image.fromarray(image)) for image in images])

    def _one(self, image: Image.Image) -> npt.NDArray[np.float32]:
        if self.resize is not None:
            image = image.resize(_target(image.size, self.resize), Image.Resampling(self.resample))
        pixels = np.asarray(image)
        if self.crop is not None:
            pixels = _centre_crop(pixels, *self.crop)
        # CLIPImageProcessor scales in float64 and rounds to float32 afterwards; so the digits agree.
        scale = np.float64(1.0 if self.rescale is None else self.rescale)
        values = np.multiply(pixels, scale).astype(np.float32)
        if self.mean is not None and self.std is not None:
            values = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1))


def _target(size: tuple[int, int], resize: tuple[int, ...]) -> tuple[int, int]:
    """(width, height) that a picture of this (width, height) is resized to."""
    if len(resize) == 2:
        return resize[1], resize[0]
    edge = resize[0]
    longer = int(edge * max(size) / min(size))
    return (edge, longer) if size[0] <= size[1] else (longer, edge)


class SafetyChecker:
    """Says which pictures to drop. Holds no state of a request; safe from several threads."""

    def __init__(self, network: SafetyVision, preparation: ImagePreparation) -> None:
        """network: with weights, on its device. Raises CheckpointError where picture and network sizes
        differ.
        """
        size = network.spec.image_size
        made = preparation.crop if preparation.crop is not None else preparation.resize
        if made != (size, size):
            raise CheckpointError(
                f"feature_extractor config: pictures become {made} pixels; "
                f"the safety checker reads {size} x {size}"
            )
        self.network = network
        self._preparation = preparation

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> SafetyChecker:
        """The checkpoint's safety checker. Raises CheckpointError where it has none, or a damaged one."""
        from ritocco.nets.vision import SafetyVision

        network = load_network(checkpoint, "safety_checker", device=device, dtype=dtype)
        if not isinstance(network, SafetyVision):
            raise TypeError(f"{type(network).__name__} is no safety network")
        return cls(network, ImagePreparation.from_config(checkpoint.feature_extractor))

    def flag(self, images: npt.NDArray[np.uint8]) -> list[bool]:
        """images: [N,H,W,3] uint8, as shown to the user. Returns True for each one to drop."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise TypeError(f"images are {images.dtype} {list(images.shape)}; uint8 [N,H,W,3] is needed")
        if not len(images):
            return []
        net = self.network
        embeds = self.embeds(self._preparation(images))
        concepts, thresholds, care, care_thresholds = (
            t.detach().float().cpu().numpy()
            for t in (
                net.concept_embeds,
                net.concept_embeds_weights,
                net.special_care_embeds,
                net.special_care_embeds_weights,
            )
        )
        return flag_embeds(embeds.float().cpu().numpy(), concepts, thresholds, care, care_thresholds)

    def embeds(self, pixels: npt.NDArray[np.float32]) -> torch.Tensor:
        """pixels: [N,3,side,side], prepared -> [N,D] on the network's device."""
        import torch

        weight = self.network.visual_projection.weight
        with torch.inference_mode():
            return self.network.image_embeds(
                torch.from_numpy(pixels).to(device=weight.device, dtype=weight.dtype)
            )

    @property
    def side(self) -> int:
        """Of the pictures that the network reads, in pixels."""
        return self.network.spec.image_size


def flag_embeds(
    embeds: npt.NDArray[np.float32],
    concepts: npt.NDArray[np.float32],
    thresholds: npt.NDArray[np.float32],
    care: npt.NDArray[np.float32],
    care_thresholds: npt.NDArray[np.float32],
) -> list[bool]:
    """The decision. embeds: [N,D]; concepts: [C,D], thresholds: [C]; care: [S,D], care_thresholds: [S];
    float32.

    Scores are rounded to three digits before they are compared with zero, as the original does.
    Raises NonFiniteError where a score is NaN or infinite: such a picture has not been judged.
    """
    care_scores = np.round(_cosines(embeds, care) - care_thresholds, 3)
    adjustment = np.where((care_scores > 0).any(axis=1), _SPECIAL_CARE_ADJUSTMENT, np.float32(0))
    scores = np.round(_cosines(embeds, concepts) - thresholds + adjustment[:, None], 3)
    if not (np.isfinite(scores).all() and np.isfinite(care_scores).all()):
        raise NonFiniteError(
            "the safety checker's scores hold NaN or infinity, so nothing was judged; "
            "try dtype float32 or bfloat16, or download its weights again",
            step=-1,
        )
    return [bool((row > 0).any()) for row in scores]


def _cosines(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return _unit(a) @ _unit(b).T


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    norms = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
    unit: npt.NDArray[np.float32] = vectors / np.maximum(norms, np.float32(1e-12))
    return unit


def _centre_crop(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """The middle height x width; where the picture is smaller it is set on black, as CLIPImageProcessor
    does.
    """
    have_h, have_w = pixels.shape[:2]
    pad_h, pad_w = max(0, height - have_h), max(0, width - have_w)
    if pad_h or pad_w:
        # The odd row goes before the picture.
        before_h, before_w = (pad_h + 1) // 2, (pad_w + 1) // 2
        pixels = np.pad(pixels, ((before_h, pad_h - before_h), (before_w, pad_w - before_w), (0, 0)))
        have_h, have_w = pixels.shape[:2]
    top, left = (have_h - height) // 2, (have_w - width) // 2
    return pixels[top : top + height, left : left + width]


def _resize_of(size: object) -> tuple[int, ...]:
    match size:
        case int(edge) if _is_side(edge):
            return (edge,)
        case {"shortest_edge": int(edge)} if _is_side(edge):
            return (edge,)
        case {"height": int(height), "width": int(width)} if _is_side(height) and _is_side(width):
            return (height, width)
    raise _refused(
        "size", size, f"a number of pixels up to {_LARGEST_SIDE}, a shortest_edge, or a height and width"
    )


def _crop_of(size: object) -> tuple[int, int]:
    match size:
        case int(side) if _is_side(side):
            return side, side
        case {"height": int(height), "width": int(width)} if _is_side(height) and _is_side(width):
            return height, width
    raise _refused("crop_size", size, f"a number of pixels up to {_LARGEST_SIDE}, or a height and width")


def _is_side(value: int) -> bool:
    return not isinstance(value, bool) and 0 < value <= _LARGEST_SIDE


def _factor_of(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise _refused("rescale_factor", value, "a number above 0 and up to 1")
    return float(value)


def _three_of(key: str, value: object) -> tuple[float, ...]:
    numbers: Sequence[object] = value if isinstance(value, list | tuple) else ()
    floats = tuple(float(n) for n in numbers if isinstance(n, int | float) and np.isfinite(n))
    if len(floats) != 3 or len(numbers) != 3 or (key == "image_std" and min(floats) <= 0):
        raise _refused(key, value, "three finite numbers" + (" above 0" if key == "image_std" else ""))
    return floats


def _refused(key: str, value: object, rule: str) -> CheckpointError:
    return CheckpointError(f"feature_extractor config: {key} is {shown(value)}; it must be {rule}")
