"""A solution as stages of a pipeline: what is removed, what becomes zero, and what the model is made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from secateur.graph import KINDS, Graph
from secateur.planning._means import stage_of
from secateur.planning._parts import Part
from secateur.planning._probes import Probe, units_gone
from secateur.planning._solutions import Solution
from secateur.reports import PlannedPart
from secateur.shrinking import kept_count

PRUNING = "sparsegpt"  # what makes zeros, as in the losses


def stages_of(model: nn.Module, parts: Sequence[Part], solution: Solution) -> list[dict[str, Any]]:
    """Return the stages that change a dense model, with their settings, as a recipe of a pipeline has them.

    Args:
        model: dense.
        parts: that were decided on.
        solution: what was decided.
    """
    stages: list[dict[str, Any]] = []
    keep = _kept(parts, solution)
    remove = {name: list(units) for name, units in solution.depth.gone.items() if units}
    if keep or remove:
        stages.append({"run": "shrink", **({"remove": remove} if remove else {}), **({"keep": keep} if keep else {})})
    zeros: dict[tuple[str, float], list[str]] = {}
    names = _new_names(model, parts, solution)
    for part, choice in zip(parts, solution.choices, strict=True):
        if choice.pattern and not choice.is_removed:
            found = zeros.setdefault((choice.pattern, choice.sparsity), [])
            found += [_renamed(layer.name, part.name, names.get(part.name, part.name)) for layer in part.layers]
    for (pattern, sparsity), include in zeros.items():
        fixed = {} if ":" in pattern and not pattern.startswith("block") else {"sparsity": sparsity}
        stages.append({"run": "prune", "pattern": pattern, **fixed, "method": PRUNING, "include": include})
    return stages


def export_stage(solution: Solution) -> dict[str, Any]:
    """Return the stage that makes the model for the engine of a solution; empty for PyTorch."""
    return stage_of(solution.way)


def probe_of(model: nn.Module, graph: Graph, parts: Sequence[Part], solution: Solution) -> Probe:
    """Return the shape of the model that a solution makes, to be timed."""
    units = {name: len(gone) for name, gone in solution.depth.gone.items() if gone}
    zeros: dict[str, tuple[str, float]] = {}
    # A probe loses its last blocks, so that the blocks that stay have the first names.
    names = _new_names(model, parts, solution)
    where = {part.name: part for part in parts}
    for part, choice in zip(parts, solution.choices, strict=True):
        if choice.is_removed:
            continue
        target = where.get(names.get(part.name, part.name), part)
        fractions = dict(zip((found.name for found in target.dimensions), choice.kept, strict=True))
        units |= units_gone(graph, fractions)
        if choice.pattern:
            zeros |= {layer.name: (choice.pattern, choice.sparsity) for layer in target.layers}
    return Probe(units, zeros)


def planned_parts(
    parts: Sequence[Part], solution: Solution, losses: Sequence[float], saved: Sequence[float]
) -> tuple[PlannedPart, ...]:
    """Return what happens to each part, for a report.

    Args:
        parts: that were decided on.
        solution: what was decided.
        losses: of each part.
        saved: which part of the dense model's time each saves.
    """
    rows = []
    for part, choice, loss, share in zip(parts, solution.choices, losses, saved, strict=True):
        kept: dict[str, tuple[int, int]] = {}
        for found, fraction in () if choice.is_removed else zip(part.dimensions, choice.kept, strict=True):
            stay, of = kept.get(found.kind, (0, 0))
            kept[found.kind] = (stay + kept_count(found, fraction), of + found.size)
        rows.append(PlannedPart(part.name, choice.is_removed, kept, choice.pattern, choice.sparsity, loss, share))
    return tuple(rows)


def title_of(parts: Sequence[Part], solution: Solution) -> str:
    """Return a solution in a few words, such as ``"3 of 6 layers, 50 % of ffn, 70 % zeros (block:1x4)"``."""
    words = []
    blocks = sum(part.blocks is not None for part in parts)
    if solution.depth.number:
        words.append(f"{blocks - solution.depth.number} of {blocks} layers")
    kept: dict[str, tuple[int, int]] = {}
    zeros: dict[str, list[tuple[int, float]]] = {}
    for part, choice in zip(parts, solution.choices, strict=True):
        if choice.is_removed:
            continue
        for found, fraction in zip(part.dimensions, choice.kept, strict=True):
            stay, of = kept.get(found.kind, (0, 0))
            kept[found.kind] = stay + kept_count(found, fraction), of + found.size
        if part.layers:
            size = sum(layer.matrix().numel() for layer in part.layers)
            zeros.setdefault(choice.pattern, []).append((size, choice.sparsity))
    words += [f"{stay / of:.0%} of {kind}" for kind, (stay, of) in kept.items() if stay < of]
    for pattern, sizes in zeros.items():
        if pattern:
            share = sum(size * sparsity for size, sparsity in sizes) / sum(size for size, _ in sizes)
            part_of = "" if len(zeros) == 1 else " in some layers"
            words.append(f"{share:.0%} zeros ({pattern}){part_of}")
    return ", ".join(words) or "nothing removed"


def _kept(parts: Sequence[Part], solution: Solution) -> dict[str, float]:
    """The fractions that stay: by kind where all of a kind are alike, else by name."""
    by_kind: dict[str, dict[str, float]] = {}
    for part, choice in zip(parts, solution.choices, strict=True):
        for found, fraction in () if choice.is_removed else zip(part.dimensions, choice.kept, strict=True):
            by_kind.setdefault(found.kind, {})[found.name] = fraction
    keep: dict[str, float] = {}
    for kind, fractions in by_kind.items():
        if len(set(fractions.values())) == 1:
            fraction = next(iter(fractions.values()))
            keep |= {kind: fraction} if fraction < 1 else {}
            continue
        # A dimension that is called as its kind has no name of its own: all others of the kind are named then.
        named = set(fractions) & set(KINDS)
        keep |= {name: fraction for name, fraction in fractions.items() if fraction < 1 or named}
    return keep


def _new_names(model: nn.Module, parts: Sequence[Part], solution: Solution) -> Mapping[str, str]:
    """The names of blocks after others of their list have gone."""
    names: dict[str, str] = {}
    for part, choice in zip(parts, solution.choices, strict=True):
        if part.blocks is None or choice.is_removed:
            continue
        gone = sum(unit < part.unit for unit in solution.depth.gone.get(part.blocks.name, ()))
        children = [name for name, _ in model.get_submodule(part.blocks.name).named_children()]
        names[part.name] = f"{part.blocks.name}.{children[part.unit - gone]}".lstrip(".")
    return names


def _renamed(layer: str, before: str, after: str) -> str:
    return after + layer.removeprefix(before) if layer.startswith(f"{before}.") else layer
