"""From stored tensors to the parameters of a network: names, shapes, dtypes, and no second copy in memory.

torch is imported inside the functions that compute with it, so that looking at a checkpoint does not need it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from safetensors import SafetensorError, safe_open

from ritocco.errors import CheckpointError
from ritocco.shown import plain
from ritocco.weight_files import FLOATS, StoredTensor, content_digest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ritocco_kernels.ops import Ops

NetworkName = Literal["unet", "vae", "text_encoder", "safety_checker"]

_TORCH_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
}
# Held by older files; no network here computes with them.
_UNUSED = ("position_ids", "logit_scale", "text_projection.weight")
_OLD_VAE_ATTENTION = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
_VARIANTS = {"torch.float16": ("fp16", "", "bf16"), "torch.bfloat16": ("bf16", "", "fp16")}


class Stored(Protocol):
    """A tensor somewhere: dtype in safetensors' spelling, and the shape that the network will see."""

    @property
    def key(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class MemoryTensor:
    """A parameter of a pipeline in memory. tensor: shared, never written to."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    tensor: torch.Tensor = field(repr=False)


def without_tensors(
    weights: Mapping[str, Mapping[str, Mapping[str, Stored]]],
) -> dict[str, dict[str, dict[str, Stored]]]:
    """The same networks, variants and names; of tensors in memory, what they are, and not their numbers."""

    def outline(stored: Stored) -> Stored:
        return (
            replace(stored, tensor=stored.tensor.to("meta")) if isinstance(stored, MemoryTensor) else stored
        )

    return {
        network: {
            variant: {name: outline(stored) for name, stored in tensors.items()}
            for variant, tensors in variants.items()
        }
        for network, variants in weights.items()
    }


def memory_tensors(module: nn.Module, where: str) -> dict[str, Stored]:
    """A module's state as stored tensors that share its memory. Raises CheckpointError for offloaded
    modules.
    """
    tensors: dict[str, Stored] = {}
    for key, tensor in module.state_dict().items():
        if tensor.device.type == "meta":
            raise CheckpointError(f"{where}: {key} is not in memory; make the pipeline without offloading")
        dtype = str(tensor.dtype)
        tensors[key] = MemoryTensor(key, _TORCH_NAMES.get(dtype, dtype), tuple(tensor.shape), tensor)
    return tensors


def build(network: NetworkName, config: Mapping[str, Any], *, ops: Ops | None = None) -> nn.Module:
    """The network of a config on the meta device: shapes without memory. Raises CheckpointError for odd
    configs.

    ops: of the UNet and the VAE; None takes plain PyTorch.
    """
    import torch

    from ritocco_kernels.ops import REFERENCE

    ops = ops or REFERENCE

    with _without_initial_values(), torch.device("meta"):
        match network:
            case "unet":
                from ritocco.nets.unet import UNet, UNetSpec

                return UNet(UNetSpec.from_config(config), ops)
            case "vae":
                from ritocco.nets.vae import VAE, VAESpec

                return VAE(VAESpec.from_config(config), ops)
            case "text_encoder":
                from ritocco.nets.text_encoder import TextEncoder, TextSpec

                return TextEncoder(TextSpec.from_config(config))
            case "safety_checker":
                from ritocco.nets.vision import SafetyVision, VisionSpec

                return SafetyVision(VisionSpec.from_config(config))


def choose_variant(
    variants: Mapping[str, Mapping[str, Stored]], wanted: str | None, dtype: torch.dtype | None
) -> tuple[str, Mapping[str, Stored]]:
    """The set of tensors to load, with its name: the one wanted, else the one that rounds least for this
    dtype.

    Raises CheckpointError where there are several and none is plain.
    """
    order = _VARIANTS.get(str(dtype), ("", "fp16", "bf16"))
    for name in order if wanted is None else (wanted, *order):
        if name in variants:
            return name, variants[name]
    if len(variants) > 1:
        listed = ", ".join(plain(name) for name in sorted(variants))
        raise CheckpointError(f"several variants and none is plain; name one: {listed}")
    return next(iter(variants.items()))


def match_tensors(module: nn.Module, stored: Mapping[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """Stored tensors by the module's names, and what is wrong with them in words (empty where all is well).

    Older and newer spellings are understood: diffusers' first names for the VAE's attention, and
    transformers' text and vision encoders with and without their outer name (5.6 and later write them
    without).
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    matched: dict[str, Stored] = {}
    unexpected: list[str] = []
    for key, tensor in stored.items():
        name = next((alias for alias in _aliases(key) if alias in expected), None)
        if name is not None:
            matched[name] = tensor
        elif not key.endswith(_UNUSED):
            unexpected.append(key)
    wrong = [
        f"{name} is {list(tensor.shape)} where {list(expected[name])} is needed"
        for name, tensor in matched.items()
        if tensor.shape != expected[name]
    ]
    found = {
        "missing": [name for name in expected if name not in matched],
        "unexpected": unexpected,
        "wrong shape": wrong,
        "not a float format that is read here": [
            f"{n} ({t.dtype})" for n, t in matched.items() if t.dtype not in FLOATS
        ],
    }
    return matched, [f"{what}: {_few(names)}" for what, names in found.items() if names]


