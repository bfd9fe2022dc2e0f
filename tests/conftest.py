"""Tiny checkpoints for every test of the engine: seeded random weights in the layouts of the real ones."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ritocco
from accelerator import interpret_kernels
from ritocco import Engine
from ritocco.backends.runtime import Batch, Floats, LatentSize, Runtime, Tokens
from ritocco.checkpoint import load_tokenizer, open_checkpoint
from ritocco.pixels import Kept, Mask, Pixels, from_model, masked_to_model, pasted

interpret_kernels()

TEXT = (
    "a photograph of a yellow cat's face on a park bench, high resolution. they're the quick brown dogs "
    "we've seen; "
    "I'm sure he'll say she'd go in 2024! café naïve \u732b the cat the face of the cat on the bench "
) * 3
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = 100


def _byte_letters() -> list[str]:
    """The 256 letters that stand for bytes in GPT-2's and CLIP's vocabularies, in the vocabulary's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _letters_of_bytes() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return dict(zip([*printable, *others], _byte_letters(), strict=True))


def _train_merges(text: str, count: int) -> list[tuple[str, str]]:
    letters = _letters_of_bytes()
    words = Counter(text.lower().split())
    spelled = {word: [letters[b] for b in word.encode()] for word in words}
    for letters_of_word in spelled.values():
        letters_of_word[-1] += "</w>"
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in spelled.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            spelled[word] = joined
    return merges


def _write_json(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")


def _write_tokenizer(folder: Path) -> int:
    """A CLIP vocabulary like SD 2's: it pads with `!`, id 0. Returns the number of tokens."""
    merges = _train_merges(TEXT, MERGES)
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), BOS, EOS]
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    named = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
    config: dict[str, object] = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **named}
    config |= {"pad_token": EOS, "add_prefix_space": False, "do_lower_case": True}
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", {**named, "pad_token": "!"})
    return len(tokens)


def _text_encoder(vocabulary: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="gelu",
        projection_dim=32,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=0,
    )
    return CLIPTextModel(config)


def _unet() -> Any:
    import diffusers

    network: Any = diffusers.UNet2DConditionModel
    return network(
        sample_size=8,
        in_channels=9,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
    )


def _vae() -> Any:
    import diffusers

    network: Any = diffusers.AutoencoderKL
    return network(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
    )


