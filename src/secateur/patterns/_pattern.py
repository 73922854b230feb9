"""Sparsity patterns: which sets of weights may be pruned together, and the exact masks they allow."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from secateur._errors import PatternError
from secateur._types import Mask, Scores

Scope: TypeAlias = Literal["layer", "row"]
Remainder: TypeAlias = Literal["error", "dense"]


class SparsityPattern(ABC):
    """A structural constraint on which weights of an ``[out, in]`` matrix may be pruned.

    A pattern is a value: it compares, hashes, prints and copies. It cuts a matrix into *units* (elements, tiles, rows
    or columns) that are kept or pruned whole, and lets units compete for survival: all units of the layer, those of
    one row, or those of one N:M group. In each competition exactly ``round(sparsity * units)`` units are pruned, the
    ones of lowest score; of equal scores the lower index is kept.

    A unit larger than one element is scored by the sum of the squares of its elements' scores (squares keep their sign,
    for scores that have one). For ``|w_ij| * ||x_j||`` that is the exact cost of dropping the unit under a diagonal
    Hessian; the sum of absolute values is not.

    The five patterns are :class:`Unstructured`, :class:`NM`, :class:`Block`, :class:`Row` and :class:`Column`, also
    reachable as ``SparsityPattern.NM`` and so on.

    Example:
        >>> import torch, secateur
        >>> pattern = secateur.SparsityPattern.parse("2:4")
        >>> pattern, str(pattern), pattern.sparsity
        (NM(2, 4), '2:4', 0.5)
        >>> pattern.mask(torch.tensor([[0.1, 0.4, 0.3, 0.2]])).tolist()
        [[False, True, True, False]]
    """

    Unstructured: ClassVar[type[_Unstructured]]
    NM: ClassVar[type[_NM]]
    Block: ClassVar[type[_Block]]
    Row: ClassVar[type[_Row]]
    Column: ClassVar[type[_Column]]

    if TYPE_CHECKING:  # a dataclass field named `width` fulfils this, which a run-time abstract property would forbid

        @property
        def width(self) -> int | None:
            """How many neighbouring columns must be decided together; None: all of them.

            The one fact that lets a solver which sweeps over columns serve every pattern.
            """

    @property
    @abstractmethod
    def sparsity(self) -> float | None:
        """The sparsity that the structure itself fixes (``1 - n/m``), or None when it is free."""

    @abstractmethod
    def _tile(self) -> tuple[int, int]:
        """Height and width that the matrix must divide into, or has a remainder of."""

    def _unit_size(self, rows: int, columns: int) -> tuple[int, int]:
        """Height and width of a unit of a matrix of this size."""
        return 1, 1

    @abstractmethod
    def _units(self, matrix: Tensor) -> Tensor:
        """The elements of a matrix without remainder, as ``[competitions, units, elements]``; a view where possible."""

    @abstractmethod
    def _spread(self, units: Tensor, rows: int, columns: int) -> Tensor:
        """Give every element of a ``[rows, columns]`` matrix the value of its unit in ``[competitions, units]``."""

    def _unit_scores(self, scores: Scores) -> Tensor:
        """Scores of a matrix without remainder, as ``[competitions, units]``."""
        units = self._units(scores)
        return units[..., 0] if units.shape[2] == 1 else _sum_of_squares(units)

    @abstractmethod
    def _violation(self, mask: Mask) -> str | None:
        """Name the first group of a matrix without remainder in which the mask is illegal."""

    @staticmethod
    def parse(text: str) -> SparsityPattern:
        """Return the pattern that ``text`` names; the inverse of ``str(pattern)``.

        Args:
            text: ``"unstructured"``, ``"2:4"``, ``"block:16x16"``, ``"row"`` or ``"column"``. Options follow a comma:
                ``"unstructured,scope=row"``, ``"2:4,remainder=dense"``, ``"column:9"`` (9 adjacent columns a channel).

        Raises:
            PatternError: the text names no pattern.

        Example:
            >>> import secateur
            >>> secateur.SparsityPattern.parse("block:4x8,remainder=dense")
            Block(4, 8, remainder='dense')
        """
        if not isinstance(text, str):
            raise TypeError(f"a pattern's name must be a str, got {type(text).__name__}")
        head, *options = (part.strip() for part in text.strip().lower().split(","))
        keywords: dict[str, str] = {}
        for option in options:
            key, separator, value = (piece.strip() for piece in option.partition("="))
            if not separator or not value or key in keywords:
                raise PatternError(_unknown_pattern(text))
            keywords[key] = value
        for grammar, kind in _GRAMMAR:
            if match := re.fullmatch(grammar, head):
                numbers = [int(group) for group in match.groups() if group is not None]
                if not keywords.keys() <= {f.name for f in fields(kind) if f.type != "int"}:  # type: ignore[arg-type]
                    raise PatternError(_unknown_pattern(text))
                return kind(*numbers, **keywords)
        raise PatternError(_unknown_pattern(text))

    def __repr__(self) -> str:
        required = [repr(getattr(self, f.name)) for f in fields(self) if f.default is MISSING]  # type: ignore[arg-type]
        options = [f"{name}={value!r}" for name, value in self._options()]
        return f"{type(self).__name__}({', '.join(required + options)})"

    def _options(self) -> list[tuple[str, object]]:
        """Fields that differ from their default."""
        pairs = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]  # type: ignore[arg-type]
        return [(name, value) for name, value, default in pairs if default is not MISSING and value != default]

    def _suffix(self) -> str:
        return "".join(f",{name}={value}" for name, value in self._options() if isinstance(value, str))

    def validate(self, shape: Sequence[int]) -> None:
        """Raise unless the pattern fits a matrix of ``shape = (out, in)``.

        Raises:
            PatternError: the shape is not two-dimensional, or does not divide and ``remainder`` is ``"error"``.

        Example:
            >>> import secateur
            >>> secateur.NM(2, 4).validate((8, 1022))
            Traceback (most recent call last):
            secateur._errors.PatternError: 2:4 needs an input size that is a multiple of 4, got 1022.
            Exclude the layer, or use NM(2, 4, remainder='dense') ('2:4,remainder=dense') to leave ...
        """
        if len(shape) != 2:
            raise PatternError(f"{self} needs a matrix of shape (out, in), got shape {tuple(shape)}.")
        if getattr(self, "remainder", "error") == "dense":
            return
        for size, step, side, name in zip(shape, self._tile(), ("output", "input"), ("rows", "columns"), strict=True):
            if size % step:
                dense = replace(self, remainder="dense") if hasattr(self, "remainder") else None  # type: ignore[type-var]
                tail = f"{size % step} {name if size % step > 1 else name[:-1]}"
                advice = f", or use {dense!r} ({str(dense)!r}) to leave its last {tail} dense." if dense else "."
                raise PatternError(
                    f"{self} needs an {side} size that is a multiple of {step}, got {size}.\nExclude the layer{advice}"
                )

    def resolve(self, sparsity: float | None) -> float:
        """Return the sparsity to use, given what was asked (None: nothing) and what the structure fixes.

        Raises:
            PatternError: the sparsity is missing, outside [0, 1] or not the pattern's own.
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
                f"{self} fixes the sparsity at {fixed:g}, but {sparsity:g} was asked. "
                "Leave the sparsity out, or choose another pattern."
            )
        return float(sparsity)

    def num_pruned(self, shape: Sequence[int], sparsity: float | None = None) -> int:
        """Return how many weights of a ``(out, in)`` matrix are pruned at ``sparsity``: exact, never an estimate.

        Raises:
            PatternError: the shape does not fit, or the sparsity is missing, outside [0, 1] or not the pattern's own.

        Example:
            >>> import secateur
            >>> secateur.Block(4, 4).num_pruned((8, 8), sparsity=0.6)  # round(0.6 * 4 tiles) = 2 tiles of 16
            32
        """
        self.validate(shape)
        sparsity = self.resolve(sparsity)
        rows, columns = self._core(shape)
        units = self._unit_scores(torch.empty(rows, columns, device="meta")).shape[1]
        return units_to_prune(units, sparsity) * (rows * columns // units) if units else 0

    def num_units(self, shape: Sequence[int]) -> int:
        """Return how many units compete with one another in a ``(out, in)`` matrix."""
        self.validate(shape)
        return self._unit_scores(torch.empty(*self._core(shape), device="meta")).shape[1]

    @torch.no_grad()
    def mask(self, scores: Scores, sparsity: float | None = None) -> Mask:
        """Return the mask that keeps the best-scored units at exactly the asked sparsity.

        Args:
            scores: ``[out, in]``, any floating dtype, strides and device; higher = keep. ``+inf`` always outranks
                finite scores.
            sparsity: fraction of units to prune, in [0, 1]. May be left out for a pattern that fixes its own (N:M).

        Returns:
            A contiguous bool tensor of the scores' shape, True = kept.

        Raises:
            PatternError: NaN or -inf among the scores, a shape that does not fit, or an impossible sparsity.
            TypeError: scores that are not a floating-point tensor.

        Example:
            >>> import torch, secateur
            >>> secateur.Unstructured().mask(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), sparsity=0.5).tolist()
            [[True, False], [False, True]]
        """
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(f"scores must be a floating-point tensor, got {kind}")
        self.validate(scores.shape)
        sparsity = self.resolve(sparsity)
        if scores.numel() and not scores.min() > -math.inf:  # min() propagates NaN, and NaN > -inf is False
            bad = int((~(scores > -math.inf)).sum())
            raise PatternError(f"{bad} of {scores.numel()} scores are NaN or -inf; scores must say what to keep.")
        rows, columns = self._core(scores.shape)
        if scores.dtype in (torch.float16, torch.bfloat16):
            scores = scores.float()  # exact, and CPU selection in half precision is an order of magnitude slower
        units = self._unit_scores(scores[:rows, :columns])
        keep = keep_top(units, units.shape[1] - units_to_prune(units.shape[1], sparsity))
        core = self._spread(keep, rows, columns)
        if (rows, columns) == tuple(scores.shape):
            return core
        mask = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
        mask[:rows, :columns] = core
        return mask

    def check(self, mask: Mask) -> None:
        """Raise unless ``mask`` (``[out, in]``, bool, True = kept) is legal under this pattern.

        Raises:
            PatternError: naming the first group that breaks the pattern.
            TypeError: a mask that is not a bool tensor.

        Example:
            >>> import torch, secateur
            >>> secateur.NM(1, 2).check(torch.tensor([[True, False, True, True]]))
            Traceback (most recent call last):
            secateur._errors.PatternError: row 0, columns 2 to 3 keep 2 weights, but 1:2 keeps exactly 1.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"a mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        self.validate(mask.shape)
        rows, columns = self._core(mask.shape)
        if not (mask[rows:].all() and mask[:, columns:].all()):
            raise PatternError(
                f"the remainder beyond {rows} rows and {columns} columns must stay dense under {self!r}."
            )
        if rows * columns and (violation := self._violation(mask[:rows, :columns])):
            raise PatternError(violation)

    def _core(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns that divide into tiles; what lies beyond is the dense remainder."""
        height, width = self._tile()
        return shape[0] - shape[0] % height, shape[1] - shape[1] % width


@dataclass(frozen=True, repr=False)
class Unstructured(SparsityPattern):
    """Any weight may be pruned, each for itself.

    Args:
        scope: what competes with what: ``"layer"`` (all weights), ``"row"`` (the weights of one output neuron, each
            row losing the same number) or None, the default: the scope that the importance was made for, the row for
            Wanda and RIA, else the layer. A bare ``mask`` call with None compares within the layer.

    Example:
        >>> import secateur
        >>> secateur.Unstructured(), str(secateur.Unstructured("row"))
        (Unstructured(), 'unstructured,scope=row')
    """

    scope: Scope | None = None

    def __post_init__(self) -> None:
        if self.scope not in (None, "layer", "row"):
            raise PatternError(f"scope must be 'layer', 'row' or None, got {self.scope!r}.")

    def __str__(self) -> str:
        return f"unstructured{self._suffix()}"

    @property
    def width(self) -> int | None:
        return 1

    @property
    def sparsity(self) -> float | None:
        return None

    def _tile(self) -> tuple[int, int]:
        return 1, 1

    def _units(self, matrix: Tensor) -> Tensor:
        return matrix.unsqueeze(2) if self.scope == "row" else matrix.reshape(1, -1, 1)

    def _spread(self, units: Tensor, rows: int, columns: int) -> Tensor:
        return units.view(rows, columns)

    def _violation(self, mask: Mask) -> str | None:
        if self.scope != "row":
            return None
        kept = mask.sum(1)
        found = _first(kept != kept[0])
        if found is None:
            return None
        counts = f"row {found[0]} keeps {int(kept[found])} weights and row 0 keeps {int(kept[0])}"
        return f"{counts}, but {self} keeps as many in each row."


@dataclass(frozen=True, repr=False)
class NM(SparsityPattern):
    """In every ``m`` consecutive inputs of a row exactly ``n`` weights are kept; groups never cross rows.

    ``n`` counts what is *kept*, as in PyTorch, NVIDIA's 2:4 and most papers; Wanda's, SparseGPT's and RIA's code count
    zeros, so their ``1:4`` is ``NM(3, 4)``.

    Args:
        n: weights kept in each group, 0 to m.
        m: consecutive columns in a group, at least 1.
        remainder: ``"error"`` raises when the input size is not a multiple of m; ``"dense"`` leaves the tail dense.

    Raises:
        PatternError: n or m out of range.

    Example:
        >>> import secateur
        >>> secateur.NM(2, 4).sparsity
        0.5

    Reference:
        Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv:2104.08378.
    """

    n: int
    m: int
    remainder: Remainder = "error"

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.m < 1 or not 0 <= self.n <= self.m:
            raise PatternError(
                f"N:M keeps n of every m weights, so 0 <= n <= m and m >= 1; got n={self.n}, m={self.m}."
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{self._suffix()}"

    @property
    def width(self) -> int | None:
        return self.m

    @property
    def sparsity(self) -> float | None:
        return 1 - self.n / self.m

    def _tile(self) -> tuple[int, int]:
        return 1, self.m

    def _units(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(matrix.numel() // self.m, self.m, 1)

    def _spread(self, units: Tensor, rows: int, columns: int) -> Tensor:
        return units.view(rows, columns)

    def _violation(self, mask: Mask) -> str | None:
        kept = mask.unflatten(1, (-1, self.m)).sum(2)
        found = _first(kept != self.n)
        if found is None:
            return None
        row, group = found
        columns = f"columns {group * self.m} to {(group + 1) * self.m - 1}"
        return (
            f"row {row}, {columns} keep {int(kept[row, group])} weights, but {self.n}:{self.m} keeps exactly {self.n}."
        )


@dataclass(frozen=True, repr=False)
class Block(SparsityPattern):
    """Tiles of ``height`` outputs by ``width`` inputs are kept or pruned whole. ``Block(1, 1)`` masks as Unstructured.

    Args:
        height: rows (outputs) in a tile, at least 1.
        width: columns (inputs) in a tile, at least 1.
        remainder: ``"error"`` raises when a side does not divide; ``"dense"`` leaves the incomplete tiles dense.

    Raises:
        PatternError: a size below 1.

    Example:
        >>> import torch, secateur
        >>> secateur.Block(1, 2).mask(torch.tensor([[3.0, 0.0, 2.0, 2.0]]), sparsity=0.5).tolist()  # 9 > 8
        [[True, True, False, False]]
    """

    height: int
    width: int
    remainder: Remainder = "error"

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.height < 1 or self.width < 1:
            raise PatternError(f"a block needs at least one row and one column, got {self.height}x{self.width}.")

    def __str__(self) -> str:
        return f"block:{self.height}x{self.width}{self._suffix()}"

    @property
    def sparsity(self) -> float | None:
        return None

    def _tile(self) -> tuple[int, int]:
        return self.height, self.width

    def _unit_size(self, rows: int, columns: int) -> tuple[int, int]:
        return self._tile()

    def _units(self, matrix: Tensor) -> Tensor:
        tiles = matrix.unflatten(1, (-1, self.width)).unflatten(0, (-1, self.height))
        units: Tensor = tiles.transpose(1, 2).flatten(2).flatten(0, 1).unsqueeze(0)
        return units

    def _spread(self, units: Tensor, rows: int, columns: int) -> Tensor:
        tiles = units.view(rows // self.height, 1, columns // self.width, 1)
        return tiles.expand(-1, self.height, -1, self.width).reshape(rows, columns).contiguous()

    def _violation(self, mask: Mask) -> str | None:
        tiles = mask.unflatten(1, (-1, self.width)).unflatten(0, (-1, self.height))
        kept = tiles.sum((1, 3))
        found = _first((kept != 0) & (kept != self.height * self.width))
        if found is None:
            return None
        row, column = found
        return (
            f"the tile at row {row * self.height}, column {column * self.width} keeps {int(kept[row, column])} of its "
            f"{self.height * self.width} weights, but {self} keeps all or none."
        )


@dataclass(frozen=True, repr=False)
class Row(SparsityPattern):
    """Whole rows, the weights of one output channel, are kept or pruned.

    Example:
        >>> import torch, secateur
        >>> secateur.Row().mask(torch.tensor([[1.0, 1.0], [0.0, 9.0]]), sparsity=0.5).tolist()
        [[False, False], [True, True]]
    """

    def __str__(self) -> str:
        return "row"

    @property
    def width(self) -> int | None:
        return None

    @property
    def sparsity(self) -> float | None:
        return None

    def _tile(self) -> tuple[int, int]:
        return 1, 1

    def _unit_size(self, rows: int, columns: int) -> tuple[int, int]:
        return 1, columns

    def _units(self, matrix: Tensor) -> Tensor:
        return matrix.unsqueeze(0)

    def _spread(self, units: Tensor, rows: int, columns: int) -> Tensor:
        return units.view(rows, 1).expand(rows, columns).contiguous()

    def _violation(self, mask: Mask) -> str | None:
        found = _first(mask.any(1) & ~mask.all(1))
        return None if found is None else f"row {found[0]} is kept in part, but {self} keeps all or none of it."


@dataclass(frozen=True, repr=False)
class Column(SparsityPattern):
    """Whole columns, the weights that read one input channel, are kept or pruned.

    Args:
        width: adjacent columns that make one channel. 1, the default, for linear layers; when a convolution is pruned
            it is set to the number of kernel positions, so that an input channel goes as a whole.

    Raises:
        PatternError: a width below 1.

    Example:
        >>> import torch, secateur
        >>> secateur.Column().mask(torch.tensor([[1.0, 2.0], [1.0, 0.0]]), sparsity=0.5).tolist()
        [[False, True], [False, True]]
    """

    width: int = 1

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.width < 1:
            raise PatternError(f"a channel has at least one column, got width={self.width}.")

    def __str__(self) -> str:
        return "column" if self.width == 1 else f"column:{self.width}"

    @property
    def sparsity(self) -> float | None:
        return None

    def _tile(self) -> tuple[int, int]:
        return 1, self.width

    def _unit_size(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, self.width

    def _units(self, matrix: Tensor) -> Tensor:
        units: Tensor = matrix.unflatten(1, (-1, self.width)).transpose(0, 1).flatten(1).unsqueeze(0)
        return units

    def _spread(self, units: Tensor, rows: int, columns: int) -> Tensor:
        return units.view(1, -1, 1).expand(rows, -1, self.width).reshape(rows, columns).contiguous()

    def _violation(self, mask: Mask) -> str | None:
        channels = mask.unflatten(1, (-1, self.width))
        found = _first(channels.any(2).any(0) & ~channels.all(2).all(0))
        if found is None:
            return None
        return f"input channel {found[0]} is kept in part, but {self} keeps all or none of it."


# Inside the class body the bare names would be the class variables themselves.
_Unstructured: TypeAlias = Unstructured
_NM: TypeAlias = NM
_Block: TypeAlias = Block
_Row: TypeAlias = Row
_Column: TypeAlias = Column
SparsityPattern.Unstructured = Unstructured
SparsityPattern.NM = NM
SparsityPattern.Block = Block
SparsityPattern.Row = Row
SparsityPattern.Column = Column

_GRAMMAR: tuple[tuple[str, type[SparsityPattern]], ...] = (
    (r"unstructured", Unstructured),
    (r"(\d{1,9}):(\d{1,9})", NM),
    (r"block:(\d{1,9})x(\d{1,9})", Block),
    (r"row", Row),
    (r"column(?::(\d{1,9}))?", Column),
)


def with_scope(pattern: SparsityPattern, scope: Scope) -> SparsityPattern:
    """Fill in the scope of an ``Unstructured()`` that left it to the importance; other patterns are returned as is."""
    return Unstructured(scope) if pattern == Unstructured() else pattern


def with_channel_width(pattern: SparsityPattern, width: int) -> SparsityPattern:
    """Let ``Column()`` mean whole input channels of ``width`` adjacent columns; any other pattern is returned as is."""
    return Column(width) if pattern == Column() else pattern


def check_sparsity(sparsity: float) -> None:
    """Raise unless ``sparsity`` is a number in [0, 1]."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise TypeError(f"sparsity must be a number, got {type(sparsity).__name__}")
    if not 0 <= sparsity <= 1:
        hint = f" Did you mean {sparsity / 100:g}?" if 1 < sparsity <= 100 else ""
        raise PatternError(f"sparsity is the fraction of zeros, between 0 and 1, got {sparsity:g}.{hint}")


def _check_sizes(pattern: SparsityPattern) -> None:
    for field in fields(pattern):  # type: ignore[arg-type]
        value = getattr(pattern, field.name)
        if field.name == "remainder":
            if value not in ("error", "dense"):
                raise PatternError(f"remainder must be 'error' or 'dense', got {value!r}.")
        elif isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{type(pattern).__name__}: {field.name} must be an int, got {type(value).__name__}")


def _unknown_pattern(text: str) -> str:
    return (
        f"{text!r} names no pattern. Patterns are 'unstructured', 'N:M' such as '2:4', 'block:HxW' such as "
        "'block:16x16', 'row' and 'column'; options follow a comma: ',scope=row' or ',scope=layer' for unstructured, "
        "',remainder=dense' for N:M and block."
    )


def _first(violations: Tensor) -> tuple[int, ...] | None:
    """Index of the first True, or None."""
    if not violations.any():
        return None
    flat = int(violations.reshape(-1).to(torch.uint8).argmax())
    return tuple(int(index) for index in torch.unravel_index(torch.tensor(flat), violations.shape))


def _sum_of_squares(elements: Tensor) -> Tensor:
    """Scores of units from those of their elements, in the last dimension: the sum of signed squares.

    In float64, so that no float32 score over- or underflows, and summed along contiguous rows, so that the order of
    additions is the same for every unit and equal units tie exactly.
    """
    wide = elements.double().contiguous()
    sums = (wide * wide.abs()).sum(-1)
    if not sums.is_meta and sums.isnan().any():  # squares of opposite sign, each beyond the largest float64
        raise PatternError("the scores are too large: their squares overflow. Scale them down.")
    return sums


def units_to_prune(units: int, sparsity: float) -> int:
    """The one place that turns a fraction into a count."""
    return round(sparsity * units)


def keep_top(scores: Tensor, num_keep: int) -> Tensor:
    """True for the ``num_keep`` largest of each row of ``[competitions, units]``; of equals, the first."""
    if num_keep == 0 or num_keep == scores.shape[1] or not scores.numel():
        return torch.full(scores.shape, num_keep > 0, dtype=torch.bool, device=scores.device)
    if scores.shape[1] <= _NARROW:
        return _keep_top_narrow(scores, num_keep)
    return _keep_top_wide(scores, num_keep)


# Up to this many units all pairs are compared: regular passes over memory, which beat selection for short rows.
_NARROW = 32
_CHUNK = 1 << 20  # elements worked on at a time, so that intermediates stay in cache


def _keep_top_narrow(scores: Tensor, num_keep: int) -> Tensor:
    size = scores.shape[1]
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for part, out in zip(scores.split(_CHUNK // size), keep.split(_CHUNK // size), strict=True):
        # How many others outrank each unit, less num_keep: first all later units, less one for each that it beats.
        excess = [part.new_full((len(part),), size - 1 - i - num_keep, dtype=torch.int8) for i in range(size)]
        for i in range(size):
            for j in range(i + 1, size):
                first_wins = (part[:, i] >= part[:, j]).view(torch.int8)  # the lower index wins a tie
                excess[i] -= first_wins
                excess[j] += first_wins
        for i in range(size):
            torch.signbit(excess[i], out=out[:, i])  # negative is kept; vectorised, where a comparison is not
    return keep


def _keep_top_wide(scores: Tensor, num_keep: int) -> Tensor:
    threshold = kth_smallest(scores, scores.shape[1] - num_keep + 1)  # the lowest score that is kept
    keep = scores >= threshold
    counts = keep.count_nonzero().view(1) if len(keep) == 1 else keep.sum(1)  # the first is several times faster
    excess = counts - num_keep  # ties at the threshold beyond what may be kept
    for row in excess.nonzero().flatten().tolist():
        ties = (scores[row] == threshold[row]).nonzero().flatten()
        keep[row, ties[len(ties) - int(excess[row]) :]] = False
    return keep


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest (from 1) of each row, ``[rows, 1]``."""
    if scores.device.type != "cpu":
        return scores.kthvalue(k, dim=1, keepdim=True).values
    # On a CPU torch's selection takes quadratic time on sorted rows; numpy's does not, and is vectorised.
    return torch.from_numpy(np.partition(scores.numpy(), k - 1, axis=1)[:, k - 1 : k].copy())


@torch.no_grad()
def cut_between(scores: Tensor, num_pruned: int, near: float | None = None) -> Tensor:
    """The value halfway between the highest pruned and the lowest kept unit of each competition.

    Args:
        scores: ``[competitions, units]``, finite and not negative.
        num_pruned: units to prune in each competition.
        near: where the value may be expected if there is one competition, such as where it was a step ago. It saves
            time and never changes the result.

    Returns:
        ``[competitions, 1]``; -inf where nothing and inf where everything is pruned.
    """
    competitions, units = scores.shape
    if num_pruned in (0, units):
        return scores.new_full((competitions, 1), math.inf if num_pruned else -math.inf)
    if units <= _NARROW:
        return torch.cat([_cut_narrow(part, num_pruned) for part in scores.split(_CHUNK // units)])
    if scores.device.type != "cpu":
        highest_pruned = scores.kthvalue(num_pruned, dim=1, keepdim=True).values
        lowest_kept = scores.kthvalue(num_pruned + 1, dim=1, keepdim=True).values
        return _between(highest_pruned, lowest_kept)
    values = scores.numpy()
    if competitions == 1 and near is not None:
        values, num_pruned = _around(values, num_pruned, near)
    parted = np.partition(values, num_pruned, axis=1)
    highest = torch.from_numpy(parted[:, :num_pruned].max(1, keepdims=True))
    lowest = torch.from_numpy(parted[:, num_pruned : num_pruned + 1].copy())
    return _between(highest, lowest)


def _between(low: Tensor, high: Tensor) -> Tensor:
    """The middle; between neighbours among floats, which have none, the higher one, so that ``>=`` tells them apart."""
    middle = low + (high - low) / 2
    return torch.where(middle > low, middle, high)


def _cut_narrow(scores: Tensor, num_pruned: int) -> Tensor:
    columns = list(scores.unbind(1))
    units = len(columns)
    if (units, num_pruned) == (4, 2):  # the two in the middle are the winner of the losers and the loser of the winners
        a, b, c, d = columns
        low = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
        high = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    else:
        # A network of comparators on whole columns: regular passes over memory, as for masks.
        for passes in range(units - 1, num_pruned - 2, -1):  # the highest of the rest rises to its place
            for i in range(passes):
                lower = torch.minimum(columns[i], columns[i + 1])
                columns[i + 1] = torch.maximum(columns[i], columns[i + 1])
                columns[i] = lower
        low, high = columns[num_pruned - 1], columns[num_pruned]
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    return _between(low, high).unsqueeze(1)


def _around(values: np.ndarray, num_pruned: int, near: float) -> tuple[np.ndarray, int]:
    """The values around the cut, and how many of them are pruned: two passes over memory instead of a selection."""
    for reach in (0.03, 0.3):
        above = values > near * (1 - reach)
        below = values.size - int(np.count_nonzero(above))
        if below >= num_pruned:
            continue
        above &= values < near * (1 + reach)
        inside = np.flatnonzero(above)
        if below + len(inside) > num_pruned:
            return values[0, inside][None], num_pruned - below
    return values, num_pruned


def on_the_way(pattern: SparsityPattern, sparsity: float) -> tuple[SparsityPattern, float]:
    """The pattern and sparsity to prune with while a schedule has only come to ``sparsity``.

    N:M has no sparsity but its own: on the way each group of m keeps more than n.
    """
    if isinstance(pattern, NM):
        pattern = replace(pattern, n=max(pattern.n, pattern.m - units_to_prune(pattern.m, sparsity)))
        return pattern, pattern.resolve(None)
    return pattern, sparsity
