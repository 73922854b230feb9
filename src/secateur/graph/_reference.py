"""Run a model as if units were gone that zeros cannot take out of it: blocks, and experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from secateur.graph._units import Dimension

# Functions that multiply a matrix with its inputs. Whatever else is done to a router's matrix gives the matrix itself.
_PRODUCTS = frozenset({"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "addmm", "bmm", "baddbmm", "einsum"})


@contextmanager
def without(model: nn.Module, removed: Iterable[tuple[Dimension, Sequence[int]]]) -> Iterator[None]:
    """Skip blocks, and let no router choose experts, for a while.

    Units of other kinds are out of the model when the columns that read them are zero, and are not looked at.

    Args:
        model: of full size.
        removed: dimensions, each with the numbers of the units that count as gone.
    """
    with ExitStack() as stack:
        for dimension, units in removed:
            if dimension.kind == "layers":
                blocks = list(model.get_submodule(dimension.name).children())
                for unit in units:
                    stack.enter_context(_skipped(blocks[unit]))
            elif dimension.kind == "experts":
                stack.enter_context(_never_chosen(model, dimension, list(units)))
        yield


@contextmanager
def _skipped(block: nn.Module) -> Iterator[None]:
    """Let the stream pass a block by, by its forward, because calibration calls that with inputs of its own."""
    run = block.forward
    own = vars(block).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _pass_on(args, kwargs, run(*args, **kwargs))

    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _pass_on(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    """What a block returns when the stream passes it by: its own input, in the place of its output."""
    stream = stream_in(args, kwargs, stream_out(output))
    if isinstance(output, Tensor):
        return stream
    if isinstance(output, tuple) and type(output) is tuple:
        place = next(index for index, value in enumerate(output) if value is stream_out(output))
        return (*output[:place], stream, *output[place + 1 :])
    raise TypeError(f"a block that returns a {type(output).__name__} is not skipped")


def stream_out(output: object) -> Tensor | None:
    """Return the residual stream in what a block returned: the tensor, or the first one of a tuple."""
    if isinstance(output, Tensor):
        return output
    if type(output) is tuple:
        return next((value for value in output if isinstance(value, Tensor)), None)
    return None


def stream_in(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor | None) -> Tensor | None:
    """Return the residual stream in what a block was given: the first tensor like the one that it returned."""
    for value in [*args, *kwargs.values()]:
        if isinstance(value, Tensor) and out is not None and value.shape == out.shape and value.dtype == out.dtype:
            return value
    return None


@contextmanager
def _never_chosen(model: nn.Module, dimension: Dimension, units: list[int]) -> Iterator[None]:
    """Make what a router computes for some experts, and what it adds to that, negative infinity."""
    hooks = []
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    modes: list[_Masked] = []

    def enter(module: nn.Module, args: object) -> None:
        weights = [p for p in module.parameters(recurse=False) if p.ndim == 2 and len(p) == dimension.size]
        modes.append(_Masked(weights, dimension.size, units))
        modes[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(module: nn.Module, args: object, output: object) -> None:
        modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    try:
        for name in dimension.routers:
            router = model.get_submodule(name)
            hooks.append(router.register_forward_pre_hook(enter))
            hooks.append(router.register_forward_hook(leave, always_call=True))
        for place in dimension.places:
            owner, _, last = place.tensor.rpartition(".")
            module = model.get_submodule(owner)
            tensor = getattr(module, last)
            if tensor.ndim == 1 and tensor.is_floating_point():  # a bias for the choice
                table: dict[str, Any] = module._parameters if last in module._parameters else module._buffers
                masked = tensor.detach().clone()
                masked[place.of(units)] = -torch.inf
                swapped.append((table, last, tensor))
                table[last] = nn.Parameter(masked, False) if isinstance(tensor, nn.Parameter) else masked
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while modes:
            modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for table, last, tensor in swapped:
            table[last] = tensor


class _Masked(TorchFunctionMode):
    """Products with some matrices give negative infinity for some of their rows."""

    def __init__(self, weights: list[nn.Parameter], size: int, units: list[int]) -> None:
        super().__init__()
        self._known: dict[int, Tensor] = {id(weight): weight for weight in weights}
        self._shapes = {(tuple(w.shape), tuple(w.shape[::-1])) for w in weights}
        self._size, self._units = size, units

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and any(id(leaf) in self._known for leaf in tree_leaves((args, kwargs))):
            if getattr(func, "__name__", "") in _PRODUCTS:
                if result.shape[-1] == self._size:
                    result = result.clone()
                    result[..., self._units] = -torch.inf
            elif any(tuple(result.shape) in shapes for shapes in self._shapes):
                self._known[id(result)] = result
        return result