def _write_networks(root: Path, vocabulary: int) -> None:
    import diffusers
    from safetensors.torch import save_file

    unet, vae, text = _unet(), _vae(), _text_encoder(vocabulary)
    unet.save_pretrained(root / "unet")
    vae.save_pretrained(root / "vae")
    # The published checkpoints' names, which transformers from 5.6 on reads but no longer writes.
    text.config.save_pretrained(root / "text_encoder")
    state = text.state_dict()
    named = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
    save_file(named, root / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    scheduler: Any = diffusers.PNDMScheduler
    scheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(root / "scheduler")


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What lies in a user's cache decides what `auto` takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RITOCCO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete SD-inpainting folder in diffusers layout: 9-channel UNet (latent sides: multiples of 2),
    VAE of factor 8, text encoder of width 32, SD 2's kind of tokenizer, PNDM scheduler config; float32, no
    safety checker.

    The same bytes every time. Read-only by agreement: copy it before you change it.
    """
    import torch

    root = tmp_path_factory.mktemp("checkpoint") / "tiny-inpainting"
    vocabulary = _write_tokenizer(root / "tokenizer")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(20)
        _write_networks(root, vocabulary)
    index: dict[str, object] = {
        "_class_name": "StableDiffusionInpaintPipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(root / "model_index.json", index)
    return root


@pytest.fixture(scope="session")
def tiny_safety_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` with a safety checker (32 x 32 pixels) and its feature extractor.

    Thresholds are 1.0 for all concepts, which no cosine exceeds: it flags nothing.
    """
    import torch

    root = tmp_path_factory.mktemp("checkpoint") / "tiny-inpainting-safe"
    shutil.copytree(tiny_checkpoint, root)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(21)
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPConfig

        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision = {**tower, "image_size": 32, "patch_size": 8}
        checker = StableDiffusionSafetyChecker(
            CLIPConfig(text_config=tower, vision_config=vision, projection_dim=16)
        )
        for name in ("concept_embeds", "special_care_embeds"):
            getattr(checker, name).data.normal_()
        checker.save_pretrained(root / "safety_checker")
    extractor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "crop_size": {"height": 32, "width": 32},
        "size": {"shortest_edge": 32},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    _write_json(root / "feature_extractor" / "preprocessor_config.json", extractor)
    index = json.loads((root / "model_index.json").read_text(encoding="utf-8"))
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    _write_json(root / "model_index.json", index)
    return root


class SpiedRuntime:
    """A Runtime around another one: counts its calls, keeps what it decoded, and lets a test step in.

    calls: by method. decoded: float32 [N,3,H,W] of every `decode`. capacities: of every `open`.
    """

    def __init__(self, inner: Runtime) -> None:
        self.inner, self.traits = inner, inner.traits
        self.calls: Counter[str] = Counter()
        self.decoded: list[Floats] = []
        self.capacities: list[int] = []

    def encode_text(self, tokens: Tokens) -> Floats:
        self.calls["encode_text"] += 1
        self.calls["prompts"] += len(tokens)
        return self.inner.encode_text(tokens)

    def encode_image(self, pixels: Floats) -> Floats:
        self.calls["encode_image"] += len(pixels)
        return self.inner.encode_image(pixels)

    def encode_pixels(self, pixels: Pixels, mask: Mask | None) -> Floats:
        return self.encode_image(masked_to_model(pixels, mask))

    def decode(self, latents: Floats) -> Floats:
        self.calls["decode"] += 1
        self.decoded.append(self.inner.decode(latents))
        return self.decoded[-1]

    def decode_pixels(self, latents: Floats, kept: Kept | None) -> Pixels:
        return pasted(from_model(self.decode(latents)), kept)

    def open(self, size: LatentSize, capacity: int) -> Batch:
        self.calls["open"] += 1
        self.capacities.append(capacity)
        return self.inner.open(size, capacity)


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path) -> Engine:
    """An engine of `tiny_checkpoint` in float32 on the CPU. Shared: never close it."""
    return ritocco.load(tiny_checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def spied_engine(tiny_checkpoint: Path, tiny_engine: Engine) -> Engine:
    """Another engine on the networks of `tiny_engine`; its `runtime` is a SpiedRuntime around theirs."""
    opened = open_checkpoint(tiny_checkpoint)
    return Engine(SpiedRuntime(tiny_engine.runtime), load_tokenizer(opened), opened.scheduler)


@pytest.fixture(scope="session")
def ask() -> Callable[..., dict[str, Any]]:
    """Makes a valid input of a few cheap steps; keywords go over it, and `size` is (width, height)."""

    def make(*, size: tuple[int, int] = (64, 64), **changes: object) -> dict[str, Any]:
        width, height = size
        noise = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 2 + 5, width // 8 : width // 2 + 3] = 255
        given: dict[str, Any] = {
            "image": Image.fromarray(noise),
            "mask": Image.fromarray(mask),
            "prompt": "the face of a yellow cat",
            "width": width,
            "height": height,
            "num_inference_steps": 3,
            "seed": 7,
        }
        return given | changes

    return make


Export = Callable[..., Path]
SIZES = "64..256@1..2"


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a checkpoint under a name, once for all processes of a test run: it takes half a minute."""
    from ritocco_export.exporter import export_checkpoint
    from ritocco_export.profiles import Profile

    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared-graphs"
    root.mkdir(exist_ok=True)

    def make(checkpoint: Path, name: str, profile: str, **options: Any) -> Path:
        out = root / name
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not out.exists():
                export_checkpoint(
                    open_checkpoint(checkpoint), out, profiles=[Profile.parse(profile)], **options
                )
        return out

    return make


@pytest.fixture(scope="session")
def tiny_graphs(tiny_checkpoint: Path, export: Export) -> Path:
    """float32, our layout. Read-only by agreement: copy it before you change it."""
    return export(tiny_checkpoint, "own", SIZES)


@pytest.fixture(scope="session")
def tiny_static_graphs(tiny_checkpoint: Path, export: Export) -> Path:
    """float32, our layout, of 128 x 64 pixels and one guided picture alone."""
    return export(tiny_checkpoint, "static", "128x64@1", static=True)


@pytest.fixture(scope="session")
def tiny_static_hoisted_graphs(tiny_checkpoint: Path, export: Export) -> Path:
    """The same, the UNet in two graphs."""
    return export(tiny_checkpoint, "static-hoisted", "128x64@1", static=True, hoisted=True)


@pytest.fixture(scope="session")
def tiny_optimum_graphs(tiny_checkpoint: Path, export: Export) -> Path:
    """float32, Optimum's layout."""
    return export(tiny_checkpoint, "optimum", SIZES, layout="optimum")


@pytest.fixture(scope="session")
def tiny_half_graphs(tiny_checkpoint: Path, export: Export) -> Path:
    """float16, our layout."""
    return export(tiny_checkpoint, "half", SIZES, dtype="float16")


@pytest.fixture(scope="session")
def tiny_bfloat16_graphs(tiny_checkpoint: Path, export: Export) -> Path:
    """bfloat16, our layout."""
    return export(tiny_checkpoint, "brain", SIZES, dtype="bfloat16")


@pytest.fixture(scope="session")
def tiny_hoisted_graphs(tiny_checkpoint: Path, export: Export) -> Path:
    """float32, our layout, the UNet in two graphs."""
    return export(tiny_checkpoint, "hoisted", SIZES, hoisted=True)


@pytest.fixture(scope="session")
def tiny_half_hoisted_graphs(tiny_checkpoint: Path, export: Export) -> Path:
    """float16, our layout, the UNet in two graphs."""
    return export(tiny_checkpoint, "half-hoisted", SIZES, dtype="float16", hoisted=True)


@pytest.fixture(scope="session")
def pocket_graphs(export: Export) -> Path:
    """The embedded model in float32, our layout, 256 to 512 pixels."""
    from ritocco.loading import pocket_model

    return export(pocket_model(), "pocket", "256..512@1..2")


@pytest.fixture(scope="session")
def pocket_hoisted_graphs(export: Export) -> Path:
    """The same, with the UNet in two graphs."""
    from ritocco.loading import pocket_model

    return export(pocket_model(), "pocket-hoisted", "256..512@1..2", hoisted=True)


@pytest.fixture(scope="module")
def standing_in() -> Iterator[None]:
    """TensorRT's modules and CUDA's are the stand-ins of tests/stand_ins for the length of a module."""
    roots = ("tensorrt", "tensorrt_rtx", "cuda", "trt_stand_in")
    before = {name: held for name, held in sys.modules.items() if name.partition(".")[0] in roots}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent / "stand_ins"))
        patch.setattr("ritocco.backends.cuda.driver_here", lambda: True)
        for name in before:
            del sys.modules[name]
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] in roots]:
        del sys.modules[name]
    sys.modules.update(before)
