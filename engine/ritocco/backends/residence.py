"""Which networks of the torch runtime are on its device; the others lie in their mapped files, as stored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ritocco.nets.unet import UNet
from ritocco.parameters import place


class Residence:
    """The networks of one runtime, which come to the device when they are needed.

    alone: whether the others leave when one comes, which takes least memory, and reads the weights again at
    every turn; else who came stays.
    """

    def __init__(
        self, networks: Mapping[str, nn.Module], *, device: torch.device, dtype: torch.dtype, packed: bool
    ) -> None:
        """networks: their parameters as stored, all of them away. packed: whether a UNet is packed here."""
        self.alone = False
        self._networks, self._device, self._dtype, self._packed = networks, device, dtype, packed
        self._homes = {
            name: [parameter.data for parameter in network.parameters()] for name, network in networks.items()
        }
        self._here: set[str] = set()

    def need(self, name: str) -> None:
        """Let a network come, and where it is to be alone, the others leave before."""
        if self.alone:
            for other in self._here - {name}:
                self._leave(other)
        if name not in self._here:
            self._here.add(name)
            try:
                self._come(self._networks[name])
            except BaseException:
                self._leave(name)  # what had come of it
                raise

    def settle(self, *, alone: bool) -> None:
        """From now on; where nobody is to be alone, all of them come."""
        if alone and not self.alone:
            for name in tuple(self._here):
                self._leave(name)
        self.alone = alone
        for name in () if alone else self._networks:
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
            torch.cuda.empty_cache()
