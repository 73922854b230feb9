"""The ways to run a packed weight, which of them at which batch, and the tensors each needs while it runs.

A way is written as text, ``panels:128x256`` or ``prepacked``, and so is a plan, ``bitmask@2 panels:128x256``: bitmask
up to 2 rows, panels beyond. Text goes through compiled graphs, exported programs and files unchanged.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name that PyTorch's own documentation uses

from secateur._errors import KernelError
from secateur.formats import Bitmask, BlockPacked, ColumnPacked, Format, NMPacked, RowPacked
from secateur.kernels import _native_backend
from secateur.kernels._layouts import BitmaskLayout, LaneLayout, Layout, PanelLayout, StripLayout, settled
from secateur.kernels._linear import _chosen, available, linear
from secateur.patterns import NM, Block, SparsityPattern

_WAYS = re.compile(
    r"dense|prepacked|bitmask|(rows|columns)(:prepacked|:strips)?"
    r"|panels:[1-9]\d{0,4}x[1-9]\d{0,4}|lanes:[1-9]\d?:[1-9]\d?|strips:[1-9]\d{0,3}x[1-9]\d{0,3}"
)
# One of each kind that won somewhere in benchmarks/kernels.py; low ones are for layers of few rows.
_PANELS = ("panels:128x256", "panels:64x128", "panels:256x128", "panels:128x512")
_SPARSE = 0.25  # up to this density one block for all columns, the plain index form, may win at few input rows
SPARE = 64  # values readable behind the last; layouts want 16
_STRIP = 16
_CODES = torch.float16  # holds every int8 code exactly, and is a value type of every layout
_THINNEST_LANES = 1.3  # lanes store every group full; beyond this share of stored zeros another layout is smaller


@dataclass(frozen=True)
class Plan:
    """Which way to take at which batch.

    Args:
        ways: one or more.
        limits: for each way but the last, the largest number of input rows that takes it; increasing.
    """

    ways: tuple[str, ...]
    limits: tuple[int, ...] = ()

    def way(self, rows: int) -> str:
        """Return the way to take for so many input rows."""
        for way, limit in zip(self.ways, self.limits, strict=False):
            if rows <= limit:
                return way
        return self.ways[-1]

    def __str__(self) -> str:
        return " ".join((*(f"{w}@{n}" for w, n in zip(self.ways, self.limits, strict=False)), self.ways[-1]))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Return the plan that ``str`` wrote.

        Raises:
            KernelError: the text is no plan.
        """
        return _parse(text)

    @classmethod
    def of(cls, choices: Sequence[tuple[int, str]]) -> Plan:
        """Return the plan that takes, for any number of rows, the way of the nearest batch by ratio.

        Args:
            choices: batch and way, by increasing batch.
        """
        ways, limits = [choices[0][1]], []
        for (batch, way), (following, next_way) in pairwise(choices):
            if way != next_way:
                limits.append(int((batch * following) ** 0.5))
                ways.append(next_way)
        return cls(tuple(ways), tuple(limits))


@lru_cache(maxsize=1024)
def _parse(text: str) -> Plan:
    *first, last = text.split(" ")
    ways, limits = [], []
    for part in first:
        way, _, limit = part.partition("@")
        if not re.fullmatch(r"[1-9]\d{0,8}|0", limit):
            raise _no_plan(text)
        ways.append(way)
        limits.append(int(limit))
    ways.append(last)
    if limits != sorted(set(limits)) or not all(_WAYS.fullmatch(way) for way in ways):
        raise _no_plan(text)
    return Plan(tuple(ways), tuple(limits))


def _no_plan(text: str) -> KernelError:
    return KernelError(
        f"{text!r:.200} is no plan; expected ways such as 'bitmask@2 panels:128x256', limits increasing, none for the "
        "last. pack_ makes one that was measured."
    )


def candidates(packed: Format, patterns: Sequence[SparsityPattern] = ()) -> list[str]:
    """Return the ways that can run a weight with native kernels, those of dense arithmetic last.

    Args:
        packed: the weight.
        patterns: others than the format's own that its zeros satisfy too.
    """
    rows, columns = packed.shape
    density = stored_share(packed)
    found: list[str] = []
    native = has_kernels() and bool(rows and columns)
    if isinstance(packed, RowPacked | ColumnPacked):
        found += [f"{packed.name}s", f"{packed.name}s:prepacked"]
        found += [f"{packed.name}s:strips"] if native and packed.values.numel() else []
    if native:
        for pattern in dict.fromkeys((packed.pattern, *patterns)):
            match pattern:
                case NM(n, m) if n and m <= 16 and columns % m == 0 and n / m <= _THINNEST_LANES * density:
                    found.append(f"lanes:{n}:{m}")
                case Block(height, width) if not (rows % height or columns % width):
                    found.append(f"strips:{height}x{width}")
        if not isinstance(packed, RowPacked | ColumnPacked):
            found += ["bitmask", *_PANELS]
            found += [f"panels:64x{columns}"] if density <= _SPARSE and columns <= PanelLayout.WIDEST else []
    return [*found, "prepacked", "dense"]


