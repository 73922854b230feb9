"""Which block of the teacher does a block of the model correspond to?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.reports import ShrinkReport


@dataclass(frozen=True)
class Correspondence:
    """Pairs of blocks with the same place in the network.

    A block of a model from which others were removed stands for itself and for those that were behind it: what it gives
    should be what the last of them gave.

    Args:
        names: of the model's blocks and of the blocks of the teacher whose outputs they should give.
        blocks: of the model, in order.
        teachers: of the teacher, in order.
        how: it was found out, in words; why there is none, where it is empty.
    """

    names: Mapping[str, str]
    blocks: tuple[nn.Module, ...]
    teachers: tuple[nn.Module, ...]
    how: str


def block_lists(model: nn.Module, least: int = 2) -> dict[str, list[nn.Module]]:
    """Return the repeated blocks of a model by the name of their list, outer lists only.

    Args:
        model: any module.
        least: how many blocks a list must have.
    """
    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(_inside(name, outer) for outer in found):
            continue
        children = list(module.children())
        alike = len(children) >= least and len({type(child) for child in children}) == 1
        if alike and all(any(p.ndim > 1 for p in child.parameters()) and list(child.children()) for child in children):
            found[name] = children
    return found


def _inside(name: str, outer: str) -> bool:
    return outer == "" or name.startswith(f"{outer}.")


def correspondence(model: nn.Module, teacher: nn.Module, history: Iterable[object] = ()) -> Correspondence:
    """Return which blocks of a model correspond to which of its teacher.

    Args:
        model: that learns.
        teacher: the dense model.
        history: reports of earlier stages; those of shrinking say which blocks stayed.
    """
    recorded = _recorded([report for report in history if isinstance(report, ShrinkReport)])
    pairs: dict[str, str] = {}
    how: list[str] = []
    for name, teachers in block_lists(teacher).items():
        blocks = _blocks_at(model, name)
        if not blocks:
            continue
        kept, why = _kept(name, blocks, teachers, recorded)
        how.append(f"{name or 'blocks'}: {why}")
        if kept:
            behind = [*(later - 1 for later in kept[1:]), len(teachers) - 1]
            names = list(dict(model.get_submodule(name).named_children()))
            theirs = list(dict(teacher.get_submodule(name).named_children()))
            for own, last in zip(names, behind, strict=True):
                pairs[f"{name}.{own}".lstrip(".")] = f"{name}.{theirs[last]}".lstrip(".")
    return Correspondence(
        pairs,
        tuple(model.get_submodule(own) for own in pairs),
        tuple(teacher.get_submodule(theirs) for theirs in pairs.values()),
        "; ".join(how) if how else "no repeated blocks were found in both models",
    )


def _blocks_at(model: nn.Module, name: str) -> list[nn.Module]:
    try:
        return list(model.get_submodule(name).children())
    except AttributeError:
        return []


def _recorded(reports: Sequence[ShrinkReport]) -> dict[str, tuple[int, ...]]:
    """By the name of a list, the numbers of its blocks in the model before the first of several stages."""
    found: dict[str, tuple[int, ...]] = {}
    for report in reports:
        for name, kept in report.kept_blocks.items():
            before = found.get(name)
            known = before is None or all(index < len(before) for index in kept)
            found[name] = kept if before is None or not known else tuple(before[index] for index in kept)
    return found


def _kept(
    name: str, blocks: Sequence[nn.Module], teachers: Sequence[nn.Module], recorded: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[int, ...], str]:
    """The numbers of the teacher's blocks that the model still has, and how that is known."""
    for listed, kept in recorded.items():
        if _same_list(listed, name) and len(kept) == len(blocks) and max(kept, default=-1) < len(teachers):
            return kept, "as the report of shrinking says"
    if len(blocks) == len(teachers):
        return tuple(range(len(blocks))), "both models have as many"
    if len(blocks) > len(teachers):
        return (), f"the model has {len(blocks)} blocks and the teacher only {len(teachers)}, so none is compared"
    found = _by_values(blocks, teachers)
    if found is None:
        return (), (
            f"the model has {len(blocks)} blocks of {len(teachers)}, and neither a report nor equal parameters say "
            "which, so none is compared"
        )
    return found, "found by parameters that are equal, because no report says it"


def _same_list(one: str, other: str) -> bool:
    """Whether two names are of one list, in a model with a head and in one without."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def _by_values(blocks: Sequence[nn.Module], teachers: Sequence[nn.Module]) -> tuple[int, ...] | None:
    """The teacher's block with the most parameters in common, for each block, if these are in order."""
    found: list[int] = []
    for block in blocks:
        shared = [_shared(block, teacher) for teacher in teachers]
        best = max(shared)
        if not best or shared.count(best) > 1:
            return None
        found.append(shared.index(best))
    return tuple(found) if found == sorted(set(found)) else None


def _shared(block: nn.Module, teacher: nn.Module) -> int:
    own: dict[str, Tensor] = dict(block.named_parameters())
    theirs = dict(teacher.named_parameters())
    return sum(
        own[name].shape == theirs[name].shape and torch.equal(own[name].to(theirs[name]), theirs[name])
        for name in own.keys() & theirs.keys()
    )
