"""A weight that is being made sparse during training, in the two ways that there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import PatternError, RecipeError
from secateur._types import Mask, Scores, Weight
from secateur.layers import Layer, clear_state_, full_tensor, local_part, sharded_like
from secateur.nn import SparseConv2d, SparseLinear
from secateur.patterns import SparsityPattern
from secateur.reports import LayerReport, thumbnail


class MaskedWeight:
    """A plain parameter that is kept at zero in the pruned places, under any kind of layer.

    Its gradient is zero there too, by a hook on the parameter that :meth:`release` removes, so that clipping by norm
    and momenta see the sparse network only. The gradients of sharded parameters do not pass such a hook; their zeros
    are restored after each step all the same.
    """

    def __init__(self, layer: Layer, pattern: SparsityPattern, sparsity: float) -> None:
        self.layer, self.pattern, self.sparsity = layer, pattern, sparsity
        self.mask: Mask | None = None  # [out, in], of the whole weight
        self.dense_gradient = False
        self.seconds = 0.0
        self._pruned: Tensor | None = None  # in the parameter's shape, of this process's part
        parameter = layer.parameter
        self._hook = None if layer.is_sharded else parameter.register_hook(self._without_pruned)

    def _without_pruned(self, gradient: Tensor) -> Tensor | None:
        if self._pruned is None or self.dense_gradient:
            return None
        return gradient.masked_fill(self._pruned, 0)

    def matrix(self) -> Weight:
        """The weight as ``[out, in]``, detached and whole."""
        return self.layer.matrix()

    def magnitudes(self) -> Scores:
        """The absolute weights, ``[out, in]``, with pruned ones below all others, zeros among them."""
        scores = magnitudes(self.matrix())
        return scores if self.mask is None else scores.masked_fill(~self.mask, -1)

    def hard_mask(self) -> Mask:
        """The mask, ``[out, in]``; all True before there is one."""
        return torch.ones_like(self.matrix(), dtype=torch.bool) if self.mask is None else self.mask.clone()

    @property
    def num_pruned(self) -> int:
        """Weights that the mask prunes."""
        return 0 if self.mask is None else self.mask.numel() - int(self.mask.count_nonzero())

    def gradient(self) -> Weight | None:
        """The gradient as ``[out, in]``, whole; None if there is none."""
        gradient = self.layer.parameter.grad
        if gradient is None:
            return None
        return self.layer.to_matrix(gradient.detach())

    def set_mask(self, mask: Mask, optimizer: torch.optim.Optimizer) -> None:
        """Prune by ``mask`` from now on; weights that it brings back start at zero with a fresh optimizer state."""
        lasting = mask if self.mask is None else mask & self.mask
        self._use(mask)
        self.zero_()
        clear_state_(optimizer, self.layer.parameter, self._in_shape(lasting))

    def remove_mask(self) -> None:
        """Prune nothing from now on; what was pruned stays at zero until something moves it."""
        self._use(None)

    def _use(self, mask: Mask | None) -> None:
        self.mask = mask
        self._pruned = None if mask is None else ~sharded_like(self._in_shape(mask), self.layer.parameter)

    def _in_shape(self, mask: Mask) -> Tensor:
        return self.layer.from_matrix(mask)

    @torch.no_grad()
    def zero_(self) -> None:
        """Set the pruned weights to zero, wherever an optimizer may have moved them."""
        if self._pruned is not None:
            local_part(self.layer.parameter).masked_fill_(self._pruned, 0)

    def release(self) -> None:
        """Leave the parameter as it would have been without us, but for its zeros."""
        if self._hook is not None:
            self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what cannot be read off the model."""
        return {"shape": list(self.layer.parameter.shape), "mask": self.mask}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        mask = state["mask"]
        self._use(None if mask is None else mask.to(self.layer.parameter.device))


