"""From a checkpoint to a folder of graphs: written whole, gated against torch, then given its manifest."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
import torch

from ritocco.artefacts import (
    CONFIGS,
    GRAPH_FILE,
    INDEX,
    Manifest,
    files_of,
    sha256_of,
    write_manifest,
)
from ritocco.checkpoint import TOKENIZER_FILES, Checkpoint, fingerprint, load_tokenizer
from ritocco.device import DTYPES
from ritocco.disk import is_utf8
from ritocco.errors import CheckpointError, RequestError
from ritocco.nets.io import (
    Contract,
    GraphName,
    Layout,
    NetworkIO,
    Range,
    Ranges,
    contract_digest,
    contract_of,
)
from ritocco.nets.specs import TextSpec, UNetSpec, VAESpec
from ritocco.scheduler_config import check_scheduler, from_pipeline
from ritocco.shown import said, shown
from ritocco_export.figures import Figures
from ritocco_export.gate import compare, compare_hoisted
from ritocco_export.graphs import OPSETS, graph_module, write_graph
from ritocco_export.picture import compare_picture
from ritocco_export.profiles import Profile, ranges_of
from ritocco_export.whole_folder import written_whole

Say = Callable[[str], None]


def export_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    *,
    dtype: str = "float32",
    layout: Layout = "ritocco",
    profiles: Iterable[Profile] = (),
    static: bool = False,
    hoisted: bool = False,
    replace: bool = False,
    say: Say = lambda line: None,
) -> Manifest:
    """Write the graphs of a checkpoint, its configs and tokenizer to the folder `out`.

    dtype: of weights and arithmetic. static: only the best size of the profile, which must be the only one.
    hoisted: the UNet as two graphs, what a request needs once and the step; in our own layout alone.
    replace: whatever folder `out` is; else an export alone. say: takes a line for every stage.
    Every graph passes `onnx.checker` in full and the parity gate before anything is kept; the folder appears
    whole, or not at all.
    Raises RequestError for options that don't fit together, CheckpointError where the gate is not passed or
    `out` is something else, OSError where the disk refuses.
    """
    profiles = list(profiles)
    if dtype not in DTYPES:
        raise RequestError(f"--dtype is {dtype!r}; it must be fp32, fp16 or bf16", field="--dtype")
    if static and len(profiles) != 1:
        raise RequestError("--static needs exactly one --profile, whose best size it takes", field="--static")
    if layout not in ("ritocco", "optimum"):
        raise RequestError(f"--layout is {shown(layout)}; it must be ritocco or optimum", field="--layout")
    for profile in profiles:
        profile.check(str(profile))
    if hoisted and layout != "ritocco":
        raise RequestError(
            f"--hoisted with --layout {layout}: that layout has one UNet graph; leave out one of the two",
            field="--hoisted",
        )
    contract = contract_for(
        checkpoint, dtype=dtype, layout=layout, profiles=profiles, static=static, hoisted=hoisted
    )
    # What the engine would refuse at load, before minutes go into graphs.
    load_tokenizer(checkpoint)
    check_scheduler(from_pipeline(checkpoint.scheduler))
    out = Path(out)
    if not is_utf8(out.absolute()):  # the checker's rule, and the runtimes'
        raise RequestError(f"--out is {shown(str(out))}; it must be UTF-8", field="--out")
    with written_whole(out, replace=replace) as part:
        _write_configs(checkpoint, part)
        parity: dict[str, Figures] = {}
        for graph in contract:
            say(f"{graph}: exporting")
            file = part / graph / GRAPH_FILE
            module = graph_module(checkpoint, graph, dtype=getattr(torch, dtype), layout=layout)
            write_graph(module, contract[graph], file, opset=OPSETS[dtype], static=static)
            del module
            gc.collect()  # exported programs are cycles
            _check(graph, file)
            parity[graph] = compare(checkpoint, graph, file, contract[graph], layout=layout, static=static)
            say(f"{graph}: {parity[graph].line(dtype)}")
        if hoisted:
            parity["unet"] = compare_hoisted(checkpoint, part, contract, static=static)
            say(f"unet: {parity['unet'].line(dtype)}")
        manifest = Manifest(
            version=fingerprint(checkpoint),
            layout=layout,
            hoisted=hoisted,
            dtype=dtype,
            opset=OPSETS[dtype],
            contract=contract_digest(contract),
            ranges={graph: dict(io.ranges) for graph, io in contract.items()},
            files=files_of(part),
            versions=_versions(),
            parity={graph: figures.as_json() for graph, figures in parity.items()},
            profiles=profile_ranges(contract, profiles, static=static),
            sha256=sha256_of(part),
        )
        write_manifest(part, manifest)
        picture = compare_picture(checkpoint, part)
        say(f"picture: {picture.line(dtype)}")
        manifest = dataclasses.replace(manifest, parity={**manifest.parity, "picture": picture.as_json()})
        write_manifest(part, manifest)
    return manifest


def contract_for(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    layout: Layout,
    profiles: Iterable[Profile],
    static: bool,
    hoisted: bool = False,
) -> Contract:
    """The contract of an export, its ranges those of the profiles."""
    unet, vae = UNetSpec.from_config(checkpoint.unet), VAESpec.from_config(checkpoint.vae)
    text = TextSpec.from_config(checkpoint.text_encoder)
    ranges = ranges_of(profiles)
    out: dict[GraphName, NetworkIO] = {}
    for graph, io in contract_of(unet, vae, text, dtype=dtype, layout=layout, hoisted=hoisted).items():
        held = _held(ranges[graph], static=static)
        for symbol, multiple in io.multiples.items():
            if any(size % multiple for size in held[symbol]):
                raise RequestError(
                    f"--profile: {8 * multiple} is what the sides must be multiples of for this checkpoint",
                    field="--profile",
                )
        out[graph] = NetworkIO(inputs=io.inputs, outputs=io.outputs, ranges=held, multiples=io.multiples)
    return out


def profile_ranges(
    contract: Contract, profiles: Iterable[Profile], *, static: bool
) -> tuple[Mapping[str, Ranges], ...]:
    """What each graph has to take for each profile alone; the contract's ranges where none was named."""
    alone = [ranges_of([profile]) for profile in profiles]
    if not alone:
        return ({graph: dict(io.ranges) for graph, io in contract.items()},)
    return tuple({graph: _held(held, static=static) for graph, held in ranges.items()} for ranges in alone)


