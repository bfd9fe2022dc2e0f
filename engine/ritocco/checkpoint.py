"""Checkpoints: safetensors -> parameters of the networks in `nets/`.

`open_checkpoint` reads configs and headers only and needs no torch; `load_network` then fills a network that
was built on the meta device, tensor by tensor from the memory-mapped file. A checkpoint is a diffusers
folder, a single `.safetensors` file in the original LDM naming, or a diffusers pipeline in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ritocco import ldm_keys
from ritocco.errors import CheckpointError
from ritocco.nets.specs import TextSpec, UNetSpec, VAESpec, VisionSpec
from ritocco.parameters import (
    NetworkName,
    Stored,
    build,
    choose_variant,
    fill,
    match_tensors,
    memory_tensors,
    weights_digest,
)
from ritocco.prompt import Tokenizer, TokenizerTables, read_tables, tables_of
from ritocco.shown import plain, shown
from ritocco.weight_files import PICKLES, find_variants, inside, pickle_message, read_header, read_json

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ritocco_kernels.ops import Ops

Config = Mapping[str, Any]
REQUIRED: tuple[NetworkName, ...] = ("unet", "vae", "text_encoder")
INPAINTING_CHANNELS = 9
_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "safety_checker": "model",
}
_OTHER_UNETS = {
    4: "a text-to-image model",
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an image-editing (InstructPix2Pix) model",
}
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What one checkpoint holds; nothing but configs and headers has been read.

    source: how messages call it. path: folder or file; None for a pipeline in memory.
    unet, vae, text_encoder, scheduler: their configs as the diffusers layout writes them.
    safety_checker, feature_extractor: configs, or None where the checkpoint has none.
    tokenizer: folder of its files, or its tables for a pipeline in memory.
    weights: network -> variant ('' is the plain one) -> name -> tensor. variant: the one asked for, or None.
    notes: what a user should know, for the log.
    """

    source: str
    path: Path | None
    unet: Config
    vae: Config
    text_encoder: Config
    scheduler: Config
    safety_checker: Config | None
    feature_extractor: Config | None
    tokenizer: Path | TokenizerTables
    weights: Mapping[str, Mapping[str, Mapping[str, Stored]]] = field(repr=False)
    variant: str | None
    notes: tuple[str, ...]

    def config(self, network: NetworkName) -> Config:
        """The config of a network. Raises CheckpointError for a safety checker that is not there."""
        found: Config | None = getattr(self, network)
        if found is None:
            raise CheckpointError(f"{self.source}: has no {network}")
        return found


def open_checkpoint(
    path: Path | str,
    *,
    variant: str | None = None,
    tokenizer: Path | str | None = None,
    configs: Mapping[str, Config] | None = None,
) -> Checkpoint:
    """Open a diffusers folder or a single `.safetensors` file of an inpainting model; needs no torch.

    variant: `fp16` and such, where a folder holds several; None chooses by the dtype asked for when loading.
    tokenizer: folder with vocab.json and merges.txt; single files never carry one.
    configs: keys to put over the configs found, per network; for single files whose shapes depart from Stable
    Diffusion 1.5 and 2.
    Raises CheckpointError: what is wrong, with which file, and what to do.
    """
    path = Path(path)
    tokenizer_folder = None if tokenizer is None else Path(tokenizer)
    try:
        if path.is_dir():
            opened = _open_folder(path, variant, tokenizer_folder, configs or {})
        elif path.is_file():
            opened = _open_single(path, tokenizer_folder, configs or {})
        else:
            raise CheckpointError(f"{shown(str(path))}: no such file or folder")
    except (OSError, ValueError) as error:  # a folder that may not be listed, a name that no file can have
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{shown(str(path))}: can't be read ({error})") from error
    _check_agreement(opened)
    return opened