class LearnedWeight:
    """The weight of layers that learn their mask: one, or several that share it."""

    def __init__(self, layer: Layer, modules: tuple[SparseLinear | SparseConv2d, ...]) -> None:
        self.layer, self.modules = layer, modules
        pattern, sparsity = modules[0].pattern, modules[0].target
        assert pattern is not None
        assert sparsity is not None
        self.pattern, self.sparsity = pattern, sparsity
        self.seconds = 0.0

    @property
    def parameter(self) -> nn.Parameter:
        """The shared weight."""
        return self.modules[0].weight

    @property
    def mask(self) -> Mask | None:
        """The frozen mask as ``[out, in]``, or None while it is learned."""
        mask = self.modules[0].mask
        return None if mask is None else mask.flatten(1)

    def matrix(self) -> Weight:
        """The weight as ``[out, in]``, detached and whole."""
        return full_tensor(self.parameter.detach()).flatten(1)

    def magnitudes(self) -> Scores:
        """The absolute weights, ``[out, in]``."""
        return magnitudes(self.matrix())

    def hard_mask(self) -> Mask:
        """The frozen mask, ``[out, in]``, or what the soft one would keep."""
        return self.modules[0].hard_mask().flatten(1)

    def set_threshold(self, sparsity: float, temperature: float) -> None:
        """Put the soft mask on a budget."""
        self.modules[0].solve_threshold(sparsity)
        for module in self.modules:
            module.temperature = temperature  # type: ignore[assignment]
            module.threshold.copy_(self.modules[0].threshold)

    @torch.no_grad()
    def shrink_pruned_(self, part: float) -> None:
        """Take a part off each weight that the mask prunes."""
        mask = self.modules[0].mask
        assert mask is not None
        kept = sharded_like(mask, self.parameter)
        weight = local_part(self.parameter)
        weight.copy_(torch.where(kept, weight, weight * (1 - part)))

    def set_mask(self, mask: Mask, *, straight_through: bool = False) -> None:
        """Use a hard mask from now on."""
        for module in self.modules:
            module.freeze(mask.view(self.parameter.shape), straight_through=straight_through)

    def state_dict(self) -> dict[str, Any]:
        """Return what cannot be read off the model, in case only its weights were saved."""
        module = self.modules[0]
        return {
            "shape": list(self.parameter.shape),
            "mask": module.mask,
            "threshold": module.threshold.clone(),
            "temperature": float(module.temperature),
            "straight_through": module.straight_through,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        mask = state["mask"]
        for module in self.modules:
            module.mask = None if mask is None else mask.to(self.parameter.device)
            module.straight_through = state["straight_through"]
            module.temperature = state["temperature"]
            module.threshold.copy_(state["threshold"])


def magnitudes(matrix: Weight) -> Scores:
    """The absolute values, at least in float32."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32)).abs()


def check_optimizer(optimizer: torch.optim.Optimizer, layers: Sequence[Layer]) -> None:
    """Raise unless the optimizer holds every layer's weight and each of them trains.

    Raises:
        RecipeError: naming the first layer for which it is not so.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in layers:
        if id(layer.parameter) not in held:
            raise RecipeError(
                f"{layer.title}: its weight is not among the optimizer's {len(held)} parameters.\n"
                "Make the optimizer from the parameters of this very model, or exclude the layer."
            )
        if not layer.parameter.requires_grad:
            raise RecipeError(f"{layer.title}: its weight takes no gradient, so it cannot train. Exclude the layer.")


def report_layer(
    weight: MaskedWeight | LearnedWeight,
    mask: Mask,
    *,
    pattern: SparsityPattern,
    asked: float,
    count: int,
    notes: Sequence[str] = (),
) -> LayerReport:
    """Check a weight that is at its final mask, and describe it.

    Args:
        weight: that the mask was applied to.
        mask: ``[out, in]``.
        pattern: under which the mask must be legal.
        asked: the sparsity that was asked for.
        count: weights that the mask must prune.
        notes: for the report.

    Raises:
        PatternError: the mask breaks its pattern or count, or a pruned weight is not zero.
    """
    pattern.check(mask)
    matrix = weight.matrix()
    pruned = mask.numel() - int(mask.count_nonzero())
    if pruned != count or matrix.masked_select(~mask).count_nonzero():
        raise PatternError(f"{pruned} weights are pruned and not all of them zero, but {count} were asked for.")
    return LayerReport(
        name=weight.layer.name,
        shape=(matrix.shape[0], matrix.shape[1]),
        pattern=str(pattern),
        asked=asked,
        sparsity=pruned / max(1, mask.numel()),
        pruned=pruned,
        zeros=matrix.numel() - int(matrix.count_nonzero()),
        relative_error=None,
        tokens=None,
        dead_inputs=None,
        seconds=weight.seconds,
        tied_to=weight.layer.tied_to,
        notes=tuple(notes),
        thumbnail=thumbnail(mask),
    )
