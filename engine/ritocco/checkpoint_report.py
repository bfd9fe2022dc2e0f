"""What `ritocco doctor --model DIR` says of a checkpoint, from configs and headers; no weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from ritocco.artefacts import is_artefacts, open_artefacts
from ritocco.checkpoint import (
    REQUIRED,
    Checkpoint,
    check_network,
    fingerprint,
    load_tokenizer,
    open_checkpoint,
)
from ritocco.errors import CheckpointError
from ritocco.parameters import NetworkName, build
from ritocco.safety import ImagePreparation
from ritocco.scheduler_config import check_scheduler, from_pipeline
from ritocco.shown import plain
from ritocco.weight_files import StoredTensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report. level: `error` means that the checkpoint can't be used as it is."""

    level: Literal["ok", "note", "error"]
    subject: str
    message: str


def verify(
    path: Path | str, *, variant: str | None = None, tokenizer: Path | str | None = None
) -> list[Finding]:
    """Look a checkpoint over without loading its weights; what is wrong comes as an `error` finding.

    Looked at: files and formats, inpainting or not, names and shapes against the networks, dtypes, sizes,
    tokenizer, scheduler, safety checker. The arguments are those of `open_checkpoint`.
    """
    if is_artefacts(Path(path)):
        return _graphs(Path(path))
    try:
        checkpoint = open_checkpoint(path, variant=variant, tokenizer=tokenizer)
    except CheckpointError as error:
        return [Finding(level="error", subject="checkpoint", message=str(error))]
    layout = "diffusers folder" if Path(path).is_dir() else "single file, LDM naming"
    findings = [Finding(level="ok", subject="checkpoint", message=f"{layout}, inpainting (9 channels)")]
    networks: list[NetworkName] = list(REQUIRED)
    checks: list[Callable[[Checkpoint], Finding]] = [_tokenizer, _scheduler]
    if checkpoint.safety_checker is not None:
        networks.append("safety_checker")
        checks.append(_extractor)
    checks = [*(partial(_network, network) for network in networks), *checks]
    for check in checks:
        try:
            findings.append(check(checkpoint))
        except CheckpointError as error:
            findings.append(Finding(level="error", subject="checkpoint", message=str(error)))
    findings += [Finding(level="note", subject="checkpoint", message=note) for note in checkpoint.notes]
    findings.append(Finding(level="ok", subject="version", message=fingerprint(checkpoint)))
    return findings


def _network(network: NetworkName, checkpoint: Checkpoint) -> Finding:
    matched, problems = check_network(checkpoint, network, build(network, checkpoint.config(network)), None)
    if problems:
        return Finding(level="error", subject=network, message="; ".join(problems))
    variants = sorted(variant or "plain" for variant in checkpoint.weights[network])
    dtypes = " and ".join(sorted({tensor.dtype for tensor in matched.values()}))
    files = {tensor.file for tensor in matched.values() if isinstance(tensor, StoredTensor)}
    count = sum(math.prod(tensor.shape) for tensor in matched.values())
    size = sum(file.stat().st_size for file in files)
    message = f"{count:,} parameters, {dtypes}, {size:,} bytes on disk (variants: {', '.join(variants)})"
    return Finding(level="ok", subject=network, message=message)


def _tokenizer(checkpoint: Checkpoint) -> Finding:
    tokenizer = load_tokenizer(checkpoint)
    size, length = tokenizer.vocab_size, tokenizer.max_length
    message = f"{size:,} tokens, {length} a prompt, padded with {tokenizer.pad_id}"
    return Finding(level="ok", subject="tokenizer", message=message)


def _scheduler(checkpoint: Checkpoint) -> Finding:
    config = checkpoint.scheduler
    name = config.get("_class_name", "unnamed")
    kind, betas = config.get("prediction_type", "epsilon"), config.get("beta_schedule", "linear")
    problems = check_scheduler(from_pipeline(config))
    message = plain(f"{name}, {kind} prediction, {betas} betas", 200)
    if problems:
        return Finding(level="note", subject="scheduler", message="; ".join((message, *problems)))
    return Finding(level="ok", subject="scheduler", message=message)


def _extractor(checkpoint: Checkpoint) -> Finding:
    preparation = ImagePreparation.from_config(checkpoint.feature_extractor)
    message = f"pictures become {preparation.crop or preparation.resize} pixels"
    return Finding(level="ok", subject="feature_extractor", message=message)


def _graphs(path: Path) -> list[Finding]:
    try:
        artefacts = open_artefacts(path)
        tokenizer = artefacts.tokenizer()
    except CheckpointError as error:
        return [Finding(level="error", subject="graphs", message=str(error))]
    ranges = artefacts.sizes
    sides = [f"{8 * ranges[symbol][0]} to {8 * ranges[symbol][2]} pixels {name}" for symbol, name in _SIDES]
    made = artefacts.manifest.dtype if artefacts.manifest else "no manifest, dtype unknown"
    hoisted = ", hoisted" if artefacts.hoisted else ""
    message = f"{artefacts.layout} layout{hoisted}, {made}, {', '.join(sides)}"
    return [
        Finding(level="ok", subject="graphs", message=message),
        Finding(level="ok", subject="tokenizer", message=f"{tokenizer.vocab_size} tokens"),
        Finding(level="ok", subject="version", message=artefacts.version),
    ]


_SIDES = (("W", "wide"), ("H", "high"))
