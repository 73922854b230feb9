"""The patterns, and what is derived from one of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from secateur._checks import instance, integer
from secateur._errors import PatternError
from secateur._types import Mask
from secateur.patterns._pattern import Remainder, Scope, SparsityPattern
from secateur.patterns._regular import keep_regular
from secateur.patterns._select import units_to_prune
from secateur.patterns._units import Units


@dataclass(frozen=True, repr=False)
class Unstructured(SparsityPattern):
    """Any single weight may be pruned.

    Args:
        scope: which weights compete: ``"layer"`` (all weights), ``"row"`` (the weights of one output neuron, so that
            each row loses the same number) or None. None, the default, takes the scope that the importance was made
            for: the row for Wanda and RIA, else the layer. ``mask`` itself takes None as the layer.

    Raises:
        PatternError: another scope.

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

    def _unit(self, rows: int, columns: int) -> tuple[int, int]:
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
        return f"{counts}, but {self} keeps the same number in each row."


@dataclass(frozen=True, repr=False)
class NM(SparsityPattern):
    """Exactly ``n`` weights are kept in every group of ``m`` consecutive inputs of a row.

    A group never crosses rows. ``n`` counts what is *kept*, as in PyTorch, NVIDIA's 2:4 and most papers. The code of
    Wanda, SparseGPT and RIA counts zeros: their ``1:4`` is ``NM(3, 4)``.

    Args:
        n: weights kept in each group, 0 to m.
        m: consecutive columns in a group, at least 1.
        remainder: for an input size that is not a multiple of m, ``"error"`` raises and ``"dense"`` leaves the columns
            beyond the last whole group dense.

    Raises:
        PatternError: n or m is out of range, or another remainder.
        TypeError: n or m is not an int.

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

    def _unit(self, rows: int, columns: int) -> tuple[int, int]:
        return 1, 1

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
class TransposableNM(NM):
    """N:M along rows and along columns: each m x m tile keeps n weights in each of its rows and columns.

    So the transpose of the weight is N:M, too, as the backward pass of training on N:M hardware needs. The mask has the
    largest sum of scores that this allows, exactly; it keeps less than that of N:M alone. Of negative scores, which
    are those of weights that an earlier round pruned, as few as possible are kept.

    Args:
        n: weights kept in each row and column of a tile, 0 to m.
        m: rows and columns of a tile, at least 1.
        remainder: for a size that is not a multiple of m, ``"error"`` raises and ``"dense"`` leaves the incomplete
            tiles dense.

    Raises:
        PatternError: n or m is out of range, or another remainder.
        TypeError: n or m is not an int.

    Example:
        >>> import torch, secateur
        >>> pattern = secateur.TransposableNM(1, 2)
        >>> scores = torch.tensor([[5.0, 4.0], [4.0, 0.0]])
        >>> str(pattern), pattern.mask(scores).tolist()  # 4 + 4 is more than 5 + 0
        ('transposable:1:2', [[False, True], [True, False]])

    Reference:
        Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable
        Masks", 2021, arXiv:2102.08124.
    """

    def __str__(self) -> str:
        return f"transposable:{super().__str__()}"

    def _tile(self) -> tuple[int, int]:
        return self.m, self.m

    def _keep(self, units: Units, scores: Tensor, num_keep: int) -> Tensor:
        core = scores.view(units.core)
        tiles = core.unflatten(0, (-1, self.m)).unflatten(2, (-1, self.m)).transpose(1, 2)
        kept = keep_regular(tiles.flatten(0, 1), num_keep).view(tiles.shape)
        return kept.transpose(1, 2).reshape(scores.shape)

    def _violation(self, mask: Mask) -> str | None:
        if (found := super()._violation(mask)) is not None:
            return found
        kept = mask.unflatten(0, (-1, self.m)).sum(1)
        wrong = _first(kept != self.n)
        if wrong is None:
            return None
        group, column = wrong
        rows = f"rows {group * self.m} to {(group + 1) * self.m - 1}"
        return f"column {column}, {rows} keep {int(kept[wrong])} weights, but {self} keeps exactly {self.n}."


@dataclass(frozen=True, repr=False)
class Block(SparsityPattern):
    """Tiles of ``height`` outputs by ``width`` inputs are kept or pruned whole.

    ``Block(1, 1)`` gives the same masks as ``Unstructured("layer")``.

    Args:
        height: rows (outputs) in a tile, at least 1.
        width: columns (inputs) in a tile, at least 1.
        remainder: for a size that is not a multiple of the tile's, ``"error"`` raises and ``"dense"`` leaves the
            incomplete tiles dense.

    Raises:
        PatternError: a size below 1, or another remainder.
        TypeError: a size that is not an int.

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
            raise PatternError(f"a tile needs at least one row and one column, got {self.height}x{self.width}.")

    def __str__(self) -> str:
        return f"block:{self.height}x{self.width}{self._suffix()}"

    @property
    def sparsity(self) -> float | None:
        return None

    def _tile(self) -> tuple[int, int]:
        return self.height, self.width

    def _unit(self, rows: int, columns: int) -> tuple[int, int]:
        return self._tile()

    def _competitions(self, rows: int, columns: int, units: int) -> tuple[int, int]:
        return 1, units

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
    """Rows are kept or pruned whole. A row holds the weights of one output channel.

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

    def _competitions(self, rows: int, columns: int, units: int) -> tuple[int, int]:
        return 1, units

    def _violation(self, mask: Mask) -> str | None:
        found = _first(mask.any(1) & ~mask.all(1))
        return None if found is None else f"row {found[0]} is kept in part, but {self} keeps all or none of a row."


@dataclass(frozen=True, repr=False)
class Column(SparsityPattern):
    """Columns are kept or pruned whole. They hold the weights that read one input channel.

    Args:
        width: adjacent columns of one channel. 1, the default, is for linear layers. Pruning a convolution sets it to
            the number of kernel positions, so that an input channel is kept or pruned whole.

    Raises:
        PatternError: a width below 1.
        TypeError: a width that is not an int.

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

    def _competitions(self, rows: int, columns: int, units: int) -> tuple[int, int]:
        return 1, units

    def _violation(self, mask: Mask) -> str | None:
        channels = mask.unflatten(1, (-1, self.width))
        found = _first(channels.any(2).any(0) & ~channels.all(2).all(0))
        if found is None:
            return None
        return f"input channel {found[0]} is kept in part, but {self} keeps all or none of a channel."