def fill(
    module: nn.Module,
    matched: Mapping[str, Stored],
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    later: tuple[str, ...] = (),
) -> nn.Module:
    """Give a meta module its parameters; in eval mode and without gradients afterwards.

    One tensor at a time: mapped, converted, dropped. A tensor on the CPU that is stored in the wanted dtype
    is used straight from the mapped file (privately mapped: writing to it would not change the file).
    later: beginnings of names whose tensors stay mapped as stored, until `place`.
    """
    import torch

    to = torch.device(device)
    state: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        read = _Reader(stack)
        for name, stored in matched.items():
            tensor = read(stored)
            state[name] = tensor if later and name.startswith(later) else _placed(tensor, to, dtype)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def place(module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
    """Convert the parameters that `fill` left for later, one tensor at a time; nothing where that is done."""
    for parameter in module.parameters():
        parameter.data = _placed(parameter.data, device, dtype)


def _placed(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """On `device` in `dtype`. A convolution's weights are laid out channels last on a GPU, and on a CPU where
    they are copied anyway.

    The torch runtime's pictures lie so, except in float32 on a CPU; otherwise every call would copy the
    weights again.
    """
    import torch

    wanted = tensor.dtype if dtype is None else dtype
    plain = device.type == "cpu" and wanted == torch.float32
    shared = device.type == "cpu" and wanted == tensor.dtype and device == tensor.device
    if tensor.dim() != 4 or plain or shared:
        return tensor.to(device=device, dtype=wanted)
    return tensor.to(device=device, dtype=wanted, memory_format=torch.channels_last)


def weights_digest(tensors: Mapping[str, Stored]) -> str:
    """A digest of a set of tensors: their files' `content_digest`, or in memory the first numbers of each."""
    files = {t.file for t in tensors.values() if isinstance(t, StoredTensor)}
    digest = hashlib.sha256("".join(sorted(map(content_digest, files))).encode())
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, MemoryTensor):
            head = tensor.tensor.detach().reshape(-1)[:8].float().cpu().numpy().tobytes()
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + head)
    return digest.hexdigest()


def _without_initial_values() -> AbstractContextManager[object]:
    """Modules made inside get no initial values.

    On the meta device there is nothing to fill, yet `normal_` (every nn.Embedding) imports torch's Python
    decompositions to find that out: 800 modules, a second and 67 MB of every start.
    """
    from torch.overrides import TorchFunctionMode

    class Skip(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            named = kwargs or {}
            if getattr(func, "__module__", "") == "torch.nn.init":
                return args[0] if args else named["tensor"]
            return func(*args, **named)

    mode: AbstractContextManager[object] = Skip()
    return mode


class _Reader:
    """Reads stored tensors, opening every file once."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._files: dict[Path, Any] = {}

    def __call__(self, stored: Stored) -> torch.Tensor:
        if isinstance(stored, MemoryTensor):
            return stored.tensor
        if not isinstance(stored, StoredTensor):
            raise TypeError(f"{type(stored).__name__} is no stored tensor")
        try:
            if stored.file not in self._files:
                self._files[stored.file] = self._stack.enter_context(safe_open(stored.file, framework="pt"))
            tensor: torch.Tensor = self._files[stored.file].get_tensor(stored.key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{stored.file}: corrupt ({error}); download the file again") from error
        k, parts = stored.part
        if parts > 1:
            rows = tensor.shape[0] // parts
            tensor = tensor[k * rows : (k + 1) * rows]
        return tensor.reshape(stored.shape)


def _aliases(key: str) -> Iterable[str]:
    yield key
    if ".attentions." in key:
        for old, new in _OLD_VAE_ATTENTION.items():
            if old in key:
                yield key.replace(old, new)
    for outer in ("text_model.", "vision_model."):
        yield outer + key
        yield key.removeprefix(outer)


def _few(names: list[str], count: int = 4) -> str:
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")
