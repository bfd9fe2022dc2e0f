"""`ritocco export --check`: is a folder of graphs whole, valid, and what TensorRT takes?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ritocco.artefacts import Artefacts, open_artefacts, sha256_of
from ritocco.errors import CheckpointError
from ritocco_export.tensorrt_check import Finding, check_graph


def report(folder: Path, *, as_json: bool) -> tuple[bool, str]:
    """Whether everything is in order, and the findings as aligned text or JSON.

    A folder that is damaged or stale is a finding like the others.
    """
    try:
        artefacts = open_artefacts(folder)
    except CheckpointError as error:
        broken = Finding(level="error", rule="manifest", subject=str(folder), message=str(error))
        found = {"folder": [broken]}
        parity: dict[str, Any] = {}
    else:
        found = {name: check_graph(artefacts.graph(name), io) for name, io in artefacts.contract.items()}
        parity = dict(artefacts.manifest.parity) if artefacts.manifest else {}
        found["folder"] = _of_folder(artefacts)
    passed = not any(finding.level == "error" for findings in found.values() for finding in findings)
    if as_json:
        rows = {name: [asdict(finding) for finding in findings] for name, findings in found.items()}
        return passed, json.dumps({"passed": passed, "findings": rows, "parity": parity}, indent=2)
    lines = [
        f"{finding.level:<5}  {name:<12}  {finding.rule:<14}  {finding.subject}: {finding.message}"
        for name, findings in found.items()
        for finding in findings
    ]
    lines += [
        f"ok     {name:<12}  parity          error {figures['error']:.1e}, {figures['psnr_db']:.1f} dB"
        for name, figures in parity.items()
        if figures.get("arithmetic")
    ]
    lines.append("passed" if passed else "failed")
    return passed, "\n".join(lines)


def _of_folder(artefacts: Artefacts) -> list[Finding]:
    """Of what opening leaves out for speed, too: every byte of large files."""
    if artefacts.manifest is not None:
        found = sha256_of(artefacts.path) if artefacts.manifest.sha256 else {}
        return [
            Finding(level="error", rule="manifest", subject=name, message="changed since it was exported")
            for name, digest in artefacts.manifest.sha256.items()
            if found.get(name) != digest
        ]
    message = "no manifest: somebody else's export, whose parity nobody measured"
    return [Finding(level="note", rule="manifest", subject=str(artefacts.path), message=message)]