def _check(graph: GraphName, file: Path) -> None:
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckpointError(f"{graph}: torch's exporter wrote no valid ONNX ({said(error)})") from error


def _held(ranges: Ranges, *, static: bool) -> dict[str, Range]:
    return {symbol: (one[1],) * 3 if static else one for symbol, one in ranges.items()}


def _write_configs(checkpoint: Checkpoint, part: Path) -> None:
    configs: Mapping[str, Mapping[str, Any]] = {
        "unet": checkpoint.unet,
        "vae": checkpoint.vae,
        "text_encoder": checkpoint.text_encoder,
        "scheduler": checkpoint.scheduler,
    }
    for name, file in CONFIGS.items():
        _write_json(part / file, configs[name])
    _write_json(part / "vae_decoder" / "config.json", checkpoint.vae)
    index = {
        "_class_name": "StableDiffusionInpaintPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", checkpoint.scheduler.get("_class_name", "DPMSolverMultistepScheduler")],
        "text_encoder": ["optimum.onnxruntime.modeling_diffusion", "ORTTextEncoder"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["optimum.onnxruntime.modeling_diffusion", "ORTUnet"],
        "vae": ["optimum.onnxruntime.modeling_diffusion", "ORTVae"],
    }
    _write_json(part / INDEX, index)
    if not isinstance(checkpoint.tokenizer, Path):
        raise CheckpointError(
            f"{checkpoint.source}: a pipeline in memory has no tokenizer files; save it with save_pretrained "
            "and export that folder"
        )
    (part / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        if (checkpoint.tokenizer / name).is_file():
            shutil.copyfile(checkpoint.tokenizer / name, part / "tokenizer" / name)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {}
    for package in ("ritocco", "torch", "onnx", "onnxscript", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
