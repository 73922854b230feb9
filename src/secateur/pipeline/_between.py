"""What a pipeline does between two rounds of pruning: the model learns to give again what the dense one gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from secateur._types import Progress
from secateur.huggingface import CalibrationText, load_model, open_model, pooling_of
from secateur.recovery import LearningText, recover_
from secateur.shrinking import stages_in


def between_rounds(
    source: Path,
    dense: Path,
    calibration: CalibrationText,
    settings: Mapping[str, Any],
    rounds: int,
    device: str | None,
    progress: Progress,
) -> Callable[[nn.Module, int], None]:
    """Return a function that is called with the model and the number of a round.

    Args:
        source: directory of the model that is pruned.
        dense: directory of the model to learn from.
        calibration: whose file is learned from, all of it.
        settings: of :func:`recover_`. Minutes or steps are for all rounds together.
        rounds: of pruning.
        device: where to compute.
        progress: called with a description, and how much of how much is done.
    """
    times = rounds - 1
    given = dict(settings)
    if "steps" not in given:
        given["minutes"] = given.get("minutes", 10.0) / times
    loaded: list[tuple[nn.Module, LearningText]] = []

    def between(model: nn.Module, number: int) -> None:
        directory, pooling = open_model(source), pooling_of(source)
        if not loaded:
            teacher, _ = load_model(open_model(dense), device, next(model.parameters()).dtype)
            text = LearningText.of(
                model,
                directory,
                calibration.path,
                is_embedder=pooling is not None,
                sequence_length=calibration.sequence_length,
                batch_size=None,
                seed=calibration.seed,
            )
            loaded.append((teacher, text))
        teacher, text = loaded[0]
        budget = dict(given)
        if "steps" in budget:
            budget["steps"] = max(1, budget["steps"] * number // times - budget["steps"] * (number - 1) // times)
        recover_(
            model,
            teacher,
            text.batches,
            pooling=pooling,
            history=stages_in(source),
            seed=calibration.seed + number,
            progress=progress,
            **budget,
        )

    return between
