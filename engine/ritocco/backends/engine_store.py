"""TensorRT engines on disk: what each was built from and for, where it lies, and whether it is whole.

An engine is a file beside a JSON of its key; their name is the digest of the key and one of the engine. It is
there once the JSON is, which comes last: of two processes that build the same one, one's is left, whole. What
is not there, was cut or changed, or belongs to another key is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from ritocco.artefacts import Artefacts, file_digest
from ritocco.backends.cuda import Gpu
from ritocco.backends.tensorrt_library import Library
from ritocco.disk import cache_root, sweep, write_whole
from ritocco.errors import BackendError, RequestError
from ritocco.nets.io import GraphName
from ritocco.shown import shown

FORMAT = 1
Hardware = Literal["gpu", "capability", "ampere+"]
_HARDWARE = ("gpu", "capability", "ampere+")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How engines are built and run.

    hardware: what an engine of TensorRT runs on: the `gpu` model it was built on, every GPU of its compute
    `capability`, or `ampere+` (8.0 and newer). version_compatible: newer TensorRT of the same major version
    runs it too. refit: built once, on a GPU, for all checkpoints of a shape, whose weights are put in at
    load. level: builder optimisation level. workspace_bytes: most scratch memory. cuda_graph: calls with
    unchanged shapes are replayed. engines: a folder that is looked into before the cache. via: for
    `tensorrt-rtx`, its own bindings (`bindings`), ONNX Runtime's provider (`onnxruntime`), or `auto`: the
    provider where installed, unless the bindings can do more (bfloat16 graphs, engines built ahead).
    """

    hardware: Hardware = "gpu"
    version_compatible: bool = False
    refit: bool = False
    level: int | None = None
    workspace_bytes: int | None = None
    cuda_graph: bool = True
    engines: str | None = None
    via: Literal["auto", "bindings", "onnxruntime"] = "auto"

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> EngineOptions:
        """From what a caller passed. Raises RequestError for a name or value that makes no sense."""
        check_options(given)
        return cls(**(given or {}))

    def built_in(self) -> dict[str, Any]:
        """Those that a built engine depends on."""
        names = ("hardware", "version_compatible", "refit", "level", "workspace_bytes")
        return {name: getattr(self, name) for name in names}


def check_options(given: Mapping[str, Any] | None) -> None:
    """Raises RequestError for what `EngineOptions` has no name or rule for."""
    if not isinstance(given, Mapping | None):
        raise _refused(f"backend_options is {shown(given)}; it must be a dict or None")
    for name, value in (given or {}).items():
        if name not in _RULES:
            raise _refused(f"backend_options has {shown(name)}; known are {', '.join(sorted(_RULES))}")
        kinds, rule = _RULES[name]
        if isinstance(kinds, tuple):  # True is 1 to Python
            allowed = any(type(value) is type(kind) and value == kind for kind in kinds)
        else:
            allowed = type(value) in kinds
        if not allowed or (name == "workspace_bytes" and value is not None and not 0 < value < 1 << 63):
            raise _refused(f"backend_options[{name!r}] is {shown(value)}; it must be {rule}")


def _refused(message: str) -> RequestError:
    return RequestError(message, field="backend_options")


def options_in(text: str | None) -> dict[str, Any] | None:
    """What `--backend-options` holds, for `EngineOptions.parse`. Raises RequestError for no JSON object."""
    if text is None:
        return None
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        rule = "it must be a JSON object, as in '{\"level\": 5}'"
        raise RequestError(f"--backend-options is {shown(text)}; {rule}", field="--backend-options")
    return parsed


