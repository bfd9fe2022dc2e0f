"""The repository itself: layout, arrows between packages, sizes, public names, and what an import does."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import ritocco

ROOT = Path(__file__).resolve().parent.parent
# Lowest first: a package may import those before it.
PACKAGES = {
    "ritocco_kernels": "kernels",
    "ritocco": "engine",
    "ritocco_export": "export",
    "ritocco_bench": "benchmarks",
}
FOLDERS = {*PACKAGES.values(), "tests", "docs", ".ci"}
FILES = {
    ".editorconfig",
    ".gitattributes",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "NOTICE",
    "README.md",
    "SECURITY.md",
    "constraints.txt",
    "pyproject.toml",
}
BESIDE_THE_PACKAGE = {"benchmarks": {"gpu_suite.sh", "pocket", "results", "traces"}}
MAX_TRACKED_BYTES = 45 << 20
MACHINE_PATH = re.compile(r"/(?:work|root|home/\w+|Users/\w+)/|\b[A-Z]:\\+Users\\")
PUBLIC_NAMES = [
    "BackendError",
    "Batcher",
    "BusyError",
    "CheckpointError",
    "DeviceLostError",
    "Engine",
    "FetchError",
    "Fetcher",
    "NonFiniteError",
    "Prediction",
    "PredictionInput",
    "RequestError",
    "RitoccoError",
    "Ticket",
    "TimeLimitError",
    "from_diffusers",
    "load",
    "predict",
]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _listed() -> list[Path]:
    """Every file that git tracks or would add; outside a checkout every file of a source archive."""
    asked = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        answer = subprocess.run(asked, capture_output=True, check=True).stdout.decode("utf-8")
    except (OSError, subprocess.CalledProcessError):
        return list(_walked())
    paths = (ROOT / name for name in answer.split("\0") if name)
    return sorted(path for path in paths if path.is_file())


def _walked() -> Iterator[Path]:
    ignored = {".venv", ".cache", ".git", "demo-output", "dist", "out", "__pycache__", "PKG-INFO"}
    ignored |= {".mypy_cache", ".pytest_cache", ".ruff_cache", ".import_linter_cache", ".hypothesis"}
    for folder, names, files in os.walk(ROOT):
        names[:] = [name for name in names if name not in ignored]
        yield from (Path(folder, name) for name in files if name not in ignored)


TRACKED = _listed()


def _relative(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def test_the_top_level_is_the_architectures() -> None:
    parts = [path.relative_to(ROOT).parts for path in TRACKED]
    assert {p[0] for p in parts if len(p) > 1} == FOLDERS
    assert {p[0] for p in parts if len(p) == 1} == FILES


def test_each_import_root_holds_one_package() -> None:
    for package, folder in PACKAGES.items():
        inside = {
            path.relative_to(ROOT / folder).parts[0] for path in TRACKED if (ROOT / folder) in path.parents
        }
        assert inside - BESIDE_THE_PACKAGE.get(folder, set()) == {package}
        assert (ROOT / folder / package / "__init__.py").is_file()
        assert (ROOT / folder / package / "py.typed").is_file()


def test_tests_and_roots_are_no_packages() -> None:
    roots = [f"{folder}/__init__.py" for folder in FOLDERS]
    found = [name for name in _relative(TRACKED) if name.endswith("__init__.py")]
    assert [
        name for name in found if name in roots or name.startswith(("tests/", "benchmarks/pocket/"))
    ] == []


def test_the_build_takes_every_package() -> None:
    built = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(built) == sorted(f"{folder}/{package}" for package, folder in PACKAGES.items())


def test_tracked_files_are_small_together() -> None:
    sizes = {path: path.stat().st_size for path in TRACKED}
    largest = sorted(sizes, key=lambda path: -sizes[path])[:5]
    assert sum(sizes.values()) < MAX_TRACKED_BYTES, [(str(path), sizes[path]) for path in largest]


def _imported(path: Path) -> set[str]:
    """Top-level names that a module imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def _modules(package: str) -> list[Path]:
    home = ROOT / PACKAGES[package] / package
    return [path for path in TRACKED if path.suffix == ".py" and home in path.parents]


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_down(package: str) -> None:
    order = list(PACKAGES)
    forbidden = {*order[order.index(package) + 1 :], "pocket", "tests"}
    modules = _modules(package)
    assert modules
    wrong = {
        str(path): sorted(_imported(path) & forbidden) for path in modules if _imported(path) & forbidden
    }
    assert wrong == {}


