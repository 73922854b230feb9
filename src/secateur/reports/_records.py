"""What reports are made of: one frozen value for each layer, module and figure. They are data, without a rendering."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


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
        parameters: qualified names of the weight, as in a ``state_dict``: under its module, and under those of
            ``tied_to``. Empty in reports of 0.1.0.
        empty_rows: outputs whose weights are all zero now.
        held_out_error: as ``relative_error``, over the tokens of batches that nothing was learned from; None if none
            were held out, or none of them reached the layer.
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
    parameters: tuple[str, ...] = ()
    empty_rows: int = 0
    held_out_error: float | None = None

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def is_empty(self) -> bool:
        """Whether all weights are zero now."""
        return bool(self.num_weights) and self.empty_rows == self.shape[0]

    @property
    def remarks(self) -> tuple[str, ...]:
        """The notes, and one on outputs that ended empty. Under the pattern ``row`` these are what was asked for."""
        if self.is_empty:
            return (*self.notes, "all weights are zero: the output no longer depends on the input")
        if self.empty_rows and self.pattern.partition(",")[0] != "row":
            return (*self.notes, f"{self.empty_rows:,} of {self.shape[0]:,} output rows are entirely zero")
        return self.notes


@dataclass(frozen=True)
class SkippedLayer:
    """A module with parameters that was left as it is.

    Args:
        name: qualified name of the module.
        kind: its class.
        reason: why it was left alone.
        weights: floating-point weights that it owns and that were left alone. A shared parameter counts once.
        matrix_weights: those of them that are in parameters with two or more dimensions.
    """

    name: str
    kind: str
    reason: str
    weights: int = 0
    matrix_weights: int = 0

    @property
    def role(self) -> str:
        """``"embeddings"`` or ``"output heads"``, which are left alone by what they are; empty for all others."""
        if self.kind in ("Embedding", "EmbeddingBag") or self.reason.startswith(("embedding", "tied to the embedding")):
            return "embeddings"
        return "output heads" if self.reason.startswith("output head") else ""

    @property
    def is_chosen(self) -> bool:
        """Whether the user left it out: by ``include`` or ``exclude``, or by the layers that ``sparsify_`` replaced."""
        return self.reason in ("excluded", "not included", "not a sparse layer")


@dataclass(frozen=True)
class ModelWeights:
    """All floating-point parameters of a model, each shared one counted once, packed layers as if they were dense.

    Args:
        weights: of the whole model: matrices, biases, norms, embeddings.
        zeros: those that are zero now.
        nbytes: that they take, dense.
        without_values: weights that are not in memory (on the meta device). They do not count as zeros.
    """

    weights: int
    zeros: int
    nbytes: int
    without_values: int = 0


@dataclass(frozen=True)
class Evaluation:
    """One quality figure before and after.

    Args:
        metric: ``"perplexity"`` (lower is better) or ``"output similarity"`` (mean cosine, 1 is the dense model) of
            text; ``"spearman"`` of pairs of sentences; ``"accuracy"`` of labels.
        before: of the dense model.
        after: of the pruned model.
        tokens: it was measured on; pairs or texts where these are counted.
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
class Choice:
    """How one layer runs at one batch.

    Args:
        rows: input rows it was measured with; pixels for a convolution.
        route: that won, such as ``bitmask`` or ``panels:128x256``; ``dense`` where the layer stayed.
        ratio: time of the dense layer over its own, the median of pairs measured in turn; above 1 is faster.
        low: lower quartile of those pairs.
        high: upper quartile.
        seconds: median time of a call.
        dense_seconds: the same of the dense layer.
        prepacked_seconds: the same of the dense layer with its weight in oneDNN's own order, None if there is none.
    """

    rows: int
    route: str
    ratio: float
    low: float
    high: float
    seconds: float
    dense_seconds: float
    prepacked_seconds: float | None

    @property
    def way(self) -> str:
        """The former name of ``route``."""
        warnings.warn("Choice.way is now called Choice.route", DeprecationWarning, stacklevel=2)
        return self.route


@dataclass(frozen=True)
class PackedLayer:
    """What happened to one layer.

    Args:
        name: qualified name of the module.
        shape: of the weight as a matrix, ``(out, in)``.
        pattern: that its zeros follow, as text.
        density: stored weights over all weights.
        format: that holds it, by its name in files.
        value_dtype: of the stored values.
        error: ``‖packed - dense‖ / ‖dense‖``, what fewer bits cost; 0 where nothing.
        dense_bytes: of the dense weight.
        stored_bytes: of the packed weight.
        runtime_bytes: that kernels keep besides it.
        packed: False where the layer stayed dense.
        reason: why it stayed dense; empty where it did not. It begins with "taken back" where the layer alone was
            faster packed, but the whole model was not.
        choices: by rows; empty where nothing was measured.
        tied_to: other modules that share the weight.
        matrices: how many there are in a stack, such as experts, or in an LSTM. ``shape`` is that of the first,
            ``density`` the mean, ``error`` the largest, and bytes are of all.
        precision: the arithmetic of its products, ``"exact"``, ``"bfloat16"`` or ``"int8"``: that of its least exact
            route.
        output_error: ``‖packed - dense‖ / ‖dense‖`` of its outputs on the given inputs; None where there were none.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    density: float
    format: str
    value_dtype: str
    error: float
    dense_bytes: int
    stored_bytes: int
    runtime_bytes: int
    packed: bool
    reason: str
    choices: tuple[Choice, ...]
    tied_to: tuple[str, ...] = ()
    matrices: int = 1
    precision: str = "exact"
    output_error: float | None = None

    @property
    def taken_back(self) -> bool:
        """Whether the layer alone was faster packed, but the whole model was not."""
        return self.reason.startswith("taken back")


@dataclass(frozen=True)
class ModelTime:
    """Milliseconds of one call of the whole model before and after packing, measured in turn.

    Args:
        shape: of the input, or of its first tensor, such as ``"8 x 64"``.
        before: with dense layers, the median.
        after: with packed layers, the median. The same as ``before`` where every layer was taken back.
        ratio: how many times as fast the packed model is: the median of the ratios within each round.
        low: their lower quartile.
        high: their upper quartile.
    """

    shape: str
    before: float
    after: float
    ratio: float
    low: float
    high: float


class PruningRecord(Protocol):
    """What the page of a pruning report reads of it; see :class:`secateur.Report`."""

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """The pruned layers."""

    @property
    def skipped(self) -> tuple[SkippedLayer, ...]:
        """Modules that were left alone."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """How the model was pruned."""

    @property
    def evaluation(self) -> Evaluation | None:
        """Quality before and after."""

    @property
    def first_line(self) -> str:
        """The shares of the whole model."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should look at."""
