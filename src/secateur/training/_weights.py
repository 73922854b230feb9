"""A weight that is made sparse during training: a plain parameter held at zero, or that of layers that learn a mask."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur._types import Mask, Scores, Weight
from secateur.layers import Layer, clear_state_, full_tensor, local_part, sharded_like
from secateur.nn import SparseLayer
from secateur.patterns import SparsityPattern


class TrainedWeight(Protocol):
    """What a training and its method need of a weight, whichever holds its mask. Matrices and masks are ``[out, in]``.

    Attributes:
        layer: the parameter and the modules that use it.
        pattern: that its masks follow.
        sparsity: to be reached.
        seconds: spent on its masks.
    """

    layer: Layer
    pattern: SparsityPattern
    sparsity: float
    seconds: float

    @property
    def mask(self) -> Mask | None:
        """The hard mask in use, or None if there is none yet."""

    def matrix(self) -> Weight:
        """Return the weight, detached and whole."""

    def magnitudes(self) -> Scores:
        """Return the absolute weights, at least in float32, as scores of a mask."""

    def gradient(self) -> Weight | None:
        """Return the gradient, whole, or None if there is none."""

    def hard_mask(self) -> Mask:
        """Return the mask in use, or the one that a soft mask would become."""

    def set_mask(self, mask: Mask, optimizer: torch.optim.Optimizer) -> None:
        """Prune by ``mask`` from now on, and clear the optimizer's state of what it prunes."""

    def hold_zeros_(self) -> None:
        """Set the pruned weights to zero, wherever an optimizer may have moved them."""

    def expect_gradient(self, dense: bool) -> None:
        """Say whether pruned weights need their gradients in the next backward pass."""

    def finish(self, mask: Mask, optimizer: torch.optim.Optimizer) -> list[str]:
        """Put the weight at its final mask, and return notes for the report."""

    def release(self) -> None:
        """Remove what was added to the parameter; its values stay."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the model's own state does not hold, or may not."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""

    def belongs_to(self, state: dict[str, Any]) -> bool:
        """Return whether the weight in the model is the one of a state: its zeros or its mask agree with it."""


class MaskedGradient:
    """Keeps the gradient of a parameter at zero where the weights in it are pruned, by one hook on the parameter.

    Args:
        parameter: whose gradient passes the hook, until every weight that was added has been removed.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self._weights: list[MaskedWeight] = []
        self._hook = parameter.register_hook(self._without_pruned)

    def add(self, weight: MaskedWeight) -> None:
        """Mask the gradient of a weight in the parameter, too."""
        self._weights.append(weight)

    def remove(self, weight: MaskedWeight) -> None:
        """Mask the gradient of this weight no longer."""
        self._weights.remove(weight)
        if not self._weights:
            self._hook.remove()

    def _without_pruned(self, gradient: Tensor) -> Tensor | None:
        masked = [weight for weight in self._weights if weight.masks_gradient]
        if not masked:
            return None
        gradient = gradient.clone()
        for weight in masked:
            weight.mask_(gradient)
        return gradient


class MaskedWeight:
    """A plain parameter, or a part of one, that is kept at zero in the pruned places, under any kind of layer.

    Its gradient is zero there too, so that clipping by norm and momenta see the sparse network only. A hook on the
    parameter does that, until :meth:`release` removes it. The gradients of sharded parameters do not pass such a hook;
    their zeros are restored after each step.

    Args:
        layer: that has the weight.
        pattern: that its masks follow.
        sparsity: to be reached.
        gradients: by the id of a parameter, its hook: one for all weights that are parts of it.
    """

    def __init__(
        self, layer: Layer, pattern: SparsityPattern, sparsity: float, gradients: dict[int, MaskedGradient]
    ) -> None:
        self.layer, self.pattern, self.sparsity = layer, pattern, sparsity
        self.mask: Mask | None = None  # [out, in], of the whole weight
        self._dense_gradient = False
        self.seconds = 0.0
        self._pruned: Tensor | None = None  # in the shape of the parameter or part, of this process's part
        self._gradient: MaskedGradient | None = None
        if not layer.is_sharded:
            key = id(layer.parameter)
            self._gradient = gradients[key] = gradients.get(key) or MaskedGradient(layer.parameter)
            self._gradient.add(self)

    @property
    def masks_gradient(self) -> bool:
        """Whether pruned weights must have no gradient now."""
        return self._pruned is not None and not self._dense_gradient

    def mask_(self, tensor: Tensor) -> None:
        """Set what is pruned to zero in a tensor of the parameter's shape, such as the parameter or its gradient."""
        if self._pruned is not None:
            self.layer.part(tensor).masked_fill_(self._pruned, 0)

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
        self.hold_zeros_()
        clear_state_(optimizer, self.layer.parameter, self._in_shape(lasting), self.layer.part)

    def remove_mask(self) -> None:
        """Prune nothing from now on; what was pruned stays at zero until something moves it."""
        self._use(None)

    def _use(self, mask: Mask | None) -> None:
        self.mask = mask
        self._pruned = None if mask is None else ~sharded_like(self._in_shape(mask), self.layer.parameter)

    def _in_shape(self, mask: Mask) -> Tensor:
        return self.layer.from_matrix(mask)

    @torch.no_grad()
    def hold_zeros_(self) -> None:
        """Set the pruned weights to zero, wherever an optimizer may have moved them."""
        self.mask_(local_part(self.layer.parameter))

    def expect_gradient(self, dense: bool) -> None:
        """Let the next gradient pass whole, or mask it."""
        self._dense_gradient = dense

    def finish(self, mask: Mask, optimizer: torch.optim.Optimizer) -> list[str]:
        """Prune by the final mask."""
        self.set_mask(mask, optimizer)
        return []

    def release(self) -> None:
        """Remove the hook; the zeros stay."""
        if self._gradient is not None:
            self._gradient.remove(self)
            self._gradient = None

    def state_dict(self) -> dict[str, Any]:
        """Return what cannot be read off the model."""
        return {"shape": list(self.layer.parameter.shape), "mask": self.mask}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._use(_on(self.layer.parameter, state["mask"]))

    def belongs_to(self, state: dict[str, Any]) -> bool:
        """Return whether the weight is zero wherever the mask of the state prunes."""
        mask = _on(self.layer.parameter, state["mask"])
        return mask is None or not self.matrix().masked_select(~mask).count_nonzero()


