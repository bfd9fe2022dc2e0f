"""OpenVINO's compiled models: for which shapes, how many are kept, in memory and in the cache."""

from __future__ import annotations

import json
import locale
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import ritocco
from ritocco import BackendError, CheckpointError
from ritocco.backends import openvino_
from ritocco.backends.compiled_cache import seal, throw_away_unsealed
from ritocco.backends.openvino_library import openvino
from ritocco.disk import cache_root

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RITOCCO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph is one."""
    monkeypatch.setattr(openvino_, "_LARGE_BYTES", 1)


@pytest.fixture
def compiled(large: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The latents' shapes that a UNet was compiled for, in turn."""
    shapes: list[tuple[int, ...]] = []
    original = openvino_.OpenVinoSession._compiled

    def kept(self: Any, held: dict[str, tuple[int, ...]]) -> Any:
        if "unet_step" in self._about:
            shapes.append(held["latents"])
        return original(self, held)

    monkeypatch.setattr(openvino_.OpenVinoSession, "_compiled", kept)
    return shapes


def painted(graphs: Path, given: dict[str, Any], dtype: str = "float32") -> npt.NDArray[np.uint8]:
    with ritocco.load(graphs, backend="openvino", dtype=dtype) as engine:
        return np.asarray(engine.predict(given).images[0])


def blobs() -> list[Path]:
    return list((cache_root() / "openvino").rglob("*.blob"))


