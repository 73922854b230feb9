"""What was done before to the model in a directory, with the names that its layers have now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from secateur._errors import FormatError
from secateur.reports import PRUNING_REPORT, LayerReport, Report, ShrinkReport, Stage, stages_from_json
from secateur.shapes import Facts


def stages_in(path: Path) -> tuple[Stage, ...]:
    """Return the reports in a model directory, in order; none if there is no file of them, or it is not ours."""
    try:
        return stages_from_json((path / PRUNING_REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ()


def pruned_before(stages: Sequence[Stage], model: nn.Module) -> list[Report]:
    """Return the reports of pruning, with the names that the layers have in a model. Layers that went are left out.

    Args:
        stages: that made the model, in order.
        model: of the directory, with a head or without.
    """
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: list[Report] = []
    for number, stage in enumerate(stages):
        if isinstance(stage, Report):
            later = [_facts(entry) for entry in stages[number + 1 :] if isinstance(entry, ShrinkReport)]
            here = (_here(layer, names, prefix, later) for layer in stage.layers)
            found.append(replace(stage, layers=tuple(layer for layer in here if layer is not None)))
    return found


def _facts(report: ShrinkReport) -> Facts:
    try:
        return Facts.from_dict(report.facts)
    except FormatError:  # of a file that somebody changed: names are as they were
        return Facts()


def _here(layer: LayerReport, names: set[str], prefix: str, later: Sequence[Facts]) -> LayerReport | None:
    # Pruning may have loaded the model without its head, which names its layers without the prefix.
    went = False
    for name in (layer.name, prefix + layer.name, layer.name.removeprefix(prefix)):
        new: str | None = name
        for facts in later:
            new = None if new is None else facts.new_name(new)
        went = went or new is None
        if new is not None and (new in names or new.rpartition(".")[0] in names):
            return replace(layer, name=new)
    return None if went else layer
