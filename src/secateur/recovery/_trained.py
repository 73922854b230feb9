"""Which numbers move while a model recovers: all weights, norms and biases, or low-rank changes of the matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError
from secateur.layers import select_layers
from secateur.recovery._zeros import HeldZeros, rounded_like
from secateur.recovery._zeros import stored as as_stored


class Trained(Protocol):
    """What an optimizer moves.

    Attributes:
        weights: how many weights of the model can move.
    """

    weights: int

    def leaves(self) -> list[nn.Parameter]:
        """Return what the optimizer gets."""

    def using(self, stored: bool = False) -> AbstractContextManager[None]:
        """Return a context in which the model computes with them.

        Args:
            stored: with what they will be in the model's own precision; without gradients.
        """

    def mask_gradients_(self) -> None:
        """Take away the gradients of zeros."""

    def hold_zeros_(self) -> None:
        """Set what is zero to zero again."""

    def finish_(self) -> None:
        """Put everything into the model's own parameters."""


class OwnWeights:
    """Some of the model's own parameters.

    Args:
        parameters: to train, each once.
        before: what :func:`secateur.recovery._zeros.widened` yields, if some are held in float32.
    """

    def __init__(self, parameters: list[nn.Parameter], before: Mapping[int, Tensor] = MappingProxyType({})) -> None:
        self._parameters, self._before = parameters, before
        self._zeros = HeldZeros(parameters)
        self.weights = sum(parameter.numel() for parameter in parameters) - self._zeros.count

    def leaves(self) -> list[nn.Parameter]:
        """The parameters."""
        return self._parameters

    @contextmanager
    def using(self, stored: bool = False) -> Iterator[None]:
        """The model has them already."""
        with as_stored(self._parameters, self._before if stored else {}):
            yield

    def mask_gradients_(self) -> None:
        """Take away the gradients of zeros."""
        self._zeros.mask_gradients_()

    def hold_zeros_(self) -> None:
        """Set what is zero to zero again."""
        self._zeros.hold_()

    def finish_(self) -> None:
        """Do nothing."""


class _LowRank:
    """``W + M * (B A)`` in place of one parameter W with the mask M of its zeros.

    Args:
        parameter: W, of two dimensions, of a convolution, or a stack of matrices.
        owners: modules that have it, and its name there.
        rank: of the change.
        generator: of the first values of A; B begins at zero.
        before: the parameter's values in 16 bits, if it is held in float32.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        owners: list[tuple[nn.Module, str]],
        rank: int,
        generator: torch.Generator,
        before: Tensor | None,
    ) -> None:
        self.parameter, self._owners, self._before, self._merged = parameter, owners, before, False
        stacked = parameter.ndim == 3 and not isinstance(owners[0][0], nn.modules.conv._ConvNd)
        *stack, rows = parameter.shape[:2] if stacked else parameter.shape[:1]
        columns = math.prod(parameter.shape[2:] if stacked else parameter.shape[1:])
        rank = min(rank, rows, columns)
        device = parameter.device
        first = torch.randn(*stack, rank, columns, generator=generator) / math.sqrt(columns)
        self.down = nn.Parameter(first.to(device))
        self.up = nn.Parameter(torch.zeros(*stack, rows, rank, device=device))
        zeros = parameter.detach() == 0
        self._kept = ~zeros if bool(zeros.any()) else None

    def value(self) -> Tensor:
        """The weight that takes the place of W. Pruned weights are exactly zero."""
        change = (self.up @ self.down).view(self.parameter.shape)
        if self._kept is not None:
            change = change * self._kept
        return self.parameter.detach() + change

    @contextmanager
    def using(self, stored: bool) -> Iterator[None]:
        """Let the modules compute with the weight."""
        value = self.value()
        if stored and self._before is not None:
            value = rounded_like(value, self._before).to(value.dtype)
        try:
            self._give(value)
            yield
        finally:
            self._give(self.parameter)

    def _give(self, value: Tensor) -> None:
        for module, name in self._owners:
            module._parameters[name] = value  # type: ignore[assignment]
            if isinstance(module, nn.RNNBase):  # it computes with a list of its own
                module._flat_weights = [getattr(module, entry, None) for entry in module._flat_weights_names]

    def merge_(self) -> None:
        """Make the weight that of the parameter, once."""
        if not self._merged:
            self.parameter.copy_(self.value())
            self._merged = True


class LowRank:
    """Low-rank changes of the matrices that pruning considers, and all norms and biases (MaskLoRA).

    Args:
        model: that recovers.
        rank: of the changes.
        seed: of their first values.
        before: what :func:`secateur.recovery._zeros.widened` yields.

    Reference:
        Max Zimmer, Megi Andoni, Christoph Spiegel, Sebastian Pokutta, "PERP: Rethinking the Prune-Retrain Paradigm in
        the Era of LLMs", 2023, arXiv:2312.15230. Differs from the paper: the change is not scaled.
    """

    def __init__(self, model: nn.Module, rank: int, seed: int, before: Mapping[int, Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append((module, name))
        matrices = {id(layer.parameter): layer.parameter for layer in select_layers(model)[0]}
        self._changes = [
            _LowRank(parameter, owners[key], rank, generator, before.get(key))
            for key, parameter in matrices.items()
            if parameter.requires_grad and parameter.ndim > 1
        ]
        self._rest = OwnWeights(vectors(model), before)
        self.weights = sum(change.up.numel() + change.down.numel() for change in self._changes) + self._rest.weights

    def leaves(self) -> list[nn.Parameter]:
        """The factors, and norms and biases."""
        factors = [factor for change in self._changes for factor in (change.up, change.down)]
        return [*factors, *self._rest.leaves()]

    @contextmanager
    def using(self, stored: bool = False) -> Iterator[None]:
        """Let the modules compute with the changed weights."""
        with ExitStack() as stack:
            stack.enter_context(self._rest.using(stored))
            for change in self._changes:
                stack.enter_context(change.using(stored))
            yield

    def mask_gradients_(self) -> None:
        """Do nothing: the mask is part of the product."""

    def hold_zeros_(self) -> None:
        """Do nothing: the mask is part of the product."""

    @torch.no_grad()
    def finish_(self) -> None:
        """Add the changes to the weights. What the model computes stays the same, bit for bit."""
        for change in self._changes:
            change.merge_()


def vectors(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters with one dimension that may be trained: norms and biases."""
    return [p for p in model.parameters() if p.ndim == 1 and p.is_floating_point() and p.requires_grad]


