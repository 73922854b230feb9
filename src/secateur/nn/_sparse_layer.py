"""What layers that learn their mask share: the effective weight, its threshold, its budget, and pruning for good."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from secateur._checks import instance, number
from secateur._errors import PatternError, RecipeError
from secateur._types import Mask, Weight
from secateur.kernels import is_intercepted
from secateur.layers import (
    clear_state_,
    full_tensor,
    is_sharded,
    local_part,
    own_behaviour,
    sharded_like,
    write_whole_,
)
from secateur.nn._gate import gated, hard_mask, solve_threshold
from secateur.nn._mask_settings import MaskSettings, check_temperature
from secateur.nn._sparse_state import FROZEN, SOFT, STRAIGHT_THROUGH, Masked, as_now, marks, without_parameters
from secateur.patterns import Units, Unstructured, check_independent, check_sparsity, with_channel_width

_ELEMENTWISE = Unstructured("row")


class SparseLayer(nn.Module, ABC):
    """A layer that learns which of its weights to keep: all but the shape of the weight and the product with it.

    The keys, shapes and dtypes of its state are the same at every step, so that copies of averaged weights and
    checkpoints of any step fit. ``kept`` has ones where a hard mask keeps a weight, and zeros while the mask is soft;
    ``stage`` says whether there is a hard mask, and whether pruned weights learn behind it. Both are floating point,
    because averages of integers are rounded, and PyTorch cannot average bools: where any of the averaged masks keeps a
    weight, the average is above zero.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    threshold: Tensor
    temperature: Tensor
    kept: Tensor
    stage: Tensor

    def _set_up(self, weight: Tensor, bias: Tensor | None, settings: MaskSettings) -> None:
        """Take over the parameters, and make the threshold, the temperature and the place of the mask.

        Raises:
            TypeError: a parameter that is computed from others.
            RecipeError: the dense layer computes, or holds, something else than this layer would.
        """
        if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter | None):
            raise TypeError(
                "weight and bias must be parameters of their own; here torch computes them from others, by a "
                "parametrization or torch.nn.utils.prune. Remove that first."
            )
        if self._own_behaviour is not None:
            raise RecipeError(f"{self._own_behaviour}.\nExclude the layer, or use a method that keeps plain layers.")
        self.weight, self.bias = weight, bias
        pattern = settings.pattern
        if pattern is not None:
            pattern = with_channel_width(pattern, self.channel_width)
            pattern.validate(self._matrix().shape)
            check_independent(pattern, "a gate")
        self.pattern, self.target, self.structured = pattern, settings.sparsity, settings.structured
        self.hard = settings.hard
        real = torch.promote_types(weight.dtype, torch.float32)
        temperature = torch.tensor(settings.initial_temperature, dtype=real, device=weight.device)
        self.register_buffer("temperature", temperature)
        # Two bytes a weight. It never needs more: it holds ones, zeros and their averages.
        self.register_buffer("kept", torch.zeros(weight.shape, dtype=torch.bfloat16, device=weight.device))
        self.register_buffer("stage", torch.zeros((), dtype=real, device=weight.device))
        self._take_note(SOFT)
        if self.target is None:
            shape = weight.shape if not self.structured else self._matrix().shape[:1]
            self.threshold = nn.Parameter(torch.full(shape, settings.threshold).to(weight))
        else:
            self.register_buffer("threshold", self._solved(self.target))

    def __setattr__(self, name: str, value: Any) -> None:
        if (
            name == "temperature"
            and "temperature" in self.__dict__.get("_buffers", {})
            and not isinstance(value, Tensor)
        ):
            # In place: a compiled graph reads this very tensor.
            self._buffers["temperature"].fill_(check_temperature(value))  # type: ignore[union-attr]
            return
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """While another module that reads the weight runs, the weight that it reads is the effective one."""
        if name == "weight" and self.__dict__.get("_readers"):
            return self._effective()
        return super().__getattr__(name)

    @property
    def _own_weight(self) -> nn.Parameter:
        """The parameter, also while the weight that others read is another one."""
        return self._parameters["weight"]  # type: ignore[return-value]

    def count_readers(self, change: int) -> None:
        """Say that modules begin or end to run that read ``weight`` instead of calling this layer.

        Meanwhile ``weight`` is the effective weight, with its gradient, so that the mask acts there, too.

        Args:
            change: 1 for a module that begins, -1 for one that ends.
        """
        self._readers = self.__dict__.get("_readers", 0) + change

    @staticmethod
    @abstractmethod
    def to_matrix(tensor: Tensor) -> Weight:
        """Return a tensor of the weight's shape as a matrix ``[out, in]``: a view."""

    @abstractmethod
    def from_matrix(self, matrix: Weight) -> Tensor:
        """Return a matrix ``[out, in]`` in the weight's shape: a view."""

    @property
    def channel_width(self) -> int:
        """How many adjacent columns of the matrix read one input channel: the kernel positions of a convolution."""
        return math.prod(self._own_weight.shape[2:])

    @property
    def mask(self) -> Mask | None:
        """The hard mask in use, bool in the weight's shape, True = kept; None while the mask is soft."""
        self._look()
        return self._mask

    @property
    def straight_through(self) -> bool:
        """Whether pruned weights learn behind a hard mask."""
        self._look()
        return self._stage == STRAIGHT_THROUGH

    def _take_note(self, stage: int) -> None:
        """Remember what the buffers say now, so that the next forward pass need not read them."""
        self._stage = stage
        self._mask = self.kept > 0 if stage != SOFT else None
        self._seen = marks(self.stage, self.kept)

    def _look(self) -> bool:
        """Follow what others wrote into the buffers, as those do who average weights or load a state.

        Returns:
            Whether what is remembered is what the buffers say. It may not be while operations are traced or mapped.
        """
        if torch.compiler.is_compiling():
            return False
        stage, kept = self._buffers["stage"], self._buffers["kept"]
        if marks(stage, kept) == self._seen:  # type: ignore[arg-type]
            return True
        if self.stage.is_meta or is_intercepted():
            return False
        self._read()
        return True

    @torch.no_grad()
    def _read(self) -> None:
        value = float(self.stage)
        self._take_note(SOFT if not value > 0 else FROZEN if value == FROZEN else STRAIGHT_THROUGH)
        if self._stage == SOFT and self.pattern is not None and self.threshold.isnan().any():
            # The average of an infinite threshold, of a budget that keeps everything, with another one.
            self.threshold.nan_to_num_(-math.inf, math.inf, -math.inf)

    def _mask_in_use(self) -> Mask | None:
        """The same as :attr:`mask`; while operations are traced or mapped, as an operation on the buffers."""
        known = self._look()
        if self._stage == SOFT:
            return None
        return self._mask if known else self.kept > 0

    @abstractmethod
    def _to_plain(self) -> nn.Module:
        """Return the layer of PyTorch with the effective weight, which takes over the parameters."""

    def _effective(self) -> Tensor:
        """The weight that the forward pass uses, in the parameter's shape."""
        mask = self._mask_in_use()
        if mask is None and not self._own_weight.numel():
            mask = torch.ones_like(self._own_weight, dtype=torch.bool)  # a unit without elements has no score
        if mask is not None:
            grows_back = self._stage == STRAIGHT_THROUGH
            return Masked.apply(self._own_weight, mask, self.threshold, grows_back)  # type: ignore[no-any-return,no-untyped-call]
        matrix = gated(
            self._matrix(),
            self._threshold_by_competition(),
            self.temperature,
            self._units(),
            solved=self.pattern is not None,
            hard=self.hard,
        )
        return self.from_matrix(matrix)

    def _matrix(self) -> Weight:
        return self.to_matrix(self._own_weight).contiguous()

    def _units(self) -> Units:
        """What is kept or pruned together. A learned threshold judges each weight for itself, in its row."""
        rows, columns = self.to_matrix(self._own_weight).shape
        return (self.pattern or _ELEMENTWISE).units((rows, columns))

    def _threshold_by_competition(self) -> Tensor:
        if self.pattern is not None:
            return self.threshold
        return self.threshold.unsqueeze(1) if self.threshold.ndim == 1 else self.to_matrix(self.threshold).contiguous()

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
        mask = self.mask
        return mask.clone() if mask is not None else self._mask_by_threshold()

    def _mask_by_threshold(self) -> Mask:
        if not self._own_weight.numel():
            return torch.ones(self._own_weight.shape, dtype=torch.bool, device=self._own_weight.device)
        threshold = full_tensor(self._threshold_by_competition())
        return self.from_matrix(hard_mask(self._whole_matrix(), threshold, self._units()))

    def _whole_matrix(self) -> Weight:
        """The weight as forward compares it: at least float32, and whole if it is sharded over processes."""
        matrix = self.to_matrix(full_tensor(self._own_weight.detach())).contiguous()
        return matrix.to(torch.promote_types(matrix.dtype, torch.float32))

    @torch.no_grad()
    def effective_weight(self) -> Weight:
        """Return ``weight * hard mask``, a new tensor; nothing changes."""
        return full_tensor(self._own_weight).masked_fill(~self.hard_mask(), 0)

    def num_active(self) -> int:
        """Return how many weights the hard rule keeps."""
        return int(self.hard_mask().count_nonzero())

    def density(self) -> float:
        """Return the fraction of weights that the hard rule keeps; 1 for a layer without weights."""
        return self.num_active() / self._own_weight.numel() if self._own_weight.numel() else 1.0

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
            RecipeError: the value is NaN.
        """
        self.threshold.fill_(number("threshold", value))

    @torch.no_grad()
    def solve_threshold(self, sparsity: float | None = None) -> None:
        """Under a pattern, move the threshold to where the hard rule prunes exactly ``sparsity``.

        Call it after every optimizer step to meet the budget while the weights change. The threshold lies halfway
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
        if optimizer is not None:
            instance("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
        if self.pattern is None:
            mask = self._mask_by_threshold()
            if self.mask is not None:  # a later hard_prune prunes more, never less
                mask &= self.mask
        elif self.mask is None:
            mask = self.from_matrix(self.pattern.mask(self._whole_matrix().abs(), self.target))
        else:
            mask = self.mask
        self.freeze(mask)
        if optimizer is not None:
            clear_state_(optimizer, self._own_weight, mask)
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
        self.use_mask(mask, straight_through=straight_through)
        if not straight_through:
            pruned = ~sharded_like(mask.to(self._own_weight.device), self._own_weight)
            for stored in (self._own_weight, self._own_weight.grad):
                if stored is not None:
                    local_part(stored).masked_fill_(pruned, 0)
            self.threshold.fill_(0)

    @torch.no_grad()
    def use_mask(self, mask: Mask | None, *, straight_through: bool = False) -> None:
        """Use this mask from now on, or a soft one again, and change nothing else: as a saved state had it.

        Args:
            mask: bool, in the weight's shape, True = kept, or None. It is copied.
            straight_through: as for :meth:`freeze`.

        Raises:
            PatternError: the mask's shape is not the weight's.
            TypeError: the mask is not a bool tensor.
        """
        if mask is None:
            self.kept.zero_()
            self._enter(SOFT)
            return
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"a mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != self._own_weight.shape:
            raise PatternError(
                f"a mask for this layer has shape {tuple(self._own_weight.shape)}, got {tuple(mask.shape)}."
            )
        self.kept.copy_(mask)
        self._enter(STRAIGHT_THROUGH if straight_through else FROZEN)

    def _enter(self, stage: int) -> None:
        self.stage.fill_(stage)
        self._take_note(stage)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts the layer. A solved threshold and the temperature never become narrower than float32.

        Rounded to the precision of the weights, a threshold halfway between two of them would fall on one. The mask
        keeps its dtype.
        """
        self._look()
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in before.items():
            cast = self._buffers[name]
            assert cast is not None
            wide = exact.dtype if name == "kept" else torch.promote_types(cast.dtype, torch.float32)
            if cast.dtype != wide:
                self._buffers[name] = exact.to(cast.device, wide)
        self._take_note(self._stage)  # what the buffers hold after to_empty means nothing
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A checkpoint has zeros where the mask prunes, whatever numbers an optimizer left there."""
        mask = self.mask
        if mask is not None and not self.straight_through and not is_sharded(self._own_weight):
            # .data, so that a backward pass that is still to come does not take this for a change of its inputs.
            self._own_weight.data.masked_fill_(~mask, 0)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint with a mask makes the layer a pruned one, a checkpoint without makes it one that learns."""
        state = as_now(state_dict, prefix, self._own_weight.shape, self._stage)
        super()._load_from_state_dict(state, prefix, *args)
        self._seen = ()
        self._look()

    def _describe(self) -> str:
        learned = "" if self.pattern is None else f", pattern={str(self.pattern)!r}"
        # Printing must not wait for other processes, which may not print.
        unknown = self._own_weight.is_meta or (is_sharded(self._own_weight) and self.mask is None)
        density = "?" if unknown else f"{self.density():.4f}"
        return f"bias={self.bias is not None}, structured={self.is_structured}{learned}, density={density}"

    @torch.no_grad()
    def _bake_(self) -> None:
        """Write the effective weight into the parameter, so that a plain layer can take it over.

        Under a pattern the budget counts, so what is not frozen yet is pruned exactly.
        """
        if self.mask is None and self.pattern is not None:
            self.hard_prune()
        write_whole_(self._own_weight, self.effective_weight())

    def _keep_shell(self, dense: nn.Module) -> None:
        """Keep all of the dense layer but its parameters, to make it again: it may be of a subclass."""
        self._own_behaviour = own_behaviour(dense)  # which can only be tried with the parameters
        self._shell = (without_parameters(dense),)  # in a tuple, so that it is no child of this module

    def _plain(self) -> nn.Module:
        """The dense layer with the effective weight. It takes over the parameters."""
        self._bake_()
        plain = without_parameters(self._shell[0])
        plain._parameters.update(weight=self._own_weight, bias=self.bias)
        return plain.train(self.training)

    def _must_be_whole(self, method: str) -> None:
        if is_sharded(self._own_weight):
            raise RecipeError(
                f"{method} cannot take over a weight that is sharded over processes (a DTensor): FSDP looks for it in "
                "this layer.\nCall it on a model that is not sharded, after loading the gathered state_dict there."
            )
