"""Folders of graphs: what is opened, what is refused by name, and that writing is whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ritocco.artefacts import (
    MANIFEST,
    cache_root,
    file_digest,
    graph_files,
    is_artefacts,
    open_artefacts,
    written_whole,
)
from ritocco.errors import CheckpointError
from ritocco.nets.io import contract_digest, contract_of


@pytest.fixture
def folder(tiny_graphs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_graphs, tmp_path / "graphs")


def edit(folder: Path, **changes: object) -> None:
    file = folder / MANIFEST
    held = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(held | changes), encoding="utf-8")


def flip_a_byte(folder: Path) -> None:
    file = folder / "unet" / "model.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(folder: Path) -> None:
    file = folder / "vae_decoder" / "model.onnx"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (flip_a_byte, "changed since it was exported"),
    "cut": (cut, "vae_decoder.*changed since it was exported"),
    "a graph": (lambda f: (f / "vae_encoder" / "model.onnx").unlink(), "vae_encoder.*missing"),
    "a config": (lambda f: (f / "unet" / "config.json").unlink(), r"unet.config\.json: missing"),
    "json": (lambda f: (f / MANIFEST).write_text("{", encoding="utf-8"), "not valid JSON"),
    "format": (lambda f: edit(f, format=99), "format is 99"),
    "contract": (lambda f: edit(f, contract="0" * 64), "other inputs and outputs"),
    "a key": (lambda f: edit(f, more=1), "no manifest of an export"),
    "ranges": (lambda f: edit(f, ranges={}), "says nothing of the sizes"),
    "no files": (lambda f: edit(f, files={}), "names no files"),
    "outside": (lambda f: edit(f, files={"../../etc/passwd": "x"}), "leads outside"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(folder: Path, damage: str) -> None:
    assert open_artefacts(folder).layout == "ritocco"
    spoil, said = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(CheckpointError, match=said):
        open_artefacts(folder)


def test_graphs_of_another_checkpoint_are_stale(folder: Path) -> None:
    version = open_artefacts(folder).version
    assert open_artefacts(folder, version=version).version == version
    with pytest.raises(CheckpointError, match="stale"):
        open_artefacts(folder, version="f" * 64)


def test_a_folder_without_manifest_is_optimums(tiny_optimum_graphs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_optimum_graphs, tmp_path / "theirs")
    (folder / MANIFEST).unlink()
    opened = open_artefacts(folder)
    assert opened.layout == "optimum"
    assert opened.manifest is None
    assert opened.contract["unet"].inputs[1].shape == ()
    before = opened.version
    flip_a_byte(folder)
    assert open_artefacts(folder).version != before


def test_writing_is_whole_or_not_at_all(tiny_graphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write(text: str, *, fail: bool) -> None:
        with written_whole(out) as part:
            shutil.copytree(tiny_graphs, part, dirs_exist_ok=True)
            (part / "note").write_text(text, encoding="utf-8")
            assert not out.exists() or (out / "note").read_text(encoding="utf-8") != text
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("first", fail=True)
    assert not list(tmp_path.iterdir())
    write("second", fail=False)
    with pytest.raises(KeyboardInterrupt):
        write("third", fail=True)
    assert (out / "note").read_text(encoding="utf-8") == "second"
    write("fourth", fail=False)
    assert (out / "note").read_text(encoding="utf-8") == "fourth"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert is_artefacts(out)


def test_a_digest_sees_every_byte_of_a_small_file_and_a_sample_of_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    digests = set()
    for k in range(300):
        small.write_bytes(bytes(k == i for i in range(300)))
        digests.add(file_digest(small))
    assert len(digests) == 300
    monkeypatch.setattr("ritocco.artefacts._WHOLE_BYTES", 1000)
    large.write_bytes(bytes(1 << 20))
    first = file_digest(large)
    large.write_bytes(bytes((1 << 20) + 1))
    assert file_digest(large) != first
    large.write_bytes(b"x" + bytes((1 << 20) - 1))
    assert file_digest(large) != first


def test_every_file_of_the_graphs_is_named(tiny_graphs: Path) -> None:
    named = graph_files(tiny_graphs)
    assert "unet/model.onnx" in named
    assert not any(name.startswith("tokenizer") for name in named)


def test_the_contract_digest_sees_names_and_types_and_no_ranges(tiny_graphs: Path) -> None:
    opened = open_artefacts(tiny_graphs)
    specs = (opened.unet, opened.vae, opened.text)
    own = contract_of(*specs, dtype="float32")
    assert contract_digest(own) == contract_digest(opened.contract)
    others = [contract_of(*specs, dtype="float16"), contract_of(*specs, dtype="float32", layout="optimum")]
    assert len({contract_digest(one) for one in (own, *others)}) == 3


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RITOCCO_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("RITOCCO_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "ritocco"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_root() == tmp_path / "local" / "ritocco"
