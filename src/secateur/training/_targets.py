"""A weight that is being made sparse during training, in the two ways that there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur._layers import Layer, full_tensor
from secateur._optimizer import clear_state_, local_part, sharded_like
from secateur._pattern import SparsityPattern
from secateur._types import Mask, Weight
from secateur.nn import SparseConv2d, SparseLinear


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
        self._hook = None if hasattr(parameter, "device_mesh") else parameter.register_hook(self._without_pruned)

    def _without_pruned(self, gradient: Tensor) -> Tensor | None:
        if self._pruned is None or self.dense_gradient:
            return None
        return gradient.masked_fill(self._pruned, 0)

    def matrix(self) -> Weight:
        """The weight as ``[out, in]``, detached and whole."""
        return self.layer.matrix()

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
        return self.layer.kind.to_matrix(self.layer.modules[0], full_tensor(gradient.detach()))

    def set_mask(self, mask: Mask, optimizer: torch.optim.Optimizer) -> None:
        """Prune by ``mask`` from now on; weights that it brings back start at zero with a fresh optimizer state."""
        lasting = mask if self.mask is None else mask & self.mask
        self._use(mask)
        self.zero_()
        clear_state_(optimizer, self.layer.parameter, self._in_shape(lasting))

    def _use(self, mask: Mask | None) -> None:
        self.mask = mask
        self._pruned = None if mask is None else ~sharded_like(self._in_shape(mask), self.layer.parameter)

    def _in_shape(self, mask: Mask) -> Tensor:
        return self.layer.kind.from_matrix(self.layer.modules[0], mask)

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
        return {"mask": self.mask}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._use(state["mask"])


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
            "mask": module.mask,
            "threshold": module.threshold.clone(),
            "temperature": float(module.temperature),
            "straight_through": module.straight_through,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        for module in self.modules:
            module.mask = state["mask"]
            module.straight_through = state["straight_through"]
            module.temperature = state["temperature"]
            module.threshold.copy_(state["threshold"])