def test_every_module_says_what_it_is_for() -> None:
    modules = [path for path in TRACKED if path.suffix == ".py" and not path.stem.startswith("_")]
    modules += [path for package in PACKAGES for path in _modules(package) if path.stem.startswith("__")]
    assert modules
    silent = [path for path in modules if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert _relative(silent) == []


def test_no_file_names_a_machines_folders() -> None:
    found = []
    for path in TRACKED:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {hit.group()}" for hit in MACHINE_PATH.finditer(text)]
    assert found == []


def test_ci_runs_the_readmes_test_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "set -eu",
        'cd "$(dirname "${BASH_SOURCE[0]}")/.."',
        "make test",
    ]


def test_tests_named_in_the_texts_exist() -> None:
    """SECURITY.md names a test for each defence; a renamed test must not leave it pointing at nothing."""
    texts = "\n".join(path.read_text(encoding="utf-8") for path in TRACKED if path.suffix == ".md")
    named = set(re.findall(r"(tests/[\w/]+\.py)::(\w+)", texts))
    assert len(named) > 20
    missing = {
        f"{file}::{test}"
        for file, test in named
        if not (ROOT / file).is_file() or f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")
    }
    assert missing == set()


def test_public_names_are_pinned() -> None:
    assert ritocco.__all__ == PUBLIC_NAMES
    assert sorted(PUBLIC_NAMES) == PUBLIC_NAMES
    assert all(hasattr(ritocco, name) for name in PUBLIC_NAMES)


def test_installed_version_is_the_sources() -> None:
    assert version("ritocco") == PYPROJECT["project"]["version"]


def test_the_changelog_knows_the_version() -> None:
    assert f"## {PYPROJECT['project']['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# numpy comes first: it adds warning filters of its own.
WATCH_IMPORT = """
import json, logging, os, sys, threading, warnings
watched = {"socket.__new__", "socket.bind", "socket.connect", "socket.getaddrinfo"}
watched |= {"subprocess.Popen", "os.fork", "os.posix_spawn"}
events = []
import numpy
sys.addaudithook(lambda event, args: events.append(event) if event in watched else None)
before = (dict(os.environ), list(warnings.filters), list(logging.getLogger().handlers))
import ritocco
after = (dict(os.environ), list(warnings.filters), list(logging.getLogger().handlers))
facts = {
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "events": events,
    "threads": threading.active_count(),
    "unchanged": before == after,
}
sys.stdout.write(json.dumps(facts))
"""
HEAVY = {
    *("torch", "triton", "transformers", "diffusers", "onnxruntime", "openvino"),
    *("fastapi", "starlette", "uvicorn", "prometheus_client", "sqlite3"),
    *("httpx", "httpcore", "requests", "urllib3", "typer", "rich", "matplotlib", "scipy"),
    *("ritocco_kernels", "ritocco_export", "ritocco_bench"),
}


def test_import_does_nothing() -> None:
    """A fresh process: nothing heavy imported, no output, socket, thread, process, changed setting."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in PACKAGES.values())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WATCH_IMPORT],
        capture_output=True,
        check=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    facts = json.loads(done.stdout)
    assert done.stderr == ""
    assert HEAVY & set(facts["modules"]) == set()
    assert {"ritocco", "numpy", "PIL"} <= set(facts["modules"])
    assert (facts["events"], facts["threads"], facts["unchanged"]) == ([], 1, True)
