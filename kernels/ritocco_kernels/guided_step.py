"""Everything between two evaluations of the network: guidance, update, history, noise, the next input."""

from __future__ import annotations

import torch
from torch import Tensor

NUMBERS = ("p", "q", "a", "b0", "b1", "b2", "b3", "c", "push", "guidance", "next_in_scale")
"""What `numbers` [N,11] holds for each lane: a row of its table, its guidance, the next row's in_scale."""


def guided_step_reference(
    output: Tensor,
    latents: Tensor,
    history: Tensor,
    numbers: Tensor,
    noise: Tensor,
    unconditional: Tensor,
    conditional: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Guidance [Ho & Salimans 2022, arXiv:2207.12598, Eq. 6] and the linear recurrence of every scheduler.

        e       = u + guidance (o - u)       u, o: the output rows of the negative and of the prompt
        m_0     = p x + q e
        x'      = a x + b0 m_0 + b1 m_-1 + b2 m_-2 + b3 m_-3 + c z
        history = push (m_0, m_-1, m_-2) + (1 - push) (m_-1, m_-2, m_-3)
        next    = next_in_scale x'

    output: [M,4,h,w], any floating dtype. latents: float32 [N,4,h,w]. history: float32 [3,N,4,h,w], newest
    first. numbers: float32 [N,11], see NUMBERS. noise: float32 [N,4,h,w]. unconditional, conditional: int64
    [N], rows of output. Returns the next latents, the next history and the next input, float32.
    """
    p, q, a, b0, b1, b2, b3, c, push, guidance, scale = (
        column.view(-1, 1, 1, 1) for column in numbers.unbind(dim=1)
    )
    base = output.float().index_select(0, unconditional)
    guided = base + guidance * (output.float().index_select(0, conditional) - base)
    m0 = p * latents + q * guided
    moved = a * latents + b0 * m0 + b1 * history[0] + b2 * history[1] + b3 * history[2] + c * noise
    shifted = torch.stack([m0, history[0], history[1]])
    return moved, push * shifted + (1 - push) * history, scale * moved
