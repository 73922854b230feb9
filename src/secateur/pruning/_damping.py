"""Choose the damping of a layer by the error on tokens that it was not solved on."""

from __future__ import annotations

import math
from dataclasses import replace

from secateur._types import Weight
from secateur.calibration import LayerStatistics
from secateur.pruning._figures import relative_error
from secateur.solvers import LayerProblem, Solution, Solver, with_damping

DAMPINGS = (0.001, 0.01, 0.1, 1.0)


def solve_with_best(method: Solver, problem: LayerProblem, goal: Weight, held_out: LayerStatistics | None) -> Solution:
    """Return the solution of the damping that loses least on held-out tokens, with a note of all that were tried.

    Where nothing can be measured, the layer is solved with the damping of the method, and the note says why.

    Args:
        method: to solve with, at each damping.
        problem: the layer.
        goal: ``[out, in]``, the weight whose outputs are to be kept.
        held_out: the Gram matrix of the layer's held-out inputs; None where none reached it.
    """
    best, least, errors = None, math.inf, []
    for damping in DAMPINGS:
        solution = None if held_out is None else with_damping(method, damping).solve(problem)
        error = None if solution is None else relative_error(goal, solution.weight, held_out)
        if solution is None or error is None:
            why = "no held-out input reached it" if held_out is None else "its held-out outputs are zero"
            return _noted(method.solve(problem), f"the damping is the method's own, because {why}")
        errors.append(f"{damping:g}: {error:.4f}")
        if best is None or error < least:
            best, chosen, least = solution, damping, error
    assert best is not None
    return _noted(best, f"damping {chosen:g} chosen by the error on held-out tokens ({', '.join(errors)})")


def _noted(solution: Solution, note: str) -> Solution:
    return replace(solution, notes=(*solution.notes, note))