def trained_by(
    method: str, model: nn.Module, rank: int, seed: int, before: Mapping[int, Tensor] = MappingProxyType({})
) -> Trained:
    """Return what a method trains of a whole model: nothing, if it trains blocks or only estimates batch norms.

    Args:
        method: by its name.
        model: that recovers.
        rank: of ``"lora"``.
        seed: of ``"lora"``.
        before: what :func:`secateur.recovery._zeros.widened` yields.

    Raises:
        RecipeError: there is nothing to train.
    """
    if method == "batchnorm":
        return OwnWeights([])
    trained: Trained
    if method == "lora":
        trained = LowRank(model, rank, seed, before)
    else:
        trained = OwnWeights(vectors(model) if method == "norms" else free(model), before)
    if not trained.leaves():
        what = "they are frozen (requires_grad=False)" if not free(model) else "the model has no such parameters"
        raise RecipeError(
            f"the method {method!r} finds nothing to train in {type(model).__name__}: {what}.\n"
            + ("Call model.requires_grad_(True)." if not free(model) else "Use method='full'.")
        )
    return trained if method != "blocks" else OwnWeights([])


def free(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that may be trained."""
    return [p for p in model.parameters() if p.is_floating_point() and p.requires_grad]


@contextmanager
def own_gradients(model: nn.Module) -> Iterator[None]:
    """Put the gradients of a model away for a while."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


@contextmanager
def only(model: nn.Module, leaves: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let gradients be computed for some parameters only, so that the others cost no time and memory."""
    wanted = {id(leaf) for leaf in leaves}
    others = [parameter for parameter in free(model) if id(parameter) not in wanted]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


@contextmanager
def recurrent_in_training(model: nn.Module) -> Iterator[None]:
    """Keep recurrent layers on a GPU in training mode, without dropout: cuDNN has no backward pass in evaluation."""
    found = [m for m in model.modules() if isinstance(m, nn.RNNBase) and next(m.parameters()).device.type == "cuda"]
    before = [(module, module.training, module.dropout) for module in found]
    try:
        for module in found:
            module.training, module.dropout = True, 0.0
        yield
    finally:
        for module, training, dropout in before:
            module.training, module.dropout = training, dropout