def test_what_was_compiled_for_float32_does_not_run_in_bfloat16(
    tiny_hoisted_graphs: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO itself does not tell them apart in one folder, and then gives numbers that are none."""
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor computes no bfloat16")
    alone = painted(tiny_hoisted_graphs, ask(), "bfloat16")
    monkeypatch.setenv("RITOCCO_CACHE", str(cache_root().parent / "another"))
    exact = painted(tiny_hoisted_graphs, ask(), "float32")
    after = painted(tiny_hoisted_graphs, ask(), "bfloat16")
    assert (after == alone).all()
    assert (after != exact).any()


def test_each_size_is_compiled_once_while_it_is_kept(
    tiny_hoisted_graphs: Path, ask: Ask, compiled: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ((64, 64), (128, 64), (64, 128), (64, 64))
    with ritocco.load(tiny_hoisted_graphs, backend="openvino", dtype="float32") as engine:
        first = [np.asarray(engine.predict(ask(size=size)).images[0]) for size in sizes]
    assert compiled == [(1, 4, 8, 8), (1, 4, 8, 16), (1, 4, 16, 8)]
    compiled.clear()
    monkeypatch.setattr(openvino_, "_KEPT_BYTES", 1)
    with ritocco.load(tiny_hoisted_graphs, backend="openvino", dtype="float32") as engine:
        again = [np.asarray(engine.predict(ask(size=size)).images[0]) for size in sizes]
    assert compiled == [(1, 4, 8, 8), (1, 4, 8, 16), (1, 4, 16, 8), (1, 4, 8, 8)]
    assert all((one == other).all() for one, other in zip(first, again, strict=True))


def test_pictures_side_by_side_are_a_size_of_their_own(
    tiny_hoisted_graphs: Path, ask: Ask, compiled: list[tuple[int, ...]]
) -> None:
    with ritocco.load(tiny_hoisted_graphs, backend="openvino", dtype="float32") as engine:
        two = engine.predict(ask(num_outputs=2)).images
        alone = engine.predict(ask()).images
    assert compiled == [(2, 4, 8, 8), (1, 4, 8, 8)]
    difference = np.abs(np.asarray(two[0], np.float32) - np.asarray(alone[0], np.float32))
    assert difference.max() <= 1


def test_the_processs_locale_survives_engines_that_load_at_once(tiny_graphs: Path) -> None:
    before = locale.setlocale(locale.LC_ALL)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: ritocco.load(tiny_graphs, backend="openvino"), range(4)))
    for engine in opened:
        engine.close()
    assert locale.setlocale(locale.LC_ALL) == before


def test_another_export_in_the_folders_place_is_not_mixed_in(
    tiny_hoisted_graphs: Path, tiny_graphs: Path, ask: Ask, large: None, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_hoisted_graphs, tmp_path / "graphs")
    wanted = painted(folder, ask(size=(128, 64)))
    with ritocco.load(folder, backend="openvino", dtype="float32") as engine:
        engine.predict(ask())
        folder.rename(tmp_path / "before")
        shutil.copytree(tiny_graphs, folder)
        shutil.rmtree(tmp_path / "before")
        assert (np.asarray(engine.predict(ask(size=(128, 64))).images[0]) == wanted).all()


def test_large_graphs_are_not_kept_as_compiled(tiny_graphs: Path, ask: Ask, large: None) -> None:
    painted(tiny_graphs, ask())
    assert not blobs()


def test_small_graphs_are_compiled_once_for_all_sizes(tiny_graphs: Path, ask: Ask) -> None:
    painted(tiny_graphs, ask())
    held = {blob: blob.stat().st_mtime_ns for blob in blobs()}
    assert len(held) == 4
    painted(tiny_graphs, ask(size=(128, 64), num_outputs=2))
    assert {blob: blob.stat().st_mtime_ns for blob in blobs()} == held


def test_every_byte_of_what_was_compiled_counts(tmp_path: Path) -> None:
    for size in (100, (64 << 20) + 5000):
        file = tmp_path / f"{size}.blob"
        file.write_bytes(bytes(size))
        seal(tmp_path, {})
        assert list(throw_away_unsealed(tmp_path) or ()) == [file.name]
        assert file.exists()
        with file.open("r+b") as stream:
            stream.seek(size * 2 // 3)
            stream.write(b"x")
        assert throw_away_unsealed(tmp_path) == {}
        assert not file.exists()


@pytest.mark.parametrize("damage", ["a byte", "no seal", "no seals", "seals that are none"])
def test_what_was_compiled_and_changed_since_is_compiled_again(
    damage: str, tiny_graphs: Path, ask: Ask
) -> None:
    wanted = painted(tiny_graphs, ask())
    held = {blob: blob.read_bytes() for blob in blobs()}
    (seals,) = (cache_root() / "openvino").rglob("seals.json")
    whole = seals.read_bytes()
    if damage == "a byte":  # of the weights: OpenVINO itself sees what is wrong with a graph
        four = (tiny_graphs / "unet" / "model.onnx.data").read_bytes()[4096:4112]
        ((blob, at),) = ((blob, data.find(four)) for blob, data in held.items() if four in data)
        with blob.open("r+b") as stream:
            stream.seek(at + 3)  # sign and exponent of a float32
            stream.write(bytes([held[blob][at + 3] ^ 0x40]))
    elif damage == "no seal":
        (blob, *_) = held
        seals.write_text(
            json.dumps({name: one for name, one in json.loads(whole).items() if name != blob.name})
        )
        blob.write_bytes(held[blob][: len(held[blob]) // 2])
    elif damage == "no seals":
        seals.unlink()
    else:
        seals.write_text("[")
    assert (painted(tiny_graphs, ask()) == wanted).all()
    assert sorted(json.loads(seals.read_bytes())) == sorted(blob.name for blob in blobs())
    assert set(blobs()) == set(held)


def test_a_size_that_a_graph_does_not_take_is_refused(tiny_graphs: Path, large: None) -> None:
    core = openvino.Core()
    file = tiny_graphs / "unet" / "model.onnx"
    shapes = {"sample": (2, 9, 8, 8), "timestep": (2,), "context": (2, 77, 32)}
    session = openvino_.OpenVinoSession(core, file, {})
    feeds = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    assert session.run(feeds).shape == (2, 4, 8, 8)
    with pytest.raises(BackendError, match="unet on CPU: OpenVINO failed"):
        session.run(feeds | {"sample": np.zeros((2, 9, 9, 8), np.float32)})
    assert session.run(feeds).shape == (2, 4, 8, 8)


def test_an_empty_graph_is_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(CheckpointError, match="OpenVINO can't compile it"):
        openvino_.OpenVinoSession(openvino.Core(), tmp_path / "model.onnx", {})


def test_an_openvino_without_its_cpu_plugin_is_named(
    tiny_graphs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("Cannot load library libopenvino_intel_cpu_plugin.so")

    monkeypatch.setattr(openvino, "Core", broken)
    with pytest.raises(BackendError, match=r"OpenVINO does not start on this CPU .*cpu_plugin"):
        ritocco.load(tiny_graphs, backend="openvino")
