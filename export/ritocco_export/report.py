"""`ritocco export --check`: is a folder of graphs whole, valid, and what TensorRT takes?"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import asdict
from pathlib import Path

from ritocco.artefacts import Artefacts, open_artefacts, sha256_of, strangers_of
from ritocco.checkpoint import Checkpoint, fingerprint
from ritocco.errors import CheckpointError, RitoccoError
from ritocco.scheduler_config import check_scheduler, from_pipeline
from ritocco.shown import printable
from ritocco_export.figures import LARGEST_ERROR, LEAST_PICTURE_PSNR_DB, LEAST_PSNR_DB, Figures
from ritocco_export.remeasure import measured
from ritocco_export.tensorrt_check import Finding, check_graph

# Rules of which an error keeps graphs from being run; the others are TensorRT's.
_DAMAGE = {"contract", "manifest", "scheduler", "shape", "tokenizer", "valid", "weights"}


def report(folder: Path, *, as_json: bool, checkpoint: Checkpoint | None = None) -> tuple[bool, str]:
    """Whether everything is in order, and the findings as aligned text or JSON.

    A folder that is damaged or stale is a finding like the others. checkpoint: whose graphs they must be, and
    beside which parity is measured again; without one the manifest's figures are read.
    """
    try:
        artefacts = open_artefacts(folder, version=None if checkpoint is None else fingerprint(checkpoint))
    except CheckpointError as error:
        broken = Finding(level="error", rule="manifest", subject=str(folder), message=str(error))
        found = {"folder": [broken]}
        parity: Mapping[str, Figures] = {}
        again, dtype = False, "float32"
    else:
        opset = artefacts.manifest.opset if artefacts.manifest else None
        found = {
            name: check_graph(artefacts.graph(name), io, opset=opset)
            for name, io in artefacts.contract.items()
        }
        found["folder"] = [*_of_folder(artefacts), *_of_configs(artefacts)]
        dtype = artefacts.manifest.dtype if artefacts.manifest else "float32"
        parity, again, of_parity = _parity(artefacts, checkpoint, dtype, whole=not _errors(found, _DAMAGE))
        for name, findings in of_parity.items():
            found.setdefault(name, []).extend(findings)
    passed = not _errors(found)
    if as_json:
        told = {
            "passed": passed,
            "findings": {name: [asdict(one) for one in findings] for name, findings in found.items()},
            "measured_again": again,
            "parity": {name: figures.as_json() for name, figures in parity.items()},
        }
        return passed, json.dumps(told, indent=2, allow_nan=False)
    lines = [
        printable(f"{finding.level:<5}  {name:<12}  {finding.rule:<14}  {finding.subject}: {finding.message}")
        for name, findings in found.items()
        for finding in findings
    ]
    lines += [
        f"ok     {name:<12}  parity          {figures.line(dtype)}{', measured again' if again else ''}"
        for name, figures in parity.items()
        if not any(finding.rule == "parity" for finding in found.get(name, []))
    ]
    lines.append("passed" if passed else "failed")
    return passed, "\n".join(lines)


def _errors(found: Mapping[str, list[Finding]], rules: Container[str] | None = None) -> bool:
    """Whether there are any, or of these rules."""
    return any(
        finding.level == "error" and (rules is None or finding.rule in rules)
        for findings in found.values()
        for finding in findings
    )


def _parity(
    artefacts: Artefacts, checkpoint: Checkpoint | None, dtype: str, *, whole: bool
) -> tuple[Mapping[str, Figures], bool, Mapping[str, list[Finding]]]:
    """The gate's figures, whether they were measured again, and what is wrong with them.

    dtype: of the graphs. whole: what is damaged is not run.
    """
    if again := checkpoint is not None and whole:
        parity, failed = measured(checkpoint, artefacts)
    else:
        parity, failed = _read_parity(artefacts), {}
    found = {
        name: [Finding(level="error", rule="parity", subject=name, message=message)]
        for name, message in failed.items()
    }
    for name in parity.keys() | set(_gated(artefacts)) - failed.keys():
        found[name] = _of_parity(parity.get(name), name, dtype)
    if checkpoint is not None and not whole:
        message = "not measured again: what is damaged is not run"
        found["folder"] = [Finding(level="note", rule="parity", subject=artefacts.path.name, message=message)]
    return parity, again, found


def _of_folder(artefacts: Artefacts) -> list[Finding]:
    """Of what opening leaves out for speed, too: every byte of large files."""
    if artefacts.manifest is not None:
        found, told = sha256_of(artefacts.path), artefacts.manifest.sha256
        changed = [
            Finding(level="error", rule="manifest", subject=name, message="changed since it was exported")
            for name in sorted(found.keys() | told.keys())
            if found.get(name) != told.get(name)
        ]
        left = "not of the export, which would not be replaced while this lies in it"
        strangers = strangers_of(artefacts)
        return changed + [
            Finding(level="note", rule="manifest", subject=name, message=left) for name in strangers
        ]
    message = "no manifest: somebody else's export, whose parity nobody measured"
    return [Finding(level="note", rule="manifest", subject=str(artefacts.path), message=message)]


def _of_configs(artefacts: Artefacts) -> list[Finding]:
    """What is read at load beside the graphs: the tokenizer's files and the scheduler's config."""
    found = []
    try:
        for problem in check_scheduler(from_pipeline(artefacts.scheduler)):
            found.append(Finding(level="note", rule="scheduler", subject="scheduler", message=problem))
    except RitoccoError as error:
        found.append(Finding(level="error", rule="scheduler", subject="scheduler", message=str(error)))
    try:
        artefacts.tokenizer()
    except RitoccoError as error:
        found.append(Finding(level="error", rule="tokenizer", subject="tokenizer", message=str(error)))
    return found


def _gated(artefacts: Artefacts) -> list[str]:
    """What an export of ours has figures of."""
    if artefacts.manifest is None:
        return []
    return [*artefacts.contract, *(["unet"] if artefacts.hoisted else []), "picture"]


def _read_parity(artefacts: Artefacts) -> dict[str, Figures]:
    """Those that make sense."""
    held = artefacts.manifest.parity if artefacts.manifest else {}
    read = {name: Figures.from_json(figures) for name, figures in held.items()}
    return {name: figures for name, figures in read.items() if figures is not None}


def _of_parity(figures: Figures | None, name: str, dtype: str) -> list[Finding]:
    """Of what the gate measured, and wrote into the manifest; `name` is a graph's, or `picture`."""
    if figures is None:
        return [Finding(level="error", rule="parity", subject=name, message="was not measured")]
    if not figures.arithmetic and dtype == "bfloat16":
        return [Finding(level="note", rule="parity", subject=name, message=figures.line(dtype))]
    least = LEAST_PICTURE_PSNR_DB if name == "picture" else LEAST_PSNR_DB
    if not figures.arithmetic:
        return [Finding(level="error", rule="parity", subject=name, message="was not measured")]
    within = name == "picture" or figures.error <= LARGEST_ERROR[dtype]
    if within and figures.psnr_db >= least[dtype]:
        return []
    message = f"{figures.line(dtype)}: more than {dtype} graphs are allowed"
    return [Finding(level="error", rule="parity", subject=name, message=message)]
