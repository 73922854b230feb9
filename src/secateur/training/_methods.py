"""The training methods: one frozen dataclass each, with the settings of its paper as fields, and the table of names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, TypeAlias, get_args

import torch

from secateur._checks import fraction, instance, number, one_of, pair
from secateur._errors import RecipeError
from secateur._types import Mask
from secateur.patterns import at_partial_sparsity
from secateur.training._exchange import exchange
from secateur.training._method import Method, Progress
from secateur.training._weights import LearnedWeight, MaskedWeight

Initial: TypeAlias = Literal["magnitude", "random"]  # which mask to begin with


@dataclass(frozen=True)
class Gate(Method):
    """Learn which weights to keep: an annealed soft mask on an exact budget, then training on the frozen mask.

    Each weight is multiplied by ``sigmoid((|w| / threshold - 1) * temperature)``, with the threshold solved after each
    step so that the budget is met exactly, see :class:`SparseLinear`. The sparsity ramps up early, the temperature
    rises geometrically, and at ``freeze`` the mask becomes exact, hard and final. Any pattern; choose it first.

    Args:
        temperature: sharpness at the start and when the mask freezes.
        ramp: parts of the training at which the sparsity begins to rise and reaches its final value.
        freeze: part of the training after which the mask is frozen.

    Raises:
        RecipeError: parts out of order or outside [0, 1], or temperatures that are not positive and rising.

    Example:
        >>> from secateur.training import Gate
        >>> Gate().schedule(0.9, steps=1000)
        Cubic(final=0.9, begin=50, end=330, initial=0.0)
    """

    name: ClassVar[str] = "gate"
    learns: ClassVar[bool] = True
    temperature: tuple[float, float] = (4.0, 60.0)
    ramp: tuple[float, float] = (0.05, 0.33)
    freeze: float = 0.8

    def __post_init__(self) -> None:
        low, high = pair("temperature", self.temperature)
        if not 0 < low <= high < math.inf:
            raise RecipeError(f"temperature must rise from one positive number to another, got {low:g} and {high:g}.")
        begin, end = pair("ramp", self.ramp)
        freeze = number("freeze", self.freeze)
        if not 0 <= begin <= end <= freeze <= 1:
            raise RecipeError(
                f"ramp and freeze are parts of the training, in order; got {begin:g}, {end:g} and {freeze:g}."
            )
        object.__setattr__(self, "temperature", (low, high))
        object.__setattr__(self, "ramp", (begin, end))

    def update(self, weight: LearnedWeight, progress: Progress) -> None:
        """Solve the threshold and sharpen the mask, or freeze it."""
        if weight.mask is not None:
            return
        freeze = self.last_step(progress.steps)
        if progress.step < freeze:
            low, high = self.temperature
            weight.set_threshold(progress.sparsity, low * (high / low) ** (progress.step / freeze))
            return
        weight.set_mask(weight.pattern.mask(weight.magnitudes(), weight.sparsity), progress.optimizer)


@dataclass(frozen=True)
class SRSTE(Method):
    """Sparse-refined straight-through estimator: prune hard in every forward pass, let pruned weights learn and shrink.

    The forward pass uses the mask of the largest magnitudes, found anew after each step; every weight, kept or not,
    receives the gradient of its place in the masked weight, and the pruned ones shrink a little. Made for N:M.

    Args:
        decay: part by which pruned weights shrink at each step, in [0, 1].
        freeze: part of the training after which the mask is frozen; 1 never freezes it.

    Raises:
        RecipeError: a setting outside [0, 1].

    Reference:
        Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021,
        arXiv:2102.04010. Differs from the paper: the decay acts on the weights after the step and not through the
        gradient, where adaptive optimizers and loss scaling would change its strength; 2e-4 a step equals the paper's
        settings (2e-4 in the gradient, learning rate 0.1, momentum 0.9).
    """

    name: ClassVar[str] = "sr-ste"
    learns: ClassVar[bool] = True
    decay: float = 2e-4
    freeze: float = 1.0

    def __post_init__(self) -> None:
        fraction("decay", self.decay)
        fraction("freeze", self.freeze)

    def update(self, weight: LearnedWeight, progress: Progress) -> None:
        """Shrink the pruned weights and find the mask anew."""
        if weight.is_final:
            return
        if weight.mask is not None and self.decay:
            weight.shrink_pruned_(self.decay)
        pattern, sparsity = at_partial_sparsity(weight.pattern, progress.sparsity)
        mask = pattern.mask(weight.magnitudes(), sparsity)
        if self.freeze < 1 and progress.step >= self.last_step(progress.steps):
            weight.set_mask(mask, progress.optimizer)
        else:
            weight.use_mask(mask)


@dataclass(frozen=True)
class GradualMagnitude(Method):
    """Gradual magnitude pruning: every few steps the smallest weights are pruned for good, more at first than later.

    Args:
        ramp: parts of the training at which the sparsity begins to rise and reaches its final value.

    Raises:
        RecipeError: parts out of order or outside [0, 1].

    Reference:
        Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
        arXiv:1710.01878.
    """

    name: ClassVar[str] = "magnitude"
    ramp: tuple[float, float] = (0.05, 0.5)

    def __post_init__(self) -> None:
        begin, end = pair("ramp", self.ramp)
        if not 0 <= begin <= end <= 1:
            raise RecipeError(f"ramp holds two parts of the training, in order; got {begin:g} and {end:g}.")
        object.__setattr__(self, "ramp", (begin, end))

    def update(self, weight: MaskedWeight, progress: Progress) -> None:
        """Prune more when an update is due."""
        if not progress.due:
            return
        pattern, sparsity = at_partial_sparsity(weight.pattern, progress.sparsity)
        scores = weight.magnitudes()
        if weight.num_pruned != pattern.num_pruned(scores.shape, sparsity):
            weight.set_mask(pattern.mask(scores, sparsity), progress.optimizer)


@dataclass(frozen=True)
class Static(Method):
    """One mask for the whole training: prune and fine-tune.

    Args:
        initial: ``"magnitude"`` keeps the largest weights, which keeps the zeros that the model has already;
            ``"random"`` is for models that have learned nothing yet.

    Raises:
        RecipeError: an unknown initial mask.
    """

    name: ClassVar[str] = "static"
    ramps: ClassVar[bool] = False
    initial: Initial = "magnitude"

    def __post_init__(self) -> None:
        one_of("initial mask", self.initial, get_args(Initial))

    def update(self, weight: MaskedWeight, progress: Progress) -> None:
        """Make the mask at step 0 and keep to it."""
        if weight.mask is None:
            weight.set_mask(_initial_mask(weight, progress, self.initial), progress.optimizer)


@dataclass(frozen=True)
class SET(Method):
    """Sparse evolutionary training: every few steps the smallest weights are pruned and as many random ones come back.

    Args:
        fraction: part of the kept units that is exchanged at each update.
        until: part of the training after which the mask no longer changes.
        initial: the first mask, as for :class:`Static`.

    Raises:
        RecipeError: a part outside [0, 1] or an unknown initial mask.

    Reference:
        Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
        network science", 2018, arXiv:1707.04780. Differs from the paper: the smallest magnitudes go, whatever their
        sign; exchanges stop at ``until``, as in RigL.
    """

    name: ClassVar[str] = "set"
    ramps: ClassVar[bool] = False
    fraction: float = 0.3
    until: float = 0.75
    initial: Initial = "magnitude"

    def __post_init__(self) -> None:
        fraction("fraction", self.fraction)
        fraction("until", self.until)
        one_of("initial mask", self.initial, get_args(Initial))

    def update(self, weight: MaskedWeight, progress: Progress) -> None:
        """Exchange weights when an update is due."""
        if weight.mask is None:
            weight.set_mask(_initial_mask(weight, progress, self.initial), progress.optimizer)
        elif progress.step % progress.update_every == 0 and 0 < progress.step < self.until * progress.steps:
            growth = torch.rand(weight.mask.shape, generator=progress.generator).to(weight.mask.device)
            mask = exchange(weight.pattern, weight.mask, weight.matrix(), growth, self.fraction, regrow_dropped=False)
            weight.set_mask(mask, progress.optimizer)


@dataclass(frozen=True)
class RigL(Method):
    """Rigged lottery: every few steps the smallest weights are pruned and those with the largest gradients come back.

    The part of the kept units that is exchanged falls from ``fraction`` to zero along half a cosine. Only in the steps
    before an update do pruned weights have gradients, which clipping by norm sees as well. New weights start at zero.

    Args:
        fraction: part of the kept units that is exchanged at first.
        until: part of the training after which the mask no longer changes.
        initial: the first mask, as for :class:`Static`.

    Raises:
        RecipeError: a part outside [0, 1] or an unknown initial mask.

    Reference:
        Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, arXiv:1911.11134.
    """

    name: ClassVar[str] = "rigl"
    ramps: ClassVar[bool] = False
    reads_gradients: ClassVar[bool] = True
    fraction: float = 0.3
    until: float = 0.75
    initial: Initial = "magnitude"

    def __post_init__(self) -> None:
        fraction("fraction", self.fraction)
        fraction("until", self.until)
        one_of("initial mask", self.initial, get_args(Initial))

    def update(self, weight: MaskedWeight, progress: Progress) -> None:
        """Exchange weights when an update is due."""
        if weight.mask is None:
            weight.set_mask(_initial_mask(weight, progress, self.initial), progress.optimizer)
            return
        if not self.wants_gradient(progress.step, progress.steps, progress.update_every):
            return
        gradient = weight.gradient()
        if (
            gradient is None
        ):  # the loss did not depend on the layer; SparseTraining.step has checked that it does on some
            return
        if not gradient.isfinite().all() and weight.matrix().isfinite().all():
            return  # loss scaling skipped this step; the exchange waits for the next update
        fraction = self.fraction / 2 * (1 + math.cos(math.pi * progress.step / (self.until * progress.steps)))
        mask = exchange(weight.pattern, weight.mask, weight.matrix(), gradient.abs(), fraction, regrow_dropped=True)
        weight.set_mask(mask, progress.optimizer)


METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {kind.name: kind for kind in (Gate, GradualMagnitude, SRSTE, SET, RigL, Static)}
)


def parse_method(text: str) -> Method:
    """Return the method of that name, with its default settings.

    Raises:
        RecipeError: no such method.
    """
    return METHODS[one_of("training method", text.strip().lower(), METHODS)]()


def as_method(method: Method | str) -> Method:
    """Return the method itself, or the one of that name.

    Raises:
        RecipeError: no such method.
        TypeError: neither a method nor its name.
    """
    if isinstance(method, str):
        return parse_method(method)
    return instance("method", method, Method, "a Method or its name")  # type: ignore[type-abstract]


def _initial_mask(weight: MaskedWeight, progress: Progress, initial: Initial) -> Mask:
    scores = weight.magnitudes()
    if initial == "random":
        scores = torch.rand(scores.shape, generator=progress.generator).to(scores.device)
    return weight.pattern.mask(scores, weight.sparsity)
