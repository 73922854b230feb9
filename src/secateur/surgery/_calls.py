"""Call parts of a model with the inputs that they have in a forward pass, and compare what they return."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.calibration import Forward, quiet

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """How a module was called in a forward pass.

    Args:
        path: qualified name of the module.
        module: that was called.
        args: copies of what it got.
        kwargs: by name.
    """

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def again(self) -> object:
        """Return what the module returns for the same inputs, computed in float32 if it has less."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        with in_float32(self.module):
            args, kwargs = tree_map(_widened, (args, kwargs))
            return self.module(*args, **kwargs)


class _Reached(BaseException):
    """Ends a forward pass. Not an Exception, so that no model's own handler catches it."""


def first_call(model: nn.Module, path: str, batch: Any, forward: Forward) -> Call:
    """Return how a module is called first, or the innermost module around it that is called at all.

    Args:
        model: that runs.
        path: of the module.
        batch: of inputs of the model.
        forward: how to call the model on it.
    """
    parts = path.split(".") if path else []
    for length in range(len(parts), 0, -1):
        outer = ".".join(parts[:length])
        module = model.get_submodule(outer)
        if type(module).forward is nn.Module.forward:  # such as of a list
            continue
        seen: list[Call] = []

        def note(module: nn.Module, args: Any, kwargs: Any, outer: str = outer, seen: list[Call] = seen) -> None:
            seen.append(Call(outer, module, *copy.deepcopy((args, kwargs))))
            raise _Reached

        hook = module.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        try:
            with quiet(model):
                forward(model, copy.deepcopy(batch))
        except _Reached:
            return seen[0]
        finally:
            hook.remove()
    return whole_call(model, batch, forward)


def whole_call(model: nn.Module, batch: Any, forward: Forward) -> Call:
    """Return the call of a whole model on a batch."""
    return Call("", _Whole(model, forward), (copy.deepcopy(batch),), {})


class _Whole(nn.Module):
    """A model that is called on batches."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._run = forward

    def forward(self, batch: Any) -> object:
        """Run it."""
        return self._run(self.model, batch)


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Give a module float32 copies of its half-precision parameters and buffers for a while."""
    with _computing_in(module, torch.float32, HALF):
        yield


@contextmanager
def _computing_in(module: nn.Module, dtype: torch.dtype, narrower: tuple[torch.dtype, ...]) -> Iterator[None]:
    """Give a module wider copies of its narrower parameters and buffers for a while."""
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    wide: dict[int, Tensor] = {}
    try:
        for inner in module.modules():
            tables: list[dict[str, Any]] = [inner._parameters, inner._buffers]
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None and tensor.dtype in narrower:
                        if id(tensor) not in wide:
                            data = tensor.detach().to(dtype)
                            wide[id(tensor)] = nn.Parameter(data, False) if isinstance(tensor, nn.Parameter) else data
                        swapped.append((table, name, tensor))
        for table, name, tensor in swapped:
            table[name] = wide[id(tensor)]
        yield
    finally:
        for table, name, tensor in swapped:
            table[name] = tensor


def _widened(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in HALF else leaf


def wide_outputs(model: nn.Module, batch: Any, forward: Forward) -> tuple[object, torch.dtype]:
    """Return what a model gives for a batch, computed in float64, or in float32 if its code allows no float64.

    In float64, sums in another order differ by so little that two models which are equal but for that can be told from
    others, however deep they are. Random numbers are the same in each call.

    Args:
        model: that runs; it has float64 copies of its parameters and buffers meanwhile.
        batch: of its inputs.
        forward: how to call the model on it.
    """
    for dtype, narrower in ((torch.float64, (*HALF, torch.float32)), (torch.float32, HALF)):

        def widened(leaf: Any, dtype: torch.dtype = dtype, narrower: tuple[torch.dtype, ...] = narrower) -> Any:
            return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.dtype in narrower else leaf

        try:
            with _computing_in(model, dtype, narrower), quiet(model), same_chance():
                return forward(model, tree_map(widened, copy.deepcopy(batch))), dtype
        except Exception:
            if dtype == torch.float32:
                raise
    raise AssertionError


@contextmanager
def same_chance() -> Iterator[None]:
    """Let a model that draws random numbers, such as one that masks patches, draw the same ones each time."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


def outputs_of(output: object) -> list[tuple[str, Tensor]]:
    """Return the floating-point tensors of an output, each with where it is. Caches and other objects are left out."""
    return list(_leaves(output, ""))


def _leaves(value: object, where: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{where}[{key!r}]")
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, inner in enumerate(value):
            # The length is part of the name: one entry for each layer is not comparable when layers have gone.
            yield from _leaves(inner, f"{where}[{index} of {len(value)}]")


@dataclass(frozen=True)
class Difference:
    """How far an output is from its reference.

    Args:
        error: norm of the difference, as a part of the norm of the reference; infinite if nothing could be compared.
        reason: why nothing could be compared, or ``""``.
    """

    error: float
    reason: str = ""


@dataclass(frozen=True)
class Looks:
    """What of an output may differ in its shape, because it is no result but a look inside.

    Args:
        sizes: pairs of a size before and after, such as of the heads in attention weights.
        lists: whether lists of one tensor for each layer may have become shorter.
    """

    sizes: frozenset[tuple[int, int]] = frozenset()
    lists: bool = False

    def allow(self, before: Tensor, after: Tensor | None) -> bool:
        """Whether one tensor may have become the other."""
        if after is None:
            return self.lists
        if before.ndim != after.ndim:
            return False
        return all(pair[0] == pair[1] or pair in self.sizes for pair in zip(before.shape, after.shape, strict=True))


def difference(found: object, reference: object, looks: Looks) -> Difference:
    """Compare two outputs of a model or a module, one of which has fewer units.

    Args:
        found: output with fewer units.
        reference: output of the same function before.
        looks: which tensors may be left out. At least one must be compared.
    """
    here, there = dict(outputs_of(found)), dict(outputs_of(reference))
    squares, norm, compared = 0.0, 0.0, 0
    for where, expected in there.items():
        got = here.get(where)
        if got is None or got.shape != expected.shape:
            if looks.allow(expected, got):
                continue
            now = "missing" if got is None else f"{list(got.shape)}"
            return Difference(math.inf, f"{where or 'the output'} is {now} instead of {list(expected.shape)}")
        wide = torch.complex128 if expected.is_complex() else torch.float64
        one, other = got.detach().to(wide), expected.detach().to(wide)
        same = (one == other) | (one.isnan() & other.isnan())
        squares += float(torch.where(same, 0, one - other).abs().square().sum())
        norm += float(torch.where(other.isfinite(), other, 0).abs().square().sum())
        compared += 1
    if not compared:
        return Difference(math.inf, "it returns no tensor of floating-point numbers that could be compared")
    if math.isnan(squares):
        return Difference(math.inf, "it returns NaN where the reference has none")
    return Difference(math.sqrt(squares) / math.sqrt(norm) if norm else math.sqrt(squares))


def tolerance_for(tensors: Iterable[Tensor]) -> float:
    """Return how far a model of such tensors may be from its reference: 1e-10 in float64, 1e-5 in anything less."""
    kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return 1e-10 if kinds and kinds <= {torch.float64} else 1e-5
