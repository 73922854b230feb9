"""Reorder what layers read, so that an N:M mask keeps more of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur._checks import globs, integer
from secateur._errors import RecipeError, SolverError, naming
from secateur._types import Progress, dtype_name
from secateur.calibration import (
    GRADIENTS,
    Forward,
    LayerStatistics,
    Padding,
    PaddingSource,
    call_model,
    fit_arguments,
    gather,
    load_batches,
    observe,
    parameter_names,
    quiet,
    replayed,
)
from secateur.graph import find_units
from secateur.layers import Layer, Observed, check_model, select_layers
from secateur.nn import check_dense
from secateur.patterns import NM, SparsityPattern, as_pattern
from secateur.permuting._order import Orders
from secateur.permuting._report import LayerGain, PermutationReport, Permuted
from secateur.permuting._search import search
from secateur.permuting._shared import Shared, find_shared
from secateur.pruning import Recipe
from secateur.solvers import Importance, Select, Wanda, head_of, method_name, parse_method
from secateur.surgery import Difference, Looks, difference, tolerance_for, wide_outputs

_PROVED = 2  # batches on which outputs are compared


def permute_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    pattern: SparsityPattern | str = "2:4",
    importance: Importance | str = "wanda",
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    rounds: int = 4,
    seed: int = 0,
    forward: Forward | None = None,
    padding: PaddingSource | None = None,
    progress: Progress | None = None,
) -> PermutationReport:
    """Reorder the inputs of layers, in place, so that an N:M mask keeps more of them. The model's function stays.

    N:M keeps n of every m adjacent inputs, whatever they are worth. In another order, m inputs that matter are no
    longer neighbours. The new order costs nothing at run time: who makes the inputs makes them in that order, as the
    dependency graph of the model says. That is possible for the neurons of feed-forward layers, the values inside of
    attention heads, channels between convolutions, and the residual stream, which has one order for all layers that
    read or write it. Inputs whose order is fixed, such as those of the model, stay. Then the outputs are computed
    before and after, in float64 where the model's code allows it, and compared. If they differ, everything is put back.

    Prune afterwards with the same pattern. Optimizers that were made before hold state in the order before: make them
    anew.

    Args:
        model: any module.
        batches: inputs, as for :func:`secateur.prune_`. They give the statistics of the importance; one is enough for
            ``"magnitude"``.
        pattern: N:M, as value or text.
        importance: whose scores the mask should keep: ``"wanda"``, ``"ria"``, ``"magnitude"`` or an
            :class:`secateur.Importance`. Each layer counts by the share of its own scores.
        include, exclude: glob patterns on the names of the layers that will be pruned. Others do not count.
        rounds: passes of the search over each order, at least 1. More take longer and find a little more.
        seed: of the search. The same seed gives the same order.
        forward: ``forward(model, batch)`` runs the model, if its batches are of none of the usual forms.
        padding: which tokens are real, where the batch does not say so. See :func:`secateur.prune_`.
        progress: called with a description, and how much of how much is done.

    Returns:
        What is kept of each layer before and after, what could not be reordered and why, and the proof.

    Raises:
        RecipeError: no N:M pattern, no importance, no layer, or a model that cannot run the batch.
        PatternError: a layer that the pattern does not fit; it is named.
        StatisticsError: batches that are empty or not finite.
        SolverError: the reordered model is another function. The model is as it was.

    Example:
        >>> import torch, secateur
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> inputs = torch.randn(64, 8)
        >>> outputs = model(inputs)
        >>> report = secateur.permute_(model, [inputs], pattern="2:4")
        >>> report.after > report.before, torch.allclose(model(inputs), outputs, atol=1e-5)
        (True, True)

    References:
        Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024;
        Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021.
    """
    began = time.perf_counter()
    check_model(model)
    check_dense(model, "its columns cannot change places")
    pattern = as_pattern(pattern)
    if not isinstance(pattern, NM):
        raise RecipeError(f"the order of inputs matters to N:M, such as '2:4'; got {pattern}. Give such a pattern.")
    scorer = _importance(importance)
    integer("rounds", rounds, 1)
    integer("seed", seed, 0)
    inputs = _Inputs.of(model, batches, forward, padding)
    chosen = globs("include", include), globs("exclude", exclude)
    layers, _ = select_layers(model, *chosen, inputs.observed)
    for layer in layers:
        layer.fit(pattern)
    tell = progress or (lambda description, done, total: None)
    tell("scoring", 0, 1)
    scores = _scores(model, layers, inputs, scorer)
    layers = [layer for layer in layers if layer.name in scores]
    graph = find_units(model, inputs.batches[0], inputs.forward, with_hidden=True)
    shared = find_shared(model, graph, inputs.observed, layers)
    proof = _Proof.of(model, inputs)
    before = {name: _kept(pattern, found) for name, found in scores.items()}
    kept = dict(before)
    orders, dimensions = Orders(model), list[Permuted]()
    try:
        tried = _Tried(model, proof)
        for number, found in enumerate(shared):
            tell(f"reordering {found.name}".strip(), number, len(shared))
            able, reason = tried.able(found)
            moved = 0
            if able is not None:
                new = [_order(part.reads, part.size, scores, pattern, rounds, seed) for part in able.parts]
                moved = _accept(able, new, scores, kept, pattern)
                if moved:
                    orders.apply(able.parts, new)
            names = tuple(layer.name for layer in found.layers)
            dimensions.append(
                Permuted(found.name, found.kind, found.parts[0].size, len(found.parts), names, moved, reason)
            )
        result = proof.compare()
        if result.error > proof.tolerance:
            what = result.reason or f"its output differs by {result.error:.1e}, at most {proof.tolerance:g} is allowed"
            raise SolverError(
                f"with its inputs in another order the model is another function: {what}.\nThe model is as it was "
                "before. Exclude the layers around what depends on the order."
            )
    except BaseException:
        orders.undo()
        raise
    why = {name: entry.reason for entry in dimensions if entry.reason for name in entry.layers}
    free = {name for entry in dimensions if not entry.reason for name in entry.layers}
    return PermutationReport(
        pattern=str(pattern),
        importance=method_name(Select(scorer)),
        dimensions=tuple(dimensions),
        layers=tuple(
            LayerGain(
                layer.name,
                before[layer.name],
                kept[layer.name],
                "" if layer.name in free else why.get(layer.name, "the order of its inputs is fixed"),
            )
            for layer in layers
        ),
        error=result.error,
        tolerance=proof.tolerance,
        dtype=dtype_name(proof.dtype),
        seconds=time.perf_counter() - began,
    )


def permute_for(model: nn.Module, batches: Iterable[Any], recipe: Recipe, progress: Progress) -> PermutationReport:
    """Reorder the inputs of the layers that a recipe prunes, for its pattern and the scores of its method.

    A method that has no importance of its own, such as SparseGPT, or one that needs a loss, has those of Wanda.

    Args:
        model, batches, progress: see :func:`permute_`.
        recipe: that the model will be pruned by.

    Raises:
        SparsityError: as :func:`permute_`.
    """
    method = head_of(recipe.method)
    scored = isinstance(method, Select) and not method.needs & GRADIENTS
    importance = method.importance if scored and isinstance(method, Select) else Wanda()
    return permute_(
        model,
        batches,
        pattern=recipe.pattern,
        importance=importance,
        include=recipe.include,
        exclude=recipe.exclude,
        progress=progress,
    )


def _importance(importance: Importance | str) -> Importance:
    method = parse_method(importance) if isinstance(importance, str) else importance
    if isinstance(method, Select):
        method = method.importance
    if not isinstance(method, Importance):
        raise RecipeError(
            f"an order is sought for scores, which {importance!r} does not give.\n"
            "Give an importance, such as 'wanda' or 'ria'; the pruning method may be another one."
        )
    return method


@dataclass(frozen=True)
class _Inputs:
    """Batches as a model takes them, and what a forward pass on them showed."""

    batches: list[Any]
    observed: Observed
    paddings: list[Padding]
    forward: Forward

    @classmethod
    def of(
        cls, model: nn.Module, batches: Iterable[Any], forward: Forward | None, padding: PaddingSource | None
    ) -> _Inputs:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        loaded = load_batches(batches, device)
        if forward is None:
            loaded = fit_arguments(model, loaded, device).batches
        names = parameter_names(model) if forward is None else ()
        with quiet(model):
            observed = observe(model, loaded, forward or call_model, lambda seen: False)
        paddings = [Padding.of(batch, names, padding) for batch in loaded]
        return cls(loaded, observed, paddings, forward or call_model)


@torch.no_grad()
def _scores(model: nn.Module, layers: Sequence[Layer], inputs: _Inputs, scorer: Importance) -> dict[str, Tensor]:
    """The scores of the layers that inputs reached, each as shares of their sum in its layer."""
    statistics: dict[str, LayerStatistics] = {}
    if scorer.needs:
        with quiet(model):
            source = replayed(model, inputs.batches, list(layers), inputs.forward, sequential=False)
            statistics = gather(
                source, 0, scorer.needs, observed=inputs.observed, strict=False, paddings=inputs.paddings
            )
    found = {}
    for layer in layers:
        if layer.name in statistics or not scorer.needs:
            with naming(layer.title):
                scores = scorer.scores(layer.matrix(), statistics.get(layer.name))
            total = float(scores.double().sum())
            found[layer.name] = scores / total if total else scores
    return found


def _kept(pattern: SparsityPattern, scores: Tensor) -> float:
    """The share of the scores that the mask keeps."""
    total = float(scores.double().sum())
    return float(torch.where(pattern.mask(scores), scores, 0).double().sum()) / total if total else 1.0


def _order(
    reads: Sequence[Any], size: int, scores: dict[str, Tensor], pattern: NM, rounds: int, seed: int
) -> NDArray[np.int64]:
    """An order of units, in which those that the search finds better are read."""
    readers, movable = [], size
    for read in reads:
        matrix = scores[read.layer.name]
        whole = matrix.shape[1] - matrix.shape[1] % pattern.m
        for run in read.aligned(pattern.m):
            movable = min(movable, max(0, whole - int(run[0, 0])) // run.shape[1])
            readers.append(matrix[:, torch.from_numpy(run).to(matrix.device)])
    return search(readers, pattern.n, pattern.m, movable, rounds, seed) if readers else np.arange(size)


def _accept(
    shared: Shared,
    orders: Sequence[NDArray[np.int64]],
    scores: dict[str, Tensor],
    kept: dict[str, float],
    pattern: NM,
) -> int:
    """Reorder the scores if the real mask then keeps more of them in all readers together. Return the units moved."""
    moved = sum(int((order != np.arange(len(order))).sum()) for order in orders)
    if not moved:
        return 0
    new: dict[str, Tensor] = {}
    for part, order in zip(shared.parts, orders, strict=True):
        for read in part.reads:
            matrix = new.setdefault(read.layer.name, scores[read.layer.name].clone())
            old = scores[read.layer.name]
            here, there = (torch.from_numpy(c.reshape(-1)) for c in (read.columns, read.columns[order]))
            matrix[:, here.to(old.device)] = old[:, there.to(old.device)]
    shares = {name: _kept(pattern, matrix) for name, matrix in new.items()}
    if sum(shares.values()) <= sum(kept[name] for name in shares):
        return 0
    scores.update(new)
    kept.update(shares)
    return moved


@dataclass(frozen=True)
class _Proof:
    """What the model gave out before."""

    model: nn.Module
    inputs: _Inputs
    expected: tuple[object, ...]
    dtype: torch.dtype
    tolerance: float

    @classmethod
    def of(cls, model: nn.Module, inputs: _Inputs) -> _Proof:
        found = [wide_outputs(model, batch, inputs.forward) for batch in inputs.batches[:_PROVED]]
        dtype = min((dtype for _, dtype in found), key=lambda dtype: torch.finfo(dtype).bits)
        return cls(model, inputs, tuple(output for output, _ in found), dtype, tolerance_for(model.parameters()))

    def compare(self, most: int = _PROVED) -> Difference:
        """The largest difference from that."""
        found = [
            difference(wide_outputs(self.model, batch, self.inputs.forward)[0], expected, Looks())
            for batch, expected in zip(self.inputs.batches[:most], self.expected, strict=False)
        ]
        return max(found, key=lambda result: result.error)


class _Tried:
    """Which units may change places: those after which, in random order, the model gives the same outputs."""

    def __init__(self, model: nn.Module, proof: _Proof) -> None:
        self._model, self._proof = model, proof
        self._known: dict[object, tuple[int, str]] = {}

    def able(self, shared: Shared) -> tuple[Shared | None, str]:
        """Return the units whose order may change, or None and why it may not."""
        choices = [shared, *shared.instead]
        key = tuple(choice.looks(self._model) for choice in choices)
        if key not in self._known:
            problems = []
            for number, choice in enumerate(choices):
                problem = self._problem(choice)
                if not problem:
                    self._known[key] = number, ""
                    break
                problems.append(problem)
            else:
                self._known[key] = -1, problems[0]
        number, problem = self._known[key]
        return (None, problem) if problem else (choices[number], "")

    def _problem(self, shared: Shared) -> str:
        generator = np.random.default_rng(0)
        orders = Orders(self._model)
        try:
            orders.apply(shared.parts, [generator.permutation(part.size) for part in shared.parts])
            found = self._proof.compare(1)
        except RecipeError as error:
            return str(error).partition("\n")[0]
        finally:
            orders.undo()
        if found.error <= self._proof.tolerance:
            return ""
        return found.reason or f"in a random order the outputs of the model differ by {found.error:.1e}"
