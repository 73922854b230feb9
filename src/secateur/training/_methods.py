"""How masks move during training: one frozen dataclass a method, its fields the settings of the method's paper."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeAlias

import torch

from secateur._errors import PatternError, RecipeError
from secateur._types import Mask, Scores, Weight
from secateur.layers import clear_state_
from secateur.patterns import SparsityPattern, at_partial_sparsity, keep_top, kth_smallest
from secateur.schedules import Cubic, OneShot, Schedule
from secateur.training._targets import LearnedWeight, MaskedWeight, magnitudes

Initial: TypeAlias = Literal["magnitude", "random"]


@dataclass(frozen=True)
class Moment:
    """Where the training stands, as a method sees it.

    Args:
        step: optimizer steps done; 0 before the first.
        steps: optimizer steps in all.
        sparsity: of the schedule, at this step.
        update_every: steps between updates of a hard mask.
        arrived: the schedule reaches its end at this step.
        generator: of random numbers, the same in every process.
        optimizer: whose state follows the masks.
    """

    step: int
    steps: int
    sparsity: float
    update_every: int
    arrived: bool
    generator: torch.Generator
    optimizer: torch.optim.Optimizer

    @property
    def due(self) -> bool:
        """Whether hard masks are updated at this step."""
        return self.step % self.update_every == 0 or self.arrived


class Method(ABC):
    """How the mask of one weight moves. Methods are values: they compare, print and copy.

    A method either keeps plain parameters at zero (:class:`GradualMagnitude`, :class:`SET`, :class:`RigL`,
    :class:`Static`) or needs layers that learn their mask (:class:`Gate`, :class:`SRSTE`), which ``SparseTraining``
    swaps in.
    """

    name: ClassVar[str]
    learns: ClassVar[bool] = False
    ramps: ClassVar[bool] = True

    def schedule(self, sparsity: float, steps: int) -> Schedule:
        """The schedule for a training of ``steps`` steps, if none is asked for: the final sparsity from the start."""
        return OneShot(sparsity)

    def last_step(self, steps: int) -> int:
        """The step at which the schedule must have come to its end."""
        return steps

    def wants_gradient(self, step: int, steps: int, update_every: int) -> bool:
        """Whether the update after ``step`` reads the gradients of pruned weights."""
        return False

    @abstractmethod
    def update(self, weight: Any, moment: Moment) -> None:
        """Move the mask of one weight after an optimizer step, or set it up at step 0."""

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the settings as plain values."""
        settings = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


@dataclass(frozen=True)
class Gate(Method):
    """Learn which weights to keep: an annealed soft mask on an exact budget, then training on the frozen mask.

    Each weight is multiplied by ``sigmoid((|w| / threshold - 1) * temperature)``, with the threshold solved after each
    step so that the budget is met exactly, see :class:`SparseLinear`. The sparsity ramps up early, the temperature
    rises geometrically, and at ``freeze`` the mask becomes exact, hard and final. Any pattern; choose it first.

    Args:
        temperature: sharpness at the start and when the mask freezes.
        ramp: parts of the training at which the sparsity begins to rise and has arrived.
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
        low, high = _pair("temperature", self.temperature)
        if not 0 < low <= high < math.inf:
            raise RecipeError(f"temperature must rise from one positive number to another, got {low:g} and {high:g}.")
        begin, end = _pair("ramp", self.ramp)
        if not 0 <= begin <= end <= self.freeze <= 1:
            raise RecipeError(
                f"ramp and freeze are parts of the training, in order; got {begin:g}, {end:g} and {self.freeze:g}."
            )
        object.__setattr__(self, "temperature", (low, high))
        object.__setattr__(self, "ramp", (begin, end))

    def schedule(self, sparsity: float, steps: int) -> Schedule:
        """Cubic, over the ramp."""
        begin, end = (round(part * steps) for part in self.ramp)
        return Cubic(sparsity, begin, end)

    def last_step(self, steps: int) -> int:
        """The step at which the mask freezes."""
        return round(self.freeze * steps)

    def update(self, weight: LearnedWeight, moment: Moment) -> None:
        """Solve the threshold and sharpen the mask, or freeze it."""
        if weight.mask is not None:
            return
        freeze = self.last_step(moment.steps)
        if moment.step < freeze:
            low, high = self.temperature
            weight.set_threshold(moment.sparsity, low * (high / low) ** (moment.step / freeze))
            return
        weight.set_mask(weight.pattern.mask(weight.magnitudes(), weight.sparsity))
        clear_state_(moment.optimizer, weight.parameter, weight.modules[0].mask)  # type: ignore[arg-type]


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
        gradient, where adaptive optimizers and loss scaling would change its strength; 2e-4 is what the paper's
        settings (2e-4 in the gradient, learning rate 0.1, momentum 0.9) come to.
    """

    name: ClassVar[str] = "sr-ste"
    learns: ClassVar[bool] = True
    decay: float = 2e-4
    freeze: float = 1.0

    def __post_init__(self) -> None:
        _check_part("decay", self.decay)
        _check_part("freeze", self.freeze)

    def last_step(self, steps: int) -> int:
        """The step at which the mask freezes."""
        return round(self.freeze * steps)

    def update(self, weight: LearnedWeight, moment: Moment) -> None:
        """Shrink the pruned weights and find the mask anew."""
        if weight.mask is not None and not weight.modules[0].straight_through:
            return
        if weight.mask is not None and self.decay:
            weight.shrink_pruned_(self.decay)
        frozen = self.freeze < 1 and moment.step >= self.last_step(moment.steps)
        pattern, sparsity = at_partial_sparsity(weight.pattern, moment.sparsity)
        weight.set_mask(pattern.mask(weight.magnitudes(), sparsity), straight_through=not frozen)
        if frozen:
            clear_state_(moment.optimizer, weight.parameter, weight.modules[0].mask)  # type: ignore[arg-type]


