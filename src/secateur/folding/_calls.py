"""Which module's output is the input of which batch norm, and nothing else's?

The code of the model is traced by torch.fx, without inputs. Where a module's code cannot be traced, such as one that
decides by what it computed, its children are traced one by one: then only what happens within each of them is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm


@dataclass(frozen=True)
class NormCall:
    """One call of a batch norm.

    Args:
        before: the module whose output it normalises, and nothing else reads; None if there is none.
        reason: why there is none.
    """

    before: nn.Module | None
    reason: str = ""


@dataclass
class Calls:
    """The calls of modules that were seen.

    Args:
        norms: calls of each batch norm, by its id.
        counts: how many calls of each module there are, by its id.
        failures: why the code of a module could not be traced, by the id of each batch norm directly in it.
    """

    norms: dict[int, list[NormCall]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


def calls_in(model: nn.Module) -> Calls:
    """Return the calls of modules in the code of a model, in which each batch norm is in evaluation mode."""
    calls = Calls()
    _trace(model, type(model).__name__, "", calls)
    return calls


def _has_norm(module: nn.Module) -> bool:
    return any(isinstance(child, BatchNorm) for child in module.modules())


class _Tracer(fx.Tracer):
    """Looks into every module that has a batch norm."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, BatchNorm) or not _has_norm(m)


def _trace(module: nn.Module, name: str, outside: str, calls: Calls) -> None:
    if isinstance(module, BatchNorm) or not _has_norm(module):
        return
    try:
        graph = _Tracer().trace(module)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        reason = f"the code of {name} cannot be traced ({type(error).__name__}: {first:.200})"
        for key, child in module.named_children():
            if isinstance(child, BatchNorm):
                calls.failures[id(child)] = reason
            _trace(child, key if name == type(module).__name__ else f"{name}.{key}", reason, calls)
        return
    _read(module, graph, name, outside, calls)


def _read(root: nn.Module, graph: fx.Graph, name: str, outside: str, calls: Calls) -> None:
    for node in graph.nodes:
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            calls.counts[id(module)] = calls.counts.get(id(module), 0) + 1
            if isinstance(module, BatchNorm):
                calls.norms.setdefault(id(module), []).append(_call(root, node, name, outside))
        elif node.op == "get_attr":  # a parameter that code reads, so that its layer must stay as it is
            owner = root.get_submodule(str(node.target).rpartition(".")[0])
            calls.counts[id(owner)] = calls.counts.get(id(owner), 0) + 2


def _call(root: nn.Module, node: fx.Node, name: str, outside: str) -> NormCall:
    source: Any = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, fx.Node):
        return NormCall(None, "its input is no result of the model's code")
    if source.op == "placeholder":
        where = f"its input comes from outside of {name}"
        return NormCall(None, f"{where}: {outside}" if outside else f"{where}, so no layer is before it")
    if source.op != "call_module":
        made_by = getattr(source.target, "__name__", source.target)
        return NormCall(None, f"its input is made by {made_by}, so that no layer is directly before it")
    others = [str(user.target) for user in source.users if user is not node]
    if others:
        return NormCall(None, f"the output of {source.target} is also read by {', '.join(others):.200}")
    return NormCall(root.get_submodule(str(source.target)))


def dimensions_of(norms: list[nn.Module]) -> tuple[dict[int, set[int]], list[Any]]:
    """Return a table of how many dimensions the inputs of batch norms have, by their id, and the hooks that fill it."""
    found: dict[int, set[int]] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor):
            found.setdefault(id(module), set()).add(args[0].ndim)

    return found, [norm.register_forward_pre_hook(note) for norm in norms]
