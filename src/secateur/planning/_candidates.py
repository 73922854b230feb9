"""Several models that reach a target in different ways, as measured, of which a short training tells the best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.planning._effects import Depth
from secateur.planning._measured import Measured
from secateur.planning._probes import Timed
from secateur.planning._solutions import Solution
from secateur.planning._target import Target

CANDIDATES = 3  # models that are made and trained for a short time
SHORT = 0.08  # of all minutes, that each of them is trained for
_MARGIN = 1.02  # a candidate is made this much faster than asked, because times differ from run to run
_TRIES = 2  # at each number of blocks


@dataclass(frozen=True)
class Candidate:
    """A model that might be made.

    Args:
        solution: what it is.
        timed: what was measured of its shape.
    """

    solution: Solution
    timed: Timed


def candidates(measured: Measured, target: Target, most: int, progress: Progress) -> list[Candidate]:
    """Return models that reach a target as measured, the one with the least predicted loss first.

    What is lost before any training says little about how much of it comes back, most of all where whole blocks go.
    So there is one for each number of blocks, of those whose predicted loss is lowest.

    Args:
        measured: all that is known of the model.
        target: to reach.
        most: how many to return.
        progress: called with a description, and how much of how much is done.

    Raises:
        RecipeError: the target cannot be reached, with the best that can.
    """
    aim = _with_margin(target)
    try:
        measured.problem.solve(aim)
    except RecipeError:
        aim = target
        measured.problem.solve(aim)  # raises with the best that can be reached
    found: list[Candidate] = []
    with measured.counting("correcting"):
        for depth in _depths(measured, aim):
            if len(found) == most:
                break
            made = _at(measured, depth, target, aim, progress)
            if made is None:
                continue
            found.append(made)
            if not made.solution.depth.number and _is_whole(made.solution):
                break  # nothing has to be removed: no other model is better
    if not found:
        problem = measured.problem
        raise RecipeError(
            f"the target {target.text} cannot be reached: models that were predicted to were too slow when they were "
            f"timed.\nGive at most {problem.fastest(target).speedup:.1f}x, or allow more means."  # type: ignore[union-attr]
        )
    return sorted(found, key=lambda one: one.solution.loss)


def _is_whole(solution: Solution) -> bool:
    return all(not choice.pattern and set(choice.kept) <= {1.0} for choice in solution.choices)


def _with_margin(target: Target) -> Target:
    return replace(
        target,
        speedup=None if target.speedup is None else target.speedup * _MARGIN,
        milliseconds=None if target.milliseconds is None else target.milliseconds / _MARGIN,
    )


def _depths(measured: Measured, target: Target) -> Iterator[Depth]:
    """The numbers of blocks at which the target can be reached, those with the least predicted loss first."""
    best: dict[int, tuple[float, Depth]] = {}
    for solution in measured.problem.solutions(target):
        known = best.get(solution.depth.number)
        if known is None or solution.loss < known[0]:
            best[solution.depth.number] = solution.loss, solution.depth
    for _, depth in sorted(best.values(), key=lambda one: one[0]):
        yield depth


def _at(measured: Measured, depth: Depth, target: Target, aim: Target, progress: Progress) -> Candidate | None:
    """The best model without some blocks that reaches the target when it is timed."""
    for number in range(_TRIES):
        whole = measured.problem
        part = replace(whole, effects=replace(whole.effects, depths=(depth,)))
        try:
            solution = part.solve(aim)
        except RecipeError:
            return None
        progress(f"timing a model without {depth.number} blocks", number, _TRIES)
        timed = measured.correct(solution)
        if measured.reaches(target, timed):
            return Candidate(solution, timed)
    return None
