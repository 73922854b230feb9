"""What a pruning run did, as data. Nothing is computed here that the run should know."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, field
from typing import Any

from secateur._errors import RecipeError
from secateur.reports._coverage import emptied, few_tokens, held_out_line, left_alone, pruning_line
from secateur.reports._masks import StoredMasks
from secateur.reports._match import Holder
from secateur.reports._records import Evaluation, Histogram, LayerReport, ModelWeights, SkippedLayer
from secateur.reports._rows import evaluation_table, pruned_table, skipped_table
from secateur.reports._tables import markdown_text, sentence
from secateur.reports._verify import Verification, verify_counts, verify_masks

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
        whole: the weights of the whole model after the run; None in reports of 0.1.0.
        calibration_mode: ``"sequential with replay"`` (each stage on the outputs of the pruned stages before it, which
            are not computed again), ``"sequential in full"`` (the same, but each stage ran the model from its start),
            or ``"one pass"`` (all layers on the dense model), and then why batches were computed in full. Empty without
            calibration, and where it is not known.
        padding: by the name of a stage (a block of the model), which rows of the batches were left out of its
            calibration as padding, or why none.
        rounds: sparsity of the layers after each round, the last one that of the report; empty where there was one.
        stored_masks: of the pruned layers. They stay in memory, one bit a weight, and are no part of JSON.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float
    calibration_hash: str | None = None
    evaluation: Evaluation | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    whole: ModelWeights | None = None
    calibration_mode: str = ""
    padding: Mapping[str, str] = field(default_factory=dict)
    rounds: tuple[float, ...] = ()
    # No field: asdict and equality leave the masks out. But dataclasses.replace hands on what __post_init__ kept.
    stored_masks: InitVar[StoredMasks | None] = None

    def __post_init__(self, stored_masks: StoredMasks | None) -> None:
        object.__setattr__(self, "stored_masks", stored_masks)

    @property
    def masks(self) -> StoredMasks:
        """The masks by the qualified name of their parameter: bool, in its shape, True = kept.

        A mapping that is kept packed: a mask is unpacked when it is looked up. ``dict(report.masks)`` unpacks all.

        Raises:
            RecipeError: the report was read from a file, and has no masks.
        """
        masks: StoredMasks | None = vars(self)["stored_masks"]
        if masks is None:
            raise RecipeError(
                "this report has no masks: they stay in memory, and it was read from a file.\n"
                "Take them from a model that has its zeros: secateur.masks(model)."
            )
        return masks

    def verify(self, model: Holder) -> Verification:
        """Check that every weight that was pruned is still zero in a model, in a copy of it, or in a ``state_dict``.

        A report that was read from a file has no masks. Then each parameter must have at least as many zeros as were
        pruned, and the result says so.

        Args:
            model: in which parameters have the same names, but for the prefixes of wrappers.

        Returns:
            What was compared.

        Raises:
            PatternError: parameters that have lost zeros, which are listed with numbers; or one of another shape.
            RecipeError: a parameter that is not in the model, or that has no values.

        Example:
            >>> import torch, secateur
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
            >>> report = secateur.prune_(model, pattern="2:4", method="magnitude")
            >>> print(report.verify(model))
            all 16 pruned weights are zero, in 1 parameter
        """
        masks: StoredMasks | None = vars(self)["stored_masks"]
        return verify_counts(model, self.layers) if masks is None else verify_masks(model, masks)

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

    @property
    def first_line(self) -> str:
        """The share of the whole model that is zero now, and that was considered; empty in reports of 0.1.0."""
        return pruning_line(self.whole, self.num_weights)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to look at: many weights left alone, layers that ended empty, and layers that got few tokens."""
        found = (left_alone(self.layers, self.skipped), emptied(self.layers), few_tokens(self.layers))
        return tuple(filter(None, found))

    def _lines(self) -> list[str]:
        run = (
            f"pruned {self.num_pruned:,} of {self.num_weights:,} weights ({self.sparsity:.2%}) "
            f"in {len(self.layers)} layers, skipped {len(self.skipped)} modules, {self.seconds:.1f} s"
        )
        run += held_out_line(self.layers)
        run += f"; calibration {self.calibration_mode}" if self.calibration_mode else ""
        run += (
            f"; {len(self.rounds)} rounds: {', '.join(f'{share:.1%}' for share in self.rounds)}" if self.rounds else ""
        )
        return [*filter(None, [self.first_line]), run, *(f"warning: {text}" for text in self.warnings)]

    def __str__(self) -> str:
        return "\n".join(self._lines())

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
            evaluation, whole = table.pop("evaluation"), table.pop("whole", None)
            rounds = tuple(table.pop("rounds", ()))
            if "stored_masks" in table:
                raise TypeError("masks are never part of JSON")
            return cls(
                layers=tuple(layers),
                skipped=tuple(skipped),
                evaluation=None if evaluation is None else Evaluation(**evaluation),
                whole=None if whole is None else ModelWeights(**whole),
                rounds=rounds,
                **table,
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a secateur report: {error}") from None

    def to_markdown(self) -> str:
        """Return the summary and the layers as Markdown, without pictures."""
        tables = [] if self.evaluation is None else [evaluation_table(self.evaluation)]
        tables += [pruned_table(self.layers), skipped_table(self.skipped)]
        parts = ["# Pruning report", *(f"{sentence(markdown_text(line))}." for line in self._lines())]
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
    table["parameters"] = tuple(table.get("parameters", ()))
    return LayerReport(histogram=histogram, **table)