def has_kernels() -> bool:
    """Whether native kernels run here; without them only the dense ways are candidates."""
    return available()["native"] == "ok"


def default_plan(packed: Format) -> Plan:
    """Return a plan for a weight that was never measured: what its format was made for; dense without kernels."""
    rows, columns = packed.shape
    if not isinstance(packed, RowPacked | ColumnPacked) and not has_kernels():
        return Plan(("dense",))
    match packed, packed.pattern:
        case RowPacked(), _:
            return Plan(("rows",))
        case ColumnPacked(), _:
            return Plan(("columns",))
        case NMPacked(), NM(n, m) if n and columns % m == 0:
            return Plan((f"lanes:{n}:{m}",))
        case BlockPacked(), Block(height, width) if not (rows % height or columns % width):
            return Plan((f"strips:{height}x{width}",))
    return Plan(("bitmask", _PANELS[0]), (2,))


def stored_share(packed: Format) -> float:
    """Return stored weights over all weights, 0 to 1."""
    size = packed.shape[0] * packed.shape[1]
    return int(packed.mask().count_nonzero()) / size if size else 0.0


class Runner(ABC):
    """A weight made ready for one way."""

    nbytes: int  # of memory that the weight's own tensors do not have already

    @abstractmethod
    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b for x ``[rows, in]``, in x's dtype."""


@final
class _Kernel(Runner):
    def __init__(self, layout: Layout, shared: int = 0) -> None:
        self._layout = layout
        plain = available()["native"] == "ok" and layout.values.is_cpu
        self._bound = _native_backend.Bound(layout, _native_backend.default_isa()) if plain else None
        self.nbytes = layout.nbytes - shared

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        # What linear checks takes longer than a small layer's product, and is known here.
        if self._bound is not None and _chosen.get()[0] is None:
            if bias is not None and not (bias.dtype is torch.float32 and bias.is_contiguous()):
                bias = bias.float().contiguous()
            if x.dtype is torch.float32:
                return self._bound(x.contiguous(), bias)
            return self._bound(x.float().contiguous(), bias).to(x.dtype)
        return linear(x, self._layout, bias)


@final
class _Dense(Runner):
    def __init__(self, weight: Tensor, shared: bool = False) -> None:
        self._weight = weight
        self.nbytes = 0 if shared else weight.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self._weight, None if bias is None else bias.to(x.dtype))


@final
class _Prepacked(Runner):
    """In the order in which oneDNN multiplies, what a compiler that freezes weights would do. float32 always."""

    def __init__(self, weight: Tensor) -> None:
        if why := why_not_prepacked():
            raise KernelError(f"there is no prepacked dense weight here: {why}. Use another way.")
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.float().contiguous(), None)
        self.nbytes = 4 * weight.numel()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.float()
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.float().contiguous(), self._weight, bias, "none", [], "")
        return y.to(x.dtype)


@final
class _Padded(Runner):
    """A layout with more rows than the weight has."""

    def __init__(self, layout: Layout, out: int) -> None:
        self._layout, self._out = layout, out
        self.nbytes = layout.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = linear(x, self._layout)[:, : self._out]
        return y if bias is None else y + bias.to(x.dtype)


@final
class _Rows(Runner):
    """The kept rows by another runner, scattered into an output that is the bias everywhere else."""

    def __init__(self, inner: Runner, rows: Tensor, out: int) -> None:
        self._inner, self._rows, self._out = inner, rows.long(), out
        self.nbytes = inner.nbytes + self._rows.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_zeros(x.shape[0], self._out)
        if bias is not None:
            y += bias
        kept = self._inner(x, None if bias is None else bias[self._rows])
        return y.index_copy_(1, self._rows, kept)


@final
class _Columns(Runner):
    """The kept columns by another runner, on those inputs."""

    def __init__(self, inner: Runner, columns: Tensor) -> None:
        self._inner, self._columns = inner, columns.long()
        self.nbytes = inner.nbytes + self._columns.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._inner(x.index_select(1, self._columns), bias)


