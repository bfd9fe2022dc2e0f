"""What a machine offers, and what is taken or refused; the machines are made of replaced probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ritocco.backends import installed
from ritocco.device import choose, held_memory, native_bfloat16
from ritocco.errors import BackendError, RequestError

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes this a machine with so many GPUs, and a processor with these capabilities."""

    def make(*, gpus: int = 0, bfloat16: bool = True, cuda: str | None = "12.8", cpu: Any = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake T4")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu or {}, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)

    return make


@pytest.mark.parametrize(
    ("offers", "device", "dtype"),
    [
        ({}, "cpu", torch.float32),
        ({"cpu": {"avx512_bf16": False, "bf16": False}}, "cpu", torch.float32),
        ({"cpu": {"avx512_bf16": True}}, "cpu", torch.bfloat16),
        ({"cpu": {"amx_bf16": True}}, "cpu", torch.bfloat16),
        ({"cpu": {"bf16": True}}, "cpu", torch.bfloat16),
        ({"gpus": 1}, "cuda:0", torch.float16),
        ({"gpus": 2, "cpu": {"avx512_bf16": True}}, "cuda:0", torch.float16),
    ],
)
def test_auto(machine: Machine, offers: dict[str, Any], device: str, dtype: torch.dtype) -> None:
    machine(**offers)
    choice = choose()
    assert (str(choice.device), choice.dtype, choice.backend) == (device, dtype, "torch")
    assert choice.reasons[0] == f"torch on {device}"
    assert str(dtype).removeprefix("torch.") in choice.reasons[1]


def test_auto_dtype_follows_the_device_asked_for(machine: Machine) -> None:
    machine(gpus=2, cpu={"amx_bf16": True})
    assert choose("cpu").dtype == torch.bfloat16
    assert choose("cuda:1").dtype == torch.float16


@pytest.mark.parametrize(
    ("asked", "device"), [("cpu", "cpu"), ("cpu:0", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_explicit_choices_are_honoured(machine: Machine, asked: str, device: str, dtype: str) -> None:
    machine(gpus=2)
    choice = choose(asked, dtype, "torch")
    assert str(choice.device) == device
    assert choice.dtype == getattr(torch, dtype)
    assert "as asked" in choice.reasons[1]


def test_float16_is_for_cuda(machine: Machine) -> None:
    machine(gpus=1)
    assert choose("cuda", "float16").dtype == torch.float16
    with pytest.raises(BackendError, match=r"float16.*CPU.*bfloat16, float32"):
        choose("cpu", "float16")


def test_bfloat16_on_a_gpu_without_it_names_the_gpu(machine: Machine) -> None:
    machine(gpus=1, bfloat16=False)
    with pytest.raises(BackendError, match=r"bfloat16.*Fake T4.*use float16"):
        choose("cuda:0", "bfloat16")


@pytest.mark.parametrize(("cuda", "said"), [(None, "a CPU build"), ("12.8", "built for CUDA 12.8")])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:99"])
def test_cuda_without_a_gpu_is_refused_with_the_builds_kind(
    machine: Machine, device: str, cuda: str | None, said: str
) -> None:
    machine(cuda=cuda)
    with pytest.raises(BackendError, match=said) as caught:
        choose(device)
    assert repr(device) in str(caught.value)


def test_a_gpu_that_is_not_there(machine: Machine) -> None:
    machine(gpus=2)
    with pytest.raises(BackendError, match="'cuda:99'; this machine has 2 CUDA devices, cuda:0 to cuda:1"):
        choose("cuda:99")


@pytest.mark.parametrize(
    "device",
    ["mps", "meta", "xpu:0", "gpu", "", " cpu", "CUDA", "cuda:x", "cuda:-1", "cuda:0:1", "a" * 40, 3, None],
)
def test_other_devices_are_refused_by_name(machine: Machine, device: Any) -> None:
    machine(gpus=2)
    with pytest.raises(RequestError) as caught:
        choose(device)
    assert str(caught.value) == f"device is {device!r}; it must be auto, cpu, cuda or cuda:N"


def test_onnxruntimes_own_device_is_none_of_torchs() -> None:
    with pytest.raises(BackendError, match="device is 'tensorrt:0', which is onnxruntime's alone"):
        choose("tensorrt:0")


@pytest.mark.parametrize("dtype", ["float64", "fp16", "int8", "", "torch.float32", "Float32"])
def test_other_dtypes_are_refused_by_name(dtype: str) -> None:
    with pytest.raises(RequestError, match="it must be auto, float32, float16, bfloat16") as caught:
        choose("cpu", dtype)
    assert repr(dtype) in str(caught.value)


@pytest.mark.parametrize("backend", ["", "Torch", "tpu"])
def test_other_backends_are_refused_by_name(backend: str) -> None:
    with pytest.raises(RequestError, match="must be auto, torch, openvino, onnxruntime") as caught:
        choose("cpu", "float32", backend)
    assert repr(backend) in str(caught.value)


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt", "openvino"])
def test_backends_of_graphs_run_no_checkpoint(backend: str) -> None:
    with pytest.raises(BackendError, match=f"backend is '{backend}', which runs exported graphs"):
        choose("cpu", "float32", backend)


def test_older_builds_of_torch_have_another_probe(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    assert not native_bfloat16()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert native_bfloat16()
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert not native_bfloat16()


def test_this_machine_has_something_to_run_on() -> None:
    choice = choose()
    assert torch.ones(2, dtype=choice.dtype, device=choice.device).sum().item() == 2.0
    assert isinstance(native_bfloat16(), bool)


@pytest.mark.parametrize(
    ("package", "there"),
    [("numpy", True), ("numpy.linalg", True), ("not_a_package", False), ("not.a.part", False)],
)
def test_installed_looks_and_imports_nothing(package: str, there: bool) -> None:
    assert installed(package) is there


def test_of_a_cpu_no_memory_is_told() -> None:
    assert held_memory("cpu") == {}


@pytest.mark.gpu
def test_held_memory_is_that_of_the_device() -> None:
    before = held_memory("cuda:0")
    held = torch.empty(3 << 20, dtype=torch.uint8, device="cuda:0")
    after = held_memory("cuda:0")
    assert after["allocated"] - before["allocated"] == held.numel()
    assert after["peak"] >= after["allocated"]
    assert after["reserved"] >= after["allocated"]