class LearnedWeight:
    """The weight of a layer that learns its mask, or of several that share it.

    The mask is soft while its threshold is set, hard after :meth:`use_mask`, and final after :meth:`set_mask`.
    """

    def __init__(self, layer: Layer, modules: tuple[SparseLayer, ...]) -> None:
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
        """The hard mask as ``[out, in]``, or None while it is soft."""
        mask = self.modules[0].mask
        return None if mask is None else mask.flatten(1)

    @property
    def is_final(self) -> bool:
        """Whether the mask is hard and pruned weights can no longer come back."""
        return self.mask is not None and not self.modules[0].straight_through

    def matrix(self) -> Weight:
        """The weight as ``[out, in]``, detached and whole."""
        return full_tensor(self.parameter.detach()).flatten(1)

    def gradient(self) -> Weight | None:
        """The gradient as ``[out, in]``, whole; None if there is none."""
        gradient = self.parameter.grad
        return None if gradient is None else full_tensor(gradient.detach()).flatten(1)

    def magnitudes(self) -> Scores:
        """The absolute weights, ``[out, in]``."""
        return magnitudes(self.matrix())

    def hard_mask(self) -> Mask:
        """The hard mask, ``[out, in]``, or what the soft one would keep."""
        return self.modules[0].hard_mask().flatten(1)

    def set_threshold(self, sparsity: float, temperature: float) -> None:
        """Solve the threshold of the soft mask for a sparsity, and set how sharp the mask is."""
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

    def use_mask(self, mask: Mask) -> None:
        """Use a hard mask in the forward pass; pruned weights keep their values and go on learning."""
        self._freeze(mask, straight_through=True)

    def set_mask(self, mask: Mask, optimizer: torch.optim.Optimizer) -> None:
        """Prune by ``mask`` for good, and clear the optimizer's state of what it prunes."""
        self._freeze(mask)
        clear_state_(optimizer, self.parameter, mask.view(self.parameter.shape))

    def _freeze(self, mask: Mask, *, straight_through: bool = False) -> None:
        for module in self.modules:
            module.freeze(mask.view(self.parameter.shape), straight_through=straight_through)

    def hold_zeros_(self) -> None:
        """Do nothing: the layers never use the numbers that are stored behind their mask."""

    def expect_gradient(self, dense: bool) -> None:
        """Do nothing: the mask of the layers decides which weights get a gradient."""

    def finish(self, mask: Mask, optimizer: torch.optim.Optimizer) -> list[str]:
        """Prune by the final mask. A sharded layer cannot be replaced by a plain one."""
        self._freeze(mask)
        if self.layer.is_sharded:
            return ["sharded: stays a sparse layer; load its full state dict into a plain model"]
        return []

    def release(self) -> None:
        """Do nothing: nothing was added to the parameter."""

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
        mask = _on(self.parameter, state["mask"])
        for module in self.modules:
            module.mask = mask
            module.straight_through = state["straight_through"]
            module.temperature = state["temperature"]
            module.threshold.copy_(state["threshold"])

    def belongs_to(self, state: dict[str, Any]) -> bool:
        """Return whether the layer holds the mask and the threshold of the state."""
        module = self.modules[0]
        mask, threshold = _on(self.parameter, state["mask"]), state["threshold"].to(module.threshold.device)
        same_mask = mask is module.mask if mask is None or module.mask is None else torch.equal(mask, module.mask)
        return same_mask and torch.equal(threshold, module.threshold)


def magnitudes(matrix: Weight) -> Scores:
    """Return the absolute values, at least in float32."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32)).abs()


def _on(parameter: nn.Parameter, mask: Mask | None) -> Mask | None:
    return None if mask is None else mask.to(parameter.device)