def why_not_prepacked() -> str | None:
    """Return the reason that this PyTorch has no prepacked dense linear layer, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return "this version of PyTorch keeps oneDNN's prepacked layers elsewhere"
    return None


@torch.no_grad()
def make_runner(way: str, packed: Format, dtype: torch.dtype) -> Runner:
    """Make a weight ready for one way.

    Args:
        way: one of :func:`candidates`.
        packed: the weight, checked.
        dtype: of the inputs.

    Raises:
        KernelError: no such way, or one that does not fit the weight.
    """
    if not _WAYS.fullmatch(way):
        raise _no_plan(way)
    kind, _, rest = way.partition(":")
    match kind:
        case "dense":
            return _Dense(packed.to_dense().to(dtype))
        case "prepacked":
            return _Prepacked(packed.to_dense())
        case "rows" | "columns":
            return _compact(kind, rest, packed, dtype)
    stored, scales = packed.unscaled()
    values = stored.to(_CODES) if stored.dtype == torch.int8 else stored
    # Whatever a format stores to fill up its units need not run; but a bitmask's own values are shared as they are.
    mask = packed.mask() if isinstance(packed, Bitmask) and kind == "bitmask" else stored != 0
    layout = _layout(kind, [int(size) for size in re.findall(r"\d+", rest)], values, mask)
    if stored.dtype == torch.int8:
        assert scales is not None
        layout = replace(layout, values=layout.values.to(torch.int8), scale=scales.float().cpu())
    shared = _shared(layout, packed)
    return _Kernel(layout) if shared is None else _Kernel(shared, shared.values.nbytes)


def padded(values: Tensor) -> Tensor:
    """Return a copy with zeros behind it in memory, so that a layout with the same order of values needs no other."""
    if values.device.type != "cpu":
        return values.detach()
    return settled(values.detach().flatten(), SPARE)[: values.numel()].view(values.shape)


def _shared(layout: Layout, packed: Format) -> Layout | None:
    """The layout on the packed values' own memory, where it holds the same values in the same order."""
    values = packed.values
    spare = layout.values.numel() - values.numel()
    beyond = values.untyped_storage().nbytes() // values.itemsize - values.storage_offset() - values.numel()
    if values.device.type != "cpu" or not values.is_contiguous() or not 0 <= spare <= beyond:
        return None
    whole = values.detach().as_strided((values.numel() + spare,), (1,))
    if not torch.equal(whole.view(torch.uint8), layout.values.view(torch.uint8)):
        return None
    return replace(layout, values=whole)


def _layout(kind: str, sizes: list[int], values: Tensor, mask: Tensor) -> Layout:
    dtype = values.dtype
    match kind:
        case "bitmask":
            return BitmaskLayout.pack(values, mask, value_dtype=dtype)
        case "panels":
            return PanelLayout.pack(values, mask, value_dtype=dtype, height=sizes[0], width=sizes[1])
        case "lanes":
            return LaneLayout.pack(values, mask, value_dtype=dtype, n=sizes[0], m=sizes[1])
        case _:
            return StripLayout.pack(values, mask, value_dtype=dtype, height=sizes[0], width=sizes[1])


def _compact(kind: str, rest: str, packed: Format, dtype: torch.dtype) -> Runner:
    if not isinstance(packed, RowPacked if kind == "rows" else ColumnPacked):
        raise KernelError(f"{kind} runs a weight that was pruned by {kind}, got {packed!r}. Use another way.")
    inner = _compact_runner(rest, packed, dtype)
    if isinstance(packed, RowPacked):
        return _Rows(inner, packed.rows, packed.shape[0])
    assert isinstance(packed, ColumnPacked)
    return _Columns(inner, packed.columns)


def _compact_runner(rest: str, packed: Format, dtype: torch.dtype) -> Runner:
    """A runner of the kept rows or columns as a dense matrix."""
    values, scales = packed.values, packed.scales
    if rest == "strips":
        missing = -len(values) % _STRIP  # rows of zeros below, whose outputs nobody reads
        codes = F.pad(values.to(_CODES) if values.dtype == torch.int8 else values, (0, 0, 0, missing))
        layout = _layout("strips", [_STRIP, codes.shape[1]], codes, torch.ones_like(codes, dtype=torch.bool))
        if scales is not None:
            scales = F.pad(scales.cpu(), (0, missing))
            layout = replace(layout, values=layout.values.to(torch.int8), scale=scales)
        return _Padded(layout, len(values))
    weight = values if scales is None else values.float() * scales[:, None]
    return _Prepacked(weight) if rest else _Dense(weight.to(dtype), shared=values.dtype == dtype)
