"""The settings of a sparse training, as one value that is checked when it is made; and the schedule that fits them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from secateur._checks import globs, instance, integer, one_of
from secateur._errors import RecipeError
from secateur.patterns import SparsityPattern, as_pattern, check_sparsity
from secateur.schedules import Cubic, Linear, OneShot, Schedule
from secateur.training._method import Method
from secateur.training._methods import as_method

_SCHEDULES = ("one_shot", "linear", "cubic")


@dataclass(frozen=True)
class TrainingSettings:
    """The arguments of :class:`SparseTraining` but for the model and the optimizer. :meth:`of` takes texts for values.

    Args:
        method: how masks change.
        pattern: that masks follow; None: unstructured, or that of the model's sparse layers.
        sparsity: to be reached; None: that of the schedule, the pattern or the model's sparse layers.
        steps: optimizer steps of the whole training; None if it is not known yet.
        schedule: the sparsity at each step, or its name; None: that of the method.
        update_every: steps between updates of hard masks; None: a hundredth of the steps.
        include: glob patterns on qualified layer names.
        exclude: glob patterns that win over ``include``.
        seed: of random choices.

    Raises:
        RecipeError: a count below one, or the name of no schedule.
        PatternError: a sparsity outside [0, 1].
        TypeError: an argument of the wrong type.
    """

    method: Method
    pattern: SparsityPattern | None = None
    sparsity: float | None = None
    steps: int | None = None
    schedule: Schedule | str | None = None
    update_every: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str):
            one_of("schedule", self.schedule, _SCHEDULES)
        elif self.schedule is not None:
            instance("schedule", self.schedule, Schedule, "a Schedule or its name")  # type: ignore[type-abstract]
            if self.sparsity is None:
                object.__setattr__(self, "sparsity", self.schedule.final)
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        if self.steps is not None:
            integer("steps", self.steps, 1)
        if self.update_every is not None:
            integer("update_every", self.update_every, 1)
        integer("seed", self.seed)

    @classmethod
    def of(
        cls,
        *,
        method: Method | str,
        pattern: SparsityPattern | str | None,
        sparsity: float | None,
        steps: int | None,
        schedule: Schedule | str | None,
        update_every: int | None,
        include: Iterable[str],
        exclude: Iterable[str],
        seed: int,
    ) -> Self:
        """Return the settings, with names of methods and patterns replaced by what they name.

        Raises:
            RecipeError: no such method, or as for the class.
            PatternError: no such pattern, or as for the class.
            TypeError: as for the class.
        """
        return cls(
            as_method(method),
            None if pattern is None else as_pattern(pattern),
            sparsity,
            steps,
            schedule,
            update_every,
            globs("include", include),
            globs("exclude", exclude),
            seed,
        )


def fit_schedule(schedule: Schedule | str | None, method: Method, sparsity: float, steps: int) -> Schedule:
    """Return the schedule that was asked for, or that of the method.

    Args:
        schedule: a schedule, the name of one over the method's ramp, or None.
        method: that follows it.
        sparsity: at which it must end.
        steps: of the training.

    Raises:
        RecipeError: it ends at another sparsity or too late, or the method cannot follow it.
    """
    own = method.schedule(sparsity, steps)
    if schedule is None:
        return own
    if isinstance(schedule, str):
        begin, end = getattr(own, "begin", 0), getattr(own, "end", 0)
        if isinstance(own, OneShot) and schedule != "one_shot":
            advice = "say where it begins and ends, as in Cubic(sparsity, begin, end)" if method.ramps else ""
            raise RecipeError(
                f"{method.name} has no ramp over which a {schedule} schedule could run: "
                f"{advice or 'it keeps the sparsity constant from the start. Leave it out'}."
            )
        kind = dict(zip(_SCHEDULES, (OneShot, Linear, Cubic), strict=True))[schedule]
        schedule = OneShot(sparsity, at=begin) if kind is OneShot else kind(sparsity, begin, end)
    if schedule.final != sparsity:
        raise RecipeError(f"the schedule ends at sparsity {schedule.final:g}, but {sparsity:g} was asked.")
    last = method.last_step(steps)
    if schedule.end > last:
        raise RecipeError(
            f"the schedule ends at step {schedule.end}, but {method.name} must reach its sparsity by step {last} of "
            f"{steps}. End it earlier, or train for longer."
        )
    if not method.ramps and schedule.end > 0:
        raise RecipeError(
            f"{method.name} keeps the sparsity constant from the start; {schedule} does not. Leave it out."
        )
    return schedule
