"""Find the experts of mixtures: stacks of matrices or lists of modules, and the routers that choose among them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from torch import Tensor, nn

from secateur.graph._units import Dimension, Place
from secateur.layers import expert_blocks

_TOP_K = re.compile(r"(moe_)?top_?k|(num|n)_(experts|selected)(_per_tok(en)?|_experts)|experts_per_tok(en)?")
_GROUPS = re.compile(r"(n|num)_(expert_)?groups?")
_BIAS = re.compile("bias|correction")
_CHOSEN_GROUPS = re.compile(r"top_?k_groups?")


def find_experts(model: nn.Module) -> list[Dimension]:
    """Return the experts of each mixture of a model, with the rows of the routers that choose them.

    What counts is the structure, not the class: parameters with one matrix for each expert, or a list of modules, and
    beside them a module with a row for each.

    Args:
        model: any module.

    Returns:
        One dimension of kind ``"experts"`` for each mixture. Its name is that of the module which holds the experts. At
        least as many experts must stay as a router chooses for a token.

    Example:
        >>> from torch import nn
        >>> from secateur.graph import find_experts
        >>> class Mixture(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.router, self.top_k = nn.Linear(8, 4), 2
        ...         self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        >>> found = find_experts(Mixture())[0]
        >>> found.name, found.size, found.least, found.routers
        ('experts', 4, 2, ('router',))
    """
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for block, counts, beside in expert_blocks(model):
        for child, count in counts.items():
            holder = block.get_submodule(child)
            places = list(_stacks(holder, names, count))
            routers = [module for module in beside if list(_rows(module, names, count))]
            places += [place for router in routers for place in _rows(router, names, count)]
            places += list(_biases(block, [holder, *routers], names, count))
            if not routers or count < 2:
                continue
            chosen, groups = _chosen(block)
            least = max(chosen, 1)
            if groups > 1:  # a router that first chooses among groups, by the two best of each
                within = max((value for value in _attributes(block, _CHOSEN_GROUPS)), default=groups)
                least = max(least * groups // max(within, 1), 2 * groups)
            found.append(
                Dimension(
                    names[id(holder)],
                    "experts",
                    count,
                    tuple(places),
                    group_size=count // groups if groups > 1 and count % groups == 0 else 0,
                    routers=tuple(names[id(router)] for router in routers),
                    least=min(least, count),
                )
            )
    return found


def _each(tensor: str, dim: int, count: int) -> Place:
    return Place(tensor, dim, np.arange(count, dtype=np.int64)[:, None])


def _stacks(holder: nn.Module, names: dict[int, str], count: int) -> Iterator[Place]:
    """The parameters of a stack, and biases with a row for each matrix. A list of modules has none."""
    if isinstance(holder, nn.ModuleList | nn.ModuleDict):
        return
    for module in holder.modules():
        for name, tensor in _tensors(module):
            if tensor.ndim >= 2 and len(tensor) == count:
                yield _each(f"{names[id(module)]}.{name}", 0, count)


def _rows(router: nn.Module, names: dict[int, str], count: int) -> Iterator[Place]:
    """What a router has for each expert: a row, and numbers that it adds or multiplies."""
    matrices = [(name, t) for name, t in _tensors(router) if t.ndim == 2 and len(t) == count]
    for name, _ in matrices:
        yield _each(f"{names[id(router)]}.{name}", 0, count)
    for name, tensor in _tensors(router):
        is_matrix = any(tensor is matrix for _, matrix in matrices)
        if matrices and not is_matrix and tensor.shape[-1:] == (count,) and tensor.numel() == count:
            yield _each(f"{names[id(router)]}.{name}", tensor.ndim - 1, count)


def _biases(block: nn.Module, others: list[nn.Module], names: dict[int, str], count: int) -> Iterator[Place]:
    """A correction of the choice that lies outside of the router."""
    inside = {id(module) for module in others} | {id(module) for module in others[0].modules()}
    for module in block.modules():
        if id(module) not in inside:
            for name, tensor in _tensors(module):
                if tensor.shape[-1:] == (count,) and tensor.numel() == count and _BIAS.search(name):
                    yield _each(f"{names[id(module)]}.{name}".lstrip("."), tensor.ndim - 1, count)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _chosen(block: nn.Module) -> tuple[int, int]:
    """How many experts a token gets, and among how many groups they are chosen."""
    return max(_attributes(block, _TOP_K), default=1), max(_attributes(block, _GROUPS), default=1)


def _attributes(block: nn.Module, pattern: re.Pattern[str]) -> list[int]:
    """The values of attributes of such a name, of the modules of a block, else of their configuration."""
    modules = list(block.modules())
    holders: list[list[dict[str, object]]] = [
        [vars(module) for module in modules],
        [vars(module.config) for module in modules if hasattr(getattr(module, "config", None), "__dict__")],
    ]
    for tables in holders:
        values = [v for table in tables for key, v in table.items() if type(v) is int and pattern.fullmatch(key)]
        if values:
            return values
    return []
