"""Layers that learn which of their weights to keep."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name that PyTorch's own documentation uses

from secateur._errors import PatternError, RecipeError
from secateur._types import Mask, Weight
from secateur.layers import clear_state_, full_tensor, is_sharded, local_part, sharded_like, write_whole_
from secateur.nn._gate import gated, gated_linear, hard_mask, solve_threshold
from secateur.patterns import SparsityPattern, Units, Unstructured, check_sparsity, with_channel_width

TEMPERATURE = 10.0
THRESHOLD = 0.01
# A solved threshold makes the mask independent of the weights' scale, and sharpness a pure number.
RELATIVE_TEMPERATURE = 4.0

_ELEMENTWISE = Unstructured("row")


class _Masked(torch.autograd.Function):
    """The weight where the mask keeps it, zero elsewhere; even if what is stored there, or its gradient, is not finite.

    The threshold takes no part and gets no gradient. It is an input because DistributedDataParallel waits until the
    backward pass has come by each of its parameters.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Mask, threshold: Tensor, straight_through: bool) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, mask, _, ctx.straight_through = inputs
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (mask,) = ctx.saved_tensors
        return grad if ctx.straight_through else torch.where(mask, grad, 0), None, None, None


class _SparseLayer(nn.Module, ABC):
    """What the linear layer and the convolution share: everything but the shape of the weight and the product."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    threshold: Tensor
    temperature: Tensor
    mask: Tensor | None

    def _set_up(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        structured: bool,
        pattern: SparsityPattern | str | None,
        sparsity: float | None,
        temperature: float | None,
        threshold: float,
        hard: bool,
    ) -> None:
        if isinstance(pattern, str):
            pattern = SparsityPattern.parse(pattern)
        if not isinstance(pattern, SparsityPattern | None):
            raise TypeError(f"pattern must be a SparsityPattern or its text, got {type(pattern).__name__}")
        if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter | None):
            raise TypeError(
                "weight and bias must be parameters of their own; here torch computes them from others, by a "
                "parametrization or torch.nn.utils.prune. Remove that first."
            )
        if sparsity is not None:
            check_sparsity(sparsity)
        if pattern is None and sparsity is not None:
            raise PatternError(
                f"sparsity={sparsity:g} needs a pattern to be met under, such as pattern='unstructured'.\n"
                "Without a pattern the threshold is learned and the sparsity is whatever comes of it."
            )
        if pattern is not None and not structured:
            raise PatternError(
                f"one threshold for each weight is for learning without a pattern; {pattern} solves its own."
            )
        self.weight, self.bias = weight, bias
        if pattern is not None:
            pattern = with_channel_width(pattern, math.prod(weight.shape[2:]))
            pattern.validate(self._matrix().shape)
            sparsity = pattern.resolve(sparsity)
        self.pattern, self.target, self.structured = pattern, sparsity, structured
        self.hard = hard
        self.straight_through = False
        if temperature is None:
            temperature = TEMPERATURE if pattern is None else RELATIVE_TEMPERATURE
        real = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("temperature", torch.tensor(0.0, dtype=real, device=weight.device))
        self.temperature = temperature  # type: ignore[assignment]
        self.register_buffer("mask", None)
        if pattern is None:
            shape = weight.shape if not structured else weight.shape[:1]
            self.threshold = nn.Parameter(torch.full(shape, _number("threshold", threshold)).to(weight))
        else:
            assert sparsity is not None
            self.register_buffer("threshold", self._solved(sparsity))

    def __setattr__(self, name: str, value: Any) -> None:
        if (
            name == "temperature"
            and "temperature" in self.__dict__.get("_buffers", {})
            and not isinstance(value, Tensor)
        ):
            value = _number(name, value)
            if not 0 < value < math.inf:
                raise PatternError(f"temperature must be positive and finite, got {value:g}.")
            self._buffers["temperature"].fill_(value)  # type: ignore[union-attr]  # in place: a compiled graph reads it
            return
        super().__setattr__(name, value)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return the product of ``x`` with the effective weight, plus the bias."""

    def _effective(self) -> Tensor:
        """The weight that the forward pass uses, in the parameter's shape."""
        mask = self.mask
        if mask is None and not self.weight.numel():
            mask = torch.ones_like(self.weight, dtype=torch.bool)  # a unit without elements has no score
        if mask is not None:
            return _Masked.apply(self.weight, mask, self.threshold, self.straight_through)  # type: ignore[no-any-return,no-untyped-call]
        matrix = gated(
            self._matrix(),
            self._threshold_by_competition(),
            self.temperature,
            self._units(),
            solved=self.pattern is not None,
            hard=self.hard,
        )
        return matrix.view(self.weight.shape)

    def _matrix(self) -> Weight:
        return self.weight.flatten(1) if self.weight.ndim > 2 else self.weight

    def _units(self) -> Units:
        """What is kept or pruned together. A learned threshold judges each weight for itself, in its row."""
        return (self.pattern or _ELEMENTWISE).units((self.weight.shape[0], math.prod(self.weight.shape[1:])))

    def _threshold_by_competition(self) -> Tensor:
        if self.pattern is not None:
            return self.threshold
        return self.threshold.unsqueeze(1) if self.threshold.ndim == 1 else self.threshold.flatten(1)

    @property
    def is_structured(self) -> bool:
        """Whether learned thresholds are one for each output; under a pattern, whether whole groups are pruned."""
        return self.structured if self.pattern is None else not isinstance(self.pattern, Unstructured)

    @torch.no_grad()
    def hard_mask(self) -> Mask:
        """Return the mask of the hard rule, in the weight's shape: kept where ``|weight| >= threshold``.

        After :meth:`hard_prune` it is the frozen mask. Under a pattern the score of a whole unit is compared. Before,
        with weights sharded over processes (FSDP), every process has to call it, and what is built on it.
        """
        return self.mask.clone() if self.mask is not None else self._mask_by_threshold()

    def _mask_by_threshold(self) -> Mask:
        if not self.weight.numel():
            return torch.ones(self.weight.shape, dtype=torch.bool, device=self.weight.device)
        threshold = full_tensor(self._threshold_by_competition())
        return hard_mask(self._whole_matrix(), threshold, self._units()).view(self.weight.shape)

    def _whole_matrix(self) -> Weight:
        """The weight as forward compares it: at least float32, and whole if it is sharded over processes."""
        matrix = full_tensor(self.weight.detach()).flatten(1)
        return matrix.to(torch.promote_types(matrix.dtype, torch.float32))

    @torch.no_grad()
    def effective_weight(self) -> Weight:
        """Return ``weight * hard mask``, a new tensor; nothing changes."""
        return full_tensor(self.weight).masked_fill(~self.hard_mask(), 0)

    def num_active(self) -> int:
        """Return how many weights the hard rule keeps."""
        return int(self.hard_mask().count_nonzero())

    def density(self) -> float:
        """Return the fraction of weights that the hard rule keeps; 1 for a layer without weights."""
        return self.num_active() / self.weight.numel() if self.weight.numel() else 1.0

    def sparsity(self) -> float:
        """Return ``1 - density()``."""
        return 1 - self.density()

    def num_parameters(self) -> int:
        """Return how many numbers the optimizer may change: weights, biases and learned thresholds."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def reset_threshold(self, value: float) -> None:
        """Set every threshold to ``value``.

        Under a pattern the next :meth:`solve_threshold` replaces it. After :meth:`hard_prune` it changes nothing that
        is computed until, without a pattern, a further ``hard_prune`` prunes more.

        Raises:
            TypeError: the value is not a number.
            PatternError: the value is NaN.
        """
        self.threshold.fill_(_number("threshold", value))

    @torch.no_grad()
    def solve_threshold(self, sparsity: float | None = None) -> None:
        """Under a pattern, move the threshold to where the hard rule prunes exactly ``sparsity``.

        Called after every optimizer step, it holds the budget while the weights move. The threshold lies halfway
        between the highest pruned and the lowest kept score of each competition: one number, or one a row or N:M group.

        Args:
            sparsity: fraction of units to prune, by default the layer's own; smaller while a schedule ramps up.

        Raises:
            PatternError: the layer has no pattern, or the sparsity is outside [0, 1].
        """
        if self.pattern is None or self.target is None:
            raise PatternError("the threshold is learned, since the layer has no pattern; reset_threshold sets it.")
        if sparsity is None:
            sparsity = self.target
        check_sparsity(sparsity)
        self.threshold.copy_(self._solved(sparsity))

    @torch.no_grad()
    def _solved(self, sparsity: float) -> Tensor:
        assert self.pattern is not None
        wide = self._whole_matrix()
        if wide.is_meta or not wide.numel():
            return wide.new_zeros(self._units().competitions, 1)
        threshold = self._buffers.get("threshold")
        known = threshold is not None and threshold.numel() == 1 and threshold.device.type == "cpu"
        near = float(threshold) if known else None  # type: ignore[arg-type]  # it has not moved far since the last step
        return solve_threshold(wide, self._units(), sparsity, near)

    @torch.no_grad()
    def hard_prune(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Set the pruned weights to zero for good, freeze the mask, and reset the threshold to zero.

        Without a pattern the hard rule decides; under a pattern exactly its budget is pruned, the lowest scores first.

        One departure from the formula, without which pruning would not be for good: from here on the sigmoid no longer
        takes part, and forward is ``x @ effective_weight().T + bias`` in training and evaluation alike. Pruned weights
        then have no gradient. Momentum from before may still move the numbers stored behind the mask, and a learned
        threshold; no result, count, conversion or ``state_dict`` reads those numbers.

        Args:
            optimizer: if given, its momenta of what is pruned, and of the threshold, are set to zero, so that the
                stored numbers stay zero as well.

        Raises:
            TypeError: ``optimizer`` is not an optimizer.
            PatternError: under a pattern, weights that are NaN; nothing has changed.
        """
        if not isinstance(optimizer, torch.optim.Optimizer | None):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if self.pattern is None:
            mask = self._mask_by_threshold()
            if self.mask is not None:  # a later hard_prune prunes more, never less
                mask &= self.mask
        elif self.mask is None:
            mask = self.pattern.mask(self._whole_matrix().abs(), self.target).view(self.weight.shape)
        else:
            mask = self.mask
        self.freeze(mask)
        if optimizer is not None:
            clear_state_(optimizer, self.weight, mask)
            if isinstance(self.threshold, nn.Parameter):
                nothing = torch.zeros(self.threshold.shape, dtype=torch.bool, device=self.threshold.device)
                clear_state_(optimizer, self.threshold, nothing)

    @torch.no_grad()
    def freeze(self, mask: Mask, *, straight_through: bool = False) -> None:
        """Use this mask from now on, as :meth:`hard_prune` does with its own.

        Args:
            mask: bool, in the weight's shape, True = kept. It is copied.
            straight_through: keep the pruned weights and give every weight the gradient of its place in the effective
                weight, so that a pruned one can grow back when the mask is set again.

        Raises:
            PatternError: the mask's shape is not the weight's.
            TypeError: the mask is not a bool tensor.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"a mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != self.weight.shape:
            raise PatternError(f"a mask for this layer has shape {tuple(self.weight.shape)}, got {tuple(mask.shape)}.")
        self.mask = mask.to(self.weight.device, copy=True)
        self.straight_through = straight_through
        if not straight_through:
            pruned = ~sharded_like(self.mask, self.weight)
            for stored in (self.weight, self.weight.grad):
                if stored is not None:
                    local_part(stored).masked_fill_(pruned, 0)
            self.threshold.fill_(0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts the layer. A solved threshold and the temperature never become narrower than float32.

        Rounded to the precision of the weights, a threshold halfway between two of them would fall on one.
        """
        before = {name: buffer for name, buffer in self._buffers.items() if name != "mask" and buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in before.items():
            cast = self._buffers[name]
            assert cast is not None
            wide = torch.promote_types(cast.dtype, torch.float32)
            if cast.dtype != wide:
                self._buffers[name] = exact.to(cast.device, wide)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A checkpoint has zeros where the mask has them, whatever an optimizer left behind it."""
        if self.mask is not None and not self.straight_through and not is_sharded(self.weight):
            # Nothing reads these numbers, so a backward pass under way must not hear of the change: hence .data.
            self.weight.data.masked_fill_(~self.mask, 0)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint with a mask makes the layer a pruned one, a checkpoint without makes it one that learns."""
        mask = state_dict.get(prefix + "mask")
        if mask is not None and mask.shape == self.weight.shape:
            self.mask = torch.ones(self.weight.shape, dtype=torch.bool, device=self.weight.device)
        elif prefix + "weight" in state_dict:
            self.mask = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _describe(self) -> str:
        learned = "" if self.pattern is None else f", pattern={str(self.pattern)!r}"
        # Printing must not wait for other processes, which may not print.
        unknown = self.weight.is_meta or (self.mask is None and is_sharded(self.weight))
        density = "?" if unknown else f"{self.density():.4f}"
        return f"bias={self.bias is not None}, structured={self.is_structured}{learned}, density={density}"

    @torch.no_grad()
    def _bake_(self) -> None:
        """Write the effective weight into the parameter, so that a plain layer can take it over.

        Under a pattern the budget counts, so what is not frozen yet is pruned exactly.
        """
        if self.mask is None and self.pattern is not None:
            self.hard_prune()
        write_whole_(self.weight, self.effective_weight())

    def _must_be_whole(self, method: str) -> None:
        if is_sharded(self.weight):
            raise RecipeError(
                f"{method} cannot take over a weight that is sharded over processes (a DTensor): FSDP looks for it in "
                "this layer.\nCall it on a model that is not sharded, after loading the gathered state_dict there."
            )


class SparseLinear(_SparseLayer):
    r"""A linear layer with a differentiable magnitude mask.

    .. math::
        \text{mask} = \sigma((|\text{weight}| - \text{threshold}) \cdot \text{temperature}), \quad
        y = x (\text{weight} \odot \text{mask})^T + \text{bias}

    Without a pattern the threshold is learned by gradient descent, one for each output neuron, or one for each weight
    with :meth:`unstructured`; the sparsity is what comes of it. With a pattern and a sparsity the threshold is solved,
    so that the mask sits on the budget exactly: the score of a unit is the root mean square of its weights, the
    threshold lies between the last score that goes and the first that stays, and the temperature is in units of
    1 / threshold.
    ``secateur.SparseTraining`` does the rest: it solves the threshold after every step, anneals the temperature and
    freezes the mask. A training step costs a few element-wise passes over the weight more than ``nn.Linear`` and keeps
    one more tensor of its size, the effective weight.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: learn an additive bias, zero at first.
        structured: one threshold for each output neuron, else one for each weight. Without a pattern only.
        pattern: learn under this pattern, a :class:`SparsityPattern` or its text.
        sparsity: the fraction of units to prune under the pattern; N:M fixes its own.
        temperature: sharpness of the mask; 10 by default, 4 under a pattern. May be assigned at any time.
        threshold: initial value of the learned thresholds.
        hard: use the hard mask forward and the slope of the sigmoid backward (straight-through estimator).
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: ``(out_features, in_features)``, Kaiming-uniform at first.
        bias: ``(out_features,)`` or None.
        threshold: a parameter ``(out_features,)``, or ``(out_features, in_features)`` if not structured; under a
            pattern a buffer ``(competitions, 1)``.
        temperature: a scalar buffer.
        mask: None, or the frozen mask after :meth:`hard_prune`.

    Raises:
        PatternError: a pattern that does not fit, an impossible sparsity, or a temperature that is not positive.
        ValueError: negative sizes.

    Example:
        >>> import torch, secateur
        >>> layer = secateur.SparseLinear(8, 4)
        >>> layer(torch.randn(2, 3, 8)).shape, layer.threshold.shape, layer.num_parameters()
        (torch.Size([2, 3, 4]), torch.Size([4]), 40)
        >>> layer = secateur.SparseLinear(8, 4, pattern="2:4")
        >>> layer.hard_prune()
        >>> layer
        SparseLinear(in_features=8, out_features=4, bias=True, structured=True, pattern='2:4', density=0.5000)

    Reference:
        Learned thresholds: Azarian et al., "Learned Threshold Pruning", 2020, arXiv:2003.00075. Thresholds from the
        budget: Cho et al., "PDP: Parameter-free Differentiable Pruning is All You Need", 2023, arXiv:2305.11203.
        Differs from the papers: magnitudes instead of squares; the backward pass holds the sum of the mask constant.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        structured: bool = True,
        pattern: SparsityPattern | str | None = None,
        sparsity: float | None = None,
        temperature: float | None = None,
        threshold: float = THRESHOLD,
        hard: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = _size("in_features", in_features), _size("out_features", out_features)
        weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        if weight.numel():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as nn.Linear
        zeros = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self._set_up(
            weight,
            zeros,
            structured=structured,
            pattern=pattern,
            sparsity=sparsity,
            temperature=temperature,
            threshold=threshold,
            hard=hard,
        )

    @classmethod
    def unstructured(cls, in_features: int, out_features: int, **keywords: Any) -> Self:
        """Return a layer with one learned threshold for each weight; keywords as for the class."""
        return cls(in_features, out_features, structured=False, **keywords)

    @classmethod
    def with_bias(cls, in_features: int, out_features: int, bias: bool, **keywords: Any) -> Self:
        """Return a layer with or without a bias; keywords as for the class."""
        return cls(in_features, out_features, bias, **keywords)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        structured: bool = True,
        pattern: SparsityPattern | str | None = None,
        sparsity: float | None = None,
        temperature: float | None = None,
        threshold: float = THRESHOLD,
        hard: bool = False,
    ) -> Self:
        """Return a sparse layer that takes over the parameters of ``linear``: the same objects, not copies.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``, or its weight is not a parameter of its own.
            PatternError: as for the class.

        Example:
            >>> import torch, secateur
            >>> linear = torch.nn.Linear(8, 4)
            >>> secateur.SparseLinear.from_linear(linear, pattern="1:4").weight is linear.weight
            True
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"from_linear needs an nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer._set_up(
            linear.weight,
            linear.bias,
            structured=structured,
            pattern=pattern,
            sparsity=sparsity,
            temperature=temperature,
            threshold=threshold,
            hard=hard,
        )
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the effective weight, true zeros in the pruned places.

        It takes over the parameters of this layer, which is of no use afterwards: optimizers keep working. Under a
        pattern exactly the budget is pruned first, as by :meth:`hard_prune`.

        Raises:
            RecipeError: the weight is sharded over processes.
        """
        self._must_be_whole("to_linear")
        self._bake_()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of ``x`` with the effective weight, plus the bias."""
        if self.mask is not None or not self.weight.numel():
            return F.linear(x, self._effective(), self.bias)
        return gated_linear(
            x,
            self.weight,
            self.bias,
            self._threshold_by_competition(),
            self.temperature,
            self._units(),
            solved=self.pattern is not None,
            hard=self.hard,
        )

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the brackets."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe()}"


