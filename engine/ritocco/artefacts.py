"""Exported graphs on disk: what a folder of them holds, whose weights they are, and whether they are whole.

The layout is Optimum's: a folder for each graph with `model.onnx` (large weights in `model.onnx.data` beside
it), configs and tokenizer as in a diffusers folder. `ritocco.json`, the manifest, is ours; a folder without
one is somebody's Optimum export. No torch here: what is exported starts without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from ritocco.disk import is_utf8
from ritocco.errors import CheckpointError
from ritocco.nets.io import (
    GRAPHS,
    HOISTED_GRAPHS,
    LARGEST,
    Contract,
    GraphName,
    Layout,
    Range,
    Ranges,
    contract_digest,
    contract_of,
)
from ritocco.nets.specs import TextSpec, UNetSpec, VAESpec
from ritocco.prompt import Tokenizer
from ritocco.shown import plain, shown
from ritocco.weight_files import inside, read_json

MANIFEST = "ritocco.json"
FORMAT = 1
GRAPH_FILE = "model.onnx"
INDEX = "model_index.json"
CONFIGS = {
    "unet": "unet/config.json",
    "vae": "vae_encoder/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
_WHOLE_BYTES = 64 << 20
_BLOCKS, _BLOCK_BYTES = 64, 4096
_VERSION = re.compile("[0-9a-f]{64}")
_LAST_OPSET = 99  # ONNX has 20-odd


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What an export says of itself.

    version: of the checkpoint, as in a prediction. hoisted: whether the UNet is two graphs, HOISTED_GRAPHS.
    dtype: of the graphs. contract: `contract_digest` of the ports. ranges: for each graph and symbol the
    sizes it takes. files: every file but this one, with its digest. versions: of the packages that made it.
    parity: figures of the gate. profiles: the parts of the ranges that were asked for, each as `ranges`; none
    stands for the ranges as one. sha256: of every byte of the files of which `files` has blocks alone.
    """

    version: str
    layout: Layout
    hoisted: bool
    dtype: str
    opset: int
    contract: str
    ranges: Mapping[str, Ranges]
    files: Mapping[str, str]
    versions: Mapping[str, str]
    parity: Mapping[str, Any] = field(default_factory=dict)
    profiles: Sequence[Mapping[str, Ranges]] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefacts:
    """A folder of graphs that was opened and found whole.

    contract: names, shapes, dtypes and ranges of the graphs. scheduler: the checkpoint's config.
    manifest: None for an Optimum export.
    """

    path: Path
    unet: UNetSpec
    vae: VAESpec
    text: TextSpec
    scheduler: Mapping[str, Any]
    contract: Contract
    layout: Layout
    version: str
    manifest: Manifest | None

    @property
    def hoisted(self) -> bool:
        """Whether the UNet is two graphs."""
        return "unet_step" in self.contract

    @property
    def sizes(self) -> Mapping[str, Range]:
        """What a step of the denoiser takes: rows `M`, latent cells `H` and `W`."""
        return self.contract["unet_step" if self.hoisted else "unet"].ranges

    @property
    def identity(self) -> str:
        """64 hex digits that change with any file; `version` is the checkpoint's."""
        if self.manifest is None:
            return self.version
        held = {**self.manifest.files, **self.manifest.sha256}
        return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()

    def graph(self, name: GraphName) -> Path:
        """The ONNX file of a graph."""
        return self.path / name / GRAPH_FILE

    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError where it is damaged, or not the text encoder's."""
        held = Tokenizer.from_folder(self.path / "tokenizer")
        held.check_fits(vocabulary=self.text.vocabulary, positions=self.text.positions, source=self.path)
        return held

    def profiles(self, name: GraphName) -> tuple[Ranges, ...]:
        """The parts of a graph's ranges that were asked for, without repetitions; at least one."""
        held = self.manifest.profiles if self.manifest else ()
        found: list[Ranges] = []
        for ranges in [dict(profile[name]) for profile in held] or [dict(self.contract[name].ranges)]:
            if ranges not in found:
                found.append(ranges)
        return tuple(found)


def is_artefacts(path: Path) -> bool:
    """Whether a folder holds exported graphs, ours or Optimum's; false where it can't be looked at."""
    try:
        # A diffusers folder may hold a graph or two beside its weights.
        return (path / MANIFEST).exists() or all((path / name / GRAPH_FILE).is_file() for name in GRAPHS)
    except (OSError, ValueError):  # a name that no file can have, a folder that may not be entered
        return False


def open_artefacts(path: Path, *, version: str | None = None, graphs: bool = True) -> Artefacts:
    """Open a folder of graphs; reads configs, the manifest and a sample of every file.

    version: of the checkpoint whose graphs they must be; None takes any. graphs: False where the graphs
    themselves lie elsewhere, and only what describes them is here.
    Raises CheckpointError, by name, for what is missing, half-written, changed since its export, written for
    another contract, or made of other weights.
    """
    path = Path(path)
    try:
        return _open(path, version, graphs=graphs)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{shown(str(path))}: can't be read ({error})") from error


