"""Methods as text and as tables: ``"wanda+refit"`` is a head, then the wrappers around it from the inside out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from secateur._checks import known_keys, one_of
from secateur._errors import RecipeError
from secateur.patterns import Scope
from secateur.solvers._admm import ADMM
from secateur.solvers._alps import ALPS
from secateur.solvers._gradient_importance import Fisher, Movement, Taylor
from secateur.solvers._importance import IMPORTANCES as FROM_INPUTS
from secateur.solvers._importance import Importance
from secateur.solvers._problem import Solver
from secateur.solvers._refit import Refit
from secateur.solvers._select import Select
from secateur.solvers._sparsegpt import SparseGPT
from secateur.solvers._swaps import Swaps

FROM_LOSS: dict[str, type[Importance]] = {"taylor": Taylor, "fisher": Fisher, "movement": Movement}
IMPORTANCES = {**FROM_INPUTS, **FROM_LOSS}
# Heads are these and the importances. A wrapper is a solver around the one in its field `inner`.
SOLVERS: dict[str, Callable[[], Solver]] = {"sparsegpt": SparseGPT, "admm": ADMM, "alps": ALPS}
WRAPPERS: dict[str, Callable[[Solver], Solver]] = {"refit": Refit, "swaps": Swaps}
METHODS = (*IMPORTANCES, *SOLVERS)

_CLASSES: dict[str, Any] = {**IMPORTANCES, **SOLVERS, **WRAPPERS}
_NAMES = {made: name for name, made in _CLASSES.items()}


def parse_method(text: str) -> Solver:
    """Return the solver that ``"wanda"``, ``"sparsegpt+refit"`` and the like name, each with its default settings.

    Raises:
        RecipeError: no such method.
    """
    head, *wrappers = text.strip().lower().split("+")
    one_of("method", head, METHODS)
    solver = Select(IMPORTANCES[head]()) if head in IMPORTANCES else SOLVERS[head]()
    for wrapper in wrappers:
        one_of("method suffix", f"+{wrapper}", [f"+{name}" for name in WRAPPERS])
        solver = WRAPPERS[wrapper](solver)
    return solver


def method_name(solver: Solver) -> str:
    """Return the text that :func:`parse_method` takes for a solver, or its repr if its settings are not the default."""
    inner, suffixes = solver, ""
    while (name := _NAMES.get(type(inner))) in WRAPPERS:
        suffixes = f"+{name}{suffixes}"
        inner = inner.inner  # type: ignore[attr-defined]
    text = f"{_NAMES.get(type(_without_select(inner)))}{suffixes}"
    return text if text.split("+", maxsplit=1)[0] in METHODS and parse_method(text) == solver else repr(solver)


def method_to_dict(solver: Solver) -> dict[str, Any]:
    """Return a solver as a table of its name and settings, without those that are None.

    One of an unknown class has its class and repr instead.
    """
    value = _without_select(solver)
    if type(value) not in _NAMES or not is_dataclass(value):
        return {"name": type(value).__name__, "repr": repr(solver)}
    settings = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) is not None}
    return {"name": _NAMES[type(value)]} | {
        key: method_to_dict(inner) if isinstance(inner, Solver) else inner for key, inner in settings.items()
    }


def method_from_dict(table: Mapping[str, Any]) -> Solver:
    """Return the solver that a table describes; the inverse of :func:`method_to_dict`.

    Raises:
        RecipeError: an unknown method or setting, or a wrapper without the method inside.
    """
    settings = dict(table)
    name = one_of("method", settings.pop("name", None), _CLASSES)
    known_keys(f"method {name!r}", settings, [f.name for f in fields(_CLASSES[name])])
    if isinstance(settings.get("inner"), Mapping):
        settings["inner"] = method_from_dict(settings["inner"])
    elif isinstance(settings.get("inner"), str):
        settings["inner"] = parse_method(settings["inner"])
    elif name in WRAPPERS:
        raise RecipeError(f'method {name!r} needs the method inside it: inner = "wanda", for example.')
    made = _CLASSES[name](**settings)
    return Select(made) if isinstance(made, Importance) else made


def head_of(solver: Solver) -> Solver:
    """Return the solver inside all wrappers: that of ``"wanda"`` for ``"wanda+refit"``."""
    while isinstance(inner := getattr(solver, "inner", None), Solver):
        solver = inner
    return solver


def scope_of(solver: Solver) -> Scope:
    """Return what a solver compares under ``Unstructured()``: what its importance was made for, else the layer."""
    head = head_of(solver)
    return head.importance.scope if isinstance(head, Select) else "layer"


def rounding_of(solver: Solver) -> str | None:
    """Return the grid that a solver rounds to; None if it does not round."""
    return getattr(solver, "rounding", None)


def with_rounding(solver: Solver, rounding: str | None) -> Solver:
    """Return a solver that rounds to a grid; None: one that does not.

    Raises:
        RecipeError: it cannot round.
    """
    if rounding == rounding_of(solver):
        return solver
    if not is_dataclass(solver) or "rounding" not in [f.name for f in fields(solver)]:
        raise RecipeError(
            f"rounding={rounding!r} needs a method that makes up for the errors of rounding, and {method_name(solver)} "
            "does not.\nUse 'sparsegpt', or add '+refit' to the method. Packing rounds what no method has rounded."
        )
    changes: dict[str, Any] = {"rounding": rounding}
    if isinstance(inner := getattr(solver, "inner", None), Solver):  # only what comes last rounds
        changes["inner"] = with_rounding(inner, None)
    return replace(solver, **changes)


def _without_select(solver: Solver) -> Solver | Importance:
    """The importance that a method's name stands for, or the solver itself."""
    return solver.importance if type(solver) is Select else solver
