"""Which models are good enough: one comparison of a figure with a bound, read from text without running any code."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from secateur._checks import instance
from secateur._errors import RecipeError

# What can be compared, in words. The dense model has each of them but the last two.
FIGURES: Mapping[str, str] = {
    "perplexity": "of a language model on the evaluation text; lower is better",
    "similarity": "mean cosine of the outputs to those of the dense model on the evaluation text, up to 1",
    "embedding_similarity": "mean cosine of the embeddings of sentences to those of the dense model, up to 1",
    "rank": "100 x Spearman between the cosines of the dense model and of this one over pairs of sentences",
    "spearman": "100 x Spearman between the cosines of pairs of sentences and their scores",
    "accuracy": "part of the labelled texts that get their label, up to 1",
    "sparsity": "zeros in the layers that are considered for pruning, as a part of their weights",
    "sparsity_total": "zeros in the whole model, as a part of its weights",
    "parameters": "weights of the whole model",
    "bytes": "size of the weight files",
    "speedup": "times as fast as the dense model, at the shape where that is least",
    "minutes": "working time of the stage",
}
WITHOUT_DENSE = ("speedup", "minutes")

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<op>>=|<=|==|>|<)"
    r"|(?P<sign>[*%])|(?P<other>\S))",
    re.ASCII,
)
_EXAMPLE = 'such as "similarity >= 0.99" or "perplexity <= 1.05 * dense"'


@dataclass(frozen=True)
class Gate:
    """A comparison that a model passes or not.

    Args:
        figure: one of ``FIGURES``.
        op: ``">="``, ``"<="``, ``">"``, ``"<"`` or ``"=="``.
        factor: the bound, or what the figure of the dense model is multiplied with.
        of_dense: whether the bound depends on the dense model.

    Example:
        >>> from secateur.pipeline import Gate
        >>> gate = Gate.parse("perplexity <= 105% * dense")
        >>> gate, str(gate), gate.passes(10.4, dense=10.0)
        (Gate(figure='perplexity', op='<=', factor=1.05, of_dense=True), 'perplexity <= 1.05 * dense', True)
    """

    figure: str
    op: str
    factor: float
    of_dense: bool = False

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Return the gate that a text describes: a figure, a comparison, and a bound.

        A bound is a number (``0.8``, ``20e6``), a percentage (``80%``, which is 0.8), ``dense``, or one of the former
        and ``* dense``.

        Raises:
            RecipeError: it is no such text. The message says at which character, and what was expected.
        """
        return _Reader(instance("a gate", text, str, "a text")).gate()

    def __str__(self) -> str:
        factor = repr(self.factor)
        if not self.of_dense:
            return f"{self.figure} {self.op} {factor}"
        return f"{self.figure} {self.op} {'dense' if self.factor == 1 else f'{factor} * dense'}"

    def bound(self, dense: float | None = None) -> float:
        """Return the bound as a number, given the figure of the dense model. NaN without the one that it needs."""
        if not self.of_dense:
            return self.factor
        return math.nan if dense is None else self.factor * dense

    def passes(self, value: float | None, dense: float | None = None, slack: float = 0.0) -> bool:
        """Return whether a figure is within the bound. One that is missing or NaN is not.

        Args:
            value: the figure.
            dense: that of the dense model.
            slack: how far beyond the bound the figure may be, because it comes in steps.
        """
        if value is None:
            return False
        bound = self.bound(dense)
        if slack and abs(value - bound) <= slack:
            return True
        return _COMPARE[self.op](value, bound)


class _Reader:
    """Reads a gate from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = [(m.lastgroup or "", m[m.lastgroup or 0], m.start(m.lastgroup or 0)) for m in _found(text)]
        self._place = 0

    def gate(self) -> Gate:
        figure = self._next("name", "a figure")
        if figure not in FIGURES:
            near = difflib.get_close_matches(figure, list(FIGURES), 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            self._back()
            self._fail(f"there is no figure {figure!r}{hint} Valid are {', '.join(FIGURES)}")
        op = self._next("op", "one of >=, <=, >, < and ==")
        factor, of_dense = self._bound()
        if self._place < len(self._tokens):
            self._fail("expected nothing more")
        if of_dense and figure in WITHOUT_DENSE:
            raise RecipeError(
                f"the gate {self._text!r} compares {figure} with that of the dense model, which has none.\n"
                "Give a number."
            )
        return Gate(figure, op, factor, of_dense)

    def _bound(self) -> tuple[float, bool]:
        if self._peek("name"):
            self._dense()
            return 1.0, True
        factor = float(self._next("number", "a number or dense"))
        if math.isinf(factor):
            self._back()
            self._fail("this number is too large")
        if self._peek("sign", "%"):
            self._place += 1
            factor /= 100
        if self._peek("sign", "*"):
            self._place += 1
            self._dense()
            return factor, True
        return factor, False

    def _dense(self) -> None:
        if self._next("name", "dense") != "dense":
            self._back()
            self._fail("the only name in a bound is dense")

    def _peek(self, kind: str, text: str | None = None) -> bool:
        if self._place == len(self._tokens):
            return False
        found, value, _ = self._tokens[self._place]
        return found == kind and text in (None, value)

    def _next(self, kind: str, what: str) -> str:
        if not self._peek(kind):
            self._fail(f"expected {what}")
        self._place += 1
        return self._tokens[self._place - 1][1]

    def _back(self) -> None:
        self._place -= 1

    def _fail(self, why: str) -> None:
        if self._place < len(self._tokens):
            _, value, start = self._tokens[self._place]
            where = f"at character {start + 1} ({value!r:.30})"
        else:
            where = "at its end"
        raise RecipeError(
            f"the gate {self._text!r:.100} cannot be read {where}: {why}.\n"
            f"A gate is a figure, a comparison and a bound, {_EXAMPLE}."
        )


def _found(text: str) -> list[re.Match[str]]:
    return [found for found in _TOKEN.finditer(text) if found.lastgroup]
