"""What doctor finds: here, and on machines with and without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ritocco import doctor
from ritocco.doctor import Line, examine, report
from ritocco.errors import BackendError


def found() -> dict[str, Line]:
    return {line.subject: line for line in examine()}


def test_this_machine() -> None:
    lines = found()
    assert lines["torch"].message == torch.__version__
    for subject in ("python", "torch", "device cpu", "default", "backend torch", "diffusers"):
        assert lines[subject].level == "ok", subject
    assert f"{torch.get_num_threads()} threads" in lines["device cpu"].message
    assert "float16 is refused" in lines["device cpu"].message
    assert {line.level for line in lines.values()} <= {"ok", "note", "missing"}


def test_what_would_be_faster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "faster_command", lambda device: (f"Faster on {device}: that one",))
    assert found()["fastest"] == Line(level="note", subject="fastest", message="Faster on cpu: that one")


@pytest.mark.parametrize(("native", "said"), [(True, "native"), (False, "float32 is faster")])
def test_bfloat16_is_told(monkeypatch: pytest.MonkeyPatch, native: bool, said: str) -> None:
    monkeypatch.setattr(doctor, "native_bfloat16", lambda: native)
    assert f"bfloat16 ({said}" in found()["device cpu"].message.replace("emulated: ", "")


@pytest.mark.parametrize(
    ("cuda", "said"), [(None, "install a CUDA build"), ("12.8", "built for CUDA 12.8, but sees no device")]
)
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, cuda: str | None, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    line = found()["device cuda"]
    assert line.level == "missing"
    assert said in line.message


def test_every_gpu_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(name="Fake H100", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    lines = found()
    for index in range(2):
        assert lines[f"device cuda:{index}"].message == "Fake H100, 80.0 GiB, compute capability 9.0"
    assert "device cuda" not in lines
    assert lines["default"].message.startswith("torch on cuda:0; float16")


def test_what_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda package: False)
    line = found()["diffusers"]
    assert line.level == "missing"
    assert 'pip install "ritocco[diffusers]"' in line.message


def test_a_machine_that_can_run_nothing_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise BackendError("no luck")

    monkeypatch.setattr(doctor, "choose", refuse)
    assert (found()["default"].level, found()["default"].message) == ("missing", "no luck")


def test_the_report_is_aligned() -> None:
    lines = [
        Line(level=level, subject=subject, message="here")
        for level, subject in (("ok", "a"), ("missing", "long one"), ("note", "b"), ("error", "c"))
    ]
    rows = report(lines).split("\n")
    assert len(rows) == 4
    assert len({row.index("here") for row in rows}) == 1
    assert [row.split()[0] for row in rows] == ["ok", "missing", "note", "ERROR"]
