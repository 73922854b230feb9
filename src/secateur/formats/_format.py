"""What every storage format can do. ``docs/format.md`` is the specification, byte by byte."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from secateur._errors import FormatError, PatternError
from secateur._types import Mask, Weight, dtype_name
from secateur.formats._arrays import expect
from secateur.formats._values import VALUE_DTYPES, encode, is_scaled
from secateur.patterns import SparsityPattern

MAX_SIDE = 2**31 - 1  # indices are int32
MAX_WEIGHTS = 2**36  # no layer comes near; a tiny file that claims more would have us allocate it


@dataclass(frozen=True, eq=False, repr=False)
class Format(ABC):
    """A sparse ``[out, in]`` weight, held as a few plain tensors that say which weights are stored, and their values.

    What is pruned is not stored and comes back as ``+0.0``; what is stored comes back bit for bit, ``-0.0``, NaN and
    infinities included, unless ``value_dtype`` asks for fewer bits. With int8, a weight is ``code * scale`` with one
    float32 scale for each output row, ``max |w| / 127``; :meth:`error` says what the rounding cost.

    The five formats are :class:`Bitmask`, :class:`NMPacked`, :class:`BlockPacked`, :class:`RowPacked` and
    :class:`ColumnPacked`; :func:`~secateur.formats.choose` picks the smallest for a pattern. Build one with
    :meth:`from_dense` (trusted) or :meth:`from_tensors` (everything is checked), not by its constructor.

    Args:
        shape: ``(out, in)`` of the dense weight.
        pattern: that the weight was pruned with.
        values: the stored weights, in one of float32, bfloat16, float16 and int8.
        scales: float32, one for each stored row, for int8 values; else None.
    """

    name: ClassVar[str]  # in files
    names: ClassVar[tuple[str, ...]]  # of all tensors that it may have: values, scales, and those of its own
    value_names: ClassVar[frozenset[str]] = frozenset({"values", "right", "bottom"})  # those of the value dtype
    _patterns: ClassVar[tuple[type[SparsityPattern], ...]]  # that it can hold
    _default: ClassVar[SparsityPattern | None] = None  # the pattern of a weight of which none is known

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
            mask: ``[out, in]`` bool, True = kept; what it prunes is dropped, whatever its value. None, the default:
                everything that is not zero is kept (``-0.0`` is zero).
            pattern: that the mask follows; needed for :class:`NMPacked` and :class:`BlockPacked`.
            value_dtype: float32, bfloat16, float16 or int8; None, the default: that of the weight.

        Raises:
            PatternError: the mask or the shape breaks the pattern.
            FormatError: a value that ``value_dtype`` cannot hold, or no such dtype.
            TypeError: arguments that are not tensors of these kinds.

        Example:
            >>> import torch
            >>> from secateur.formats import Bitmask
            >>> packed = Bitmask.from_dense(torch.tensor([[0.0, 1.5, 0.0, -2.0]]))
            >>> packed, packed.values.tolist(), packed.bitmask.tolist()
            (Bitmask(1x4, unstructured, float32, 17 bytes), [1.5, -2.0], [[10]])
            >>> packed.to_dense().tolist()
            [[0.0, 1.5, 0.0, -2.0]]
        """
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"a weight must be a floating-point tensor, got {kind}")
        if weight.ndim != 2:
            raise FormatError(f"{cls.__name__} holds a matrix (out, in), got shape {tuple(weight.shape)}.")
        if mask is None:
            mask = weight != 0
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
            found = f"{mask.dtype} of {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"a mask must be a bool tensor of the weight's shape {tuple(weight.shape)}, got {found}")
        pattern = cls._accept(pattern)
        pattern.validate(weight.shape)
        kept = torch.where(mask, weight.detach(), torch.zeros((), dtype=weight.dtype, device=weight.device))
        stored, scales = encode(kept, weight.dtype if value_dtype is None else value_dtype)
        return cls._pack(stored, mask, pattern, scales)

    @final
    def to_dense(self) -> Weight:
        """Return the weight, ``[out, in]``: in the dtype of the values, or float32 where they are int8."""
        stored, scales = self.unscaled()
        return stored if scales is None else stored.float() * scales[:, None]

    @final
    def unscaled(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight in the dtype of the values, ``[out, in]``, and the scale of every row, ``[out]`` or None.

        A kernel that has a layout of its own starts from here, so that int8 codes are not rounded twice.
        """
        return self._stored(), None if self.scales is None else self._row_scales()

    @final
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, ``values`` first, as a file or a module's buffers hold them."""
        named = {name: getattr(self, name) for name in self.names}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    @final
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: Sequence[int], pattern: SparsityPattern | None = None
    ) -> Self:
        """Put together what :meth:`tensors` took apart, after checking all of it: a file is not trusted.

        Afterwards no index can lead outside of a tensor, so that kernels need not look.

        Args:
            tensors: by name; they are used as they are, not copied.
            shape: ``(out, in)`` of the dense weight.
            pattern: as for :meth:`from_dense`.

        Raises:
            FormatError: a tensor that is missing, superfluous, of another dtype or shape, or whose contents cannot be.

        Example:
            >>> import torch
            >>> from secateur.formats import RowPacked
            >>> RowPacked.from_tensors({"values": torch.ones(1, 4), "rows": torch.tensor([3]).int()}, (2, 4))
            Traceback (most recent call last):
            secateur._errors.FormatError: rows names 3, but there are 2.
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
                f"{cls.__name__} needs the tensors {sorted(wanted)}: {missing} missing, {extra} too many."
            )
        packed = cls.assemble(tensors, size, pattern)
        if packed.values.dtype not in VALUE_DTYPES:
            raise FormatError(
                f"values should be float32, bfloat16, float16 or int8, got {dtype_name(packed.values.dtype)}."
            )
        packed._check()
        if packed.scales is not None:
            expect("scales", packed.scales, torch.float32, (packed._num_scales(),))
            if not bool((packed.scales.isfinite() & (packed.scales >= 0)).all()):
                raise FormatError("scales should be finite and not negative, but some are not.")
        return packed

    @classmethod
    @final
    def assemble(cls, tensors: Mapping[str, Tensor | None], shape: tuple[int, int], pattern: SparsityPattern) -> Self:
        """Put together tensors by name that were checked before; what is missing is None."""
        own: dict[str, Any] = {name: tensors.get(name) for name in cls.names[2:]}
        return cls(shape, pattern, tensors["values"], tensors.get("scales"), **own)  # type: ignore[arg-type]

    @classmethod
    @final
    def predicted_nbytes(
        cls, mask: Mask, pattern: SparsityPattern | None = None, value_dtype: torch.dtype = torch.float32
    ) -> int | None:
        """Return the bytes that ``from_dense`` would need, without packing; None where it cannot hold the mask."""
        try:
            pattern = cls._accept(pattern)
            pattern.validate(mask.shape)
        except PatternError:
            return None
        counted = cls._count(mask, pattern)
        if counted is None:
            return None
        values, index_bytes, scaled_rows = counted
        return values * value_dtype.itemsize + index_bytes + (4 * scaled_rows if is_scaled(value_dtype) else 0)

    @final
    def convert(self, to: type[Format], pattern: SparsityPattern | None = None) -> Format:
        """Return the same weight in another format, with the same codes and scales: nothing is rounded again."""
        pattern = to._accept(pattern)
        pattern.validate(self.shape)
        stored, scales = self.unscaled()
        return to._pack(stored, self.mask(), pattern, scales)

    @property
    @final
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    @final
    def value_dtype(self) -> torch.dtype:
        """Of the stored values."""
        return self.values.dtype

    @property
    @final
    def dense_dtype(self) -> torch.dtype:
        """That :meth:`to_dense` returns: of the values, or float32 where they are codes."""
        return torch.float32 if is_scaled(self.value_dtype) else self.value_dtype

    @final
    @torch.no_grad()
    def error(self, weight: Weight, mask: Mask | None = None) -> float:
        """Return what ``value_dtype`` cost, ``‖packed - kept‖ / ‖kept‖`` (Frobenius, float64): 0.0 where nothing.

        Args:
            weight: what was packed.
            mask: that it was packed with.
        """
        kept = (weight.detach() if mask is None else weight.detach().where(mask, 0)).double()
        packed = self.to_dense().double()
        same = (packed == kept) | (packed.isnan() & kept.isnan())  # infinities have no difference
        if bool(same.all()):
            return 0.0
        return float(torch.where(same, 0.0, packed - kept).norm() / kept.norm())

    @final
    def __repr__(self) -> str:
        size = f"{self.shape[0]}x{self.shape[1]}"
        return f"{type(self).__name__}({size}, {self.pattern}, {dtype_name(self.value_dtype)}, {self.nbytes:,} bytes)"

    @abstractmethod
    def mask(self) -> Mask:
        """Return which weights are stored, ``[out, in]`` bool: all that were kept, and what shares a unit with them."""

    @classmethod
    @abstractmethod
    def _pack(cls, stored: Tensor, mask: Mask, pattern: SparsityPattern, scales: Tensor | None) -> Self:
        """Pack a matrix of value dtype that is zero where the mask is False; ``scales`` are one for each row."""

    @abstractmethod
    def _stored(self) -> Tensor:
        """The matrix that was packed, before scales."""

    @abstractmethod
    def _check(self) -> None:
        """Raise FormatError unless dtypes, shapes and contents of the tensors fit shape and pattern."""

    @classmethod
    @abstractmethod
    def _count(cls, mask: Mask, pattern: SparsityPattern) -> tuple[int, int, int] | None:
        """How many values a mask needs, bytes of indices, and rows that have a scale; None where it cannot be held."""

    @classmethod
    def _why_not(cls, pattern: SparsityPattern) -> str | None:
        """The reason that a pattern of the right class cannot be held, or None."""
        return None

    def _num_scales(self) -> int:
        """Scales that scaled values have: one for each row of the weight, or of what is stored of it."""
        return self.shape[0]

    def _row_scales(self) -> Tensor:
        """The scale of every row, ``[out]``."""
        assert self.scales is not None
        return self.scales

    @classmethod
    @final
    def _accept(cls, pattern: SparsityPattern | None) -> SparsityPattern:
        pattern = cls._default if pattern is None else pattern
        if pattern is None or not isinstance(pattern, cls._patterns):
            wanted = " or ".join(known.__name__ for known in cls._patterns)
            raise PatternError(f"{cls.__name__} holds weights pruned with the pattern {wanted}, got {pattern!r}.")
        if (reason := cls._why_not(pattern)) is not None:
            raise PatternError(reason)
        return pattern


def check_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of a matrix that may be true.

    Raises:
        FormatError: not two sizes, a negative one, or more weights than any layer has.
    """
    sizes = tuple(shape)
    if len(sizes) != 2 or any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise FormatError(f"the shape should be two integers (out, in), got {sizes}.")
    rows, columns = sizes
    if min(sizes) < 0 or max(sizes) > MAX_SIDE or rows * columns > MAX_WEIGHTS:
        raise FormatError(f"the shape {rows}x{columns} is absurd: sizes are 0 to {MAX_SIDE}, {MAX_WEIGHTS} in all.")
    return rows, columns
