"""What was done to a model directory, stage by stage: all reports in one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from secateur.reports._pruning import Report
from secateur.reports._recovering import RecoveryReport
from secateur.reports._shrinking import ShrinkReport

Stage: TypeAlias = Report | ShrinkReport | RecoveryReport
# The name of each stage in the file, and what reads its report.
_NAMES: dict[type[Stage], str] = {Report: "prune", ShrinkReport: "shrink", RecoveryReport: "recover"}
_READERS: dict[str, Callable[[Any], Stage]] = {
    "prune": lambda table: Report.from_json(json.dumps(table)),
    "shrink": ShrinkReport.from_dict,
    "recover": RecoveryReport.from_dict,
}


def stages_to_json(stages: Sequence[Stage]) -> str:
    """Return the reports of all stages, in order, as JSON text. A single report of pruning is written as it is."""
    if len(stages) == 1 and isinstance(stages[0], Report):
        return stages[0].to_json()  # as all versions write and read it
    return json.dumps({"stages": [{"stage": _NAMES[type(made)], "report": made.to_dict()} for made in stages]})


def stages_from_json(text: str) -> tuple[Stage, ...]:
    """Return the reports that :func:`stages_to_json` wrote.

    Raises:
        ValueError: the text is not JSON, or has something else than reports.
    """
    table = json.loads(text)
    if not isinstance(table, dict) or "stages" not in table:
        return (Report.from_json(text),)
    found: list[Stage] = []
    try:
        for entry in table["stages"]:
            name, report = entry["stage"], entry["report"]
            if name not in _READERS:
                raise ValueError(f"unknown stage {name!r:.40}")
            found.append(_READERS[name](report))
    except (TypeError, KeyError) as error:
        raise ValueError(f"not the stages of a model: {error}") from None
    return tuple(found)
