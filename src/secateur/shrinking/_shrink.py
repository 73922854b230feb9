"""Make a model physically smaller, in one call, and prove that it computes what was left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from secateur._checks import globs, one_of
from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.calibration import Forward, PaddingSource, call_model
from secateur.graph import Dimension, Graph, Removal, find_blocks, find_experts, find_units
from secateur.nn import check_dense
from secateur.reports import ShrinkReport, Stage
from secateur.shapes import Facts, remember_facts
from secateur.shrinking._method import Method
from secateur.shrinking._request import check_request
from secateur.shrinking._work import Inputs, Settings, Shrinking, load_inputs
from secateur.surgery import tried

ALLOCATIONS = ("uniform", "global")


def analyze(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    with_hidden: bool = False,
) -> Graph:
    """Return what can be removed from a model, and what stands in the way of the rest. The model does not change.

    The model runs a few times on the first batch.

    Args:
        model: any module.
        batches: inputs; one is enough. See :func:`secateur.prune_`.
        forward: ``forward(model, batch)`` runs the model, if its batches are of none of the usual forms.
        include: glob patterns on the names of dimensions and their tensors. Given, only those that match are returned.
        exclude: glob patterns that win over ``include``.
        with_hidden: look for channels of the residual stream, too.

    Raises:
        RecipeError: the model cannot run the batch, or a glob matches nothing.
        StatisticsError: there is no batch.

    Example:
        >>> import torch
        >>> from secateur.shrinking import analyze
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> graph = analyze(model, [torch.randn(2, 8)])
        >>> [(found.name, found.kind, found.size) for found in graph.dimensions]
        [('channels', 'channels', 16)]
        >>> graph.boundaries[0].reason
        'it is multiplied by values of fixed size'
    """
    check_dense(model, "nothing can be cut out of it")
    loaded, *_ = load_inputs(model, batches, forward)
    chosen = globs("include", include), globs("exclude", exclude)
    return _analyze(model, loaded[0], forward or call_model, chosen, with_hidden)


def _analyze(
    model: nn.Module, batch: Any, forward: Forward, chosen: tuple[tuple[str, ...], tuple[str, ...]], with_hidden: bool
) -> Graph:
    include, exclude = chosen
    began = time.perf_counter()
    graph = find_units(model, batch, forward, with_hidden=with_hidden)
    found = [*find_blocks(model, batch, forward), *find_experts(model), *graph.dimensions]
    graph = tried(model, replace(graph, dimensions=tuple(found)), batch, forward)
    found_now = tuple(d for d in graph.dimensions if (not include or _matches(d, include)) and not _matches(d, exclude))
    for glob in (*include, *exclude):
        if not any(_matches(dimension, [glob]) for dimension in graph.dimensions):
            names = ", ".join(dimension.name for dimension in graph.dimensions[:3])
            raise RecipeError(f"{glob!r} matches nothing that could go. A glob matches whole names, such as {names}.")
    return replace(graph, dimensions=found_now, seconds=time.perf_counter() - began)


def _matches(dimension: Dimension, patterns: Iterable[str]) -> bool:
    tensors = {place.tensor for place in dimension.places}
    names = {dimension.name, *tensors, *(name.rpartition(".")[0] for name in tensors)}
    return any(fnmatchcase(name, glob) for name in names for glob in patterns)


def shrink_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    keep: Mapping[str, float] | None = None,
    target: Mapping[str, float] | None = None,
    remove: Mapping[str, Sequence[int]] | Removal | None = None,
    zeros: bool = False,
    method: str = "obs+refit",
    allocation: str = "uniform",
    round_to: int = 1,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    history: Stage | Sequence[Stage] | None = None,
    forward: Forward | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    padding: PaddingSource | None = None,
    progress: Progress | None = None,
) -> ShrinkReport:
    """Make a model physically smaller, in place: without some layers, heads, neurons, channels or experts.

    What goes together is found in a forward pass. The least important units are taken out of the model by zeros, block
    by block, and what stays is fitted to make up for them. Then tensors are cut, and it is proved on the batches that
    the smaller model computes the same as the one with zeros: to 1e-5 in float32, and 1e-10 in float64. If that fails,
    the model is put back as it was. Optimizers that were made before hold the old parameters: make them anew.

    Exactly one of ``keep``, ``target``, ``remove`` and ``zeros`` says what goes, or ``remove`` and ``keep`` together.
    Fractions are what is kept.

    Args:
        model: any module.
        batches: inputs, as for :func:`secateur.prune_`. One is enough to find what goes together; scores and fits need
            a few thousand tokens or more.
        keep: by kind, or by the name of a dimension, the fraction of units that stay, such as ``{"layers": 0.5, "ffn":
            0.75}`` or ``{"encoder.layer.0.ffn": 0.5}``. Kinds are ``layers`` (blocks), ``heads`` (key/value heads with
            all their query heads), ``query_heads``, ``ffn`` (neurons), ``channels``, ``experts``, and ``hidden``
            (channels of the residual stream: not exact).
        target: ``{"params": 0.5}`` or ``{"macs": 0.5}``: the fraction of the whole model's parameters, or of its
            multiply-adds on the first batch, that stays at most. Neurons, heads, channels and experts go, the same
            fraction of each.
        remove: by the name of a dimension, or by a kind that the model has once, the numbers of the units that go,
            counted from 0; or a :class:`secateur.shrinking.Removal`.
        zeros: remove units that are zero already, such as rows or columns that were pruned. What they add as a constant
            goes into biases.
        method: an importance of units, ``"obs"``, ``"flap"``, ``"wanda"``, ``"magnitude"``, ``"taylor"`` or
            ``"fisher"``; with ``"+influence"``, blocks go that turn the residual stream least, in place of those
            without which outputs change least; with ``"+refit"``, what stays makes up for what goes.
        allocation: ``"uniform"`` keeps one size in all blocks, as an ordinary configuration describes it;
            ``"global"`` compares units of all blocks, so that each gets a size of its own.
        round_to: sizes of neurons and channels become multiples of it.
        include, exclude: glob patterns on the names of dimensions and of their tensors.
        history: reports of what was done before, such as of :func:`secateur.prune_`: patterns of layers that must stay.
        forward: ``forward(model, batch)`` runs the model, if its batches are of none of the usual forms.
        loss: ``loss(output, batch)``, for ``"taylor"`` and ``"fisher"``. It gets the batch as given, labels too.
        padding: which tokens are real, where the batch does not say so. See :func:`secateur.prune_`.
        progress: called with a description, and how much of how much is done.

    Returns:
        The report: what went and what it cost, what cannot go and why, sizes before and after, and the proof.

    Raises:
        RecipeError: settings that contradict each other, units that do not exist, or nothing that can go.
        StatisticsError: batches that are empty or not finite.
        SolverError: the smaller model is not the same function. It names the units; the model is as it was.

    Example:
        >>> import torch, secateur
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> report = secateur.shrink_(model, [torch.randn(64, 8)], keep={"channels": 0.5})
        >>> model[0].out_features, model[2].weight.shape, report.after.parameters / report.before.parameters
        (8, torch.Size([4, 8]), 0.5094339622641509)

    References:
        Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models", 2023, arXiv:2302.04089; An et
        al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", 2023, arXiv:2312.11983.
    """
    check_dense(model, "nothing can be cut out of it")
    asked = check_request(keep, target, remove, zeros, round_to)
    one_of("allocation", allocation, ALLOCATIONS)
    chosen = Method.parse(method)
    if "input_gradients" in chosen.scores.needs and loss is None and asked in ("keep", "target"):
        raise RecipeError(f"method {method!r} needs a loss: pass loss=, a function of the model's output and a batch.")
    inputs = Inputs.of(model, batches, forward, padding)
    hidden = bool(keep and "hidden" in keep) or _asks_hidden(remove)
    given = globs("include", include or ()), globs("exclude", exclude or ())
    graph = _analyze(model, inputs.batches[0], inputs.forward, given, hidden)
    past = (history,) if isinstance(history, Stage) else tuple(history or ())
    tell = progress or (lambda description, done, total: None)
    settings = Settings(chosen, allocation, round_to, loss, past, tell)
    report = Shrinking(model, graph, inputs, settings).run(keep, target, remove, zeros)
    facts = replace(Facts.from_dict(report.facts), model_hash=report.model_hash)
    remember_facts(model, facts)  # for what saves the model
    return replace(report, facts=facts.to_dict())


def _asks_hidden(remove: Mapping[str, Sequence[int]] | Removal | None) -> bool:
    names = remove.units if isinstance(remove, Removal) else remove or {}
    return any(name.rpartition(".")[2].startswith("hidden") for name in names)
