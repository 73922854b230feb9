"""What a user may ask :func:`shrink_` for, checked before a model is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur._checks import flag, integer, known_keys, number, one_of
from secateur._errors import RecipeError
from secateur.graph import KINDS, Removal

TARGETS = ("params", "macs")


def check_request(
    keep: Mapping[str, float] | None,
    target: Mapping[str, float] | None,
    remove: Mapping[str, Sequence[int]] | Removal | None,
    zeros: bool,
    round_to: int = 1,
) -> str:
    """Return which of the four was asked for: ``"keep"``, ``"target"``, ``"remove"`` or ``"zeros"``.

    Args:
        keep: by kind, or by the name of a dimension, the fraction of its units that stay, above 0 and at most 1. It may
            come with ``remove``.
        target: ``{"params": fraction}`` of the whole model's parameters that stay, or ``{"macs": fraction}``.
        remove: by kind or by the name of a dimension, the numbers of the units that go; or a list from a file.
        zeros: whether units that are zero already go.
        round_to: sizes become multiples of it.

    Raises:
        RecipeError: not exactly one of the four; an unknown kind, or a fraction that is none.
        TypeError: a value of the wrong Python type.
    """
    flag("zeros", zeros)
    integer("round_to", round_to, 1)
    asked = {"keep": keep is not None, "target": target is not None, "remove": remove is not None, "zeros": zeros}
    given = [name for name, is_given in asked.items() if is_given]
    if len(given) != 1 and given != ["keep", "remove"]:
        raise RecipeError(
            "exactly one of keep, target, remove and zeros says what goes, or keep and remove together; got "
            f"{' and '.join(given) or 'none'}.\nGive one, such as keep={{'ffn': 0.5}}."
        )
    if keep is not None:
        for kind, value in _table("keep", keep).items():
            if "." not in kind:  # else it is the name of a dimension, which only the model knows
                one_of("kind in keep", kind, KINDS)
            _share(f"keep[{kind!r}]", value)
        if remove is not None and "layers" in keep:
            raise RecipeError(
                "keep has layers, and remove says which units go.\nLeave layers out of keep, and name the blocks in "
                "remove."
            )
    if target is not None:
        known_keys("target", _table("target", target), TARGETS)
        if len(target) != 1:
            raise RecipeError(f"target has one of params and macs, got {' and '.join(target)}. Give one of them.")
        for name, value in target.items():
            _share(f"target[{name!r}]", value)
    if remove is not None and not isinstance(remove, Removal):
        for name, units in _table("remove", remove).items():
            if isinstance(units, str) or not isinstance(units, Sequence):
                raise TypeError(f"remove[{name!r}] must be a list of numbers, got {type(units).__name__}")
            for unit in units:
                integer(f"remove[{name!r}]", unit, 0)
    return given[0]


def _table(name: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict, got {type(value).__name__}")
    if not value:
        raise RecipeError(f"{name} is empty, so it does not say what goes. Give at least one entry.")
    return value


def _share(name: str, value: object) -> None:
    if not 0 < number(name, value) <= 1:
        raise RecipeError(f"{name} is the fraction that stays, above 0 and at most 1, got {value}.")
