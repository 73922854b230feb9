"""Find the parameters that a report names in a model, in a copy of it, or in a state_dict.

A copy may be wrapped, so that all its names begin with those of the wrappers. Names are never matched one by one: one
prefix must fit all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

from torch import Tensor, nn

from secateur._errors import PatternError, RecipeError

Holder: TypeAlias = nn.Module | Mapping[str, Tensor]
_Names: TypeAlias = list[tuple[str, ...]]  # for each wanted parameter its names in the holder

# Attributes in which wrappers keep a whole model: DistributedDataParallel, AveragedModel, timm's ModelEma, accelerate;
# and, by convention, a LightningModule.
_WRAPPERS = ("module", "model")
# Attributes that are only ever wrappers', so that they do not count anywhere in a name: torch.compile, FSDP, activation
# checkpointing, Lightning Fabric.
_TRANSPARENT = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_DEEPEST = 3  # wrappers around one another

_PREFIXES = tuple(
    "".join(f"{part}." for part in parts) for depth in range(_DEEPEST + 1) for parts in product(_WRAPPERS, repeat=depth)
)


@dataclass(frozen=True)
class Wanted:
    """A parameter to find.

    Args:
        names: that it may have: several where modules share it. One is enough.
        shape: that it must have; None if that is not known.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...] | None


def find_tensors(holder: Holder, wanted: Sequence[Wanted], *, computed: bool = False) -> list[dict[str, Tensor]]:
    """Return for each wanted parameter the tensors that hold it, by their names in the holder.

    Args:
        holder: a module, or a mapping of names to tensors.
        wanted: what to find.
        computed: take weights that a module computes when they are read, too, such as those of packed layers.

    Raises:
        RecipeError: a parameter that is not there, or is there under several prefixes.
        PatternError: one of another shape.
        TypeError: the holder is something else.
    """
    given = _tensors_of(holder, {name.rpartition(".")[2] for entry in wanted for name in entry.names}, computed)
    by_plain: dict[str, list[str]] = {}
    for name in given:
        by_plain.setdefault(_plain(name), []).append(name)
    matches = _match([entry.names for entry in wanted], by_plain)
    best = matches[0]
    if not all(best):
        absent = [entry.names[0] for entry, names in zip(wanted, best, strict=True) if not names]
        raise RecipeError(_missing(absent, len(wanted), holder, list(given)))
    if len(matches) > 1:
        places = " and ".join(repr(match[0][0]) for match in matches)
        raise RecipeError(
            f"{wanted[0].names[0]}: it may be any of {places}, in models that are alike.\n"
            "Pass only the part of the model or of the state_dict that is meant."
        )
    found = []
    for entry, names in zip(wanted, best, strict=True):
        tensors = {name: given[name]() for name in names}
        for name, tensor in tensors.items():
            if entry.shape is not None and tuple(tensor.shape) != entry.shape:
                raise PatternError(
                    f"{name}: it has shape {tuple(tensor.shape)}, but its mask has shape {entry.shape}.\n"
                    "Pass a copy of the model that the masks were made for."
                )
        found.append(tensors)
    return found


def _tensors_of(holder: object, attributes: set[str], computed: bool) -> dict[str, Callable[[], Tensor]]:
    """What reads each tensor of a holder, by name."""

    def reader(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    def computer(module: nn.Module, attribute: str) -> Callable[[], Tensor]:
        # A packed layer that took the place of transformers' Conv1D, whose parameter is [in, out].
        turned = getattr(module, "transposed", False)
        return lambda: getattr(module, attribute).T if turned else getattr(module, attribute)

    if isinstance(holder, Mapping):
        return {str(name): reader(tensor) for name, tensor in holder.items() if isinstance(tensor, Tensor)}
    if not isinstance(holder, nn.Module):
        raise TypeError(f"expected an nn.Module or a state_dict, got {type(holder).__name__}")
    found = {name: reader(tensor) for name, tensor in holder.named_buffers(remove_duplicate=False)}
    found |= {name: reader(tensor) for name, tensor in holder.named_parameters(remove_duplicate=False)}
    for name, module, attribute in _properties(holder, attributes) if computed else ():
        found.setdefault(name, computer(module, attribute))
    return found


def _properties(model: nn.Module, attributes: Iterable[str]) -> list[tuple[str, nn.Module, str]]:
    """The weights that modules compute when they are read: of packed layers, and of parametrizations."""
    return [
        (f"{name}.{attribute}".lstrip("."), module, attribute)
        for name, module in model.named_modules(remove_duplicate=False)
        for attribute in attributes
        if isinstance(getattr(type(module), attribute, None), property)
    ]


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _TRANSPARENT)


def _match(wanted: Sequence[tuple[str, ...]], given: Mapping[str, list[str]]) -> list[_Names]:
    """Every way to match all names: the names as they are, or else all that drop one prefix and add another.

    If there is none, the one that matches most.
    """
    plain = [tuple(_plain(name) for name in names) for names in wanted]
    found: list[_Names] = []
    for lost, gained in product(_PREFIXES, _PREFIXES):
        if all(name.startswith(lost) for names in plain for name in names):
            match = [
                tuple(there for name in names for there in given.get(gained + name.removeprefix(lost), ()))
                for names in plain
            ]
            if not lost and not gained and all(match):
                return [match]  # whatever else there is, the same names are no guess
            if match not in found:
                found.append(match)
    return [match for match in found if all(match)] or [max(found, key=lambda match: sum(map(bool, match)))]


def _missing(absent: Sequence[str], total: int, holder: Holder, given: Sequence[str]) -> str:
    some = ", ".join(map(repr, given[:3])) + (", ..." if len(given) > 3 else "")
    kind = type(holder).__name__
    lines = [
        f"{len(absent)} of {total} pruned parameters are not in the {kind}: {listed(absent)}. It has {len(given)} "
        f"tensors{': ' if given else ''}{some}.",
        "Names must be the same, but for the prefixes of wrappers (module., model., _orig_mod.).",
    ]
    attributes = {name.rpartition(".")[2] for name in absent}
    computed = _properties(holder, attributes) if isinstance(holder, nn.Module) else []
    ends = {name.partition(".")[2] or name for name in absent} | set(absent)
    behind = [(name, module) for name, module, _ in computed if any(name.endswith(end) for end in ends)]
    if behind:
        name, module = behind[0]
        lines.append(
            f"{name!r} is computed by {type(module).__name__} when it is read: call secateur.unpack_ on a packed model "
            "first, and remove parametrizations."
        )
    elif any(".base_layer." in name for name in given):
        lines.append("Its layers have adapters: merge these first, such as with merge_and_unload().")
    elif isinstance(holder, Mapping) and any(isinstance(value, Mapping) for value in holder.values()):
        lines.append("It has mappings inside: pass the state_dict that is in the checkpoint, not the checkpoint.")
    else:
        lines.append("Pass a copy of the model that was made sparse.")
    return "\n".join(lines)


def listed(names: Sequence[str]) -> str:
    """Return names for a message, at most five."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
