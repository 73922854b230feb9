"""What shrinking a model did, as data. Nothing is computed here that the run should know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.reports._records import Evaluation
from secateur.reports._rows import evaluation_table
from secateur.reports._shrink_page import shrink_page
from secateur.reports._shrink_records import Boundary, Latency, ModelSize, ShrinkProof, ShrunkDimension
from secateur.reports._shrink_rows import blocked_table, shrunk_table, size_table
from secateur.reports._tables import Table, markdown_text, sentence

_WORDS = {"query_heads": "query heads", "ffn": "feed-forward neurons", "hidden": "hidden channels"}


@dataclass(frozen=True)
class ShrinkReport:
    """What :func:`shrink_` did to a model, and what later stages need to know of the model before.

    Args:
        dimensions: all that were found, those that nothing went from among them, with names of the model before.
        boundaries: dimensions of tensors that cannot be made smaller.
        before: the whole model before.
        after: the whole model after.
        asked: what was asked for, under the name of the argument: ``{"keep": {"ffn": 0.5}}``, ``{"target": ...}``,
            ``{"remove": ...}`` or ``{"zeros": True}``.
        method: that chose the units and compensated for them, as text; empty where neither was done.
        allocation: how removal was shared out, as text.
        round_to: sizes were rounded to multiples of it.
        uniform: whether an ordinary configuration describes its sizes, as where all blocks have the same.
        uniform_reason: why none does.
        versions: of secateur, torch and Python.
        seconds: of the whole run.
        proof: that the smaller model is the same function as the masked one; None if it was not made.
        kept_blocks: by the name of a list of blocks, the number in the original model of each block that it has now,
            as a teacher of the smaller model needs. Lists that lost no block are here, too.
        original_sizes: by the name of a dimension of the original model, how many units it had there.
        model_name: class of the model.
        model_hash: SHA-256 of the names and shapes of the tensors of the model before.
        facts: what makes a model of the original sizes as small as this one, without looking at batches: new shapes,
            kept blocks and attributes, as JSON-ready values.
        calibration_hash: SHA-256 over the batches, None where there were none.
        calibration: where the batches came from, if the caller says.
        evaluation: measured before and after, if asked.
        latency: measured before and after, if asked.
        notes: what else is worth knowing.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> report = secateur.shrink_(model, [torch.randn(4, 8)], remove={"channels": [0, 5]})
        >>> report.removed, report.first_line
        ({'channels': (0, 5)}, "87.74% of the model's 212 parameters are left, and 87.50% of its multiply-adds")
    """

    dimensions: tuple[ShrunkDimension, ...]
    boundaries: tuple[Boundary, ...]
    before: ModelSize
    after: ModelSize
    asked: Mapping[str, Any]
    method: str
    allocation: str
    round_to: int
    uniform: bool
    uniform_reason: str
    versions: Mapping[str, str]
    seconds: float
    proof: ShrinkProof | None = None
    kept_blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    original_sizes: Mapping[str, int] = field(default_factory=dict)
    model_name: str = ""
    model_hash: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    calibration_hash: str | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    latency: Latency | None = None
    notes: tuple[str, ...] = ()

    @property
    def removed(self) -> dict[str, tuple[int, ...]]:
        """By the name of a dimension, the numbers of the units that went; only dimensions that lost some."""
        return {found.name: found.removed for found in self.dimensions if found.removed}

    @property
    def first_line(self) -> str:
        """The share of the whole model that is left."""
        left = self.after.parameters / self.before.parameters if self.before.parameters else 1.0
        text = f"{left:.2%} of the model's {self.before.parameters:,} parameters are left"
        if self.before.macs and self.after.macs is not None:
            text += f", and {self.after.macs / self.before.macs:.2%} of its multiply-adds"
        return text

    def _lines(self) -> list[str]:
        lines = [self.first_line]
        counts: dict[str, list[int]] = {}
        for found in self.dimensions:
            total = counts.setdefault(found.kind, [0, 0])
            total[0] += len(found.removed)
            total[1] += found.before
        went = [f"{gone:,} of {all_:,} {_WORDS.get(kind, kind)}" for kind, (gone, all_) in counts.items() if gone]
        how = f" by {self.method}, allocation {self.allocation}" if self.method else ""
        lines.append(f"removed {', '.join(went) or 'nothing'}{how}; {self.seconds:.1f} s")
        if self.proof is not None:
            lines.append(
                f"the smaller model equals the masked one: relative error {self.proof.error:.2g} in "
                f"{self.proof.dtype}, at most {self.proof.tolerance:.2g} was allowed"
                + (f" ({self.proof.note})" if self.proof.note else "")
            )
        shape = "an ordinary config describes its sizes" if self.uniform else "no ordinary config describes its sizes"
        lines.append(f"{shape}: {self.uniform_reason}" if self.uniform_reason else shape)
        if self.latency is not None:
            lines.append(
                f"{self.latency.ratio:.2f} times as fast at {' x '.join(map(str, self.latency.shape))}: "
                f"{1e3 * self.latency.before:.4g} ms before, {1e3 * self.latency.after:.4g} ms after"
            )
        return [*lines, *self.notes]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready dicts and lists."""
        table: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become lists, as in a file
        return table

    def to_json(self) -> str:
        """Return the whole report as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> ShrinkReport:
        """Return the report that :meth:`to_dict` gave.

        Raises:
            ValueError: it is not such a report.
        """
        try:
            rest = dict(table)
            optional = {
                name: None if rest.get(name) is None else made(**rest[name])
                for name, made in (("proof", _proof), ("evaluation", Evaluation), ("latency", _latency))
            }
            return cls(
                **{
                    **rest,
                    **optional,
                    "dimensions": tuple(_dimension(**entry) for entry in rest["dimensions"]),
                    "boundaries": tuple(Boundary(**entry) for entry in rest["boundaries"]),
                    "before": _size(**rest["before"]),
                    "after": _size(**rest["after"]),
                    "kept_blocks": {name: tuple(kept) for name, kept in rest.get("kept_blocks", {}).items()},
                    "notes": tuple(rest.get("notes", ())),
                }
            )
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not a report of shrink_: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> ShrinkReport:
        """Return the report that :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not JSON or not such a report.
        """
        return cls.from_dict(json.loads(text))

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables of the report, in order, those without rows among them."""
        quality = () if self.evaluation is None else (evaluation_table(self.evaluation),)
        sizes = size_table(self.before, self.after, self.latency)
        return sizes, *quality, shrunk_table(self.dimensions), blocked_table(self.boundaries)

    def to_markdown(self) -> str:
        """Return the summary and the tables as Markdown."""
        lines = [f"{sentence(markdown_text(line))}." for line in self._lines()]
        parts = ["# Shrinking report", *lines]
        for table in self.tables:
            if table.rows:
                parts += [f"## {table.title}", table.to_markdown()]
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """Return one self-contained HTML page; it loads nothing from anywhere and needs no further library."""
        figures = (self.before, self.after, self.proof, self.latency)
        return shrink_page(self._lines(), *figures, self.dimensions, self.tables)


def _dimension(removed: Any = (), notes: Any = (), **rest: Any) -> ShrunkDimension:
    return ShrunkDimension(removed=tuple(removed), notes=tuple(notes), **rest)


def _size(shape: Any = (), uncounted: Any = (), **rest: Any) -> ModelSize:
    return ModelSize(shape=tuple(shape), uncounted=tuple(uncounted), **rest)


def _proof(**rest: Any) -> ShrinkProof:
    return ShrinkProof(**rest)


def _latency(shape: Any, **rest: Any) -> Latency:
    return Latency(shape=tuple(shape), **rest)
