"""Which numbers move while a model recovers: all weights, norms and biases, or low-rank changes of the matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError
from secateur.layers import select_layers
from secateur.recovery._zeros import HeldZeros


class Trained(Protocol):
    """What an optimizer moves.

    Attributes:
        weights: how many weights of the model can move.
    """

    weights: int

    def leaves(self) -> list[nn.Parameter]:
        """Return what the optimizer gets."""

    def using(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes with them."""

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
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._zeros = HeldZeros(parameters)
        self.weights = sum(parameter.numel() for parameter in parameters) - self._zeros.count

    def leaves(self) -> list[nn.Parameter]:
        """The parameters."""
        return self._parameters

    @contextmanager
    def using(self) -> Iterator[None]:
        """The model has them already."""
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
    """

    def __init__(
        self, parameter: nn.Parameter, owners: list[tuple[nn.Module, str]], rank: int, generator: torch.Generator
    ) -> None:
        self.parameter, self._owners = parameter, owners
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
    def using(self) -> Iterator[None]:
        """Let the modules compute with the weight."""
        value = self.value()
        try:
            for module, name in self._owners:
                module._parameters[name] = value  # type: ignore[assignment]
            yield
        finally:
            for module, name in self._owners:
                module._parameters[name] = self.parameter


class LowRank:
    """Low-rank changes of the matrices that pruning considers, and all norms and biases (MaskLoRA).

    Args:
        model: that recovers.
        rank: of the changes.
        seed: of their first values.

    Reference:
        Max Zimmer, Megi Andoni, Christoph Spiegel, Sebastian Pokutta, "PERP: Rethinking the Prune-Retrain Paradigm in
        the Era of LLMs", 2023, arXiv:2312.15230. Differs from the paper: the change is not scaled.
    """

    def __init__(self, model: nn.Module, rank: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append((module, name))
        matrices = {id(layer.parameter): layer.parameter for layer in select_layers(model)[0]}
        self._changes = [
            _LowRank(parameter, owners[key], rank, generator)
            for key, parameter in matrices.items()
            if parameter.requires_grad and parameter.ndim > 1
        ]
        self._rest = OwnWeights(vectors(model))
        self.weights = sum(change.up.numel() + change.down.numel() for change in self._changes) + self._rest.weights

    def leaves(self) -> list[nn.Parameter]:
        """The factors, and norms and biases."""
        factors = [factor for change in self._changes for factor in (change.up, change.down)]
        return [*factors, *self._rest.leaves()]

    @contextmanager
    def using(self) -> Iterator[None]:
        """Let the modules compute with the changed weights."""
        with ExitStack() as stack:
            for change in self._changes:
                stack.enter_context(change.using())
            yield

    def mask_gradients_(self) -> None:
        """Do nothing: the mask is part of the product."""

    def hold_zeros_(self) -> None:
        """Do nothing: the mask is part of the product."""

    @torch.no_grad()
    def finish_(self) -> None:
        """Add the changes to the weights. What the model computes stays the same, bit for bit."""
        for change in self._changes:
            change.parameter.copy_(change.value())


def vectors(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters with one dimension that may be trained: norms and biases."""
    return [p for p in model.parameters() if p.ndim == 1 and p.is_floating_point() and p.requires_grad]


def trained_by(method: str, model: nn.Module, rank: int, seed: int) -> Trained:
    """Return what a method trains of a model.

    Raises:
        RecipeError: there is nothing.
    """
    if method == "lora":
        trained: Trained = LowRank(model, rank, seed)
    elif method == "norms":
        trained = OwnWeights(vectors(model))
    else:
        trained = OwnWeights([p for p in model.parameters() if p.is_floating_point() and p.requires_grad])
    if not trained.leaves():
        raise RecipeError(
            f"the method {method!r} finds nothing to train in {type(model).__name__}: it has no such parameters, or "
            "all are frozen.\nCall model.requires_grad_(True), or use method='full'."
        )
    return trained
