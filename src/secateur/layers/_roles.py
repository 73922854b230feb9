"""Layers that are left dense because of what they do: output heads, routers, depthwise convolutions, adapters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from secateur.layers._kinds import kind_of
from secateur.layers._stacks import stacked_kinds

# A part of the name of an output head, which turns features into predictions.
_HEADS = frozenset({"lm_head", "embed_out", "classifier", "score", "qa_outputs", "output_projection", "head", "heads"})


def roles(model: nn.Module) -> dict[int, str]:
    """Return what modules of a model do, by their id, for those that are left dense unless they are asked for."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        if any(part.startswith("lora_") for part in name.split(".")):
            found[id(module)] = "adapter"
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and 1 < module.groups == module.in_channels:
            found[id(module)] = "depthwise convolution"
    found |= {id(module): "router" for _, _, routers in expert_blocks(model) for module in routers}
    return found | {id(module): "output head" for module in _heads(model)}


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """The last layer of each part of the model that makes predictions.

    Such a part is what the model says that it is (``get_output_embeddings`` of transformers, ``get_classifier`` of
    timm), or one outside of numbered blocks with the name of a head, or a last layer ``fc`` of the model itself.
    """
    for getter in ("get_output_embeddings", "get_classifier"):
        try:
            part = getattr(model, getter, lambda: None)()
        except (AttributeError, NotImplementedError, TypeError):  # such as a base model that has none
            part = None
        if isinstance(part, nn.Module):
            yield from _last_layer(part)
    for name, module in model.named_modules():
        parts = name.split(".")
        has_name = parts[-1] in _HEADS and not any(part.isdigit() for part in parts)
        if has_name and not any(isinstance(inner, nn.MultiheadAttention) for inner in module.modules()):
            yield from _last_layer(module)  # what attends is no head but pools, and has features as its outputs
    children = list(model.named_children())
    if len(children) > 1 and children[-1][0] == "fc":
        yield from _last_layer(children[-1][1])


def _last_layer(part: nn.Module) -> list[nn.Module]:
    layers = [module for module in part.modules() if kind_of(module) is not None]
    return layers[-1:]


def expert_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, int], list[nn.Module]]]:
    """Find the mixtures of experts of a model.

    Args:
        model: any module.

    Yields:
        A module with experts inside, how many experts each of its children holds, by name, and the modules beside them
        whose weight has one row for each expert, or one for a shared expert.
    """
    for block in model.modules():
        counts = {name: count for name, child in block.named_children() if (count := _num_experts(name, child))}
        if not counts:
            continue
        inside = {id(module) for name in counts for module in block.get_submodule(name).modules()}
        rows = {1, *counts.values()}
        beside = [module for module in block.modules() if id(module) not in inside]
        sized = {id(module): {len(p) for p in module.parameters(recurse=False) if p.ndim == 2} for module in beside}
        yield block, counts, [module for module in beside if rows & sized[id(module)]]


def _num_experts(name: str, module: nn.Module) -> int:
    """How many experts a module holds: matrices of a stack that shows how it is read, or what its name says; else 0."""
    is_named = "expert" in f"{name} {type(module).__name__}".lower()
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return len(module) if is_named else 0
    if not is_named and not stacked_kinds(module):
        return 0
    return next((len(p) for p in module.parameters(recurse=False) if p.ndim == 3 and min(p.shape) > 1), 0)