class SparseConv2d(_SparseLayer):
    """A two-dimensional convolution with the differentiable magnitude mask of :class:`SparseLinear`.

    Its weight ``(out, in / groups, height, width)`` is read as a matrix ``(out, in / groups * height * width)``.
    ``Row()`` prunes output channels and ``Column()`` input channels, all their kernel positions at once.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: as for ``nn.Conv2d``, like ``stride``, ``padding``, ``dilation``, ``groups`` and ``padding_mode``.
        stride: see ``nn.Conv2d``.
        padding: see ``nn.Conv2d``.
        dilation: see ``nn.Conv2d``.
        groups: see ``nn.Conv2d``.
        bias: learn an additive bias, zero at first.
        padding_mode: see ``nn.Conv2d``.
        structured: as for :class:`SparseLinear`, like all that follow.
        pattern: see :class:`SparseLinear`.
        sparsity: see :class:`SparseLinear`.
        temperature: see :class:`SparseLinear`.
        threshold: see :class:`SparseLinear`.
        hard: see :class:`SparseLinear`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        PatternError: a pattern that does not fit, an impossible sparsity, or a temperature that is not positive.
        ValueError: sizes that ``nn.Conv2d`` refuses.

    Example:
        >>> import torch, secateur
        >>> layer = secateur.SparseConv2d(3, 8, 3, padding=1, pattern="row", sparsity=0.5)
        >>> layer.hard_prune()
        >>> layer(torch.randn(1, 3, 5, 5)).shape, layer.sparsity()
        (torch.Size([1, 8, 5, 5]), 0.5)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | Literal["same", "valid"] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        structured: bool = True,
        pattern: SparsityPattern | str | None = None,
        sparsity: float | None = None,
        temperature: float | None = None,
        threshold: float = THRESHOLD,
        hard: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dense = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        if dense.bias is not None:
            nn.init.zeros_(dense.bias)
        self._take_over(dense)
        self._set_up(
            dense.weight,
            dense.bias,
            structured=structured,
            pattern=pattern,
            sparsity=sparsity,
            temperature=temperature,
            threshold=threshold,
            hard=hard,
        )

    def _take_over(self, convolution: nn.Conv2d) -> None:
        """Copy everything but the parameters."""
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self.kernel_size, self.stride, self.padding = convolution.kernel_size, convolution.stride, convolution.padding
        self.dilation, self.groups, self.padding_mode = (
            convolution.dilation,
            convolution.groups,
            convolution.padding_mode,
        )
        self._reversed_padding_repeated_twice = convolution._reversed_padding_repeated_twice

    @classmethod
    def from_conv2d(
        cls,
        convolution: nn.Conv2d,
        *,
        structured: bool = True,
        pattern: SparsityPattern | str | None = None,
        sparsity: float | None = None,
        temperature: float | None = None,
        threshold: float = THRESHOLD,
        hard: bool = False,
    ) -> Self:
        """Return a sparse layer that takes over the parameters of ``convolution``: the same objects, not copies.

        Raises:
            TypeError: ``convolution`` is not an ``nn.Conv2d``, or its weight is not a parameter of its own.
            PatternError: as for the class.
        """
        if not isinstance(convolution, nn.Conv2d):
            raise TypeError(f"from_conv2d needs an nn.Conv2d, got {type(convolution).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_over(convolution)
        layer._set_up(
            convolution.weight,
            convolution.bias,
            structured=structured,
            pattern=pattern,
            sparsity=sparsity,
            temperature=temperature,
            threshold=threshold,
            hard=hard,
        )
        return layer.train(convolution.training)

    def to_conv2d(self) -> nn.Conv2d:
        """Return an ``nn.Conv2d`` with the effective weight, true zeros in the pruned places.

        It takes over the parameters of this layer, which is of no use afterwards: optimizers keep working. Under a
        pattern exactly the budget is pruned first, as by :meth:`hard_prune`.

        Raises:
            RecipeError: the weight is sharded over processes.
        """
        self._must_be_whole("to_conv2d")
        self._bake_()
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device="meta",
        )
        dense.weight, dense.bias = self.weight, self.bias
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x`` with the effective weight, plus the bias."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0  # type: ignore[assignment]
        return F.conv2d(x, self._effective(), self.bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the brackets."""
        shape = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        usual = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        other = [f"{name}={getattr(self, name)!r}, " for name, value in usual.items() if getattr(self, name) != value]
        return f"{shape}, {''.join(other)}{self._describe()}"


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if math.isnan(value):
        raise PatternError(f"{name} must be a number, got NaN.")
    return float(value)


def _size(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 0:
        raise PatternError(f"{name} must not be negative, got {value}.")
    return value