@dataclass(frozen=True)
class GradualMagnitude(Method):
    """Gradual magnitude pruning: every few steps the smallest weights go for good, fast at first and then slower.

    Args:
        ramp: parts of the training at which the sparsity begins to rise and has arrived.

    Raises:
        RecipeError: parts out of order or outside [0, 1].

    Reference:
        Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
        arXiv:1710.01878.
    """

    name: ClassVar[str] = "magnitude"
    ramp: tuple[float, float] = (0.05, 0.5)

    def __post_init__(self) -> None:
        begin, end = _pair("ramp", self.ramp)
        if not 0 <= begin <= end <= 1:
            raise RecipeError(f"ramp holds two parts of the training, in order; got {begin:g} and {end:g}.")
        object.__setattr__(self, "ramp", (begin, end))

    def schedule(self, sparsity: float, steps: int) -> Schedule:
        """Cubic, over the ramp."""
        begin, end = (round(part * steps) for part in self.ramp)
        return Cubic(sparsity, begin, end)

    def update(self, weight: MaskedWeight, moment: Moment) -> None:
        """Prune more when an update is due."""
        if not moment.due:
            return
        pattern, sparsity = at_partial_sparsity(weight.pattern, moment.sparsity)
        scores = weight.magnitudes()
        if weight.num_pruned != pattern.num_pruned(scores.shape, sparsity):
            weight.set_mask(pattern.mask(scores, sparsity), moment.optimizer)


@dataclass(frozen=True)
class Static(Method):
    """One mask for the whole training: prune and fine-tune.

    Args:
        initial: ``"magnitude"`` keeps the largest weights, and with them any mask that the model already has;
            ``"random"`` is for models that have learned nothing yet.

    Raises:
        RecipeError: an unknown initial mask.
    """

    name: ClassVar[str] = "static"
    ramps: ClassVar[bool] = False
    initial: Initial = "magnitude"

    def __post_init__(self) -> None:
        _check_initial(self.initial)

    def update(self, weight: MaskedWeight, moment: Moment) -> None:
        """Make the mask at step 0 and keep to it."""
        if weight.mask is None:
            weight.set_mask(_initial_mask(weight, moment, self.initial), moment.optimizer)