def from_diffusers(pipe: Any) -> Checkpoint:
    """A diffusers `StableDiffusionInpaintPipeline` in memory as a checkpoint that shares its tensors.

    Networks loaded with the pipeline's own device and dtype use the very same memory, but for weights that a
    GPU wants laid out otherwise; the pipeline must not be trained or offloaded meanwhile. Works with
    transformers 4.57 and 5.x. Raises CheckpointError where the pipeline lacks a part or its weights are
    elsewhere.
    """
    source = f"the {type(pipe).__name__} in memory"
    parts: dict[str, Any] = {
        n: getattr(pipe, n, None) for n in (*REQUIRED, "safety_checker", "feature_extractor")
    }
    parts |= {n: getattr(pipe, n, None) for n in ("scheduler", "tokenizer")}
    missing = [n for n in (*REQUIRED, "scheduler", "tokenizer") if parts[n] is None]
    if missing:
        raise CheckpointError(f"{source}: has no {', '.join(missing)}")
    networks = [n for n in (*REQUIRED, "safety_checker") if parts[n] is not None]
    opened = Checkpoint(
        source=source,
        path=None,
        unet=_plain(parts["unet"].config),
        vae=_plain(parts["vae"].config),
        text_encoder=_plain(parts["text_encoder"].config),
        scheduler=_plain(parts["scheduler"].config),
        safety_checker=None if parts["safety_checker"] is None else _plain(parts["safety_checker"].config),
        feature_extractor=None if parts["feature_extractor"] is None else _plain(parts["feature_extractor"]),
        tokenizer=tables_of(parts["tokenizer"]),
        weights={n: {"": memory_tensors(parts[n], f"{source}: {n}")} for n in networks},
        variant=None,
        notes=() if "safety_checker" in networks else (f"{source} has no safety checker, so none is run",),
    )
    _check_agreement(opened)
    return opened


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer. Raises CheckpointError where it does not fit the text encoder."""
    held = checkpoint.tokenizer
    tokenizer = Tokenizer(read_tables(held) if isinstance(held, Path) else held)
    text = TextSpec.from_config(checkpoint.text_encoder)
    tokenizer.check_fits(vocabulary=text.vocabulary, positions=text.positions, source=checkpoint.source)
    return tokenizer


def load_network(
    checkpoint: Checkpoint,
    network: NetworkName,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    later: tuple[str, ...] = (),
    ops: Ops | None = None,
) -> nn.Module:
    """A network with its weights, in eval mode and without gradients.

    dtype: of every parameter; None keeps what is stored. On the CPU a tensor stored in that dtype is used
    straight from the mapped file, any other is converted one by one: no second copy of the weights exists at
    any time. later: beginnings of names that are checked and mapped, but converted only by `place`. ops: see
    `build`.
    Raises CheckpointError where names or shapes do not fit the config.
    """
    module = build(network, checkpoint.config(network), ops=ops)
    matched, problems = check_network(checkpoint, network, module, dtype)
    if problems:
        raise CheckpointError(
            f"{checkpoint.source} ({network}): the weights do not fit the config. {'; '.join(problems)}. "
            "Download the model again, or correct the config"
        )
    return fill(module, matched, device=device, dtype=dtype, later=later)


def check_network(
    checkpoint: Checkpoint, network: NetworkName, module: nn.Module, dtype: torch.dtype | None
) -> tuple[dict[str, Stored], list[str]]:
    """The tensors that `load_network` would use, by the module's names, and what is wrong with them. Reads
    none.
    """
    try:
        _, stored = choose_variant(checkpoint.weights[network], checkpoint.variant, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source} ({network}): {error}") from error
    return match_tensors(module, stored)


def fingerprint(checkpoint: Checkpoint) -> str:
    """64 hex digits that identify the weights and configs: a prediction's `version`.

    sha256 over configs, tokenizer, and of every weights file the size, header and blocks spread over the
    tensors (not all of their bytes, so it takes milliseconds). Independent of where the checkpoint lies.
    """
    digest = hashlib.sha256()
    for name in (*REQUIRED, "scheduler", "safety_checker", "feature_extractor"):
        digest.update(
            json.dumps([name, _without_private(getattr(checkpoint, name))], sort_keys=True).encode()
        )
    held = checkpoint.tokenizer
    if isinstance(held, TokenizerTables):
        digest.update(json.dumps([sorted(held.vocab.items()), list(held.merges), held.pad.content]).encode())
    else:
        for name in TOKENIZER_FILES:
            if (held / name).is_file():
                digest.update(name.encode() + hashlib.sha256((held / name).read_bytes()).digest())
    for network, variants in sorted(checkpoint.weights.items()):
        for variant, tensors in sorted(variants.items()):
            digest.update(f"{network}/{variant}".encode() + weights_digest(tensors).encode())
    return digest.hexdigest()


def _open_folder(
    root: Path, variant: str | None, tokenizer: Path | None, overrides: Mapping[str, Config]
) -> Checkpoint:
    _refuse_other_folders(root)
    safety = _has_safety_checker(root)
    networks: tuple[NetworkName, ...] = (*REQUIRED, "safety_checker") if safety else REQUIRED
    configs = {
        n: _override(read_json(inside(root / n / "config.json", root)), n, overrides) for n in networks
    }
    scheduler = read_json(inside(root / "scheduler" / "scheduler_config.json", root))
    weights: dict[str, Mapping[str, Mapping[str, Stored]]]
    weights = {n: find_variants(root / n, root=root, stem=_STEMS[n]) for n in networks}
    if variant is not None and not any(variant in found for found in weights.values()):
        held = sorted({plain(v) or "(plain)" for found in weights.values() for v in found})
        raise CheckpointError(f"{root}: has no variant {shown(variant)}; it has {', '.join(held)}")
    extractor = root / "feature_extractor" / "preprocessor_config.json"
    notes = [] if safety else [f"{root.name}: this checkpoint has no safety checker, so none is run"]
    if safety and not extractor.is_file():
        notes.append(
            f"{root.name}: no feature_extractor/preprocessor_config.json; CLIP's own values are used"
        )
    return Checkpoint(
        source=str(root),
        path=root,
        unet=configs["unet"],
        vae=configs["vae"],
        text_encoder=configs["text_encoder"],
        scheduler=_override(scheduler, "scheduler", overrides),
        safety_checker=configs.get("safety_checker"),
        feature_extractor=read_json(inside(extractor, root)) if extractor.is_file() else None,
        tokenizer=tokenizer or _tokenizer_inside(root),
        weights=weights,
        variant=variant,
        notes=tuple(notes),
    )


def _refuse_other_folders(root: Path) -> None:
    names = sorted(p.name for p in root.iterdir())
    if not names:
        raise CheckpointError(f"{root}: the folder is empty; download the model into it")
    foreign = [n for n in ("text_encoder_2", "transformer", "image_encoder") if (root / n).is_dir()]
    if foreign:
        raise CheckpointError(
            f"{root}: holds {foreign[0]}/, so it is no Stable Diffusion 1.5 or 2 inpainting model, which "
            "ritocco runs"
        )
    if (root / "unet" / "config.json").exists():
        return
    if (root / "snapshots").is_dir():
        raise CheckpointError(f"{root}: a download cache; name the folder under {root / 'snapshots'} instead")
    singles = [n for n in names if n.endswith(".safetensors")]
    if singles and not (root / "unet").is_dir():
        raise CheckpointError(f"{root}: not a diffusers folder; if {singles[0]} is the model, name that file")
    pickles = [n for n in names if n.lower().endswith(PICKLES)]
    if pickles and not (root / "unet").is_dir():
        raise CheckpointError(pickle_message(root / pickles[0]))
    raise CheckpointError(
        f"{root / 'unet' / 'config.json'}: missing; a model folder in diffusers layout holds unet/, vae/, "
        "text_encoder/, "
        "tokenizer/ and scheduler/"
    )


def _has_safety_checker(root: Path) -> bool:
    index = root / "model_index.json"
    entry = read_json(inside(index, root)).get("safety_checker") if index.is_file() else None
    switched_off = isinstance(entry, list) and not any(entry)
    folder = root / "safety_checker"
    return folder.is_dir() and any(folder.iterdir()) and not switched_off


def _tokenizer_inside(root: Path) -> Path:
    folder = root / "tokenizer"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: missing; download this folder of the model too")
    for name in TOKENIZER_FILES:
        inside(folder / name, root)
    return folder


def _open_single(file: Path, tokenizer: Path | None, overrides: Mapping[str, Config]) -> Checkpoint:
    suffix = file.suffix.lower()
    if suffix in PICKLES:
        raise CheckpointError(pickle_message(file))
    if suffix != ".safetensors":
        hint = f"; name its folder {file.parent}" if file.name == "model_index.json" else ""
        raise CheckpointError(f"{file}: neither a model folder nor a .safetensors file{hint}")
    header = read_header(file)
    defaults = ldm_keys.DEFAULT_CONFIGS[ldm_keys.family(header, str(file))]
    configs = {name: _override(defaults[name], name, overrides) for name in defaults}
    # A single file has no config to say so, but the first convolution does.
    first = header.get(ldm_keys.UNET_PREFIX + "input_blocks.0.0.weight")
    if first is not None and len(first.shape) == 4:
        configs["unet"]["in_channels"] = first.shape[1]
    return Checkpoint(
        source=str(file),
        path=file,
        unet=configs["unet"],
        vae=configs["vae"],
        text_encoder=configs["text_encoder"],
        scheduler=configs["scheduler"],
        safety_checker=None,
        feature_extractor=None,
        tokenizer=tokenizer or _tokenizer_beside(file),
        weights={
            "unet": {"": ldm_keys.unet_tensors(header, configs["unet"])},
            "vae": {"": ldm_keys.vae_tensors(header, configs["vae"])},
            "text_encoder": {"": ldm_keys.text_tensors(header, configs["text_encoder"])},
        },
        variant=None,
        notes=(f"{file.name}: a single file carries no safety checker, so none is run",),
    )


def _tokenizer_beside(file: Path) -> Path:
    for folder in (file.parent / "tokenizer", file.parent):
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return folder
    raise CheckpointError(
        f"{file}: a single file carries no tokenizer; put the model's tokenizer/ folder (vocab.json, "
        "merges.txt) "
        "beside it, or name one with tokenizer=…"
    )


def _override(config: Config, name: str, overrides: Mapping[str, Config]) -> dict[str, Any]:
    return {**config, **overrides.get(name, {})}


def _check_agreement(opened: Checkpoint) -> None:
    """Every config by itself, and what no single one can tell: an inpainting UNet, and networks made for
    each other.
    """
    try:
        unet, vae = UNetSpec.from_config(opened.unet), VAESpec.from_config(opened.vae)
        text = TextSpec.from_config(opened.text_encoder)
        if opened.safety_checker is not None:
            VisionSpec.from_config(opened.safety_checker)
    except CheckpointError as error:
        raise CheckpointError(f"{opened.source}: {error}") from error
    if unet.in_channels != INPAINTING_CHANNELS:
        kind = _OTHER_UNETS.get(unet.in_channels)
        raise CheckpointError(
            f"{opened.source}: the UNet takes {unet.in_channels} input "
            f"channels{f' ({kind})' if kind else ''}; inpainting "
            "needs 9 (4 latent, 1 mask, 4 masked image). Use an inpainting checkpoint"
        )
    if (unet.out_channels, vae.latent_channels, vae.in_channels, vae.out_channels) != (4, 4, 3, 3):
        raise CheckpointError(
            f"{opened.source}: a UNet with {unet.out_channels} output channels and a VAE with "
            f"{vae.latent_channels} latent, "
            f"{vae.in_channels} input and {vae.out_channels} output channels; 4, 4, 3 and 3 are needed"
        )
    if vae.factor != 8:
        raise CheckpointError(
            f"{opened.source}: vae.block_out_channels has {len(vae.channels)} entries; four are needed, "
            "as a latent cell is "
            "8 pixels wide"
        )
    if unet.context_dim != text.width:
        raise CheckpointError(
            f"{opened.source}: the UNet reads text vectors of {unet.context_dim} numbers and the text "
            "encoder writes "
            f"{text.width}; these networks do not belong together"
        )


def _plain(config: Any) -> dict[str, Any]:
    held = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    plain: dict[str, Any] = json.loads(json.dumps(held, default=str))
    return plain


def _without_private(config: Config | None) -> dict[str, Any] | None:
    # `_name_or_path` and `_diffusers_version` say where a copy came from, not what it is.
    return (
        None
        if config is None
        else {k: v for k, v in config.items() if not k.startswith("_") or k == "_class_name"}
    )