# Allowed values or exact types, and the rule in words. bool is no int here.
_RULES: Mapping[str, tuple[tuple[object, ...] | set[type], str]] = {
    "hardware": (_HARDWARE, ", ".join(_HARDWARE)),
    "version_compatible": ({bool}, "True or False"),
    "refit": ({bool}, "True or False"),
    "level": ((None, 0, 1, 2, 3, 4, 5), "0 to 5, or None"),
    "workspace_bytes": ({int, type(None)}, "a number of bytes from 1 on and below 2**63, or None"),
    "cuda_graph": ({bool}, "True or False"),
    "engines": ({str, type(None)}, "the name of a folder, or None"),
    "via": (("auto", "bindings", "onnxruntime"), "auto, bindings or onnxruntime"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineKey:
    """Everything that a built engine depends on.

    source: digests of the graph's files, or of its structure alone where weights are put in later. shapes:
    smallest, best and largest of every moving input, for each profile. version: of the library. target: the
    GPUs that it runs on, by name or compute capability.
    """

    graph: GraphName
    source: Mapping[str, str]
    shapes: Sequence[Mapping[str, Any]]
    library: Library
    version: str
    target: str
    options: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """As it comes back from a file."""
        return cast(dict[str, Any], json.loads(json.dumps({"format": FORMAT, **asdict(self)})))

    def digest(self) -> str:
        """32 hex digits, different for every key."""
        text = json.dumps(self.as_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def engine_key(
    artefacts: Artefacts,
    graph: GraphName,
    options: EngineOptions,
    *,
    library: Library,
    version: str,
    target: str,
    structure: str | None = None,
) -> EngineKey:
    """The key of an engine for a graph. structure: of the graph without its weights, with `refit`."""
    io = artefacts.contract[graph]
    major = version.partition(".")[0]
    return EngineKey(
        graph=graph,
        source={"structure": structure} if structure else weights_of(artefacts, graph),
        shapes=[io.shapes(ranges) for ranges in artefacts.profiles(graph)],
        library=library,
        version=major if options.version_compatible else version,
        target=target,
        options=options.built_in(),
    )


def target_of(library: Library, options: EngineOptions, gpu: Gpu) -> str:
    """What engines for a GPU are built for. Raises BackendError where the library does not run on it."""
    capability = f"sm{gpu.capability}"
    if library == "tensorrt":
        names = {"gpu": f"{gpu.name} {capability}", "capability": capability, "ampere+": "ampere+"}
        return names[options.hardware]
    if gpu.capability not in (75, 86, 89) and gpu.capability < 120:
        raise BackendError(
            f"{gpu.name} has compute capability {gpu.capability / 10}; TensorRT for RTX runs on 7.5, 8.6, "
            "8.9 and from 12.0 on (RTX cards): use the backend tensorrt"
        )
    return capability


def weights_of(artefacts: Artefacts, graph: GraphName) -> dict[str, str]:
    """Digests of a graph's files: from the manifest, of every byte where it has them, else of the files."""
    if artefacts.manifest is not None:
        held = {**artefacts.manifest.files, **artefacts.manifest.sha256}
        return {name: digest for name, digest in held.items() if name.startswith(f"{graph}/model.")}
    found = sorted((artefacts.path / graph).glob("model.*"))
    return {f"{graph}/{file.name}": file_digest(file) for file in found}


class EngineStore:
    """A folder that engines are written to, and others that are only looked into.

    kept: whether what is written is there at the next start.
    """

    def __init__(self, folder: Path | None = None, *, also: Sequence[Path] = ()) -> None:
        """folder: None takes the cache, or one that goes with this object where that can't be written."""
        self._also = tuple(also)
        self.kept = True
        wanted = cache_root() / "engines" if folder is None else folder
        try:
            wanted.mkdir(parents=True, exist_ok=True)
            if not os.access(wanted, os.W_OK):
                raise PermissionError(f"{wanted} can't be written")
            if folder is None:  # the cache is ours alone
                sweep(wanted, ".*.part", days=1)  # of processes that were killed
        except OSError:
            if folder is not None:
                raise
            self.kept = False
            wanted = Path(tempfile.mkdtemp(prefix="ritocco-engines-"))
            weakref.finalize(self, shutil.rmtree, wanted, ignore_errors=True)
        self.folder = wanted

    @classmethod
    def of(cls, options: EngineOptions) -> EngineStore:
        """The cache, behind the folder that the options name."""
        return cls(also=[Path(options.engines)] if options.engines else [])

    def holds(self, pattern: str) -> bool:
        """Whether anything of a name lies here, of whatever key."""
        return any(next(folder.glob(pattern), None) for folder in (*self._also, self.folder))

    def find(self, key: EngineKey, *, written: bool = False) -> tuple[Path, Mapping[str, str]] | None:
        """The engine of a key and the digests of the weights in it; None where none is whole.

        written: only where `written` writes to.
        """
        for folder in (self.folder,) if written else (*self._also, self.folder):
            for about in sorted(folder.glob(f"{key.digest()}.*.json")):
                file = about.with_suffix(".engine")
                with suppress(OSError, ValueError):
                    match json.loads(about.read_text(encoding="utf-8")):
                        case {"key": dict(of), "engine": str(digest), "weights": dict(weights)} if (
                            of == key.as_json() and digest == file_digest(file)
                        ):
                            return file, weights
        return None

    @contextmanager
    def written(self, key: EngineKey, weights: Mapping[str, str]) -> Iterator[Path]:
        """A file to write an engine to: the key's at the end, in place of any other, or gone where the block
        raises.
        """
        part = self.folder / f".{key.digest()}.{secrets.token_hex(8)}.part"
        try:
            yield part
            digest = file_digest(part)
            final = self.folder / f"{key.digest()}.{digest[:16]}.engine"
            part.replace(final)
            about = {"key": key.as_json(), "engine": digest, "weights": dict(weights)}
            write_whole(final.with_suffix(".json"), json.dumps(about, indent=2, sort_keys=True).encode())
            for other in self.folder.glob(f"{key.digest()}.*.json"):
                if other.stem != final.stem:
                    other.unlink(missing_ok=True)
                    other.with_suffix(".engine").unlink(missing_ok=True)
        finally:
            part.unlink(missing_ok=True)

    def cache_file(self, name: str) -> Path:
        """Where a cache of the library's own is kept. name: of what it belongs to."""
        safe = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
        return self.folder / f"{safe}.cache"
