"""Find the blocks of a model that a residual stream passes through, so that it can also pass by."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.calibration import Forward, call_model, quiet
from secateur.graph._reference import stream_in, stream_out
from secateur.graph._units import Dimension

_RESIZED = "what it returns has another shape than what it is given"
_ADDITIONS = frozenset({"aten::add", "aten::add_", "aten::addcmul", "aten::addcmul_", "aten::sub", "aten::rsub"})


def find_blocks(model: nn.Module, batch: Any, forward: Forward = call_model) -> list[Dimension]:
    """Return the lists of blocks of which some can be left out.

    A block can go if it runs once, takes and returns one residual stream (a tensor of the same shape, to which it adds
    something), gets the stream from the block before as that returned it, and gives later blocks nothing else.

    Args:
        model: any module; it runs once, in the state of :func:`secateur.calibration.quiet`.
        batch: of its inputs.
        forward: how to call the model on it.

    Returns:
        One dimension of kind ``"layers"`` for each list (``ModuleList`` or ``Sequential``) that has such blocks. Its
        size is the number of all blocks of the list; those that must stay are ``fixed``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from secateur.graph import find_blocks
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.inner(x)
        >>> model = nn.Sequential(nn.Linear(2, 4), Block(), Block())
        >>> found = find_blocks(model, torch.ones(1, 2))[0]
        >>> found.name, found.kind, found.size, found.fixed
        ('', 'layers', 3, (0,))
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    }
    watched = {id(child): child for module in lists.values() for child in module.children()}
    watch = _Watch()
    hooks = []
    try:
        for child in watched.values():
            hooks.append(child.register_forward_pre_hook(watch.enter, with_kwargs=True, prepend=True))
            hooks.append(child.register_forward_hook(watch.leave))
        with quiet(model), watch:
            forward(model, copy.deepcopy(batch))
    finally:
        for hook in hooks:
            hook.remove()
    reasons = {
        name: [watch.reason(child, list(module.children())) for child in module.children()]
        for name, module in lists.items()
    }
    return [_dimension(name, reasons[name]) for name in _chosen(reasons)]


def _dimension(name: str, reasons: list[str]) -> Dimension:
    fixed = tuple(index for index, reason in enumerate(reasons) if reason)
    notes = tuple(f"block {index} stays: {reasons[index]}" for index in fixed)
    return Dimension(name, "layers", len(reasons), fixed=fixed, least=max(len(fixed), 1), notes=notes)


def _chosen(reasons: Mapping[str, list[str]]) -> list[str]:
    """The lists to take: the outer ones, unless lists inside have others and these are stages, or most must stay."""
    free = {name: sum(not reason for reason in found) for name, found in reasons.items()}
    chosen: list[str] = []
    for name in reasons:
        prefix = f"{name}." if name else ""
        if not free[name] or any(name != outer and name.startswith(f"{outer}." if outer else "") for outer in chosen):
            continue
        inside = any(other != name and other.startswith(prefix) and count for other, count in free.items())
        is_stages = _RESIZED in reasons[name]
        if not inside or (2 * free[name] >= len(reasons[name]) and not is_stages):
            chosen.append(name)
    return chosen


@dataclass
class _Seen:
    """One call of a block."""

    given: list[Tensor]
    stream: Tensor | None = None
    returned: object = None
    adds: bool = False
    order: int = 0
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = field(default_factory=lambda: ((), {}))


class _Watch(TorchDispatchMode):
    """Notes what blocks are given and return, and whether something is added to what they are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: dict[int, list[_Seen]] = {}
        self._running: list[_Seen] = []
        self._order = 0

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a call of a block."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        call = _Seen(given, order=self._order, inputs=(args, kwargs))
        self._order += 1
        self._calls.setdefault(id(module), []).append(call)
        self._running.append(call)

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        """End it."""
        call = self._running.pop()
        call.returned = output
        call.stream = stream_in(*call.inputs, stream_out(output))
        call.inputs = ((), {})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._running and func._schema.name in _ADDITIONS:
            places = [_place(leaf) for leaf in args if isinstance(leaf, Tensor)]
            for call in self._running:
                if not call.adds:
                    call.adds = any(_place(given) in places for given in call.given if given.is_floating_point())
        return func(*args, **(kwargs or {}))

    def reason(self, block: nn.Module, siblings: list[nn.Module]) -> str:
        """Return why a block cannot go, or ``""``."""
        calls = self._calls.get(id(block), [])
        if len(calls) != 1:
            return f"it runs {len(calls)} times" if calls else "it does not run"
        call = calls[0]
        if call.stream is None:
            return _RESIZED
        if not call.adds:
            return "it does not add to what it is given"
        others = [seen for sibling in siblings for seen in self._calls.get(id(sibling), []) if sibling is not block]
        before = max((seen for seen in others if seen.order < call.order), key=lambda seen: seen.order, default=None)
        if before is not None and before.stream is not None and not _same(stream_out(before.returned), call.stream):
            return "it is not given what the block before it returns"
        own = {_place(tensor) for tensor in call.given}
        stream = stream_out(call.returned)
        extra = {
            _place(leaf)
            for leaf in tree_leaves(call.returned)
            if isinstance(leaf, Tensor) and leaf is not stream and _place(leaf) not in own
        }
        if any(_place(tensor) in extra for seen in others if seen.order > call.order for tensor in seen.given):
            return "it also computes what later blocks need"
        return ""


def _place(tensor: Tensor) -> tuple[object, ...]:
    """The memory of a tensor. Tensors that were seen stay alive, so that no other is ever at the same place."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return ("object", id(tensor))
    return tensor.data_ptr(), tensor.numel()


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and _place(one) == _place(other)
