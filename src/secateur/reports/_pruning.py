"""What a pruning run did, as data. Nothing is computed here that the run should know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.reports._rows import evaluation_table, pruned_table, skipped_table

PRUNING_REPORT = "secateur.json"  # the report in a pruned model directory


@dataclass(frozen=True)
class Histogram:
    """Scores of one layer on a logarithmic axis, kept and pruned apart.

    Args:
        edges: ``bins + 1`` values, log10 of the score, increasing. Scores of zero are counted in the first bin.
        kept: weights kept in each bin.
        pruned: weights pruned in each bin.
        cut: log10 of the lowest kept score, or None if that is zero or nothing is kept.
    """

    edges: tuple[float, ...]
    kept: tuple[int, ...]
    pruned: tuple[int, ...]
    cut: float | None


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Args:
        name: qualified name of the module.
        shape: of the weight as a matrix, ``(out, in)``.
        pattern: as text.
        asked: the sparsity that was asked for.
        sparsity: the sparsity of the mask.
        pruned: weights pruned, ``sparsity * out * in``.
        zeros: weights that are zero now; more than ``pruned`` if the dense layer had zeros of its own.
        relative_error: ``norm((W - V) X) / norm(W X)`` over all calibration tokens, W and V the weights before and
            after, as stored; None if it was not measured.
        tokens: calibration input rows, None without calibration.
        dead_inputs: inputs that were zero on every token, None without calibration.
        seconds: to solve the layer, without calibration.
        tied_to: other modules that share the weight.
        notes: what the solver wants known.
        histogram: of the scores that decided.
        thumbnail: a picture of the mask, at most 48 x 48, rows of percent kept.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    asked: float
    sparsity: float
    pruned: int
    zeros: int
    relative_error: float | None
    tokens: int | None
    dead_inputs: int | None
    seconds: float
    tied_to: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    histogram: Histogram | None = None
    thumbnail: tuple[tuple[int, ...], ...] = ()

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class SkippedLayer:
    """A module with parameters that was left as it is, its class and the reason."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """One quality figure before and after.

    Args:
        metric: ``"perplexity"`` (lower is better) or ``"output similarity"`` (mean cosine, 1 is the dense model).
        before: of the dense model.
        after: of the pruned model.
        tokens: it was measured on.
    """

    metric: str
    before: float
    after: float
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """One run among several on the same model and text.

    Args:
        method: as text.
        target: what runs are compared at: the pattern as text and, where it is free, the sparsity that was asked for.
        sparsity: that the pruned layers have.
        before: perplexity of the dense model.
        after: perplexity of the pruned model.
        error: mean relative error of the layers' outputs, None if it was not measured.
        seconds: that pruning took.
    """

    method: str
    target: str
    sparsity: float
    before: float
    after: float
    error: float | None
    seconds: float


@dataclass(frozen=True)
class Report:
    """Everything a pruning run did and all that is needed to repeat it.

    Args:
        layers: the pruned layers, in the order they were pruned.
        skipped: modules with parameters that were left alone.
        recipe: the recipe, as the table that ``Recipe.from_dict`` reads.
        versions: of secateur, torch and Python.
        seconds: of the whole run, calibration included.
        calibration_hash: SHA-256 over the calibration batches, None without any.
        evaluation: measured before and after, if asked.
        calibration: where the batches came from, such as file, samples, sequence length and seed, if the caller says.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float
    calibration_hash: str | None = None
    evaluation: Evaluation | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_weights(self) -> int:
        """Weights of the pruned layers."""
        return sum(layer.num_weights for layer in self.layers)

    @property
    def num_pruned(self) -> int:
        """Weights pruned."""
        return sum(layer.pruned for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the pruned layers' weights that was pruned."""
        return self.num_pruned / self.num_weights if self.num_weights else 0.0

    def __str__(self) -> str:
        return (
            f"pruned {self.num_pruned:,} of {self.num_weights:,} weights ({self.sparsity:.2%}) "
            f"in {len(self.layers)} layers, skipped {len(self.skipped)} modules, {self.seconds:.1f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready dicts and lists, with the totals."""
        table = asdict(self)
        table["totals"] = {"weights": self.num_weights, "pruned": self.num_pruned, "sparsity": self.sparsity}
        return table

    def to_json(self) -> str:
        """Return the whole report as JSON text, with the totals under ``"totals"``."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Return the report that :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not JSON or not a report.
        """
        try:
            table = json.loads(text)
            table.pop("totals", None)
            layers = [_layer_from_dict(layer) for layer in table.pop("layers")]
            skipped = [SkippedLayer(**entry) for entry in table.pop("skipped")]
            evaluation = table.pop("evaluation")
            return cls(
                layers=tuple(layers),
                skipped=tuple(skipped),
                evaluation=None if evaluation is None else Evaluation(**evaluation),
                **table,
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a secateur report: {error}") from None

    def to_markdown(self) -> str:
        """Return the summary and the layers as Markdown, without pictures."""
        tables = [] if self.evaluation is None else [evaluation_table(self.evaluation)]
        tables += [pruned_table(self.layers), skipped_table(self.skipped)]
        parts = ["# Pruning report", f"{str(self).capitalize()}."]
        return "\n\n".join(parts + [table.to_markdown() for table in tables if table.rows]) + "\n"

    def to_html(self) -> str:
        """Return one self-contained HTML page with pictures; it loads nothing from anywhere.

        Raises:
            ImportError: matplotlib or jinja2 is missing; the message names the extra to install.
        """
        from secateur.reports._page import report_page

        return report_page(self)


def _layer_from_dict(table: dict[str, Any]) -> LayerReport:
    histogram = table.pop("histogram")
    if histogram is not None:
        cut = histogram.pop("cut")
        histogram = Histogram(**{key: tuple(value) for key, value in histogram.items()}, cut=cut)
    table["thumbnail"] = tuple(tuple(row) for row in table["thumbnail"])
    for key in ("shape", "tied_to", "notes"):
        table[key] = tuple(table[key])
    return LayerReport(histogram=histogram, **table)
