"""What training a pruned or shrunk model again did, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.reports._checked import checked
from secateur.reports._records import Evaluation
from secateur.reports._recovery_page import curve_table, duration, recovery_page, trained_table
from secateur.reports._recovery_records import CurvePoint
from secateur.reports._rows import evaluation_table
from secateur.reports._tables import Table, figure, markdown_text, sentence


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
        >>> report.method, report.best <= report.start, report.zeros
        ('full', True, (16, 16))
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

    @property
    def gain(self) -> float:
        """The part of the held-out loss that went, 0 to 1; 0 where there was no loss."""
        return (self.start - self.best) / self.start if self.start > 0 else 0.0

    @property
    def first_line(self) -> str:
        """What part of the held-out loss went, from what to what."""
        numbers = f"{figure(self.start)} before, {figure(self.best)} after"
        if self.best >= self.start:
            return f"nothing was gained: the held-out loss is {figure(self.start)}, and the model is as it was"
        return f"{self.gain:.1%} of the held-out loss went: {numbers}"

    def _lines(self) -> list[str]:
        asked = ", ".join(f"{value:g} {name}" for name, value in self.asked.items())
        run = f"method {self.method}, {self.steps:,} steps in {duration(self.seconds)}"
        run += f" ({asked} asked)" if asked else ""
        run += f"; the best state is that after step {self.best_step:,}" if self.best < self.start else ""
        lines = [self.first_line, f"{run}; training ended because {_WHY.get(self.stopped, self.stopped)}"]
        lines.append(f"loss: {self.loss}")
        lines.append(
            f"{self.trained:,} of {self.weights:,} weights could move; {self.samples:,} samples, gone through "
            f"{self.epochs:.3g} times, and {self.held_out_samples:,} held out"
        )
        before, after = self.zeros
        lines.append(
            f"{after:,} weights are zero, as before"
            if before == after
            else f"{after:,} weights are zero, and {before:,} were before"
        )
        return [*lines, *self.notes]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables of the report, in order, those without rows among them."""
        quality = () if self.evaluation is None else (evaluation_table(self.evaluation),)
        return *quality, curve_table(self.curve, self.best_step), trained_table(self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready dicts and lists."""
        table: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return table

    def to_json(self) -> str:
        """Return the whole report as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> RecoveryReport:
        """Return the report that :meth:`to_dict` gave.

        Raises:
            ValueError: it is not such a report.
        """
        try:
            rest = dict(table)
            evaluation = rest.get("evaluation")
            return checked(
                cls(
                    **{
                        **rest,
                        "curve": tuple(checked(CurvePoint(**point)) for point in rest["curve"]),
                        "zeros": tuple(rest["zeros"]),
                        "notes": tuple(rest.get("notes", ())),
                        "evaluation": None if evaluation is None else Evaluation(**evaluation),
                    }
                )
            )
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not a report of recover_: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> RecoveryReport:
        """Return the report that :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not JSON or not such a report.
        """
        return cls.from_dict(json.loads(text))

    def to_markdown(self) -> str:
        """Return the summary and the tables as Markdown."""
        parts = ["# Recovery report", *(f"{sentence(markdown_text(line))}." for line in self._lines())]
        for table in self.tables:
            if table.rows:
                parts += [f"## {table.title}", table.to_markdown()]
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """Return one self-contained HTML page; it loads nothing from anywhere and needs no further library."""
        losses = (self.start, self.best, self.gain)
        return recovery_page(self._lines(), losses, self.curve, self.best_step, self.seconds, self.tables)


_WHY = {"interrupted": "somebody interrupted it"}
