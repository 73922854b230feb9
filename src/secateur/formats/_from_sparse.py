"""Packed weights from sparse tensors of PyTorch and sparse arrays of scipy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur._checks import flag
from secateur._errors import FormatError, RecipeError
from secateur.formats._arrays import expect
from secateur.formats._choose import made_for, smallest
from secateur.formats._format import Format
from secateur.formats._nm import NMPacked
from secateur.formats._sparse import Entries, from_scipy_sparse, from_torch_sparse
from secateur.formats._values import as_value_dtype, is_scaled
from secateur.patterns import NM, Block, SparsityPattern, along_rows, as_pattern


@torch.no_grad()
def from_torch(
    tensor: Tensor,
    pattern: SparsityPattern | str | None = None,
    *,
    value_dtype: torch.dtype | str | None = None,
    scales: Tensor | None = None,
    keep_zeros: bool = True,
) -> Format:
    """Pack a sparse tensor of PyTorch: COO, CSR, CSC, BSR or BSC. The inverse of :meth:`Format.to_torch`.

    Lossless: every entry is a kept weight with the same bits, also one that is zero, and every other weight is pruned.
    Indices may be int32 or int64, in any order. Entries of one place in a COO tensor are added up, as its ``coalesce``
    does. All indices are checked, which PyTorch does not do. Nothing is shared with the tensor.

    Args:
        tensor: one matrix ``[out, in]``.
        pattern: the pattern that its entries follow. None to find it from where entries are; for a layout of blocks it
            is :class:`~secateur.Block`.
        value_dtype: float32, bfloat16, float16 or int8; None for that of the tensor.
        scales: float32 ``[out]``, for a tensor of int8 codes: a weight is the code times the scale of its row.
        keep_zeros: False to prune entries that are zero, such as those that only fill a block.

    Returns:
        The weight in the format that is made for the pattern: units of the pattern that have an entry are stored whole.
        Without a pattern, in the smallest format, as :func:`pack` takes it.

    Raises:
        FormatError: indices that point outside of the matrix, two entries of one place in another layout than COO, a
            tensor that is not one matrix, or values that ``value_dtype`` cannot hold.
        PatternError: the shape or the entries break the pattern.
        RecipeError: values cannot be stored in ``value_dtype``, or scales for values without.
        TypeError: no sparse tensor, or values that are neither floating-point nor int8.

    Example:
        >>> import torch
        >>> from secateur.formats import from_torch
        >>> at, values = torch.tensor([[0, 0, 1], [1, 3, 2]]), torch.tensor([5.0, 0.0, 7.0])
        >>> packed = from_torch(torch.sparse_coo_tensor(at, values, (2, 4), check_invariants=True), "2:4")
        >>> packed.mask().int().tolist()  # a group with fewer entries than the pattern keeps is filled up
        [[0, 1, 0, 1], [1, 0, 1, 0]]
        >>> packed.to_torch().to_dense().tolist()
        [[0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 7.0, 0.0]]
    """
    return _packed(from_torch_sparse(tensor), pattern, value_dtype, scales, keep_zeros)


@torch.no_grad()
def from_scipy(
    matrix: Any,
    pattern: SparsityPattern | str | None = None,
    *,
    value_dtype: torch.dtype | str | None = None,
    scales: Tensor | None = None,
    keep_zeros: bool = True,
) -> Format:
    """Pack a sparse array or matrix of scipy: csr, csc, coo or bsr. The inverse of :meth:`Format.to_scipy`.

    Args:
        matrix: ``[out, in]``. Entries of one place are added up. scipy's usual dtype is float64, which needs a
            ``value_dtype``.
        pattern: see :func:`from_torch`, like all that follow.
        value_dtype: see there.
        scales: see there.
        keep_zeros: see there.

    Raises:
        SparsityError: as :func:`from_torch`.
        TypeError: no sparse array, or one of another format or dtype.
        ImportError: scipy is not installed.
    """
    return _packed(from_scipy_sparse(matrix), pattern, value_dtype, scales, keep_zeros)


def _packed(
    entries: Entries,
    given: SparsityPattern | str | None,
    value_dtype: torch.dtype | str | None,
    scales: Tensor | None,
    keep_zeros: bool,
) -> Format:
    dense = entries.dense
    wanted = as_value_dtype(value_dtype)
    mask = entries.stored if flag("keep_zeros", keep_zeros) else entries.stored & (dense != 0)
    pattern = Block(*entries.tile) if given is None and entries.tile else None if given is None else as_pattern(given)
    if is_scaled(dense.dtype) != (scales is not None):
        raise RecipeError(
            "int8 values are codes, and the scale of each row is missing. Give scales=, float32 [out]."
            if scales is None
            else f"scales= are for int8 codes, but the values are {str(dense.dtype).removeprefix('torch.')}. Leave "
            "them out."
        )
    if scales is not None and wanted not in (None, dense.dtype):
        raise RecipeError(f"int8 codes are stored as they are, not as {wanted}. Leave value_dtype out.")
    dtype = wanted or dense.dtype
    if pattern is None:
        format_type, pattern = smallest(mask, dtype, None)
    else:
        pattern.validate(dense.shape)
        pattern = along_rows(pattern, len(dense))
        format_type = made_for(pattern)
        if isinstance(pattern, NM) and format_type is not NMPacked:  # NMPacked checks its groups itself
            pattern.check(mask)
    if scales is None:
        return format_type.from_dense(dense, mask, pattern, wanted)
    expect("scales", scales, torch.float32, (len(dense),))
    if not bool((scales.isfinite() & (scales >= 0)).all()):
        raise FormatError("scales should be finite and not negative, but some are not.")
    return format_type._pack(dense.where(mask, 0), mask, pattern, scales.detach().clone().to(dense.device))
