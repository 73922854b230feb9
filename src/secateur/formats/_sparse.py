"""A matrix as a sparse tensor of PyTorch or scipy and back, with every stored entry, zeros among them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur._checks import instance, integer, one_of
from secateur._errors import FormatError, RecipeError
from secateur._types import Mask, dtype_name
from secateur.formats._arrays import NO_VALUES, check_shape

_BLOCKED = (torch.sparse_bsr, torch.sparse_bsc)
_BY_COLUMN = (torch.sparse_csc, torch.sparse_bsc)
# By the name that scipy has for them, too; it has no bsc.
_LAYOUTS = {
    "coo": torch.sparse_coo,
    "csr": torch.sparse_csr,
    "csc": torch.sparse_csc,
    "bsr": torch.sparse_bsr,
    "bsc": torch.sparse_bsc,
}
_SCIPY = ("coo", "csr", "csc", "bsr")


@dataclass(frozen=True)
class Entries:
    """What a sparse tensor holds.

    Args:
        dense: the values ``[out, in]``, zero where nothing is stored.
        stored: ``[out, in]`` bool, which entries are stored, whatever their value.
        tile: height and width of the blocks; None where entries are single.
    """

    dense: Tensor
    stored: Mask
    tile: tuple[int, int] | None = None


def layout_of(name: object) -> torch.layout:
    """Return the layout that a name of scipy means.

    Raises:
        RecipeError: scipy has no such format, or it is none of those that hold a weight.
    """
    return _LAYOUTS[one_of("format", name, _SCIPY)]


def check_blocksize(blocksize: object, layout: torch.layout) -> tuple[int, int] | None:
    """Return the height and width of blocks, or None for none.

    Raises:
        RecipeError: a layout without blocks, or sizes that are none.
        TypeError: not two ints.
    """
    if blocksize is None:
        return None
    if not isinstance(blocksize, tuple | list) or len(blocksize) != 2:
        raise TypeError(f"blocksize must be (height, width), got {blocksize!r}")
    if layout not in _BLOCKED:
        raise RecipeError(f"blocksize={blocksize} is for BSR and BSC, and the layout is {layout}. Leave it out.")
    return integer("the height of a block", blocksize[0], 1), integer("the width of a block", blocksize[1], 1)


def to_torch_sparse(entries: Entries, layout: torch.layout) -> Tensor:
    """Return entries as a sparse tensor with int64 indices. Where the layout is in blocks, their tile is a block.

    Raises:
        RecipeError: no sparse layout, or one in blocks for entries without a tile that divides the shape.
    """
    instance("layout", layout, torch.layout, "a torch.layout such as torch.sparse_csr")
    if layout not in _LAYOUTS.values():
        raise RecipeError(f"{layout} is no sparse layout. Valid are {', '.join(map(str, _LAYOUTS.values()))}.")
    size = tuple(entries.dense.shape)
    with _quiet():
        if layout == torch.sparse_coo:
            at, values = entries.stored.nonzero().T.contiguous(), entries.dense[entries.stored]
            return torch.sparse_coo_tensor(at, values, size, check_invariants=False, is_coalesced=True)
        starts, at, values = _compressed(entries, layout)
        return torch.sparse_compressed_tensor(starts, at, values, size, layout=layout, check_invariants=False)


def to_scipy_sparse(entries: Entries, layout: torch.layout) -> Any:
    """Return entries as a sparse array of scipy. Where the layout is in blocks, their tile is a block.

    Raises:
        RecipeError: a layout in blocks for entries without a tile that divides the shape.
        FormatError: scipy cannot compute with the dtype of the values.
        ImportError: scipy is not installed.
    """
    sparse = _scipy("to_scipy")
    if entries.dense.dtype not in (torch.float32, torch.float64, torch.int8):
        name = dtype_name(entries.dense.dtype)
        raise FormatError(
            f"the values are {name}, but scipy's sparse arrays cannot compute with {name}. Give "
            f"value_dtype=torch.float32, which holds them exactly; from_scipy(array, value_dtype=torch.{name}) takes "
            "them back."
        )
    size = tuple(entries.dense.shape)
    if layout == torch.sparse_coo:
        at = entries.stored.nonzero().cpu().numpy()
        return sparse.coo_array((entries.dense[entries.stored].cpu().numpy(), (at[:, 0], at[:, 1])), shape=size)
    kind = {torch.sparse_csr: sparse.csr_array, torch.sparse_csc: sparse.csc_array, torch.sparse_bsr: sparse.bsr_array}
    starts, at, values = (part.cpu().numpy() for part in _compressed(entries, layout))
    return kind[layout]((values, at, starts), shape=size)


def from_torch_sparse(tensor: Tensor) -> Entries:
    """Return what a sparse tensor of PyTorch holds. It is not trusted: PyTorch does not check the indices.

    Raises:
        FormatError: not one matrix, indices that point outside of it, or two entries of one place in a layout that
            cannot have them.
        TypeError: no sparse tensor.
    """
    if not isinstance(tensor, Tensor) or tensor.layout not in _LAYOUTS.values():
        found = f"one of layout {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"from_torch takes a sparse tensor, got {found}; pack(weight) takes a dense one")
    if tensor.is_meta:
        raise FormatError(NO_VALUES)
    tensor = tensor.detach()
    if tensor.ndim != 2 or (tensor.layout == torch.sparse_coo and tensor.dense_dim()):
        kind = "a hybrid tensor with dense dimensions" if tensor.ndim == 2 else f"{tensor.ndim} dimensions"
        raise FormatError(
            f"a sparse weight is one matrix [out, in] whose entries are single or in blocks, got {kind}. Give one "
            "matrix, made by .to_dense().to_sparse() where need be."
        )
    size = check_shape(tensor.shape)
    if tensor.layout == torch.sparse_coo:
        return _from_coordinates(tensor._indices(), _storable(tensor._values()), size)
    by_column = tensor.layout in _BY_COLUMN
    starts = tensor.ccol_indices() if by_column else tensor.crow_indices()
    at = tensor.row_indices() if by_column else tensor.col_indices()
    return _expanded(starts, at, _storable(tensor.values()), size, tensor.layout)


def from_scipy_sparse(matrix: Any) -> Entries:
    """Return what a sparse array or matrix of scipy holds. Entries of one place are added up, as scipy means them.

    Raises:
        FormatError: not one matrix, or indices that point outside of it.
        TypeError: no sparse array of scipy, or one of another format.
        ImportError: scipy is not installed.
    """
    sparse = _scipy("from_scipy")
    if not sparse.issparse(matrix):
        raise TypeError(f"from_scipy takes a sparse array or matrix of scipy, got {type(matrix).__name__}")
    if matrix.format not in _SCIPY:
        raise TypeError(f"from_scipy takes {', '.join(_SCIPY)}, got {matrix.format}. Call .tocsr() first")
    if matrix.ndim != 2:
        raise FormatError(f"a sparse weight is one matrix [out, in], got {matrix.ndim} dimensions.")
    size = check_shape([int(side) for side in matrix.shape])
    if matrix.format == "coo":
        at = torch.stack([_tensor(matrix.row).long(), _tensor(matrix.col).long()])
        return _from_coordinates(at, _storable(_tensor(matrix.data)), size)
    starts, held = _tensor(matrix.indptr), int(matrix.indptr[-1])  # the arrays may be longer than what they hold
    at, values = _tensor(matrix.indices[:held]), _storable(_tensor(matrix.data[:held]))
    return _expanded(starts, at, values, size, _LAYOUTS[matrix.format], adds_up=True)


def _compressed(entries: Entries, layout: torch.layout) -> tuple[Tensor, Tensor, Tensor]:
    """Where each line of tiles starts (one more at the end), the place of each tile in its line, and the tiles."""
    height, width = (entries.tile or (0, 0)) if layout in _BLOCKED else (1, 1)
    rows, columns = entries.dense.shape
    if not height or rows % height or columns % width:
        found = f"blocks of {height}x{width} do not divide a weight of {rows}x{columns}" if height else "no blocksize"
        raise RecipeError(
            f"{layout} holds whole blocks, got {found}. Give a blocksize=(height, width) that divides the shape, or "
            "take CSR, which holds any weight."
        )
    tiles, stored = (_tiled(matrix, height, width) for matrix in (entries.dense, entries.stored))
    stored = stored.any(3).any(2)
    if layout in _BY_COLUMN:
        tiles, stored = tiles.transpose(0, 1), stored.T
    starts = torch.cat([stored.new_zeros(1, dtype=torch.long), stored.sum(1).cumsum(0)])
    values = tiles[stored]
    return starts, stored.nonzero()[:, 1], values if layout in _BLOCKED else values[:, 0, 0]


def _expanded(
    starts: Tensor, at: Tensor, values: Tensor, size: tuple[int, int], layout: torch.layout, adds_up: bool = False
) -> Entries:
    """The inverse of :func:`_compressed`, for indices in any order; ``adds_up`` allows two of one place."""
    if values.ndim != (3 if layout in _BLOCKED else 1):
        raise FormatError(f"{layout} has values of {values.ndim} dimensions. Give numbers, or blocks for BSR and BSC.")
    tile = (values.shape[1], values.shape[2]) if layout in _BLOCKED else (1, 1)
    if not all(tile) or size[0] % tile[0] or size[1] % tile[1]:
        raise FormatError(f"blocks of {tile[0]}x{tile[1]} do not divide a weight of {size[0]}x{size[1]}.")
    down, across = size[0] // tile[0], size[1] // tile[1]
    lines, limit = (across, down) if layout in _BY_COLUMN else (down, across)
    ends = starts.tolist()
    if len(ends) != lines + 1 or ends[0] != 0 or ends[-1] != len(at) or bool((starts.diff() < 0).any()):
        raise FormatError(
            f"the compressed indices should be {lines + 1} numbers that start at 0, do not fall and end at {len(at)}; "
            f"they are {str(ends)[:60]}."
        )
    if len(values) != len(at):
        raise FormatError(f"there are {len(values)} values for {len(at)} indices. Give one for each.")
    line = torch.repeat_interleave(torch.arange(lines, device=at.device), starts.long().diff())
    _check_range("the indices", at, limit)
    places = torch.stack([line, at.long()])
    tiles, stored = _placed(places, values.reshape(-1, *tile), (lines, limit), adds_up)
    dense, mask = (_untiled(each, layout, size) for each in (tiles, stored))
    return Entries(dense, mask, tile if layout in _BLOCKED else None)


def _from_coordinates(at: Tensor, values: Tensor, size: tuple[int, int]) -> Entries:
    """Entries from the row and column of each, ``[2, entries]``. Those of one place are added up."""
    for name, indices, limit in zip(("row", "column"), at, size, strict=True):
        _check_range(f"the {name} indices", indices, limit)
    return Entries(*_placed(at.long(), values, size, adds_up=True))


def _placed(at: Tensor, values: Tensor, size: tuple[int, int], adds_up: bool) -> tuple[Tensor, Mask]:
    """Values or tiles in their places, and which are there. Each value is copied bit for bit unless it is added to."""
    if len((at[0] * size[1] + at[1]).unique()) != at.shape[1]:
        if not adds_up:
            raise FormatError(
                "the sparse tensor has two entries for one place, which its layout does not allow. Make it from a COO "
                "tensor, which adds them up."
            )
        if values.dtype == torch.int8:
            raise FormatError("int8 codes have two entries for one place, and codes cannot be added up. Give one.")
        whole = (*size, *values.shape[1:])
        with _quiet():
            summed = torch.sparse_coo_tensor(at, values, whole, check_invariants=False).coalesce()
            at, values = summed.indices(), summed.values()
    placed = values.new_zeros(*size, *values.shape[1:])
    stored = torch.zeros_like(placed, dtype=torch.bool)
    placed[at[0], at[1]], stored[at[0], at[1]] = values, True
    return placed, stored


def _check_range(name: str, indices: Tensor, limit: int) -> None:
    if bool((outside := (indices < 0) | (indices >= limit)).any()):
        raise FormatError(f"{name} have {int(indices[outside][0])}; they should be 0 to {limit - 1}.")


def _tiled(matrix: Tensor, height: int, width: int) -> Tensor:
    rows, columns = matrix.shape
    return matrix.reshape(rows // height, height, columns // width, width).transpose(1, 2)


def _untiled(tiles: Tensor, layout: torch.layout, size: tuple[int, int]) -> Tensor:
    tiles = tiles.transpose(0, 1) if layout in _BY_COLUMN else tiles
    return tiles.transpose(1, 2).reshape(size)


def _storable(values: Tensor) -> Tensor:
    if values.dtype == torch.int8 or (values.is_floating_point() and values.dtype.itemsize > 1):
        return values
    name = dtype_name(values.dtype)
    if values.is_floating_point():  # float8, whose scale is elsewhere
        raise FormatError(f"the weight is {name}. Multiply it by its scale in float32 first.")
    raise TypeError(f"a sparse weight has floating-point values, or int8 codes with scales, got {name}")


def _tensor(array: NDArray[Any]) -> Tensor:
    if array.dtype.kind not in "fi" or array.dtype.itemsize > 8:
        raise TypeError(f"a sparse weight has values of a dtype of PyTorch, got {array.dtype}. Call .astype('float32')")
    return torch.from_numpy(array.copy())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that sparse tensors are new to PyTorch: it comes once, and is not about what the user did."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse .* tensor support is in beta state", UserWarning)
        yield


def _scipy(what: str) -> Any:
    try:
        from scipy import sparse
    except ImportError:
        raise ImportError(f"{what} needs scipy, which is not installed; install it with: pip install scipy") from None
    return sparse
