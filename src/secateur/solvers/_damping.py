"""The damping of a method: that of every solver in it, from the outermost wrapper to the innermost one."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from secateur._checks import number
from secateur._errors import RecipeError
from secateur.solvers._methods import method_name
from secateur.solvers._problem import Solver


def has_damping(solver: Solver) -> bool:
    """Return whether a method, or one inside it, has a ``damping``."""
    return "damping" in _names(solver) or any(has_damping(inner) for inner in _inner(solver).values())


def with_damping(solver: Solver, damping: float) -> Solver:
    """Return a method with a damping, and with the same one in all methods inside it that have one.

    Raises:
        RecipeError: neither it nor one inside it has a damping, or the damping is below 0.

    Example:
        >>> import secateur
        >>> from secateur.solvers import with_damping
        >>> with_damping(secateur.Refit(secateur.SparseGPT()), 0.1)
        Refit(inner=SparseGPT(block_size=128, damping=0.1), iterations=10, damping=0.1)
    """
    check_damping(solver)
    damping = number("damping", damping, 0)
    changes: dict[str, Any] = {
        name: with_damping(inner, damping) for name, inner in _inner(solver).items() if has_damping(inner)
    }
    if "damping" in _names(solver):
        changes["damping"] = damping
    made: Solver = replace(solver, **changes)  # type: ignore[type-var]
    return made


def check_damping(solver: Solver) -> None:
    """Check that a method has a damping to set.

    Raises:
        RecipeError: neither it nor one inside it has one.
    """
    if not has_damping(solver):
        raise RecipeError(
            f"damping is given, but {method_name(solver)} has none: it factorises nothing.\n"
            "Leave damping out, use 'sparsegpt', or add '+refit' to the method."
        )


def _names(solver: Solver) -> list[str]:
    return [f.name for f in fields(solver) if f.init] if is_dataclass(solver) else []


def _inner(solver: Solver) -> dict[str, Solver]:
    """The methods inside a method, by the field that holds them."""
    return {name: value for name in _names(solver) if isinstance(value := getattr(solver, name), Solver)}
