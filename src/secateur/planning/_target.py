"""What a user wants of a model, read from text: how fast, how small, and how much it may lose."""

from __future__ import annotations

import re
from dataclasses import dataclass

from secateur._checks import instance, number
from secateur._errors import RecipeError

_PART = re.compile(
    r"(?P<speedup>\d+(?:\.\d+)?)\s*[xX\N{MULTIPLICATION SIGN}]|(?P<ms>\d+(?:\.\d+)?)\s*ms"
    r"|(?P<size>\d+(?:\.\d+)?)\s*(?P<unit>kB|KB|MB|GB)|params\s*=\s*(?P<params>\d*\.?\d+)",
    re.ASCII,
)
_UNITS = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_FORMS = "4x (times as fast as PyTorch), 12ms, 20MB, params=0.4 (of the dense model's), or several with commas"


@dataclass(frozen=True)
class Target:
    """What a model must reach.

    Args:
        text: as it was given; empty for none.
        speedup: times as fast as the dense model in PyTorch, at every shape.
        milliseconds: for one call, at every shape.
        nbytes: of the weights on the disk.
        parameters: as a part of the dense model's.

    Example:
        >>> from secateur.planning import Target
        >>> Target.parse("4x, 20MB")
        Target(text='4x, 20MB', speedup=4.0, milliseconds=None, nbytes=20000000, parameters=None)
    """

    text: str = ""
    speedup: float | None = None
    milliseconds: float | None = None
    nbytes: int | None = None
    parameters: float | None = None

    @classmethod
    def parse(cls, text: str | None) -> Target:
        """Return the target that a text describes; None for none.

        Raises:
            RecipeError: it is no such text.
        """
        if text is None:
            return cls()
        found: dict[str, float | int] = {}
        for part in instance("target", text, str, "a text such as '4x'").split(","):
            matched = _PART.fullmatch(part.strip())
            if matched is None:
                raise RecipeError(f"the target {text!r:.60} cannot be read at {part.strip()!r:.30}.\nGive {_FORMS}.")
            name, value = _read(matched)
            if name in found:
                raise RecipeError(f"the target {text!r:.60} says twice how large {name} may be. Say it once.")
            if value <= 0 or (name == "parameters" and value > 1):
                raise RecipeError(f"the target {part.strip()!r:.30} cannot be reached by any model.\nGive {_FORMS}.")
            found[name] = value
        return cls(text, **found)  # type: ignore[arg-type]


def _read(matched: re.Match[str]) -> tuple[str, float | int]:
    if matched["speedup"]:
        return "speedup", float(matched["speedup"])
    if matched["ms"]:
        return "milliseconds", float(matched["ms"])
    if matched["params"]:
        return "parameters", float(matched["params"])
    return "nbytes", int(float(matched["size"]) * _UNITS[matched["unit"]])


@dataclass(frozen=True)
class MaxLoss:
    """How much a figure may lose.

    Args:
        text: as it was given; empty for no limit.
        value: how much.
        is_relative: it is a part of the dense model's figure; else it is in the unit of the figure.

    Example:
        >>> from secateur.planning import MaxLoss
        >>> MaxLoss.parse("1%").limit(dense=20.0, higher_is_better=False)
        20.2
    """

    text: str = ""
    value: float = float("inf")
    is_relative: bool = False

    @classmethod
    def parse(cls, text: str | float | None) -> MaxLoss:
        """Return the limit that a text describes: ``"1%"`` of the dense figure, or a number in its unit; None for none.

        Raises:
            RecipeError: it is no such text.
        """
        if text is None:
            return cls()
        matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*", str(text), re.ASCII)
        if matched is None or isinstance(text, bool):
            raise RecipeError(f"max_loss is a number or a percentage, such as 0.5 or '1%', got {text!r:.40}.")
        value = number("max_loss", float(matched[1]), least=0.0, finite=True)
        return cls(str(text), value / 100 if matched[2] else value, bool(matched[2]))

    def limit(self, dense: float, higher_is_better: bool) -> float:
        """Return the worst figure that is allowed.

        Args:
            dense: figure of the dense model.
            higher_is_better: of the figure.
        """
        lost = self.value * abs(dense) if self.is_relative else self.value
        return dense - lost if higher_is_better else dense + lost

    def allows(self, figure: float, dense: float, higher_is_better: bool) -> bool:
        """Return whether a figure is within the limit."""
        limit = self.limit(dense, higher_is_better)
        return figure >= limit if higher_is_better else figure <= limit
