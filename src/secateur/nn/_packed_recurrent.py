"""LSTM, GRU and RNN with packed weights: products of inputs for all steps at once, those of states step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name that PyTorch's own documentation uses
from torch.nn.utils.rnn import PackedSequence

from secateur._errors import KernelError
from secateur.nn._packed_stack import PackedStack
from secateur.nn._recurrent_steps import gru_step, lstm_step

_CLASSES: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN, "RNN_RELU": nn.RNN}
_OPTIONS = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
Product = Callable[[Tensor, Tensor | None], Tensor]


class PackedRecurrent(nn.Module):
    """An ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` whose weights may be stored without their zeros.

    It takes and returns what the dense module does, and has its attributes: ``weight_ih_l0`` and so on are packed
    stacks of one matrix, or parameters where a weight is dense. Biases stay parameters. Packed weights are frozen:
    gradients go to the input, the states and the biases.

    Args:
        module: an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, which is not changed. Its parameters are shared.
        weights: packed weights by the names of the parameters that they replace.

    Raises:
        KernelError: a module with ``proj_size``, or a weight of another name or shape.

    Example:
        >>> import torch, secateur
        >>> from secateur.nn import PackedRecurrent, PackedStack
        >>> lstm = torch.nn.LSTM(8, 4)
        >>> packed = secateur.formats.pack(lstm.weight_hh_l0.detach())
        >>> stack = PackedStack({"0": secateur.PackedLinear(packed)}, stacked=False)
        >>> layer, x = PackedRecurrent(lstm, {"weight_hh_l0": stack}), torch.randn(5, 2, 8)
        >>> torch.allclose(layer(x)[0], lstm(x)[0], atol=1e-6)
        True
    """

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    # What the dense modules check of their arguments, with the same errors.
    check_input = nn.RNNBase.check_input
    check_hidden_size = nn.RNNBase.check_hidden_size
    get_expected_hidden_size = nn.RNNBase.get_expected_hidden_size
    get_expected_cell_size = nn.LSTM.get_expected_cell_size

    def __init__(self, module: nn.RNNBase, weights: Mapping[str, PackedStack] | None = None) -> None:
        super().__init__()
        if module.proj_size:
            raise KernelError(
                f"an LSTM with proj_size={module.proj_size} has a projection in each step, which no packed one has. "
                "Keep it dense."
            )
        self.mode = module.mode
        for option in _OPTIONS:
            setattr(self, option, getattr(module, option))
        if isinstance(module, nn.RNN):
            self.nonlinearity = module.nonlinearity
        self._parameters.update(module._parameters)
        for name, stack in (weights or {}).items():
            old = self._parameters.pop(name, None)
            if old is None or stack.shape != old.shape:
                raise KernelError(
                    f"a packed weight {name!r} of the shape {list(stack.shape)}, but the {self.mode} has "
                    f"{'none' if old is None else list(old.shape)} there. Check that it belongs to this module."
                )
            self._modules[name] = stack
        self.train(module.training)

    @property
    def weight_names(self) -> list[str]:
        """Names of weights and biases, in the order of the dense module."""
        made = (
            [
                f"{part}_l{layer}{end}"
                for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
            ]
            for layer in range(self.num_layers)
            for end in ("", "_reverse")[: 1 + self.bidirectional]
        )
        return [name for names in made for name in names]

    @property
    def all_weights(self) -> list[list[Any]]:
        """Weights and biases by layer and direction."""
        count, flat = (4 if self.bias else 2), [getattr(self, name) for name in self.weight_names]
        return [flat[begin : begin + count] for begin in range(0, len(flat), count)]

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, self.weight_names[0])]  # the checks read its dtype

    def flatten_parameters(self) -> None:
        """Do nothing: only cuDNN wants parameters side by side."""

    def to_dense(self) -> nn.RNNBase:
        """Return the dense module, with the same weights and biases."""
        options = {option: getattr(self, option) for option in _OPTIONS}
        if self.mode != "LSTM":
            del options["proj_size"]
        if hasattr(self, "nonlinearity"):
            options["nonlinearity"] = self.nonlinearity
        made: nn.RNNBase = _CLASSES[self.mode](**options, device="meta")
        for name in self.weight_names:
            own = getattr(self, name)
            setattr(made, name, nn.Parameter(own.to_dense()) if isinstance(own, PackedStack) else own)
        return made.train(self.training)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Return the outputs of the last layer for all steps, and the last states, as the dense module does."""
        if isinstance(input, PackedSequence):
            x, sizes, order, back = input
            steps = sizes.tolist()
            states = self._states(hx, x, steps[0], batched=True, order=order)
            self._check(x, states, sizes)
            y, states = self._run(x, steps, states)
            if back is not None:
                states = [state.index_select(1, back) for state in states]
            return PackedSequence(y, sizes, order, back), self._returned(states)
        if input.dim() not in (2, 3):
            raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(int(not self.batch_first))
        states = self._states(hx, x, x.size(0 if self.batch_first else 1), batched=batched, order=None)
        self._check(x, states, None)
        x = x.transpose(0, 1) if self.batch_first else x
        length, batch = x.shape[:2]
        y, states = self._run(x.reshape(length * batch, -1), [batch] * length, states)
        y = y.view(length, batch, -1)
        y = y.transpose(0, 1) if self.batch_first else y
        if not batched:
            y, states = y.squeeze(int(not self.batch_first)), [state.squeeze(1) for state in states]
        return y, self._returned(states)

    def _states(self, hx: Any, x: Tensor, batch: int, *, batched: bool, order: Tensor | None) -> list[Tensor]:
        """The states that each layer and direction begins with, ``[layers * directions, batch, hidden]``."""
        wanted = 2 if self.mode == "LSTM" else 1
        if hx is None:
            shape = self.num_layers * (1 + self.bidirectional), batch, self.hidden_size
            return [x.new_zeros(shape)] * wanted
        given = list(hx) if self.mode == "LSTM" else [hx]
        for state in given:
            if state.dim() != (3 if batched else 2):
                side = (
                    f"{'batched 3-D' if batched else 'unbatched 2-D'} input, hx should also be {3 if batched else 2}-D"
                )
                raise RuntimeError(f"For {side} but got {state.dim()}-D tensor")
        given = given if batched else [state.unsqueeze(1) for state in given]
        return given if order is None else [state.index_select(1, order) for state in given]

    def _check(self, x: Tensor, states: list[Tensor], sizes: Tensor | None) -> None:
        checker: Any = nn.LSTM if self.mode == "LSTM" else nn.RNNBase
        checker.check_forward_args(self, x, self._returned(states), sizes)

    def _returned(self, states: list[Tensor]) -> Any:
        return tuple(states) if self.mode == "LSTM" else states[0]

    def _run(self, x: Tensor, sizes: list[int], states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run all layers on the rows of all steps, one step after the other.

        Args:
            x: ``[rows, in]``.
            sizes: how many rows each step has; none has more than the one before.
            states: what each layer and direction begins with.
        """
        last: list[list[Tensor]] = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            outputs = []
            for direction, end in enumerate(("", "_reverse")[: 1 + self.bidirectional]):
                begin = [state[layer * (1 + self.bidirectional) + direction] for state in states]
                y, own = self._run_one(f"l{layer}{end}", x, sizes, begin, is_reverse=bool(direction))
                outputs.append(y)
                last.append(own)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return x, [torch.stack(own) for own in zip(*last, strict=True)]

    def _run_one(
        self, end: str, x: Tensor, sizes: list[int], begin: list[Tensor], *, is_reverse: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one direction of one layer: its outputs for all rows, and its last states."""
        bias_ih: Tensor | None
        bias_hh: Tensor | None
        bias_ih, bias_hh = (getattr(self, f"{name}_{end}") if self.bias else None for name in ("bias_ih", "bias_hh"))
        if self.mode != "GRU" and bias_ih is not None and bias_hh is not None:  # both are added to the same sum
            bias_ih, bias_hh = bias_ih + bias_hh, None
        gates = self._product(f"weight_ih_{end}")(x, bias_ih)
        multiply, step = self._product(f"weight_hh_{end}"), _STEPS[self.mode]
        ends, offset = [], 0
        for size in sizes:
            ends.append((offset, offset + size))
            offset += size
        states, finished = [state[: sizes[-1] if is_reverse else sizes[0]] for state in begin], []
        outputs = []
        for first, behind in reversed(ends) if is_reverse else ends:
            rows = behind - first
            if rows < len(states[0]):  # the last sequences have ended
                finished.append([state[rows:] for state in states])
                states = [state[:rows] for state in states]
            elif rows > len(states[0]):  # backwards, further sequences begin
                states = [torch.cat([own, state[len(own) : rows]]) for own, state in zip(states, begin, strict=True)]
            states = step(gates[first:behind], multiply(states[0], bias_hh), states)
            outputs.append(states[0])
        if finished:
            pieces = [states, *reversed(finished)]
            states = [torch.cat(own) for own in zip(*pieces, strict=True)]
        return torch.cat(outputs[::-1] if is_reverse else outputs), states

    def _product(self, name: str) -> Product:
        """What multiplies by a weight."""
        stack = self._modules.get(name)
        if stack is None:
            weight = self._parameters[name]
            return lambda x, bias: F.linear(x, weight, bias)  # type: ignore[arg-type]
        return stack._modules["0"].product  # type: ignore[union-attr, return-value]

    def extra_repr(self) -> str:
        """Describe the module."""
        return f"{self.input_size}, {self.hidden_size}, mode={self.mode!r}"


def _lstm(from_input: Tensor, from_state: Tensor, states: list[Tensor]) -> list[Tensor]:
    return list(lstm_step(from_input + from_state, states[1]))


def _gru(from_input: Tensor, from_state: Tensor, states: list[Tensor]) -> list[Tensor]:
    return [gru_step(from_input, from_state, states[0])]


def _tanh(from_input: Tensor, from_state: Tensor, states: list[Tensor]) -> list[Tensor]:
    return [(from_input + from_state).tanh()]


def _relu(from_input: Tensor, from_state: Tensor, states: list[Tensor]) -> list[Tensor]:
    return [(from_input + from_state).relu()]


_STEPS = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _tanh, "RNN_RELU": _relu}


def packed_recurrents(model: nn.Module) -> dict[str, PackedRecurrent]:
    """Return the packed LSTM, GRU and RNN of a model by qualified name. One with several names is under each."""
    found = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in found if isinstance(module, PackedRecurrent)}
