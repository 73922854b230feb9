"""What training a pruned or shrunk model again did, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.reports._records import Evaluation


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


@dataclass(frozen=True)
class RecoveryReport:
    """What :func:`recover_` did to a model.

    Args:
        method: by its name.
        loss: what was made small, in words, such as ``"token states + pooled cosine + similarity matrix"``.
        steps: optimizer steps done.
        seconds: working time of the whole run.
        asked: the budget, ``{"minutes": 10}`` or ``{"steps": 450}``.
        start: held-out loss of the model as it came.
        best: held-out loss of the state that was kept; never more than ``start``.
        best_step: after how many steps that was; 0 if nothing was better than the start.
        stopped: why training ended: ``"the budget is used"``, ``"nothing was gained"``, ``"the loss is not finite"``
            or ``"interrupted"``.
        curve: held-out loss over time, the start among it.
        trained: weights that could move.
        weights: of the whole model.
        zeros: of the whole model, weights that are zero, before and after; both are the same.
        samples: rows of training batches, each counted once; held-out ones are not among them.
        held_out_samples: rows of held-out batches.
        epochs: how often the training batches were gone through.
        blocks: by the name of each block of the model, the name of the block of the teacher whose output it learns;
            empty where none corresponds.
        settings: all that decides the run beside the model and the batches, as plain values.
        versions: of secateur, torch and Python.
        model_name: class of the model.
        teacher_name: class of the teacher.
        batches_hash: SHA-256 over the batches, training and held-out.
        calibration: where the batches came from, if the caller says.
        evaluation: measured before and after, if asked.
        notes: what else is worth knowing.

    Example:
        >>> import copy, torch, secateur
        >>> _ = torch.manual_seed(0)
        >>> dense = torch.nn.Linear(8, 4)
        >>> model = copy.deepcopy(dense)
        >>> _ = secateur.prune_(model, sparsity=0.5, method="magnitude")
        >>> batches = [torch.randn(16, 8) for _ in range(4)]
        >>> report = secateur.recover_(model, dense, batches, steps=10, learning_rate=0.01)
        >>> report.method, report.steps, report.stopped, report.zeros
        ('full', 10, 'the budget is used', (16, 16))
    """

    method: str
    loss: str
    steps: int
    seconds: float
    asked: Mapping[str, float]
    start: float
    best: float
    best_step: int
    stopped: str
    curve: tuple[CurvePoint, ...]
    trained: int
    weights: int
    zeros: tuple[int, int]
    samples: int
    held_out_samples: int
    epochs: float
    blocks: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    model_name: str = ""
    teacher_name: str = ""
    batches_hash: str = ""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    notes: tuple[str, ...] = ()

    @property
    def interrupted(self) -> bool:
        """Whether somebody stopped the run; the model is in the best state so far."""
        return self.stopped == "interrupted"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready dicts and lists."""
        table: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return table

    def to_json(self) -> str:
        """Return the whole report as JSON text."""
        return json.dumps(asdict(self))
