"""One step of an LSTM or GRU, given the products of its weights."""

from __future__ import annotations

import torch
from torch import Tensor


def lstm_step(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return the new state and cell.

    Args:
        gates: ``[..., 4 * hidden]``, the products of both weights with their biases, added: the gates of the input, of
            what is kept, of the candidate and of the output.
        cell: ``[..., hidden]``, the last one.
    """
    hidden = cell.shape[-1]
    into, kept, _, out = gates.sigmoid().split(hidden, -1)
    candidate = gates[..., 2 * hidden : 3 * hidden].tanh()
    cell = torch.addcmul(kept * cell, into, candidate)
    return out * cell.tanh(), cell


def gru_step(from_input: Tensor, from_state: Tensor, state: Tensor) -> Tensor:
    """Return the new state.

    Args:
        from_input: ``[..., 3 * hidden]``, the product with the input and its bias: the gates that reset and that
            update, and the candidate.
        from_state: the same of the last state.
        state: ``[..., hidden]``, the last one.
    """
    hidden = state.shape[-1]
    gates = (from_input[..., : 2 * hidden] + from_state[..., : 2 * hidden]).sigmoid()
    reset, update = gates.split(hidden, -1)
    candidate = torch.addcmul(from_input[..., 2 * hidden :], reset, from_state[..., 2 * hidden :]).tanh()
    return torch.lerp(candidate, state, update)
