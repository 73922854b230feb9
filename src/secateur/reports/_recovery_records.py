"""What a report of a recovery is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CurvePoint:
    """A moment of a recovery at which the held-out batches were run.

    Args:
        step: optimizer steps done.
        seconds: working time so far, without pauses between runs that were stopped and went on.
        train_loss: mean over the steps since the last point; None at the first.
        held_out: mean loss over the held-out batches.
        learning_rate: of the last step.
        part: what was trained, for methods that train one part after the other, such as the name of a block; else "".
    """

    step: int
    seconds: float
    train_loss: float | None
    held_out: float
    learning_rate: float = 0.0
    part: str = ""