def is_graph_file(name: str) -> bool:
    """Whether a file of an export, by its relative name, is a graph or its weights."""
    return name.rpartition("/")[2].startswith(GRAPH_FILE)


def _open(path: Path, version: str | None, *, graphs: bool) -> Artefacts:
    if not is_utf8(path.absolute()):
        raise CheckpointError(f"{shown(str(path))}: no UTF-8, so runtimes can't open it; rename the folder")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no folder of graphs")
    configs = {name: read_json(inside(path / file, path)) for name, file in CONFIGS.items()}
    unet, vae = UNetSpec.from_config(configs["unet"]), VAESpec.from_config(configs["vae"])
    text = TextSpec.from_config(configs["text_encoder"])
    manifest = read_manifest(path) if (path / MANIFEST).exists() else None
    hoisted = manifest is not None and manifest.hoisted
    for name in (HOISTED_GRAPHS if hoisted else GRAPHS) if graphs else ():
        if not inside(path / name / GRAPH_FILE, path).is_file():
            raise CheckpointError(f"{path / name / GRAPH_FILE}: missing; export the checkpoint again")
    layout: Layout = "optimum" if manifest is None else manifest.layout
    dtype = "float32" if manifest is None else manifest.dtype
    contract = dict(contract_of(unet, vae, text, dtype=dtype, layout=layout, hoisted=hoisted))
    if manifest is not None:
        _check(path, manifest, contract, version)
        _check_files(path, {k: v for k, v in manifest.files.items() if graphs or not is_graph_file(k)})
        for graph, ranges in manifest.ranges.items():
            name = cast(GraphName, graph)
            contract[name] = replace(contract[name], ranges=ranges)
    return Artefacts(
        path=path,
        unet=unet,
        vae=vae,
        text=text,
        scheduler=configs["scheduler"],
        contract=contract,
        layout=layout,
        version=manifest.version if manifest else _version_of(path),
        manifest=manifest,
    )


