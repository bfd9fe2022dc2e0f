"""A Runtime around exported graphs, whatever runs them: ONNX Runtime, OpenVINO, TensorRT."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ritocco.artefacts import MANIFEST, Artefacts
from ritocco.backends.hoisted import HoistedBatch, HoistedUNet
from ritocco.backends.network import NetworkBatch
from ritocco.backends.runtime import Floats, LatentSize, Tokens, Traits
from ritocco.errors import BackendError
from ritocco.nets.io import GraphName, NetworkIO, Ranges
from ritocco.pixels import Kept, Mask, Pixels, from_model, masked_to_model, pasted

Arrays = Mapping[str, npt.NDArray[Any]]


_FED = ("float32", "float16", "int64", "int32")


class Session(Protocol):
    """One graph, ready to run; called by one thread at a time."""

    dtypes: Mapping[str, str]
    """What each input is declared as: `float32`, `float16`, `int64`, `int32`."""
    ranks: Mapping[str, int]
    """How many axes each input has."""
    outputs: Sequence[Collection[str]]
    """The names of each output, of which a runtime may know several."""

    def run(self, feeds: Arrays) -> npt.NDArray[Any]:
        """The graph's first output."""

    def run_all(self, feeds: Arrays) -> Arrays:
        """All of its outputs by name; they stay as they are when the graph runs again."""


