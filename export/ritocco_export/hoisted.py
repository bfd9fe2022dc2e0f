"""The UNet as two graphs: what a lane needs once, and one step.

Both are parts of the network that the torch runtime runs (`UNet.hoist_*`, `UNet.step`): weights that a part
does not use are not written with it.
"""

from __future__ import annotations

from torch import Tensor, nn

from ritocco.nets.unet import UNet


class UNetOnceGraph(nn.Module):
    """Time vectors of a whole table, the constant half of `conv_in`, keys and values of both prompts."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, timesteps: Tensor, context: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        """[R], [M,77,D], [1,5,h,w] -> [R,T], [1,C0,h,w], then [M,heads,77,head_dim] for each port."""
        layers = self.unet.hoist_context(context)
        return (
            self.unet.hoist_timesteps(timesteps),
            self.unet.hoist_condition(condition),
            *(tensor for keys_values in layers for tensor in keys_values),
        )


class UNetStepGraph(nn.Module):
    """The rest, for lanes side by side; a lane's rows share all that comes before the first prompt."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, latents: Tensor, rows: Tensor, time: Tensor, condition: Tensor, *keys_values: Tensor
    ) -> Tensor:
        """[N,4,h,w], [M] int32, [N,T], [N,C0,h,w], [M,heads,77,head_dim] for each port -> [M,4,h,w]."""
        layers = tuple(zip(keys_values[::2], keys_values[1::2], strict=True))
        return self.unet.step(latents, time, condition, layers, rows)
