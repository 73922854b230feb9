"""The base of the patterns: a pattern makes masks with an exact count, checks masks, and has a text."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from secateur._checks import instance, number
from secateur._errors import PatternError, RecipeError
from secateur._types import Mask, Scores, dtype_name
from secateur.patterns._select import keep_top, units_to_prune
from secateur.patterns._units import Units

Scope: TypeAlias = Literal["layer", "row"]
Remainder: TypeAlias = Literal["error", "dense"]


class SparsityPattern(ABC):
    """A structural constraint on which weights of an ``[out, in]`` matrix may be pruned.

    A pattern is a value: it can be compared, hashed, printed and copied. It cuts a matrix into *units* (elements,
    tiles, rows or columns). A unit is kept or pruned whole. Units compete: all units of the layer, those of one row, or
    those of one N:M group. In each competition exactly ``round(sparsity * units)`` units are pruned, those with the
    lowest scores. Of units with equal scores, the one with the lower index is kept.

    The score of a unit with several elements is the sum of the squares of the elements' scores. A square keeps the sign
    of its score. For ``|w_ij| * ||x_j||`` this is the exact cost of pruning the unit under a diagonal Hessian. The sum
    of absolute values is not.

    The patterns are :class:`Unstructured`, :class:`NM`, :class:`TransposableNM`, :class:`Block`, :class:`Row` and
    :class:`Column`. They are also attributes of this class, such as ``SparsityPattern.NM``. In a
    :class:`TransposableNM`, the competitions of rows and columns depend on one another, and what is kept has the
    largest sum.

    Example:
        >>> import torch, secateur
        >>> pattern = secateur.SparsityPattern.parse("2:4")
        >>> pattern, str(pattern), pattern.sparsity
        (NM(2, 4), '2:4', 0.5)
        >>> pattern.mask(torch.tensor([[0.1, 0.4, 0.3, 0.2]])).tolist()
        [[False, True, True, False]]
    """

    _grammar: ClassVar[tuple[tuple[str, type[SparsityPattern]], ...]]  # how the patterns are written
    # The patterns themselves, which this module does not know: they are set where they are defined.
    Unstructured: ClassVar[Any]
    NM: ClassVar[Any]
    TransposableNM: ClassVar[Any]
    Block: ClassVar[Any]
    Row: ClassVar[Any]
    Column: ClassVar[Any]

    # Only for type checkers: an abstract property at run time would keep Block and Column from having a field `width`.
    if TYPE_CHECKING:

        @property
        def width(self) -> int | None:
            """How many adjacent columns must be decided together; None means all of them.

            A solver that sweeps over columns needs no other fact about a pattern.
            """

    @property
    @abstractmethod
    def sparsity(self) -> float | None:
        """The sparsity that the pattern fixes (``1 - n/m``), or None where any sparsity fits."""

    @abstractmethod
    def _tile(self) -> tuple[int, int]:
        """Height and width of a tile; a size of the matrix that is not a multiple leaves a remainder."""

    @abstractmethod
    def _unit(self, rows: int, columns: int) -> tuple[int, int]:
        """Height and width of a unit in a matrix of this size that has no remainder."""

    @abstractmethod
    def _competitions(self, rows: int, columns: int, units: int) -> tuple[int, int]:
        """Number of competitions in a matrix of this size that has no remainder, and of units in each."""

    def _keep(self, units: Units, scores: Tensor, num_keep: int) -> Tensor:
        """Return which units are kept, ``[competitions, count]`` bool, ``num_keep`` in each competition.

        Where competitions depend on one another, it is not enough that each keeps its highest scores.
        """
        return keep_top(scores, num_keep)

    @abstractmethod
    def _violation(self, mask: Mask) -> str | None:
        """Say which group is the first that breaks the pattern, for a mask without remainder; None where none does."""

    @staticmethod
    def parse(text: str) -> SparsityPattern:
        """Return the pattern that ``text`` names. This is the inverse of ``str(pattern)``.

        Args:
            text: ``"unstructured"``, ``"2:4"``, ``"transposable:2:4"``, ``"block:16x16"``, ``"row"`` or ``"column"``.
                Options follow a comma: ``"unstructured,scope=row"``, ``"2:4,remainder=dense"``, ``"column:9"`` (9
                adjacent columns a channel).

        Raises:
            PatternError: the text names no pattern, or sizes that are out of range.
            TypeError: not a str.

        Example:
            >>> import secateur
            >>> secateur.SparsityPattern.parse("block:4x8,remainder=dense")
            Block(4, 8, remainder='dense')
        """
        instance("the text of a pattern", text, str)
        head, *options = (part.strip() for part in text.strip().lower().split(","))
        keywords: dict[str, str] = {}
        for option in options:
            key, separator, value = (piece.strip() for piece in option.partition("="))
            if not separator or not value or key in keywords:
                raise PatternError(_unknown_pattern(text))
            keywords[key] = value
        for grammar, pattern_type in SparsityPattern._grammar:
            if match := re.fullmatch(grammar, head):
                numbers = [int(group) for group in match.groups() if group is not None]
                options_of = {f.name for f in fields(pattern_type) if f.type != "int"}  # type: ignore[arg-type]
                if not keywords.keys() <= options_of:
                    raise PatternError(_unknown_pattern(text))
                return pattern_type(*numbers, **keywords)
        raise PatternError(_unknown_pattern(text))

    def __repr__(self) -> str:
        required = [repr(getattr(self, f.name)) for f in fields(self) if f.default is MISSING]  # type: ignore[arg-type]
        options = [f"{name}={value!r}" for name, value in self._options()]
        return f"{type(self).__name__}({', '.join(required + options)})"

    def _options(self) -> list[tuple[str, object]]:
        """Names and values of the fields that differ from their default."""
        pairs = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]  # type: ignore[arg-type]
        return [(name, value) for name, value, default in pairs if default is not MISSING and value != default]

    def _suffix(self) -> str:
        return "".join(f",{name}={value}" for name, value in self._options() if isinstance(value, str))

    def validate(self, shape: Sequence[int]) -> None:
        """Raise unless the pattern fits a matrix of ``shape = (out, in)``.

        Raises:
            PatternError: the shape is not two-dimensional, or is not a multiple of the tile and ``remainder`` is
                ``"error"``.

        Example:
            >>> import secateur
            >>> secateur.NM(2, 4).validate((8, 1022))
            Traceback (most recent call last):
            secateur._errors.PatternError: 2:4 needs an input size that is a multiple of 4, got 1022.
            Exclude the layer, or use '2:4,remainder=dense' (--remainder dense) to leave its last 2 columns dense.
        """
        if len(shape) != 2:
            raise PatternError(f"{self} needs a matrix of shape (out, in), got shape {tuple(shape)}.")
        if getattr(self, "remainder", "error") == "dense":
            return
        for size, step, side, name in zip(shape, self._tile(), ("output", "input"), ("rows", "columns"), strict=True):
            if size % step:
                dense = replace(self, remainder="dense") if hasattr(self, "remainder") else None  # type: ignore[type-var]
                tail = f"{size % step} {name if size % step > 1 else name[:-1]}"
                advice = (
                    f", or use {str(dense)!r} (--remainder dense) to leave its last {tail} dense." if dense else "."
                )
                raise PatternError(
                    f"{self} needs an {side} size that is a multiple of {step}, got {size}.\nExclude the layer{advice}"
                )

    def resolve(self, sparsity: float | None) -> float:
        """Return the sparsity to prune at: the one that was asked for, or the one that the pattern fixes.

        Args:
            sparsity: fraction of units to prune, in [0, 1]; None for the one that the pattern fixes.

        Raises:
            PatternError: the sparsity is missing, outside [0, 1] or not the one that the pattern fixes.
            TypeError: the sparsity is not a number.
        """
        fixed = self.sparsity
        if sparsity is None:
            if fixed is None:
                raise PatternError(f"{self} fits any sparsity: say which, for example sparsity=0.5.")
            return fixed
        check_sparsity(sparsity)
        if fixed is not None and not math.isclose(sparsity, fixed, abs_tol=1e-9):
            raise PatternError(
                f"{self} fixes the sparsity at {fixed:g}, but {sparsity:g} was asked for. "
                "Leave the sparsity out, or use another pattern."
            )
        return float(sparsity)

    def num_pruned(self, shape: Sequence[int], sparsity: float | None = None) -> int:
        """Return how many weights of a matrix are pruned at a sparsity. The number is exact.

        Args:
            shape: ``(out, in)`` of the matrix.
            sparsity: fraction of units to prune; see :meth:`resolve`.

        Raises:
            PatternError: the shape does not fit, or the sparsity is missing, outside [0, 1] or not the one that the
                pattern fixes.
            TypeError: the sparsity is not a number.

        Example:
            >>> import secateur
            >>> secateur.Block(4, 4).num_pruned((8, 8), sparsity=0.6)  # round(0.6 * 4 tiles) = 2 tiles of 16
            32
        """
        units = self.units(shape)
        return units_to_prune(units.count, self.resolve(sparsity)) * units.competitions * units.size

    def num_units(self, shape: Sequence[int]) -> int:
        """Return how many units each competition has in an ``(out, in)`` matrix."""
        return self.units(shape).count

    def units(self, shape: Sequence[int]) -> Units:
        """Return the units of an ``(out, in)`` matrix: what is kept or pruned together, and what competes.

        Raises:
            PatternError: the shape does not fit.

        Example:
            >>> import secateur
            >>> units = secateur.NM(2, 4).units((8, 16))  # single weights, in groups of 4
            >>> units.competitions, units.count, units.size
            (32, 4, 1)
        """
        self.validate(shape)
        down, across = self._tile()
        rows, columns = shape[0] - shape[0] % down, shape[1] - shape[1] % across
        height, width = self._unit(rows, columns)
        units = (rows // height if height else 1) * (columns // width if width else 1)
        competitions, count = self._competitions(rows, columns, units)
        return Units((shape[0], shape[1]), (rows, columns), height, width, competitions, count)

    @torch.no_grad()
    def mask(self, scores: Scores, sparsity: float | None = None) -> Mask:
        """Return the mask that keeps the units with the highest scores, at exactly the given sparsity.

        Args:
            scores: ``[out, in]``, of any floating dtype, strides and device; higher = keep. ``+inf`` is above every
                finite score.
            sparsity: fraction of units to prune, in [0, 1]. N:M fixes its own, so that it may be left out there.

        Returns:
            A contiguous bool tensor of the scores' shape, True = kept.

        Raises:
            PatternError: NaN or -inf among the scores, a shape that does not fit, or a sparsity that does not.
            TypeError: scores that are not a floating-point tensor, or a sparsity that is not a number.

        Example:
            >>> import torch, secateur
            >>> secateur.Unstructured().mask(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), sparsity=0.5).tolist()
            [[True, False], [False, True]]
        """
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            found = dtype_name(scores.dtype) if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(f"scores must be a floating-point tensor, got {found}")
        self.validate(scores.shape)
        sparsity = self.resolve(sparsity)
        if scores.numel() and not scores.min() > -math.inf:  # min() propagates NaN, and NaN > -inf is False
            bad = int((~(scores > -math.inf)).sum())
            raise PatternError(
                f"{bad} of {scores.numel()} scores are NaN or -inf, which say nothing about what to keep. "
                "Give finite scores, or +inf for what must be kept."
            )
        if scores.dtype in (torch.float16, torch.bfloat16):
            scores = scores.float()  # exact; selection in half precision takes ten times as long on a CPU
        units = self.units(scores.shape)
        return units.mask(self._keep(units, units.scores(scores), units.count - units_to_prune(units.count, sparsity)))

    def check(self, mask: Mask) -> None:
        """Raise unless ``mask`` (``[out, in]``, bool, True = kept) is legal under this pattern.

        Raises:
            PatternError: the mask breaks the pattern. The message names the first group that does, or the shape.
            TypeError: a mask that is not a bool tensor.

        Example:
            >>> import torch, secateur
            >>> secateur.NM(1, 2).check(torch.tensor([[True, False, True, True]]))
            Traceback (most recent call last):
            secateur._errors.PatternError: row 0, columns 2 to 3 keep 2 weights, but 1:2 keeps exactly 1.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = dtype_name(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"a mask must be a bool tensor, got {found}")
        rows, columns = self.units(mask.shape).core
        if not (mask[rows:].all() and mask[:, columns:].all()):
            raise PatternError(
                f"the mask prunes weights beyond {rows} rows and {columns} columns, the whole tiles of {self!r}. "
                "This remainder must stay dense."
            )
        if rows * columns and (violation := self._violation(mask[:rows, :columns])):
            raise PatternError(violation)


def check_sparsity(sparsity: float, name: str = "sparsity") -> None:
    """Raise unless ``sparsity``, an argument of that name, is a number in [0, 1].

    Raises:
        PatternError: outside [0, 1].
        TypeError: not a number.
    """
    try:
        number(name, sparsity, 0, 1)
    except RecipeError:  # also of a mask that is asked for without a recipe, so that the class is that of patterns
        hint = f" Did you mean {sparsity / 100:g}?" if 1 < sparsity <= 100 else ""
        raise PatternError(f"{name} is the fraction of zeros, between 0 and 1, got {sparsity:g}.{hint}") from None


def _unknown_pattern(text: str) -> str:
    return (
        f"{text!r} names no pattern. Patterns are 'unstructured', 'N:M' such as '2:4', 'transposable:N:M', 'block:HxW' "
        "such as 'block:16x16', 'row' and 'column'. Options follow a comma: ',scope=row' or ',scope=layer' for "
        "unstructured, ',remainder=dense' for N:M and block."
    )
