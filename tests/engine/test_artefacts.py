"""Folders of graphs: what is opened, what is refused by name, and that writing is whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import ritocco
from ritocco.artefacts import (
    MANIFEST,
    file_digest,
    files_of,
    is_artefacts,
    open_artefacts,
    read_manifest,
    write_manifest,
)
from ritocco.checkpoint_report import verify
from ritocco.errors import CheckpointError
from ritocco.nets.io import contract_digest, contract_of
from ritocco_export.whole_folder import written_whole


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


def more_files(folder: Path, name: str) -> None:
    held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    edit(folder, files=held["files"] | {name: "x"})


def no_ranges(folder: Path, graph: str) -> None:
    held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    edit(folder, ranges=held["ranges"] | {graph: {}})


def all_ranges(folder: Path, sizes: list[int]) -> None:
    held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    edit(folder, ranges={graph: dict.fromkeys(ranges, sizes) for graph, ranges in held["ranges"].items()})


def one_profile(folder: Path, graph: str, ranges: object) -> None:
    held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    edit(folder, profiles=[held["ranges"] | {graph: ranges}])


def swap_prediction(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    held = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(held | {"prediction_type": "v_prediction"}), encoding="utf-8")


def swap_tokens(folder: Path) -> None:
    file = folder / "tokenizer" / "vocab.json"
    held = json.loads(file.read_text(encoding="utf-8"))
    first, second, *_ = held
    file.write_text(json.dumps(held | {first: held[second], second: held[first]}), encoding="utf-8")


def folder_for_a_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()


def pipe_for_a_config(folder: Path) -> None:
    (folder / "tokenizer" / "vocab.json").unlink()
    os.mkfifo(folder / "tokenizer" / "vocab.json")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (flip_a_byte, "changed since it was exported"),
    "cut": (cut, "vae_decoder.*changed since it was exported"),
    "a graph": (lambda f: (f / "vae_encoder" / "model.onnx").unlink(), "vae_encoder.*missing"),
    "a config": (lambda f: (f / "unet" / "config.json").unlink(), r"unet.config\.json: missing"),
    "json": (lambda f: (f / MANIFEST).write_text("{", encoding="utf-8"), "not valid JSON.*Export the check"),
    "a folder for a manifest": (folder_for_a_manifest, r"ritocco\.json.*Export the checkpoint again"),
    "format": (lambda f: edit(f, format=99), "format is 99"),
    "true": (lambda f: edit(f, format=True), "format is True"),
    "opset": (lambda f: edit(f, opset=True), "opset is True"),
    "no opset": (lambda f: edit(f, opset=-1), "opset is -1"),
    "endless opset": (lambda f: edit(f, opset=10**30), "opset is 10000"),
    "no version": (lambda f: edit(f, version=""), "version is ''; a version is 64 hex digits"),
    "sizes from true on": (lambda f: all_ranges(f, [True, 8, 8]), r"are \[True, 8, 8\]"),
    "the index": (lambda f: (f / "model_index.json").write_bytes(b"{}"), "model_index.json changed"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
    "an empty folder": (lambda f: (f / "unet" / "x").mkdir(), "unet/x does not belong"),
    "a link to nowhere": (lambda f: (f / "unet" / "x").symlink_to("nowhere"), "unet/x does not belong"),
    "a link to a folder": (lambda f: (f / "unet" / "x").symlink_to(f.parent), "unet/x does not belong"),
    "a pipe": (lambda f: os.mkfifo(f / "unet" / "x"), "unet/x does not belong"),
    "a pipe for a graph": (pipe_for_a_config, "vocab.json changed since"),
    "contract": (lambda f: edit(f, contract="0" * 64), "other inputs and outputs"),
    "a key": (lambda f: edit(f, more=1), "no manifest of an export"),
    "ranges": (lambda f: edit(f, ranges={}), "says nothing of the sizes"),
    "no files": (lambda f: edit(f, files={}), "names no files"),
    "outside": (lambda f: more_files(f, "../../etc/passwd"), "etc/passwd is missing"),
    "a name": (lambda f: more_files(f, "a\0b"), "is missing"),
    "a long name": (lambda f: more_files(f, "a" * 400), "is missing"),
    "fewer files": (lambda f: edit(f, files={"unet/model.onnx": "0" * 64}), "does not belong to the export"),
    "a stranger": (lambda f: (f / "unet" / "x").write_bytes(b""), "unet/x does not belong"),
    "scheduler": (swap_prediction, r"scheduler_config\.json changed since it was exported"),
    "tokens": (swap_tokens, r"vocab\.json changed since it was exported"),
    "symbols": (lambda f: no_ranges(f, "unet"), "sizes of unet must be those of H, M, W"),
    "profiles": (lambda f: edit(f, profiles={}), "profiles are"),
    "a profile": (lambda f: edit(f, profiles=[7]), "a profile is 7"),
    "a profile outside": (
        lambda f: one_profile(f, "unet", {"M": [1, 2, 4], "H": [8, 8, 33], "W": [8, 8, 8]}),
        "a profile of unet has H 8 to 33; the graph takes 8 to 32",
    ),
    "ranges without end": (
        lambda f: all_ranges(f, [1, 64, 10**9]),
        "has N 1 to 1000000000; sizes must be multiples of 1 up to 16",
    ),
    "a profile of odd sizes": (
        lambda f: one_profile(f, "unet", {"M": [1, 2, 4], "H": [8, 8, 9], "W": [8, 8, 8]}),
        "unet has H 8 to 9; sizes must be multiples of 2 up to 128",
    ),
    "a profile's symbols": (lambda f: one_profile(f, "unet", {}), "sizes of unet must be those of H, M, W"),
    "text symbols": (lambda f: no_ranges(f, "text_encoder"), "sizes of text_encoder must be those of N"),
}


def test_a_name_that_runtimes_could_not_open(folder: Path) -> None:
    renamed = folder.rename(folder.with_name("\udcff"))
    with pytest.raises(CheckpointError, match="no UTF-8, so runtimes can't open it; rename the folder"):
        open_artefacts(renamed)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(folder: Path, damage: str) -> None:
    assert open_artefacts(folder).layout == "ritocco"
    spoil, said = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(CheckpointError, match=said):
        open_artefacts(folder)


def test_a_manifest_without_profiles_has_one(folder: Path) -> None:
    """Manifests of before there were several."""
    held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del held["profiles"]
    (folder / MANIFEST).write_text(json.dumps(held), encoding="utf-8")
    opened = open_artefacts(folder)
    assert opened.profiles("unet") == (opened.contract["unet"].ranges,)


def test_profiles_are_kept_apart(folder: Path) -> None:
    small, large = {"M": [1, 2, 4], "H": [8, 8, 8], "W": [8, 8, 8]}, {"M": [1, 2, 2], "H": [8, 32, 32]}
    held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    large["W"] = large["H"]
    edit(folder, profiles=[held["ranges"] | {"unet": one} for one in (small, large)])
    opened = open_artefacts(folder)
    assert [one["M"] for one in opened.profiles("unet")] == [(1, 2, 4), (1, 2, 2)]
    assert opened.profiles("text_encoder") == (opened.contract["text_encoder"].ranges,)
    shapes = opened.contract["unet"].shapes(opened.profiles("unet")[1])
    assert shapes["sample"] == ((1, 9, 8, 8), (2, 9, 32, 32), (2, 9, 32, 32))
    assert shapes["timestep"] == ((1,), (2,), (2,))


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
            (part / "model_index.json").write_text(text, encoding="utf-8")
            assert not out.exists() or (out / "model_index.json").read_text(encoding="utf-8") != text
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("first", fail=True)
    assert not list(tmp_path.iterdir())
    write("second", fail=False)
    with pytest.raises(KeyboardInterrupt):
        write("third", fail=True)
    assert (out / "model_index.json").read_text(encoding="utf-8") == "second"
    write("fourth", fail=False)
    assert (out / "model_index.json").read_text(encoding="utf-8") == "fourth"
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


def test_every_file_of_an_export_is_named(tiny_graphs: Path) -> None:
    named = files_of(tiny_graphs)
    assert "unet/model.onnx" in named
    assert {"tokenizer/vocab.json", "scheduler/scheduler_config.json"} <= named.keys()
    assert MANIFEST not in named


def test_the_contract_digest_sees_names_and_types_and_no_ranges(tiny_graphs: Path) -> None:
    opened = open_artefacts(tiny_graphs)
    specs = (opened.unet, opened.vae, opened.text)
    own = contract_of(*specs, dtype="float32")
    assert contract_digest(own) == contract_digest(opened.contract)
    others = [contract_of(*specs, dtype="float16"), contract_of(*specs, dtype="float32", layout="optimum")]
    assert len({contract_digest(one) for one in (own, *others)}) == 3


def test_the_identity_is_of_every_file(folder: Path) -> None:
    before = open_artefacts(folder).identity
    assert len(before) == 64
    assert open_artefacts(folder).identity == before
    file = folder / "unet" / "config.json"
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    edit(folder, files=files_of(folder))
    assert open_artefacts(folder).identity != before
    (folder / MANIFEST).unlink()
    assert open_artefacts(folder).identity == open_artefacts(folder).version


@pytest.mark.parametrize("inside", ["", "unet"])
def test_the_folder_that_one_is_in_is_not_replaced(
    folder: Path, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / inside)
    with pytest.raises(CheckpointError, match="is the folder that you are in"), written_whole(Path()):
        pass
    open_artefacts(folder)


def test_a_link_is_written_where_it_leads(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    with written_whole(tmp_path / "link", replace=True) as part:
        (part / "unet").mkdir()
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["link", folder.name])
    assert [path.name for path in folder.iterdir()] == ["unet"]


def test_what_a_killed_export_left_is_cleared(folder: Path) -> None:
    token = "0123456789abcdef"
    names = (f".{folder.name}.{token}.part", f".other.{token}.part", f".{folder.name}.tar.part")
    kept = [folder.with_name(name) for name in names]
    gone = [folder.with_name(f".{folder.name}.{token[::-1]}.{end}") for end in ("part", "old")]
    for path in (*kept, *gone):
        path.mkdir()
        (path / "model.onnx").write_text("x", encoding="utf-8")
        if path != kept[0]:  # which another export may be writing
            for one in (path / "model.onnx", path):
                os.utime(one, (0, 0))
    with written_whole(folder, replace=True) as part:
        (part / "unet").mkdir()
    assert [path.exists() for path in (*kept, *gone)] == [True, True, True, False, False]


@pytest.mark.parametrize("name", ["unet/notes.txt", "thesis.txt", "photos/cat.png"])
def test_an_export_with_strangers_files_is_not_replaced(tiny_graphs: Path, tmp_path: Path, name: str) -> None:
    out = shutil.copytree(tiny_graphs, tmp_path / "out")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine", encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"holds {name}, which no export wrote"), written_whole(out):
        pass
    assert (out / name).read_text(encoding="utf-8") == "mine"


def test_graphs_without_a_manifest_are_not_replaced(tiny_graphs: Path, tmp_path: Path) -> None:
    out = shutil.copytree(tiny_graphs, tmp_path / "out")
    (out / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="exists and is no export"), written_whole(out):
        pass
    assert (out / "unet" / "model.onnx").is_file()


def test_whatever_lies_in_the_cache_is_replaced(tiny_graphs: Path, tmp_path: Path) -> None:
    out = shutil.copytree(tiny_graphs, tmp_path / "out")
    (out / MANIFEST).write_text("cut sh", encoding="utf-8")
    (out / "left").write_text("over", encoding="utf-8")
    with pytest.raises(CheckpointError), written_whole(out):
        pass
    with written_whole(out, replace=True) as part:
        shutil.copytree(tiny_graphs, part, dirs_exist_ok=True)
    assert open_artefacts(out).layout == "ritocco"
    assert not (out / "left").exists()


def test_links_out_of_an_export_are_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("x", encoding="utf-8")
    (folder / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert not any("secret" in name for name in files_of(folder))
    (folder / "more").unlink()
    data = folder / "tokenizer" / "vocab.json"
    data.rename(tmp_path / "vocab.json")
    data.symlink_to(tmp_path / "vocab.json")
    with pytest.raises(CheckpointError, match="leads outside"):
        open_artefacts(folder)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_no_file_can_have(name: str) -> None:
    assert not is_artefacts(Path(name))
    with pytest.raises(CheckpointError, match=r"can't be read|no folder of graphs"):
        open_artefacts(Path(name))
    with pytest.raises(CheckpointError):
        ritocco.load(name)


def test_two_writers_at_once_leave_one_whole_export(tiny_graphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = threading.Barrier(2)
    errors: list[BaseException] = []

    def write(name: str) -> None:
        try:
            with written_whole(out) as part:
                shutil.copytree(tiny_graphs, part, dirs_exist_ok=True)
                (part / "unet" / f"{name}-first").write_bytes(b"")
                both.wait(30)
                (part / "unet" / f"{name}-second").write_bytes(b"")
                write_manifest(part, replace(read_manifest(part), files=files_of(part)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    left = {path.name for path in (out / "unet").iterdir() if "-" in path.name}
    assert left in ({"a-first", "a-second"}, {"b-first", "b-second"})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("before", ["nothing", "an export"])
def test_what_is_put_there_meanwhile_is_not_lost(tiny_graphs: Path, tmp_path: Path, before: str) -> None:
    out = tmp_path / "out"
    if before == "an export":
        shutil.copytree(tiny_graphs, out)

    def export(meanwhile: Callable[[], object]) -> None:
        with written_whole(out):
            meanwhile()

    def put() -> None:
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("mine", encoding="utf-8")

    with pytest.raises(CheckpointError, match=r"exists and is no export|holds thesis.txt"):
        export(put)
    assert (out / "thesis.txt").read_text(encoding="utf-8") == "mine"
    (out / "thesis.txt").unlink()
    shutil.rmtree(out)
    with pytest.raises(CheckpointError, match="exists and is no export"):
        export(lambda: out.write_text("mine", encoding="utf-8"))
    assert out.read_text(encoding="utf-8") == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_of_a_download_cache_are_no_riddle_on_openvino(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    data = folder / "unet" / "model.onnx.data"
    data.rename(folder / "unet" / "held")
    data.symlink_to("held")
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, files=files_of(folder)))
    with pytest.raises(CheckpointError, match=r"OpenVINO does not follow links to weights.*cp -rL"):
        ritocco.load(folder, backend="openvino")


def test_a_manifest_that_leads_outside(folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST).rename(tmp_path / "elsewhere.json")
    (folder / MANIFEST).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="leads outside"):
        open_artefacts(folder)


def test_a_tokenizer_of_another_text_encoder(folder: Path) -> None:
    file = folder / "tokenizer" / "vocab.json"
    held = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({word: index + 5000 for word, index in held.items()}), encoding="utf-8")
    write_manifest(folder, replace(read_manifest(folder), files=files_of(folder)))
    said = r"the tokenizer \(.* does not belong to the text encoder"
    with pytest.raises(CheckpointError, match=said):
        ritocco.load(folder)
    (finding,) = verify(folder)
    assert re.search(said, finding.message)


def test_doctor_knows_graphs(tiny_graphs: Path, folder: Path) -> None:
    findings = {finding.subject: finding for finding in verify(tiny_graphs)}
    assert (
        findings["graphs"].message == "ritocco layout, float32, 64 to 256 pixels wide, 64 to 256 pixels high"
    )
    assert findings["version"].message == open_artefacts(tiny_graphs).version
    flip_a_byte(folder)
    (finding,) = verify(folder)
    assert (finding.level, finding.subject) == ("error", "graphs")


def test_an_older_export_survives_a_move_that_fails(
    tiny_graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(tiny_graphs, tmp_path / "out")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"), written_whole(out):
        pass
    assert open_artefacts(out).layout == "ritocco"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_graph_beside_weights_makes_no_export(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "both")
    (folder / "unet" / "model.onnx").write_bytes(b"")
    assert not is_artefacts(folder)
    assert ritocco.load(folder, dtype="float32").traits.dtype == "float32"
