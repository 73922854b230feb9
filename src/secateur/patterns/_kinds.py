"""The five patterns."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from secateur._errors import PatternError
from secateur._types import Mask
from secateur.patterns._pattern import Remainder, Scope, SparsityPattern
from secateur.patterns._select import units_to_prune


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

    def _competitions(self, rows: int, columns: int, units: int) -> tuple[int, int]:
        return (rows, columns) if self.scope == "row" else (1, units)

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

    def _competitions(self, rows: int, columns: int, units: int) -> tuple[int, int]:
        return units // self.m, self.m

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

    def _unit(self, rows: int, columns: int) -> tuple[int, int]:
        return self._tile()

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

    def _unit(self, rows: int, columns: int) -> tuple[int, int]:
        return 1, columns

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

    def _unit(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, self.width

    def _violation(self, mask: Mask) -> str | None:
        channels = mask.unflatten(1, (-1, self.width))
        found = _first(channels.any(2).any(0) & ~channels.all(2).all(0))
        if found is None:
            return None
        return f"input channel {found[0]} is kept in part, but {self} keeps all or none of it."


SparsityPattern.Unstructured = Unstructured
SparsityPattern.NM = NM
SparsityPattern.Block = Block
SparsityPattern.Row = Row
SparsityPattern.Column = Column

# The one table of patterns by their text; whole numbers in it are the fields in their order.
SparsityPattern._grammar = (
    (r"unstructured", Unstructured),
    (r"(\d{1,9}):(\d{1,9})", NM),
    (r"block:(\d{1,9})x(\d{1,9})", Block),
    (r"row", Row),
    (r"column(?::(\d{1,9}))?", Column),
)


def as_pattern(pattern: SparsityPattern | str) -> SparsityPattern:
    """Return the pattern itself, or the one that a text names.

    Raises:
        PatternError: the text names no pattern.
        TypeError: neither a pattern nor text.
    """
    if isinstance(pattern, str):
        return SparsityPattern.parse(pattern)
    if not isinstance(pattern, SparsityPattern):
        raise TypeError(f"pattern must be a SparsityPattern or its text, got {type(pattern).__name__}")
    return pattern


def with_scope(pattern: SparsityPattern, scope: Scope) -> SparsityPattern:
    """Fill in the scope of an ``Unstructured()`` that left it to the importance; other patterns are returned as is."""
    return Unstructured(scope) if pattern == Unstructured() else pattern


def with_channel_width(pattern: SparsityPattern, width: int) -> SparsityPattern:
    """Let ``Column()`` mean whole input channels of ``width`` adjacent columns; any other pattern is returned as is."""
    return Column(width) if pattern == Column() else pattern


def at_partial_sparsity(pattern: SparsityPattern, sparsity: float) -> tuple[SparsityPattern, float]:
    """The pattern and sparsity to prune with while a schedule has only come to ``sparsity``.

    N:M has no sparsity but its own: on the way each group of m keeps more than n.
    """
    if isinstance(pattern, NM):
        pattern = replace(pattern, n=max(pattern.n, pattern.m - units_to_prune(pattern.m, sparsity)))
        return pattern, pattern.resolve(None)
    return pattern, sparsity


def _check_sizes(pattern: SparsityPattern) -> None:
    for field in fields(pattern):  # type: ignore[arg-type]
        value = getattr(pattern, field.name)
        if field.name == "remainder":
            if value not in ("error", "dense"):
                raise PatternError(f"remainder must be 'error' or 'dense', got {value!r}.")
        elif isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{type(pattern).__name__}: {field.name} must be an int, got {type(value).__name__}")


def _first(violations: Tensor) -> tuple[int, ...] | None:
    """Index of the first True, or None."""
    if not violations.any():
        return None
    flat = int(violations.reshape(-1).to(torch.uint8).argmax())
    return tuple(int(index) for index in torch.unravel_index(torch.tensor(flat), violations.shape))
