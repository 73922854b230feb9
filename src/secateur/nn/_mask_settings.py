"""How a layer learns its mask: the settings, as one value that is checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from secateur._checks import flag, number
from secateur._errors import PatternError
from secateur.patterns import SparsityPattern, as_pattern, check_sparsity

THRESHOLD = 0.01
_TEMPERATURE = 10.0
# A solved threshold makes the mask independent of the weights' scale, and sharpness a pure number.
_RELATIVE_TEMPERATURE = 4.0


@dataclass(frozen=True)
class MaskSettings:
    """How a layer learns which of its weights to keep; what the arguments mean is said at :class:`SparseLinear`.

    A value: it compares, prints and copies. A text becomes a pattern, and the sparsity that N:M fixes is filled in.

    Args:
        structured: one learned threshold for each output, else one for each weight. Without a pattern only.
        pattern: a :class:`SparsityPattern` or its text; None learns the threshold by gradient.
        sparsity: fraction of units to prune under the pattern, in [0, 1].
        temperature: sharpness of the mask at first; 10 by default, 4 under a pattern.
        threshold: initial value of the learned thresholds.
        hard: use the hard mask forward and the slope of the sigmoid backward.

    Raises:
        PatternError: a text that names no pattern, a sparsity that is missing, impossible or without a pattern, or
            ``structured=False`` under a pattern.
        RecipeError: a temperature that is not positive and finite, or a threshold that is NaN.
        TypeError: an argument of the wrong type.

    Example:
        >>> from secateur.nn import MaskSettings
        >>> MaskSettings(pattern="2:4")
        MaskSettings(structured=True, pattern=NM(2, 4), sparsity=0.5, temperature=None, threshold=0.01, hard=False)
    """

    structured: bool = True
    pattern: SparsityPattern | None = None
    sparsity: float | None = None
    temperature: float | None = None
    threshold: float = THRESHOLD
    hard: bool = False

    def __post_init__(self) -> None:
        flag("structured", self.structured)
        flag("hard", self.hard)
        pattern = None if self.pattern is None else as_pattern(self.pattern)
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        if pattern is None and self.sparsity is not None:
            raise PatternError(
                f"sparsity={self.sparsity:g} needs a pattern to be met under, such as pattern='unstructured'.\n"
                "Without a pattern the threshold is learned, and no sparsity can be promised."
            )
        if pattern is not None and not self.structured:
            raise PatternError(
                f"one learned threshold for each weight is for layers without a pattern; {pattern} solves its own."
            )
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "sparsity", None if pattern is None else pattern.resolve(self.sparsity))
        if self.temperature is not None:
            check_temperature(self.temperature)
        object.__setattr__(self, "threshold", number("threshold", self.threshold))

    @property
    def initial_temperature(self) -> float:
        """The temperature that was asked for, or the default."""
        if self.temperature is not None:
            return float(self.temperature)
        return _TEMPERATURE if self.pattern is None else _RELATIVE_TEMPERATURE


def check_temperature(value: object) -> float:
    """Return the value as a float if it is positive and finite."""
    return number("temperature", value, above=0, finite=True)