class SessionRuntime:
    """See `Runtime`. What runs a graph is a Session; names and ranges are the contract's."""

    def __init__(
        self,
        artefacts: Artefacts,
        sessions: Mapping[GraphName, Session],
        *,
        device: str,
        dtype: str,
        release: Sequence[Any] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """device, dtype: what is computed on and in, for `Traits`. notes: what to say of it in logs.

        Raises BackendError where a graph does not have the inputs of the contract.
        """
        self._artefacts, self._sessions = artefacts, dict(sessions)
        self._keep = release  # objects that the sessions need alive
        self.notes = tuple(notes)
        for name, io in artefacts.contract.items():
            _check_ports(name, io, self._sessions[name], ours=artefacts.manifest is not None)
        ranges = artefacts.sizes
        self._scaling = 1.0 if artefacts.layout == "ritocco" else artefacts.vae.scaling_factor
        self.traits = Traits(
            device=device,
            dtype=dtype,
            lane_timesteps=artefacts.layout == "ritocco",
            size_multiple=artefacts.unet.size_multiple,
            heights=(ranges["H"][0], ranges["H"][2]),
            widths=(ranges["W"][0], ranges["W"][2]),
            whole_timesteps=not artefacts.hoisted
            and self._sessions["unet"].dtypes["timestep"].startswith("int"),
        )

    def encode_text(self, tokens: Tokens) -> Floats:
        """See `Runtime`."""
        return self._call("text_encoder", tokens)

    def encode_image(self, pixels: Floats) -> Floats:
        """See `Runtime`. One picture at a time: the activations of a picture set the peak."""
        latents = np.concatenate([self._call("vae_encoder", one[None]) for one in pixels])
        # Optimum's graph gives mean and log variance; the mean is the first half.
        return latents[:, : self._artefacts.vae.latent_channels] * np.float32(self._scaling)

    def encode_pixels(self, pixels: Pixels, mask: Mask | None) -> Floats:
        """See `Runtime`."""
        return self.encode_image(masked_to_model(pixels, mask))

    def decode_pixels(self, latents: Floats, kept: Kept | None) -> Pixels:
        """See `Runtime`."""
        return pasted(from_model(self.decode(latents)), kept)

    def decode(self, latents: Floats) -> Floats:
        """See `Runtime`. One picture at a time: the activations of a picture set the peak."""
        unscaled = latents / np.float32(self._scaling)
        return np.concatenate([self._call("vae_decoder", one[None]) for one in unscaled])

    def open(self, size: LatentSize, capacity: int) -> NetworkBatch:
        """See `Runtime`."""
        if self._artefacts.hoisted:
            io, sessions = self._artefacts.contract, self._sessions
            unet = HoistedUNet(
                sessions["unet_once"],
                io["unet_once"],
                sessions["unet_step"],
                io["unet_step"],
                ranges_at(size, self._artefacts.profiles("unet_step"), io["unet_step"]),
            )
            channels = self._artefacts.unet.out_channels
            return HoistedBatch(unet, size, channels=channels, capacity=capacity)
        return NetworkBatch(self._unet, capacity=capacity, lane_timesteps=self.traits.lane_timesteps)

    def _unet(self, sample: Floats, timestep: Floats, context: Floats) -> Floats:
        if not self.traits.lane_timesteps:
            timestep = timestep[:1].reshape(())
        return self._call("unet", sample, timestep, context)

    def _call(self, graph: GraphName, *arrays: npt.NDArray[Any]) -> Floats:
        """Run a graph on any number of rows: in parts of the most it takes, filled up to the least."""
        io = self._artefacts.contract[graph]
        least, _, most = io.ranges["M" if graph == "unet" else "N"]
        count = len(arrays[0])
        outputs = []
        for first in range(0, count, most):
            taken = min(most, count - first)
            rows = [first + min(i, taken - 1) for i in range(max(taken, least))]
            part = [array[rows] if array.ndim else array for array in arrays]
            outputs.append(self._run(graph, part)[:taken])
        return np.concatenate(outputs)

    def _run(self, graph: GraphName, arrays: Sequence[npt.NDArray[Any]]) -> Floats:
        session = self._sessions[graph]
        ports = self._artefacts.contract[graph].inputs
        feeds = {
            port.name: np.asarray(array, dtype=session.dtypes[port.name], order="C")
            for port, array in zip(ports, arrays, strict=True)
        }
        for name, array in feeds.items():
            if not array.ndim:  # Optimum's timestep; in brackets in its older exports
                feeds[name] = array.reshape((1,) * session.ranks[name])
        return session.run(feeds).astype(np.float32, copy=False)


def refuse_other_dtype(
    artefacts: Artefacts, dtype: str, runtime: str, sessions: Mapping[GraphName, Session] | None = None
) -> str:
    """The dtype of the graphs, in which a runtime computes. Raises BackendError for another.

    sessions: once they are open; an export without a manifest does not tell its dtype before.
    """
    port = artefacts.contract["vae_decoder"].inputs[0]
    held = port.dtype
    if artefacts.manifest is None:
        if sessions is None:
            return held
        held = sessions["vae_decoder"].dtypes.get(port.name, held)
    if dtype not in ("auto", held):
        raise BackendError(f"dtype is {dtype!r}; these graphs are {held}, and {runtime} computes in that")
    return held


def ranges_at(size: LatentSize, profiles: Sequence[Ranges], io: NetworkIO) -> Ranges:
    """Of a hoisted step: those of the profile that takes most lanes at a size; of all as one where none takes
    the size by itself.
    """
    sizes = {"H": size.height, "W": size.width}
    fitting = [one for one in profiles if all(one[s][0] <= n <= one[s][2] for s, n in sizes.items())]
    return max(fitting, key=lambda one: one["N"][2], default=io.ranges)


def _check_ports(graph: str, io: NetworkIO, session: Session, *, ours: bool) -> None:
    wanted, found = {port.name for port in io.inputs}, set(session.dtypes)
    if wanted != found:
        why = "" if ours else f" of an Optimum export, which a folder without {MANIFEST} is taken for"
        raise BackendError(
            f"{graph}: the graph takes {', '.join(sorted(found)) or 'nothing'}; {', '.join(sorted(wanted))} "
            f"are the inputs{why}. Export the checkpoint again"
        )
    for port in io.inputs:
        ranks = (0, 1) if port.name == "timestep" and not port.shape else (len(port.shape),)
        if session.dtypes[port.name] not in _FED or session.ranks[port.name] not in ranks:
            raise BackendError(
                f"{graph}: {port.name} is {session.dtypes[port.name]} of {session.ranks[port.name]} axes; it "
                f"must be {', '.join(_FED)} of {len(port.shape)}. Export the checkpoint again"
            )
    first = io.outputs[0].name
    if not session.outputs or first not in session.outputs[0]:
        found_first = ", ".join(sorted(session.outputs[0])) if session.outputs else "none"
        raise BackendError(
            f"{graph}: its first output is {found_first}; {first} is needed. Export the checkpoint again"
        )