@dataclass(frozen=True)
class SET(Method):
    """Sparse evolutionary training: every few steps the smallest weights give way to as many new ones, at random.

    Args:
        fraction: part of the kept units that is exchanged at each update.
        until: part of the training after which the mask stays.
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
        _check_part("fraction", self.fraction)
        _check_part("until", self.until)
        _check_initial(self.initial)

    def update(self, weight: MaskedWeight, moment: Moment) -> None:
        """Exchange weights when an update is due."""
        if weight.mask is None:
            weight.set_mask(_initial_mask(weight, moment, self.initial), moment.optimizer)
        elif moment.step % moment.update_every == 0 and 0 < moment.step < self.until * moment.steps:
            growth = torch.rand(weight.mask.shape, generator=moment.generator).to(weight.mask.device)
            mask = exchange(weight.pattern, weight.mask, weight.matrix(), growth, self.fraction, regrow_dropped=False)
            weight.set_mask(mask, moment.optimizer)


@dataclass(frozen=True)
class RigL(Method):
    """Rigged lottery: every few steps the smallest weights give way to those with the largest gradients.

    The part that is exchanged falls from ``fraction`` to zero along half a cosine. Gradients of pruned weights are
    computed in the steps before an update only; those are the steps in which clipping by norm sees them too. New
    weights start at zero.

    Args:
        fraction: part of the kept units that is exchanged at first.
        until: part of the training after which the mask stays.
        initial: the first mask, as for :class:`Static`.

    Raises:
        RecipeError: a part outside [0, 1] or an unknown initial mask.

    Reference:
        Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, arXiv:1911.11134.
    """

    name: ClassVar[str] = "rigl"
    ramps: ClassVar[bool] = False
    fraction: float = 0.3
    until: float = 0.75
    initial: Initial = "magnitude"

    def __post_init__(self) -> None:
        _check_part("fraction", self.fraction)
        _check_part("until", self.until)
        _check_initial(self.initial)

    def wants_gradient(self, step: int, steps: int, update_every: int) -> bool:
        """Whether weights are exchanged after ``step``."""
        return step % update_every == 0 and 0 < step < self.until * steps

    def update(self, weight: MaskedWeight, moment: Moment) -> None:
        """Exchange weights when an update is due."""
        if weight.mask is None:
            weight.set_mask(_initial_mask(weight, moment, self.initial), moment.optimizer)
            return
        if not self.wants_gradient(moment.step, moment.steps, moment.update_every):
            return
        gradient = weight.gradient()
        assert gradient is not None  # checked by the session, for all layers before the first is changed
        if not gradient.isfinite().all() and weight.matrix().isfinite().all():
            return  # a step that loss scaling skipped; the next update is not far
        fraction = self.fraction / 2 * (1 + math.cos(math.pi * moment.step / (self.until * moment.steps)))
        mask = exchange(weight.pattern, weight.mask, weight.matrix(), gradient.abs(), fraction, regrow_dropped=True)
        weight.set_mask(mask, moment.optimizer)


# The one table of names.
_METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (Gate, GradualMagnitude, SRSTE, SET, RigL, Static)}


def parse_method(text: str) -> Method:
    """Return the method of that name, with its default settings.

    Raises:
        RecipeError: no such method.
    """
    import difflib

    name = text.strip().lower()
    if name not in _METHODS:
        near = difflib.get_close_matches(name, _METHODS, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise RecipeError(f"unknown training method {text!r}{hint} Valid are {', '.join(_METHODS)}.")
    return _METHODS[name]()


@torch.no_grad()
def exchange(
    pattern: SparsityPattern, mask: Mask, weight: Weight, growth: Scores, fraction: float, *, regrow_dropped: bool
) -> Mask:
    """Drop a fraction of the kept units, the smallest, and keep as many others, those of highest growth score.

    ``round(fraction * kept)`` units of the layer are exchanged, each within its own competition (layer, row or N:M
    group), so that the mask stays legal and exact. All competitions exchange the same number; where that is no whole
    number, those in which the next smallest unit is smallest exchange one more.

    Args:
        pattern: of the mask.
        mask: ``[out, in]``.
        weight: ``[out, in]``; units of small magnitude go.
        growth: ``[out, in]``, not negative; units of high score come.
        fraction: part of the kept units to exchange.
        regrow_dropped: let units that were just dropped come back at once. They do in any case where there are too few
            others.

    Raises:
        PatternError: weights that are NaN.
    """
    if weight.isnan().any():
        raise PatternError(f"{int(weight.isnan().sum())} of its {weight.numel()} weights are NaN.")
    units = pattern.units(mask.shape)
    kept = units.elements(units.crop(mask))[..., 0]
    if not kept.numel():
        return mask
    count = int(kept[0].count_nonzero())
    moving, more = divmod(round(fraction * count * len(kept)), len(kept))
    scores = units.scores(magnitudes(weight))
    gains = units.scores(growth.to(scores.dtype))

    def exchanged(moving: int) -> Mask:
        staying = keep_top(torch.where(kept, scores, -math.inf), count - moving)
        enough_others = kept.shape[1] - count >= moving
        candidates = ~kept if enough_others and not regrow_dropped else ~staying
        return staying | keep_top(torch.where(candidates, gains, -math.inf), moving)

    keep = exchanged(moving)
    if more:
        next_smallest = kth_smallest(torch.where(kept, scores, math.inf), moving + 1)
        keep = torch.where(keep_top(-next_smallest.view(1, -1), more).view(-1, 1), exchanged(moving + 1), keep)
    return units.mask(keep)


def _initial_mask(weight: MaskedWeight, moment: Moment, initial: Initial) -> Mask:
    scores = weight.magnitudes()
    if initial == "random":
        scores = torch.rand(scores.shape, generator=moment.generator).to(scores.device)
    return weight.pattern.mask(scores, weight.sparsity)


def _pair(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(_is_number(part) for part in value):
        raise TypeError(f"{name} must be two numbers, got {value!r}")
    return float(value[0]), float(value[1])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_part(name: str, value: float) -> None:
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise RecipeError(f"{name} is a part of a whole, between 0 and 1, got {value:g}.")


def _check_initial(initial: str) -> None:
    if initial not in ("magnitude", "random"):
        raise RecipeError(f"initial must be 'magnitude' or 'random', got {initial!r}.")