def read_manifest(path: Path) -> Manifest:
    """The manifest of a folder. Raises CheckpointError where it makes no sense or is of another format."""
    file = path / MANIFEST
    try:
        held = read_json(inside(file, path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}. Export the checkpoint again") from error
    if type(held.get("format")) is not int or held["format"] != FORMAT:
        raise CheckpointError(
            f"{file}: format is {shown(held.get('format'))}; this version of ritocco reads format {FORMAT}. "
            "Export the checkpoint again"
        )
    match held:
        case {
            "version": str(),
            "layout": "ritocco" | "optimum" as layout,
            "hoisted": bool(hoisted),
            "dtype": "float32" | "float16" | "bfloat16",
            "opset": int(),
            "contract": str(),
            "ranges": dict(ranges),
            "files": dict(files),
            "versions": dict(),
            "parity": dict(),
        } if held.keys() | {"profiles", "sha256"} == set(Manifest.__dataclass_fields__) and not (
            hoisted and layout == "optimum"
        ):
            pass
        case _:
            raise CheckpointError(f"{file}: no manifest of an export; export the checkpoint again")
    if not _VERSION.fullmatch(held["version"]):
        rule = "a version is 64 hex digits; export the checkpoint again"
        raise CheckpointError(f"{file}: version is {shown(held['version'])}; {rule}")
    if isinstance(held["opset"], bool) or not 1 <= held["opset"] <= _LAST_OPSET:
        raise CheckpointError(f"{file}: opset is {shown(held['opset'])}; export the checkpoint again")
    if not files or not all(isinstance(digest, str) for digest in files.values()):
        raise CheckpointError(f"{file}: names no files; export the checkpoint again")
    graphs = HOISTED_GRAPHS if hoisted else GRAPHS
    profiles, whole = held.get("profiles", []), held.get("sha256", {})
    if not isinstance(profiles, list):
        raise CheckpointError(f"{file}: profiles are {shown(profiles)}; export the checkpoint again")
    if not isinstance(whole, dict):
        raise CheckpointError(f"{file}: sha256 is {shown(whole)}; export the checkpoint again")
    read = [_graph_ranges_of(file, graphs, one) for one in (ranges, *profiles)]
    return Manifest(**{**held, "ranges": read[0], "profiles": tuple(read[1:])})


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest, last of all files: without it the folder is no export of ours."""
    text = json.dumps(asdict(manifest), indent=2, sort_keys=True, allow_nan=False) + "\n"
    with (path / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def file_digest(file: Path) -> str:
    """sha256 over a file's size and bytes: all up to 64 MiB, evenly spread blocks of a larger file."""
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with file.open("rb") as stream:
        if size <= _WHOLE_BYTES:
            digest.update(stream.read())
            return digest.hexdigest()
        for k in range(_BLOCKS):
            stream.seek(max(0, size - _BLOCK_BYTES) * k // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def files_of(path: Path) -> dict[str, str]:
    """Every file of an export but its manifest, as written in it: relative name -> digest."""
    return {file.relative_to(path).as_posix(): file_digest(file) for file in _files(path)}


def sha256_of(path: Path) -> dict[str, str]:
    """The files of which `file_digest` reads blocks alone, read whole: relative name -> sha256."""
    found = {}
    for file in _files(path):
        if file.stat().st_size > _WHOLE_BYTES:
            with file.open("rb") as stream:
                found[file.relative_to(path).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def entries_of(path: Path) -> dict[str, Path]:
    """Everything in a folder but folders that hold something: relative name -> file, link, pipe or empty
    folder. What lies behind a link is not looked at.
    """
    found = []
    for place, folders, names in os.walk(path):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, name) for name in (*names, *links)]
        if not folders and not names:
            found.append(Path(place))
    return {entry.relative_to(path).as_posix(): entry for entry in sorted(found)}


def strangers_of(artefacts: Artefacts) -> list[str]:
    """What lies beside the folders of an export of ours and is none of it, which opening it allows."""
    named = artefacts.manifest.files if artefacts.manifest else {}
    beside = (name for name in entries_of(artefacts.path) if "/" not in name)
    return sorted(name for name in beside if name != MANIFEST and name not in named)


def _files(path: Path) -> list[Path]:
    """What belongs to an export: the index, and every file in its folders."""
    found = entries_of(path).items()
    return [entry for name, entry in found if entry.is_file() and ("/" in name or name == INDEX)]


def _check(path: Path, manifest: Manifest, contract: Contract, version: str | None) -> None:
    if manifest.contract != contract_digest(contract):
        raise CheckpointError(
            f"{path}: written for other inputs and outputs than this version of ritocco feeds "
            f"({manifest.versions.get('ritocco', 'an unknown version')} wrote it); export it again"
        )
    if version is not None and manifest.version != version:
        raise CheckpointError(
            f"{path}: stale, made of the checkpoint {manifest.version[:12]} and not of {version[:12]}; "
            "export the checkpoint again"
        )
    for ranges in (manifest.ranges, *manifest.profiles):
        for graph, io in contract.items():
            if set(ranges[graph]) != set(io.ranges):
                needed = ", ".join(sorted(io.ranges))
                raise CheckpointError(f"{path / MANIFEST}: sizes of {graph} must be those of {needed}")
            for symbol, (least, best, most) in ranges[graph].items():
                first, _, last = manifest.ranges[graph][symbol]
                if not first <= least <= most <= last:
                    rule = f"a profile of {graph} has {symbol} {_span(least, most)}"
                    raise CheckpointError(f"{path / MANIFEST}: {rule}; the graph takes {_span(first, last)}")
                multiple = io.multiples.get(symbol, 1)
                if most > LARGEST[symbol] or least % multiple or best % multiple or most % multiple:
                    rule = f"multiples of {multiple} up to {LARGEST[symbol]}"
                    found_here = f"{graph} has {symbol} {_span(least, most)}"
                    raise CheckpointError(f"{path / MANIFEST}: {found_here}; sizes must be {rule}")


def _check_files(path: Path, files: Mapping[str, str]) -> None:
    # Beside the folders may lie what people and desktops put there.
    found = {name: one for name, one in entries_of(path).items() if "/" in name or name in files}
    for name in sorted(files.keys() ^ found.keys()):
        file = f"{path}: {plain(name)}"
        if name not in found:
            raise CheckpointError(f"{file} is missing; export the checkpoint again")
        raise CheckpointError(f"{file} does not belong to the export; take it away, or export again")
    for name, digest in sorted(files.items()):
        if not found[name].is_file() or file_digest(inside(found[name], path)) != digest:
            raise CheckpointError(
                f"{path}: {plain(name)} changed since it was exported; export the checkpoint again"
            )


def _span(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def _graph_ranges_of(file: Path, graphs: Sequence[GraphName], held: object) -> dict[str, dict[str, Range]]:
    if not isinstance(held, dict):
        raise CheckpointError(f"{file}: a profile is {shown(held)}; export the checkpoint again")
    return {graph: _ranges_of(file, graph, held.get(graph)) for graph in graphs}


def _ranges_of(file: Path, graph: str, held: object) -> dict[str, Range]:
    if not isinstance(held, dict):
        raise CheckpointError(f"{file}: says nothing of the sizes of {graph}; export the checkpoint again")
    out: dict[str, Range] = {}
    for symbol, sizes in held.items():
        match sizes:
            case [int(least), int(best), int(most)] if 0 < least <= best <= most and bool not in map(
                type, sizes
            ):
                out[symbol] = (least, best, most)
            case _:
                raise CheckpointError(f"{file}: sizes of {graph}.{shown(symbol)} are {shown(sizes)}")
    return out


def _version_of(path: Path) -> str:
    digest = hashlib.sha256()
    for name, one in files_of(path).items():
        digest.update(f"{name} {one}\n".encode())
    return digest.hexdigest()
