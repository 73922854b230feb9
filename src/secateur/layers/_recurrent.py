"""The weights of LSTM, GRU and RNN: those that read the input of a layer, and those that read its last state."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from secateur.layers._kind import LayerKind, as_it_is


def cell_kinds(module: Any) -> Iterator[LayerKind]:
    """Yield the kinds of the two weights of an LSTM, GRU or RNN cell."""
    for name, call_rows in (("weight_ih", _cell_input), ("weight_hh", _cell_state)):
        yield LayerKind(as_it_is, as_it_is, parameter=name, name=name, call_rows=call_rows)


def _cell_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else kwargs["input"]
    return x.reshape(1, -1, x.shape[-1])


def _cell_state(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x = _cell_input(module, args, kwargs)
    state = args[1] if len(args) > 1 else kwargs.get("hx")
    if state is None:
        return x.new_zeros(1, x.shape[1], module.hidden_size)
    state = state[0] if isinstance(state, tuple) else state
    rows: Tensor = state.reshape(1, -1, state.shape[-1])
    return rows


_CLASSES: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN, "RNN_RELU": nn.RNN}


def recurrent_kinds(module: Any) -> Iterator[LayerKind]:
    """Yield the kinds of all weights of an LSTM, GRU or RNN. All gates of a weight are one matrix.

    The projection of an LSTM with ``proj_size`` reads a state that nothing shows: it has no rows.
    """
    for depth in range(module.num_layers):
        for direction in range(2 if module.bidirectional else 1):
            end = f"l{depth}" + ("_reverse" if direction else "")
            names = [f"weight_ih_{end}", f"weight_hh_{end}"]
            rows = [partial(_input_rows, depth=depth), partial(_state_rows, depth=depth, direction=direction)]
            for name, call_rows in zip(names, rows, strict=True):
                yield LayerKind(as_it_is, as_it_is, parameter=name, name=name, call_rows=call_rows)
            if module.proj_size:
                yield LayerKind(as_it_is, as_it_is, parameter=f"weight_hr_{end}", name=f"weight_hr_{end}")


def _input_rows(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, depth: int) -> Tensor:
    """What a layer reads: the module's input, or the outputs of the layer before."""
    x, lengths, states = _sequence(module, *args, **kwargs)
    for below in range(depth):
        x = _outputs(module, below, x, lengths, states)
    return _rows(module, x, lengths)


def _state_rows(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, depth: int, direction: int) -> Tensor:
    """The states that one direction of a layer reads: each step's is what the step before has returned."""
    x, lengths, states = _sequence(module, *args, **kwargs)
    for below in range(depth + 1):
        x = _outputs(module, below, x, lengths, states)
    found = x.unflatten(-1, (2 if module.bidirectional else 1, -1))[..., direction, :]
    first = states[0][depth * (2 if module.bidirectional else 1) + direction]
    if direction == 0:
        before = torch.cat([first[None], found[:-1]])
    else:  # it begins at the last step of each sequence
        before = torch.cat([found[1:], first[None]])
        before[lengths.to(x.device) - 1, torch.arange(x.shape[1], device=x.device)] = first
    return _rows(module, before, lengths)


def _sequence(module: Any, input: Any, hx: Any = None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The input as ``[steps, batch, features]``, the lengths of its sequences, and the states that it begins with."""
    if isinstance(input, PackedSequence):
        x, lengths = pad_packed_sequence(input)
    else:
        x = input.unsqueeze(1) if input.ndim == 2 else input.transpose(0, 1) if module.batch_first else input
        lengths = torch.full((x.shape[1],), x.shape[0])
    if hx is not None:
        states = list(hx) if isinstance(hx, tuple) else [hx]
        return x, lengths, [state.unsqueeze(1) if state.ndim == 2 else state for state in states]
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or module.hidden_size] + [module.hidden_size] * (module.mode == "LSTM")
    return x, lengths, [x.new_zeros(count, x.shape[1], size) for size in sizes]


def _outputs(module: Any, depth: int, x: Tensor, lengths: Tensor, states: list[Tensor]) -> Tensor:
    """What one layer of the module returns, both directions side by side; zero beyond the end of a sequence."""
    directions = 2 if module.bidirectional else 1
    options = {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
    if module.proj_size:
        options["proj_size"] = module.proj_size
    one = _CLASSES[module.mode](
        x.shape[-1], module.hidden_size, bias=module.bias, bidirectional=module.bidirectional, device="meta", **options
    )
    for end in ("", "_reverse")[:directions]:
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"):
            if hasattr(one, f"{name}_l0{end}"):
                setattr(one, f"{name}_l0{end}", getattr(module, f"{name}_l{depth}{end}"))
    own = [state[depth * directions : (depth + 1) * directions].contiguous() for state in states]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, _ = one(packed, tuple(own) if module.mode == "LSTM" else own[0])
    return pad_packed_sequence(y, total_length=x.shape[0])[0]


def _rows(module: Any, x: Tensor, lengths: Tensor) -> Tensor:
    """The steps within the sequences as rows, in the order of the module's input."""
    within = torch.arange(x.shape[0], device=x.device)[:, None] < lengths.to(x.device)
    if module.batch_first:
        x, within = x.transpose(0, 1), within.T
    return x[within][None]
