"""Which networks of the torch runtime are on its device; the others lie in their mapped files, as stored."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

import torch
from torch import nn

from ritocco.backends.allocator import give_back_unused
from ritocco.nets.unet import UNet
from ritocco.parameters import place


class Residence:
    """The networks of one runtime, which come to the device when they are needed.

    leaving: those that leave when another comes, which takes less memory, and reads their weights again at
    every turn; the others stay. seconds: of each network, how long its latest coming took.
    """

    def __init__(
        self, networks: Mapping[str, nn.Module], *, device: torch.device, dtype: torch.dtype, packed: bool
    ) -> None:
        """networks: their parameters as stored, all of them away. packed: whether a UNet is packed here."""
        self.leaving: frozenset[str] = frozenset()
        self.seconds: dict[str, float] = {}
        self._networks, self._device, self._dtype, self._packed = networks, device, dtype, packed
        self._homes = {
            name: [parameter.data for parameter in network.parameters()] for name, network in networks.items()
        }
        self._here: set[str] = set()

    def need(self, name: str) -> None:
        """Let a network come; those that leave for another do so before."""
        for other in (self._here & self.leaving) - {name}:
            self._leave(other)
        if name not in self._here:
            self._here.add(name)
            began = time.perf_counter()
            try:
                self._come(self._networks[name])
            except BaseException:
                self._leave(name)  # what had come of it
                raise
            self.seconds[name] = time.perf_counter() - began

    def settle(self, leaving: Collection[str]) -> None:
        """Who leaves from now on; those who stay come."""
        if self.leaving != set(leaving):
            for name in self._here & set(leaving):
                self._leave(name)
        self.leaving = frozenset(leaving)
        for name in self._networks:
            if name not in self.leaving:
                self.need(name)

    def _come(self, network: nn.Module) -> None:
        place(network, device=self._device, dtype=self._dtype)
        if self._packed and isinstance(network, UNet):
            network.pack()

    def _leave(self, name: str) -> None:
        network = self._networks[name]
        if isinstance(network, UNet):
            network.unpack()
        for parameter, home in zip(network.parameters(), self._homes[name], strict=True):
            parameter.data = home
        self._here.remove(name)
        if self._device.type == "cuda":
            give_back_unused()