# Set here and not in the class, which must exist before the classes that derive from it.
SparsityPattern.Unstructured = Unstructured
SparsityPattern.NM = NM
SparsityPattern.TransposableNM = TransposableNM
SparsityPattern.Block = Block
SparsityPattern.Row = Row
SparsityPattern.Column = Column

# The one table of the patterns' texts. Each number in a text is a field, in the order of the fields.
SparsityPattern._grammar = (
    (r"unstructured", Unstructured),
    (r"(\d{1,9}):(\d{1,9})", NM),
    (r"transposable:(\d{1,9}):(\d{1,9})", TransposableNM),
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
    return instance("pattern", pattern, SparsityPattern, "a SparsityPattern or its text")  # type: ignore[type-abstract]


def with_scope(pattern: SparsityPattern, scope: Scope) -> SparsityPattern:
    """Return ``Unstructured(scope)`` for ``Unstructured()``, whose scope is open; else the pattern itself."""
    return Unstructured(scope) if pattern == Unstructured() else pattern


def with_channel_width(pattern: SparsityPattern, width: int) -> SparsityPattern:
    """Return ``Column(width)`` for ``Column()``, which means whole input channels; else the pattern itself."""
    return Column(width) if pattern == Column() else pattern


def with_dense_remainder(pattern: SparsityPattern) -> SparsityPattern:
    """Return the pattern with ``remainder="dense"``; the pattern itself where it fits every size.

    Example:
        >>> import secateur
        >>> secateur.patterns.with_dense_remainder(secateur.NM(2, 4))
        NM(2, 4, remainder='dense')
    """
    return replace(pattern, remainder="dense") if hasattr(pattern, "remainder") else pattern  # type: ignore[type-var]


def at_partial_sparsity(pattern: SparsityPattern, sparsity: float) -> tuple[SparsityPattern, float]:
    """Return the pattern and the sparsity to prune with while a schedule is at ``sparsity``.

    N:M fixes its own sparsity. Before the schedule reaches it, each group of m keeps more than n.
    """
    if isinstance(pattern, NM):
        pattern = replace(pattern, n=max(pattern.n, pattern.m - units_to_prune(pattern.m, sparsity)))
        return pattern, pattern.resolve(None)
    return pattern, sparsity


def along_rows(pattern: SparsityPattern, rows: int) -> SparsityPattern:
    """Return the pattern as it is along rows, in which weights are stored: N:M for a transposable one.

    Args:
        pattern: any.
        rows: of the matrix. Where some of them are left dense, no pattern holds in all rows.

    Example:
        >>> import secateur
        >>> secateur.patterns.along_rows(secateur.TransposableNM(2, 4), 8)
        NM(2, 4)
    """
    if not isinstance(pattern, TransposableNM):
        return pattern
    return Unstructured() if rows % pattern.m else NM(pattern.n, pattern.m, pattern.remainder)


def check_independent(pattern: SparsityPattern, what: str) -> None:
    """Raise if competitions of a pattern depend on one another, for what decides each of them alone.

    Args:
        pattern: any.
        what: decides so, for the message.

    Raises:
        PatternError: they do.
    """
    if isinstance(pattern, TransposableNM):
        raise PatternError(
            f"{what} decides each group of a row alone, but {pattern} ties rows and columns together.\n"
            f"Train with {pattern.n}:{pattern.m}, or prune with secateur.prune_ and keep the zeros while training."
        )


def _check_sizes(pattern: SparsityPattern) -> None:
    for field in fields(pattern):  # type: ignore[arg-type]
        value = getattr(pattern, field.name)
        if field.name == "remainder":
            if value not in ("error", "dense"):
                raise PatternError(f"remainder must be 'error' or 'dense', got {value!r}.")
        else:
            integer(f"{type(pattern).__name__}: {field.name}", value)


def _first(violations: Tensor) -> tuple[int, ...] | None:
    """The index of the first True, or None."""
    if not violations.any():
        return None
    flat = int(violations.reshape(-1).to(torch.uint8).argmax())
    return tuple(int(index) for index in torch.unravel_index(torch.tensor(flat), violations.shape))
