"""How units are chosen and what makes up for them, as text: ``"obs+refit"``."""

from __future__ import annotations

from dataclasses import dataclass

from secateur._checks import one_of
from secateur._errors import RecipeError
from secateur.solvers import UNIT_IMPORTANCES, UnitImportance

LAYER_IMPORTANCES = ("effect", "influence")


@dataclass(frozen=True)
class Method:
    """How units are chosen, and whether what stays makes up for them.

    Args:
        importance: name of the importance of units.
        layers: name of that of blocks: ``"effect"`` or ``"influence"``.
        refit: whether what stays is fitted to what the model computed before.
    """

    importance: str = "obs"
    layers: str = "effect"
    refit: bool = False

    @classmethod
    def parse(cls, text: str) -> Method:
        """Return the method that ``"obs+refit"``, ``"wanda"``, ``"flap+influence+refit"`` and the like name.

        Raises:
            RecipeError: an unknown name, or two of one kind.
        """
        if not isinstance(text, str):
            raise TypeError(f"method must be a text such as 'obs+refit', got {text!r}")
        parts = text.strip().lower().split("+")
        known = (*UNIT_IMPORTANCES, *LAYER_IMPORTANCES, "refit")
        for part in parts:
            one_of("method", part, known)
        units = [part for part in parts if part in UNIT_IMPORTANCES]
        layers = [part for part in parts if part in LAYER_IMPORTANCES]
        if len(set(parts)) != len(parts) or len(units) > 1 or len(layers) > 1:
            raise RecipeError(f"method {text!r} names two of a kind. Give one, such as 'obs+refit'.")
        return cls((units or ["obs"])[0], (layers or ["effect"])[0], "refit" in parts)

    def __str__(self) -> str:
        layers = "" if self.layers == "effect" else f"+{self.layers}"
        return f"{self.importance}{layers}{'+refit' * self.refit}"

    @property
    def scores(self) -> UnitImportance:
        """The importance of units."""
        return UNIT_IMPORTANCES[self.importance]()
