"""Group lasso: a penalty that drives whole units of a pattern to zero, and its proximal step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur._checks import number
from secateur._errors import PatternError, RecipeError, naming
from secateur._types import Weight
from secateur.layers import Layer, check_model, full_tensor, select_layers, write_whole_
from secateur.patterns import SparsityPattern, as_pattern, with_channel_width


@dataclass(frozen=True)
class GroupSparsity:
    """Group lasso on the units of a pattern: tiles, rows (output channels) or columns (input channels).

    ``R(W) = strength * sum_g sqrt(|g|) * ||w_g||_2``, over the units g of the pattern, of ``|g|`` weights each. The
    norm is not squared, so a unit is pulled to zero as a whole and with a force that does not fade as it shrinks.

    There are two ways to train with it. Use one of them, not both:

    - *As a penalty*: add :meth:`model_penalty` to the loss. Any optimizer works. Units become small, but never exactly
      zero: prune them afterwards.
    - *As a proximal step*: leave the loss as it is, and call :meth:`model_prox_` after each ``optimizer.step()`` with
      the learning rate of that step. Units become exactly zero, and come back only if the loss pulls harder than R.
      With plain SGD this is proximal gradient descent on ``loss + R``. With Adam it is the decoupled variant, as weight
      decay is in AdamW: the step is not scaled as Adam scales the gradient. The strength then competes with Adam's
      updates, which are about 1 for a weight whose gradients agree and 0.2 (at beta1 = 0.9) where they are noise:
      choose a strength between these.

    An unstructured or an N:M pattern has units of one weight, for which this is the plain lasso,
    ``strength * sum |w|``. It makes single weights zero, wherever they are: it ignores N:M groups, and its result is no
    N:M mask. The dense remainder of a pattern is neither penalised nor shrunk.

    Half precision weights are computed in float32 and rounded once. A proximal step that is smaller than their
    resolution has no effect, as a small update of the optimizer has none: train weights in float32.

    Args:
        pattern: a :class:`SparsityPattern` or its text. ``Column()`` means whole input channels of a convolution.
        strength: lambda, at least 0 and finite. Under SGD a unit stays at zero while the norm of the loss's gradient on
            it is at most ``strength * sqrt(|g|)``.

    Raises:
        PatternError: a text that names no pattern.
        RecipeError: a strength that is negative or not finite.
        TypeError: a pattern or a strength of another type.

    Example:
        >>> import torch, secateur
        >>> group = secateur.GroupSparsity("row", strength=0.5)
        >>> weight = torch.tensor([[3.0, 4.0], [0.5, 0.5]])
        >>> group.penalty(weight)  # 0.5 * sqrt(2) * (5 + sqrt(0.5))
        tensor(4.0355)
        >>> group.prox_(weight, step_size=1.0)
        >>> weight
        tensor([[2.5757, 3.4343],
                [0.0000, 0.0000]])

        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for x in torch.ones(5, 4, 2):
        ...     optimizer.zero_grad()
        ...     model(x).square().sum().backward()
        ...     optimizer.step()
        ...     group.model_prox_(model, optimizer.param_groups[0]["lr"])

    Reference:
        Yuan and Lin, "Model selection and estimation in regression with grouped variables", J. R. Statist. Soc. B 68,
        2006. Parikh and Boyd, "Proximal Algorithms", Foundations and Trends in Optimization 1(3), 2014, section 6.5.
    """

    pattern: SparsityPattern
    strength: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", as_pattern(self.pattern))
        object.__setattr__(self, "strength", number("strength", self.strength, 0, finite=True))

    def penalty(self, weight: Tensor) -> Tensor:
        """Return R of one weight, differentiable; at a unit of zeros the gradient is 0, a subgradient.

        Args:
            weight: ``[out, in]``, or ``[out, in, *kernel]`` of a convolution; any floating dtype.

        Returns:
            A scalar, in float32 for half precision weights and in the weight's dtype otherwise.

        Raises:
            PatternError: the pattern does not fit the shape.
            TypeError: not a floating-point tensor.

        Example:
            >>> import torch, secateur
            >>> secateur.GroupSparsity("block:2x2", strength=0.1).penalty(torch.ones(2, 4))  # 0.1 * 2 * (2 + 2)
            tensor(0.8000)
        """
        matrix, pattern = self._fit(weight)
        return self._penalty(matrix, pattern)

    @torch.no_grad()
    def prox_(self, weight: Tensor, step_size: float) -> None:
        """Shrink each unit of one weight in place, ``w_g *= max(0, 1 - step_size * strength * sqrt(|g|) / ||w_g||)``.

        The result is the V of least ``||V - W||^2 / 2 + step_size * R(V)``. Units at or below the threshold, and those
        that are zero already, are exactly zero after it.

        Args:
            weight: ``[out, in]``, or ``[out, in, *kernel]`` of a convolution; any floating dtype.
            step_size: the learning rate of the step that came before, at least 0 and finite.

        Raises:
            PatternError: the pattern does not fit the shape.
            RecipeError: a step size that is negative or not finite.
            TypeError: not a floating-point tensor, or a step size that is no number.

        Example:
            >>> import torch, secateur
            >>> weight = torch.tensor([[0.3, 2.0, 0.1]])
            >>> secateur.GroupSparsity("unstructured", strength=1.0).prox_(weight, step_size=0.5)
            >>> weight
            tensor([[0.0000, 1.5000, 0.0000]])
        """
        step_size = number("step_size", step_size, 0, finite=True)
        matrix, pattern = self._fit(weight)
        shrunk = self._shrunk(matrix, pattern, step_size)
        write_whole_(weight, shrunk.reshape(weight.shape))

    def model_penalty(self, model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> Tensor:
        """Return the sum of R over a model's layers, differentiable, to be added to the loss.

        The layers are those that :func:`prune_` would prune, less those whose weight requires no gradient. A weight
        that several layers share counts once.

        Args:
            model: any module.
            include: glob patterns on qualified layer names. Given, exactly those layers are penalised; empty, all but
                output heads and weights tied to an embedding.
            exclude: glob patterns that win over ``include``.

        Returns:
            A scalar on the device of the first layer.

        Raises:
            PatternError: the pattern does not fit a layer; naming the layer.
            RecipeError: a glob that matches nothing, or no layer to penalise.
            TypeError: not a module.

        Example:
            >>> import torch, secateur
            >>> model = torch.nn.Linear(4, 2)
            >>> group = secateur.GroupSparsity("column", strength=1e-3)
            >>> loss = model(torch.ones(1, 4)).square().mean() + group.model_penalty(model)
            >>> loss.backward()
        """
        penalties = [self._penalty(_matrix(layer), pattern) for layer, pattern in self._layers(model, include, exclude)]
        total = penalties[0]
        for penalty in penalties[1:]:
            total = total + penalty.to(total.device)
        return total

    @torch.no_grad()
    def model_prox_(
        self, model: nn.Module, step_size: float, include: Iterable[str] = (), exclude: Iterable[str] = ()
    ) -> None:
        """Apply :meth:`prox_` to a model's layers, the same as in :meth:`model_penalty`, after ``optimizer.step()``.

        Nothing is changed unless all layers fit.

        Args:
            model: any module.
            step_size: the learning rate of the step that came before, at least 0 and finite.
            include: glob patterns on qualified layer names. Given, exactly those layers are shrunk; empty, all but
                output heads and weights tied to an embedding.
            exclude: glob patterns that win over ``include``.

        Raises:
            PatternError: the pattern does not fit a layer; naming the layer.
            RecipeError: a glob that matches nothing, no layer to shrink, or a step size that is negative or not finite.
            TypeError: not a module, or a step size that is no number.

        Example:
            >>> import torch, secateur
            >>> model = torch.nn.Linear(4, 2)
            >>> secateur.GroupSparsity("column", strength=10.0).model_prox_(model, step_size=0.1)
            >>> int(model.weight.count_nonzero())
            0
        """
        step_size = number("step_size", step_size, 0, finite=True)
        for layer, pattern in self._layers(model, include, exclude):
            shrunk = self._shrunk(_matrix(layer), pattern, step_size)
            layer.write_(shrunk)

    def _fit(self, weight: Tensor) -> tuple[Weight, SparsityPattern]:
        """A weight as a matrix, and the pattern as it applies to it."""
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() == 1:
            kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"weight must be a floating-point tensor of 16 bits or more, got {kind}")
        if weight.ndim < 2:
            raise PatternError(
                f"{self.pattern} needs a weight of shape (out, in) or, of a convolution, (out, in, *kernel); "
                f"got shape {tuple(weight.shape)}."
            )
        matrix = full_tensor(weight).flatten(1)
        pattern = with_channel_width(self.pattern, max(1, math.prod(weight.shape[2:])))
        pattern.validate(matrix.shape)
        return matrix, pattern

    def _layers(
        self, model: nn.Module, include: Iterable[str], exclude: Iterable[str]
    ) -> list[tuple[Layer, SparsityPattern]]:
        """The layers to work on, each with the pattern as it applies to it."""
        check_model(model)
        selected, _ = select_layers(model, include, exclude)
        # Not Layer.fit, which looks at every weight: this runs at each step of training.
        fitted = []
        for layer in selected:
            if not layer.parameter.requires_grad:
                continue
            pattern = with_channel_width(self.pattern, layer.channel_width)
            with naming(layer.title):
                pattern.validate(_matrix(layer).shape)
            fitted.append((layer, pattern))
        if not fitted:
            raise RecipeError(
                f"none of the {len(selected)} layers' weights requires a gradient, so none is being trained.\n"
                "Unfreeze some, or include other layers."
            )
        return fitted

    def _penalty(self, matrix: Weight, pattern: SparsityPattern) -> Tensor:
        units = pattern.units(matrix.shape)
        core = units.crop(matrix)
        norms = _norms(units.elements(core.to(torch.promote_types(core.dtype, torch.float32))))
        return self.strength * math.sqrt(units.size) * norms.sum()

    def _shrunk(self, matrix: Weight, pattern: SparsityPattern, step_size: float) -> Weight:
        """A new matrix, in float32 at least, after the proximal step."""
        result = matrix.to(torch.promote_types(matrix.dtype, torch.float32), copy=True)
        units = pattern.units(matrix.shape)
        core = units.crop(result)
        threshold = step_size * self.strength * math.sqrt(units.size)
        if not threshold:
            return result  # not even a norm that underflows changes anything
        norms = _norms(units.elements(core))
        # The comparison, not a clamp, makes the zeros: 0 / 0 never matters, and NaN stays visible.
        scale = (1 - threshold / norms).masked_fill_(norms <= threshold, 0.0)
        core.mul_(units.spread(scale)).add_(0.0)  # -0.0 + 0.0 is 0.0
        return result


def _matrix(layer: Layer) -> Weight:
    """The layer's weight as ``[out, in]``, whole and attached to its gradient."""
    return layer.to_matrix(layer.parameter)


def _norms(units: Tensor) -> Tensor:
    """L2 norms ``[competitions, units]``, of gradient 0 where they are 0."""
    return units[..., 0].abs() if units.shape[2] == 1 else torch.linalg.vector_norm(units, dim=2)
