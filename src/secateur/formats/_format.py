"""The base of the storage formats. ``docs/format.md`` specifies every byte."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from secateur._errors import FormatError, PatternError, RecipeError
from secateur._types import Mask, Weight, dtype_name
from secateur.formats._arrays import NO_VALUES, check_mask, check_shape, check_weight, expect
from secateur.formats._grid import GRIDS
from secateur.formats._sparse import Entries, check_blocksize, layout_of, to_scipy_sparse, to_torch_sparse
from secateur.formats._values import INT4, VALUE_DTYPES, as_value_dtype, encode, is_scaled, value_name
from secateur.patterns import NM, Block, SparsityPattern, along_rows

_IN_CACHE = 1 << 14  # weights that are compared at a time


@dataclass(frozen=True, eq=False, repr=False)
class Format(ABC):
    """A sparse ``[out, in]`` weight as a few tensors: which weights are stored, and their values.

    A pruned weight is not stored and comes back as ``+0.0``. A stored weight comes back bit for bit, ``-0.0``, NaN and
    infinities included, unless ``value_dtype`` asks for fewer bits. With int8, a weight is ``code * scale``, with one
    float32 scale for each output row, ``max |w| / 127``; with int4, which :class:`Bitmask` and :class:`DensePacked`
    can hold, with one float16 scale for each output row and group of 64 columns. :meth:`error` returns the error of the
    rounding.

    The formats are :class:`Bitmask`, :class:`NMPacked`, :class:`BlockPacked`, :class:`RowPacked` and
    :class:`ColumnPacked`, and :class:`DensePacked` for weights without zeros. :func:`~secateur.formats.choose` returns
    the smallest for a pattern. Make one with :meth:`from_dense` or, from tensors that are not trusted, with
    :meth:`from_tensors`. The constructor checks nothing.

    Args:
        shape: ``(out, in)`` of the dense weight.
        pattern: the pattern that the weight was pruned to.
        values: the stored weights, in float32, bfloat16, float16 or int8; for int4 bytes, two weights in each.
        scales: float32, one for each stored row, for int8 values; float16 ``[out, ceil(in / 64)]`` for int4; else None.
    """

    name: ClassVar[str]  # in files
    names: ClassVar[tuple[str, ...]]  # of all tensors that it may have: values, scales, and further ones
    value_names: ClassVar[frozenset[str]] = frozenset({"values", "right", "bottom"})  # the tensors of the value dtype
    _patterns: ClassVar[tuple[type[SparsityPattern], ...]]  # the ones that it can hold
    _default: ClassVar[SparsityPattern | None] = None  # of a weight whose pattern is not known
    _scaled_rows: ClassVar[str | None] = None  # the tensor that lists the rows that have a scale; None: all rows have
    _layout: ClassVar[torch.layout] = torch.sparse_csr  # the sparse layout that is most like it
    _largest_group: ClassVar[int | None] = None  # the largest m of the N:M patterns that it can hold

    # How many bytes the values of a mask take as int4; None for a format that cannot hold these.
    _int4_nbytes: ClassVar[staticmethod[[Mask], int] | None] = None

    shape: tuple[int, int]
    pattern: SparsityPattern
    values: Tensor
    scales: Tensor | None

    @classmethod
    @final
    @torch.no_grad()
    def from_dense(
        cls,
        weight: Weight,
        mask: Mask | None = None,
        pattern: SparsityPattern | None = None,
        value_dtype: torch.dtype | None = None,
    ) -> Self:
        """Pack a dense weight.

        Args:
            weight: ``[out, in]``, floating point.
            mask: ``[out, in]`` bool, True = kept. A weight that it prunes is not stored, whatever its value. None, the
                default, keeps every weight that is not zero (``-0.0`` is zero).
            pattern: the pattern that the mask follows. :class:`NMPacked` and :class:`BlockPacked` need it.
            value_dtype: float32, bfloat16, float16, int8 or ``INT4``. None, the default, is that of the weight.

        Raises:
            PatternError: the mask or the shape breaks the pattern, or the mask has another shape than the weight.
            RecipeError: values cannot be stored in ``value_dtype``.
            FormatError: a weight that ``value_dtype`` cannot hold, or a weight of a dtype that cannot be stored.
            TypeError: a weight that is not a floating-point tensor, or a mask that is not a bool tensor.

        Example:
            >>> import torch
            >>> from secateur.formats import Bitmask
            >>> packed = Bitmask.from_dense(torch.tensor([[0.0, 1.5, 0.0, -2.0]]))
            >>> packed, packed.values.tolist(), packed.bitmask.tolist()
            (Bitmask(1x4, unstructured, float32, 17 bytes), [1.5, -2.0], [[10]])
            >>> packed.to_dense().tolist()
            [[0.0, 1.5, 0.0, -2.0]]
        """
        check_weight(weight)
        pattern = cls._accept(pattern)
        pattern.validate(weight.shape)
        mask = weight != 0 if mask is None else check_mask(mask, weight)
        kept = torch.where(mask, weight.detach(), torch.zeros((), dtype=weight.dtype, device=weight.device))
        dtype = as_value_dtype(value_dtype)
        cls._check_holds(dtype)
        stored, scales = encode(kept, dtype)
        return cls._pack(stored, mask, pattern, scales)

    @final
    def to_dense(self) -> Weight:
        """Return the weight, ``[out, in]``, in the dtype of the values, or in float32 for int8 values."""
        stored, scales = self.unscaled()
        return stored if scales is None else stored.float() * scales[:, None]

    @final
    def unscaled(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight in the dtype of the values, ``[out, in]``, and the scale of every row, ``[out]`` or None.

        The layouts of the kernels are made from these, so that int8 codes are not rounded a second time. On the meta
        device these have no values either. With int4: the weight itself, in float32, without scales.
        """
        if self.value_dtype == INT4:
            if self.values.is_meta:
                return self.values.new_empty(self.shape, dtype=torch.float32), None
            codes, groups = self.grouped()
            return codes * GRIDS["int4"].spread(groups, self.shape[1]), None
        if self.values.is_meta:
            scales = None if self.scales is None else self.scales.new_empty(self.shape[0])
            return self.values.new_empty(self.shape), scales
        return self._stored(), None if self.scales is None else self._row_scales()

    @final
    def grouped(self) -> tuple[Tensor, Tensor]:
        """Return int4 codes, int8 ``[out, in]``, and the scales of groups of 64 columns, float16 ``[out, groups]``.

        Raises:
            FormatError: the values are not int4, or on the meta device.
        """
        self._must_have_values()
        if self.value_dtype != INT4 or self.scales is None:
            raise FormatError(f"the values are {value_name(self.value_dtype)}; only int4 has scales of groups.")
        return self._stored(), self.scales

    @final
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, ``values`` first, as files and the buffers of modules have them."""
        named = {name: getattr(self, name) for name in self.names}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    @final
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: Sequence[int], pattern: SparsityPattern | None = None
    ) -> Self:
        """Return the format that has the given tensors, after checking all of them: a file is not trusted.

        The checks include that no index points outside of a tensor. Kernels rely on this and do not check again.

        Args:
            tensors: by name, as :meth:`tensors` returns them. They are not copied.
            shape: ``(out, in)`` of the dense weight.
            pattern: as for :meth:`from_dense`.

        Raises:
            FormatError: a tensor is missing, is unknown, has another dtype or shape, or has invalid contents.

        Example:
            >>> import torch
            >>> from secateur.formats import RowPacked
            >>> RowPacked.from_tensors({"values": torch.ones(1, 4), "rows": torch.tensor([3]).int()}, (2, 4))
            Traceback (most recent call last):
            secateur._errors.FormatError: rows has the index 3; it should be 0 to 1.
        """
        size = check_shape(shape)
        try:
            pattern = cls._accept(pattern)
            pattern.validate(size)
        except PatternError as error:
            raise FormatError(str(error)) from None
        core = pattern.units(size).core
        right, bottom = size[1] - core[1], size[0] - core[0]
        absent = {name for name, beyond in (("right", right), ("bottom", bottom)) if not beyond}
        wanted = {"values", *cls.names[2:]} - absent
        if "values" in tensors and is_scaled(tensors["values"].dtype):
            wanted.add("scales")
        if wanted != tensors.keys():
            missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
            raise FormatError(
                f"{cls.__name__} needs the tensors {sorted(wanted)}: {missing} are missing, {extra} are unknown."
            )
        packed = cls.assemble(tensors, size, pattern)
        held = (*VALUE_DTYPES, INT4) if cls._int4_nbytes else VALUE_DTYPES
        if packed.values.dtype not in held:
            raise FormatError(
                f"values should be {', '.join(map(value_name, held))}, got {dtype_name(packed.values.dtype)}."
            )
        packed._check()
        if packed.scales is not None:
            if packed.value_dtype == INT4:
                expect("scales", packed.scales, GRIDS["int4"].dtype, (size[0], GRIDS["int4"].groups(size[1])))
            else:
                expect("scales", packed.scales, torch.float32, (packed._num_scales(),))
            if not bool((packed.scales.isfinite() & (packed.scales >= 0)).all()):
                raise FormatError("scales should be finite and not negative, but some are not.")
        return packed

    @classmethod
    @final
    def assemble(cls, tensors: Mapping[str, Tensor | None], shape: tuple[int, int], pattern: SparsityPattern) -> Self:
        """Return the format that has the given tensors, by name, without checking them. A missing tensor is None."""
        own: dict[str, Any] = {name: tensors.get(name) for name in cls.names[2:]}
        return cls(shape, pattern, tensors["values"], tensors.get("scales"), **own)  # type: ignore[arg-type]

    @classmethod
    @final
    def predicted_nbytes(
        cls, mask: Mask, pattern: SparsityPattern | None = None, value_dtype: torch.dtype = torch.float32
    ) -> int | None:
        """Return how many bytes ``from_dense`` would need, without packing; None where it would raise.

        Args:
            mask: ``[out, in]`` bool, True = kept.
            pattern: the pattern that the mask follows.
            value_dtype: dtype of the stored values.
        """
        try:
            pattern = cls._accept(pattern)
            pattern.validate(mask.shape)
        except PatternError:
            return None
        counted = cls._count(mask, pattern)
        if counted is None or (value_dtype == INT4 and cls._int4_nbytes is None):
            return None
        values, index_bytes, scaled_rows = counted
        if value_dtype == INT4 and cls._int4_nbytes is not None:
            return cls._int4_nbytes(mask) + index_bytes + 2 * mask.shape[0] * GRIDS["int4"].groups(mask.shape[1])
        return values * value_dtype.itemsize + index_bytes + (4 * scaled_rows if is_scaled(value_dtype) else 0)

    @final
    def convert(self, to: type[Format], pattern: SparsityPattern | None = None) -> Format:
        """Return the same weight in another format, with the same codes and scales: nothing is rounded again.

        Raises:
            PatternError: the other format cannot hold the weight.
            FormatError: the weight is on the meta device, or its values are int4 and the other format cannot hold them.
        """
        self._must_have_values()
        pattern = to._accept(pattern)
        pattern.validate(self.shape)
        to._check_holds(self.value_dtype)
        stored, scales = self.grouped() if self.value_dtype == INT4 else self.unscaled()
        return to._pack(stored, self.mask(), pattern, scales)

    @final
    @torch.no_grad()
    def to_torch(
        self,
        layout: torch.layout | None = None,
        *,
        blocksize: tuple[int, int] | None = None,
        value_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return the weight as a sparse tensor of PyTorch, ``[out, in]``, with int64 indices, in memory of its own.

        Lossless: each stored weight is one entry with the same bits, a stored zero as well. :func:`from_torch` makes
        the same weight from it. In layouts of blocks, each block with a stored weight is an entry; what it has besides
        is stored as ``+0.0``, and would come back as kept.

        Args:
            layout: ``torch.sparse_csr``, ``sparse_csc``, ``sparse_coo``, ``sparse_bsr`` or ``sparse_bsc``. None for
                that of the format: BSR for :class:`BlockPacked` without a remainder, CSC for :class:`ColumnPacked`,
                CSR for all others.
            blocksize: ``(height, width)`` of the blocks of BSR and BSC; None for those of a :class:`~secateur.Block`
                pattern.
            value_dtype: a dtype that holds every value: None for that of :meth:`to_dense`, ``torch.float32`` or
                ``torch.float64``. With int8 values, ``torch.int8`` for their codes; :meth:`unscaled` has the scales.

        Raises:
            RecipeError: a layout that is not sparse, blocks that do not divide the shape, or a dtype that would lose
                bits.
            FormatError: the weight is on the meta device.

        Example:
            >>> import torch
            >>> from secateur import Block
            >>> from secateur.formats import BlockPacked, from_torch
            >>> packed = BlockPacked.from_dense(torch.eye(8), pattern=Block(4, 4))
            >>> sparse = packed.to_torch()
            >>> sparse.layout, tuple(sparse.values().shape), packed.to_torch(torch.sparse_csr).values().numel()
            (torch.sparse_bsr, (2, 4, 4), 32)
            >>> from_torch(sparse)
            BlockPacked(8x8, block:4x4, float32, 152 bytes)
        """
        return to_torch_sparse(*self._entries(layout, blocksize, value_dtype))

    @final
    @torch.no_grad()
    def to_scipy(
        self,
        format: str | None = None,
        *,
        blocksize: tuple[int, int] | None = None,
        value_dtype: torch.dtype | None = None,
    ) -> Any:
        """Return the weight as a sparse array of scipy, ``[out, in]``, as :meth:`to_torch` does.

        Args:
            format: ``"csr"``, ``"csc"``, ``"coo"`` or ``"bsr"``; None as for :meth:`to_torch`.
            blocksize: as there.
            value_dtype: as there. scipy cannot compute with bfloat16 and float16: give ``torch.float32`` for these.

        Raises:
            RecipeError: as :meth:`to_torch`, or an unknown format.
            FormatError: values that scipy has no dtype for.
            ImportError: scipy is not installed.
        """
        layout = None if format is None else layout_of(format)
        return to_scipy_sparse(*self._entries(layout, blocksize, value_dtype))

    @property
    @final
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    @final
    def value_dtype(self) -> torch.dtype:
        """The dtype of the stored values."""
        return self.values.dtype

    @property
    @final
    def dense_dtype(self) -> torch.dtype:
        """The dtype of what :meth:`to_dense` returns: that of the values, or float32 for int8 values."""
        return torch.float32 if is_scaled(self.value_dtype) else self.value_dtype

    @final
    @torch.no_grad()
    def error(self, weight: Weight, mask: Mask | None = None) -> float:
        """Return the error that packing made, ``‖packed - kept‖ / ‖kept‖`` (Frobenius norms in float64).

        Args:
            weight: the dense weight that was packed.
            mask: the mask that it was packed with.
        """
        self._must_have_values()
        kept = weight.detach() if mask is None else weight.detach().where(mask, 0)
        packed = self.to_dense()
        if packed.dtype == kept.dtype and torch.equal(packed, kept):
            return 0.0
        rows = max(1, _IN_CACHE // max(1, self.shape[1]))
        norms = [_norms(*part) for part in zip(packed.split(rows), kept.split(rows), strict=True)]
        difference, whole = (torch.stack(parts).norm() for parts in zip(*norms, strict=True))
        return float(difference / whole) if difference != 0 else 0.0

    @final
    def __repr__(self) -> str:
        size = f"{self.shape[0]}x{self.shape[1]}"
        return f"{type(self).__name__}({size}, {self.pattern}, {value_name(self.value_dtype)}, {self.nbytes:,} bytes)"

    @final
    def _entries(
        self, layout: torch.layout | None, blocksize: tuple[int, int] | None, value_dtype: torch.dtype | None
    ) -> tuple[Entries, torch.layout]:
        """What a sparse tensor of this weight holds, and its layout."""
        self._must_have_values()
        tile = (self.pattern.height, self.pattern.width) if isinstance(self.pattern, Block) else None
        if layout is None:
            whole = tile is not None and not (self.shape[0] % tile[0] or self.shape[1] % tile[1])
            layout = self._layout if whole or self._layout != torch.sparse_bsr else torch.sparse_csr
        tile = check_blocksize(blocksize, layout) or tile
        if value_dtype == torch.int8 == self.value_dtype:
            return Entries(self.unscaled()[0], self.mask(), tile), layout
        dense = self.to_dense()
        exact = (dense.dtype, torch.float32, torch.float64)
        if value_dtype not in (None, *exact):
            raise RecipeError(
                f"value_dtype={value_dtype} would lose bits of {value_name(self.value_dtype)} values. Give "
                f"{' or '.join(dict.fromkeys(map(str, exact)))}, and convert the sparse tensor."
            )
        return Entries(dense.to(value_dtype or dense.dtype), self.mask(), tile), layout

    @abstractmethod
    def mask(self) -> Mask:
        """Return which weights are stored, ``[out, in]`` bool: those that were kept, and the others in their units."""

    @classmethod
    @abstractmethod
    def _pack(cls, stored: Tensor, mask: Mask, pattern: SparsityPattern, scales: Tensor | None) -> Self:
        """Pack a matrix of value dtype that is zero where the mask is False. ``scales`` has one scale for each row.

        With int4 the matrix has codes, int8, and ``scales`` has one for each row and group.
        """

    @abstractmethod
    def _stored(self) -> Tensor:
        """The matrix that was packed, without scales; with int4 its codes."""

    @abstractmethod
    def _check(self) -> None:
        """Raise FormatError unless dtypes, shapes and contents of the tensors fit the shape and the pattern."""

    @classmethod
    @abstractmethod
    def _count(cls, mask: Mask, pattern: SparsityPattern) -> tuple[int, int, int] | None:
        """How many values, bytes of indices and scales a mask needs; None where the format cannot hold it."""

    @classmethod
    @final
    def _check_holds(cls, dtype: torch.dtype | None) -> None:
        """Raise if the format cannot hold values of a dtype."""
        if dtype == INT4 and cls._int4_nbytes is None:
            raise FormatError(
                f"{cls.__name__} cannot hold int4 values, which have a scale for each group of 64 columns; Bitmask and "
                "DensePacked can. Use one of these, or value_dtype=torch.int8."
            )

    @final
    def _must_have_values(self) -> None:
        if self.values.is_meta:
            raise FormatError(NO_VALUES)

    @final
    def _num_scales(self) -> int:
        """How many scales the format has for int8 values."""
        return self.shape[0] if self._scaled_rows is None else len(getattr(self, self._scaled_rows))

    @final
    def _row_scales(self) -> Tensor:
        """The scale of every row, ``[out]``; 1 for a row that is not stored."""
        assert self.scales is not None
        if self._scaled_rows is None:
            return self.scales
        scales = torch.ones(self.shape[0], device=self.values.device)
        scales[getattr(self, self._scaled_rows).long()] = self.scales
        return scales

    @classmethod
    @final
    def holds(cls, pattern: SparsityPattern) -> bool:
        """Return whether the format can hold weights of a pattern."""
        try:
            cls._accept(pattern)
        except PatternError:
            return False
        return True

    @classmethod
    @final
    def _accept(cls, pattern: SparsityPattern | None) -> SparsityPattern:
        """The pattern, or the default one for None. Raise PatternError if the format cannot hold it."""
        pattern = cls._default if pattern is None else along_rows(pattern, 0)
        if pattern is None or not isinstance(pattern, cls._patterns):
            wanted = " or ".join(known.__name__ for known in cls._patterns)
            raise PatternError(f"{cls.__name__} holds weights pruned to the pattern {wanted}, got {pattern!r}.")
        if cls._largest_group is not None and isinstance(pattern, NM) and pattern.m > cls._largest_group:
            raise PatternError(
                f"{cls.__name__} holds groups of up to {cls._largest_group} weights, got {pattern}. Use Bitmask."
            )
        return pattern


def _norms(packed: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of the difference of two matrices and of the second one, in float64."""
    least = torch.float64 if torch.float64 in (packed.dtype, kept.dtype) else torch.float32
    difference, whole = (
        torch.linalg.vector_norm(matrix, dtype=torch.float64) for matrix in (packed.to(least) - kept.to(least), kept)
    )
    if not bool(difference.isfinite()):
        packed, kept = packed.double(), kept.double()
        same = (packed == kept) | (packed.isnan() & kept.isnan())  # the difference of equal infinities would be NaN
        difference = torch.where(same, 0.0, packed - kept).norm()
    return difference, whole
