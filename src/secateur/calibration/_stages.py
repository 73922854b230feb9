"""Cut a model into stages, in the order in which they run.

A *stage* is calibrated at once: one of the model's repeated blocks, or a layer outside of all blocks.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.calibration._batches import Forward, code_path
from secateur.calibration._decisions import Decisions
from secateur.layers import Layer

Fingerprint: TypeAlias = list[Any]


@dataclass(frozen=True)
class Stage:
    """A part of the model that is calibrated at once.

    Args:
        name: qualified name of the module.
        module: runs the layers; the model itself when everything is calibrated in one pass.
        layers: to prune, all inside the module.
        once: whether one forward pass runs the module exactly once, so that the pass can end there.
    """

    name: str
    module: nn.Module
    layers: tuple[Layer, ...]
    once: bool = False


@dataclass(frozen=True)
class PlainRun:
    """One forward pass of the whole model on one batch, without any replay.

    Args:
        batch: that was run.
        calls: which watched modules ran, in order; a module that ran twice is listed twice. They are the modules of
            the stages and their neighbours in lists of modules.
        outputs: of each of these calls, a fingerprint, or None for a module that is no stage.
        decides: whether code outside of the stages looks at what they computed, and may therefore run other modules on
            another batch.
    """

    batch: Any
    calls: tuple[nn.Module, ...]
    outputs: tuple[Fingerprint | None, ...]
    decides: bool


def find_stages(
    model: nn.Module, layers: Iterable[Layer], batches: list[Any], forward: Forward
) -> tuple[tuple[Stage, ...], list[PlainRun]]:
    """Return the stages in the order in which they run, and the plain forward passes that showed the order.

    A model without repeated blocks is one stage, and then no pass is run.
    """
    layers = tuple(layers)
    members = _layers_by_part(model, layers)
    if not members:
        return (Stage("", model, layers),), []
    parts = [module for module, _ in members.values() if module is not model]
    runs = [_plain_run(model, parts, batch, forward) for batch in _examples(batches)]
    order = [key for key in dict.fromkeys(id(module) for run in runs for module in run.calls) if key in members]
    repeated = {key for run in runs for key, count in Counter(map(id, run.calls)).items() if count > 1}
    names = {id(module): name for name, module in model.named_modules()}
    stages = tuple(
        Stage(names[key], members[key][0], tuple(members[key][1]), once=key in order and key not in repeated)
        for key in order + [key for key in members if key not in order]
    )
    return stages, runs


def _layers_by_part(model: nn.Module, layers: tuple[Layer, ...]) -> dict[int, tuple[nn.Module, list[Layer]]]:
    """By the id of a part of the model, the part and the layers that it runs. Empty for a model without blocks."""
    prunable = {id(module) for layer in layers for module in layer.modules}
    owner: dict[int, nn.Module] = {}
    for block in _repeated_blocks(model, prunable):
        for inner in block.modules():
            # A module of several blocks sees inputs in each: it is calibrated last, by a pass over the whole model.
            owner[id(inner)] = model if id(inner) in owner else block
    members: dict[int, tuple[nn.Module, list[Layer]]] = {}
    if not owner:
        return members
    for layer in layers:
        owners = {id(found): found for found in (owner.get(id(module), module) for module in layer.modules)}
        part = next(iter(owners.values())) if len(owners) == 1 else model
        members.setdefault(id(part), (part, []))[1].append(layer)
    return members


def _repeated_blocks(module: nn.Module, prunable: set[int]) -> list[nn.Module]:
    """The outermost modules that are repeated, of one class, side by side, each with layers to prune.

    In a list of modules (ModuleList, Sequential, ModuleDict) two modules of a class are enough. In any other module,
    repeated modules deeper inside take precedence, so that an encoder and a decoder of one class are not two blocks.
    """
    by_class: dict[type, list[nn.Module]] = {}
    for child in module.children():
        if id(child) not in prunable and any(id(inner) in prunable for inner in child.modules()):
            by_class.setdefault(type(child), []).append(child)
    repeated = {id(block): block for blocks in by_class.values() if len(blocks) > 1 for block in blocks}
    if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        rest = [child for child in module.children() if id(child) not in repeated]
        return [*repeated.values(), *(block for child in rest for block in _repeated_blocks(child, prunable))]
    deeper = [block for child in module.children() for block in _repeated_blocks(child, prunable)]
    return deeper or list(repeated.values())


def _examples(batches: list[Any]) -> list[Any]:
    """One batch of each code path shows which parts run, and how often: the largest one, where loops are longest."""
    largest: dict[str, tuple[int, Any]] = {}
    for batch in batches:
        size = sum(leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        path = code_path(batch)
        if path not in largest or size > largest[path][0]:
            largest[path] = (size, batch)
    return [batch for _, batch in largest.values()]


def watched_modules(model: nn.Module, parts: Iterable[nn.Module]) -> list[nn.Module]:
    """The parts, and their neighbours in lists of modules: enough to see which way a forward pass takes."""
    found = {id(part): part for part in parts}
    for container in model.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            children = list(container.children())
            if any(id(child) in found for child in children):
                found |= {id(child): child for child in children}
    return list(found.values())


def _plain_run(model: nn.Module, parts: list[nn.Module], batch: Any, forward: Forward) -> PlainRun:
    calls: list[nn.Module] = []
    outputs: list[Fingerprint | None] = []
    stages = {id(part) for part in parts}
    decisions = Decisions()
    with ExitStack() as stack:
        for part in watched_modules(model, parts):

            def recorded(
                *args: Any, part: nn.Module = part, run: Callable[..., Any] = part.forward, **kwargs: Any
            ) -> object:
                calls.append(part)
                place = len(outputs)
                outputs.append(None)
                if id(part) not in stages:
                    return run(*args, **kwargs)
                with decisions.inside():
                    output = run(*args, **kwargs)
                outputs[place] = fingerprint(output)
                return output

            stack.enter_context(forward_as(part, recorded))
        stack.enter_context(decisions)
        forward(model, copy.deepcopy(batch))
    return PlainRun(batch, tuple(calls), tuple(outputs), decisions.found)


def fingerprint(output: Any) -> Fingerprint:
    """Enough of an output to tell it from another: at most 4096 values of each tensor. Other leaves count by type."""
    leaves = tree_leaves(output)
    return [
        leaf.detach().flatten()[:: math.ceil(leaf.numel() / 4096) or 1].clone()
        if isinstance(leaf, Tensor)
        else type(leaf)
        for leaf in leaves
    ]


def same_output(left: Fingerprint, right: Fingerprint) -> bool:
    """Whether two fingerprints agree up to the order in which a device adds."""

    def agree(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
            return not isinstance(a, Tensor) and bool(a == b)
        tolerance = 1e-5 if a.dtype in (torch.float32, torch.float64) else 1e-2
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance * 0.1, equal_nan=True)

    return len(left) == len(right) and all(agree(a, b) for a, b in zip(left, right, strict=True))


_ABSENT = object()


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Give a module another forward function; on exit it has its own again."""
    own = module.__dict__.get("forward", _ABSENT)
    module.forward = forward
    try:
        yield
    finally:
        if own is _ABSENT:
            del module.forward
        else:
            module.forward = own
