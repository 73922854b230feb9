"""What a pruning run did, as data. Nothing is computed here that the run should know."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.reports._records import Evaluation, Histogram, LayerReport, SkippedLayer
from secateur.reports._rows import evaluation_table, pruned_table, skipped_table

PRUNING_REPORT = "secateur.json"  # the report in a pruned model directory


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
        padding: by the name of a stage (a block of the model), which rows of the batches were left out of its
            calibration as padding, or why none.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float
    calibration_hash: str | None = None
    evaluation: Evaluation | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    padding: Mapping[str, str] = field(default_factory=dict)

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
        if self.padding:
            stages = Counter(self.padding.values())
            counted = (f"{count} {'stage' if count == 1 else 'stages'}: {text}" for text, count in stages.items())
            parts.append(f"Padding: {'. '.join(counted)}.")
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
