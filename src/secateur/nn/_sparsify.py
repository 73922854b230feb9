"""Swap a model's layers for ones that learn their mask, and back."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from secateur._checks import globs
from secateur._checks import settings as settings_of
from secateur._errors import RecipeError, naming
from secateur.layers import Layer, Replaceability, plain_class, select_layers, swap_modules_, transposed_linear
from secateur.nn._mask_settings import MaskSettings
from secateur.nn._sparse import SparseConv2d, SparseLinear
from secateur.nn._sparse_conv1d import SparseConv1D
from secateur.nn._sparse_layer import SparseLayer
from secateur.patterns import SparsityPattern
from secateur.reports import SkippedLayer


def sparsify_(
    model: nn.Module,
    *,
    pattern: SparsityPattern | str | None = None,
    sparsity: float | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    structured: bool | None = None,
    temperature: float | None = None,
    threshold: float | None = None,
    hard: bool | None = None,
    settings: MaskSettings | None = None,
) -> dict[str, SparseLayer]:
    """Replace a model's linear layers and two-dimensional convolutions, in place, by ones that learn their mask.

    Those of a subclass that computes the same, such as one that only adds a name, and transformers' ``Conv1D`` are
    linear layers, too; each becomes what it was at the end.
    Their parameters move over, the same objects: an optimizer that has them keeps them. Without a pattern each new
    layer brings a learned ``threshold`` that the optimizer still has to be given. The output head, and layers that
    share their weight with an embedding, are left alone unless ``include`` names them; other kinds of layers stay. So
    do layers that share their weight with one another if there is no pattern: each would learn thresholds of its own.

    Args:
        model: any module but a bare layer.
        pattern: learn under this pattern; None learns thresholds without a budget.
        sparsity: the fraction of units to prune in each layer, where the pattern leaves it free.
        include: glob patterns on qualified names; given, exactly these layers are replaced.
        exclude: glob patterns that win over ``include``.
        structured: see :class:`SparseLinear`, like all that follow.
        temperature: see :class:`SparseLinear`.
        threshold: see :class:`SparseLinear`.
        hard: see :class:`SparseLinear`.
        settings: a :class:`~secateur.nn.MaskSettings`, instead of the keywords from ``pattern`` to ``hard``.

    Returns:
        The new layers by qualified name.

    Raises:
        RecipeError: no layer to replace, one that was included but cannot be replaced, a glob that matches nothing, an
            impossible temperature or threshold, or both ``settings`` and keywords.
        PatternError: a pattern that does not fit a layer, which is named, or an impossible sparsity.
        TypeError: an argument of the wrong type.

    After any of these the model is unchanged.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> list(secateur.sparsify_(model, pattern="unstructured", sparsity=0.9))
        ['0', '2']
        >>> model[0]  # doctest: +ELLIPSIS
        SparseLinear(in_features=8, out_features=16, bias=True, structured=False, pattern='unstructured', ...)
    """
    keywords = {
        "structured": structured,
        "pattern": pattern,
        "sparsity": sparsity,
        "temperature": temperature,
        "threshold": threshold,
        "hard": hard,
    }
    settings = settings_of("MaskSettings", settings, MaskSettings, keywords)
    if settings.pattern is None and isinstance(model, nn.parallel.DistributedDataParallel):
        raise RecipeError(
            "DistributedDataParallel would not synchronise thresholds that are added to the model inside it.\n"
            "Call sparsify_ first and wrap the model then."
        )
    layers, _ = replaceable_layers(model, include, exclude, own_thresholds=settings.pattern is None)
    made: dict[str, SparseLayer] = {}
    swaps: list[tuple[nn.Module, SparseLayer]] = []
    for layer in layers:
        if settings.pattern is not None:
            layer.fit(settings.pattern)
        for name, module in zip((layer.name, *layer.tied_to), layer.modules, strict=True):
            with naming(layer.title):
                made[name] = _sparse(module, settings)
            swaps.append((module, made[name]))
    swap_modules_(model, swaps)
    return made


def densify_(model: nn.Module) -> list[str]:
    """Replace a model's sparse layers, in place, by plain ones with the effective weight: true zeros, no mask.

    The parameters move over, the same objects.

    Returns:
        The qualified names of the layers that were replaced.

    Raises:
        RecipeError: the model itself is a sparse layer, or one is sharded over processes; the model is unchanged.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(secateur.SparseLinear(8, 4, pattern="2:4"))
        >>> secateur.densify_(model), model[0], int((model[0].weight == 0).sum())
        (['0'], Linear(in_features=8, out_features=4, bias=True), 16)
    """
    layers = sparse_layers(model)
    if "" in layers:
        raise RecipeError("a bare layer cannot be replaced in place: its to_linear or to_conv2d returns the plain one.")
    for name, layer in layers.items():
        with naming(name):
            layer._must_be_whole("densify_")
    swap_modules_(model, [(layer, layer._to_plain()) for layer in layers.values()])
    return list(layers)


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The model's sparse layers by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}


def replaceable_layers(
    model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = (), *, own_thresholds: bool = False
) -> tuple[list[Layer], list[SkippedLayer]]:
    """Split the prunable layers into those that have a sparse counterpart and the rest, each with its reason.

    Args:
        model: any module.
        include: as for :func:`sparsify_`, like ``exclude``.
        exclude: see there.
        own_thresholds: every module would learn thresholds, so that none may share its weight.

    Raises:
        RecipeError: nothing is left, or a layer that ``include`` names has no counterpart.
    """
    include = globs("include", include)
    layers, skipped = select_layers(model, include, exclude)
    found = []
    replaceability = Replaceability(model, "build the sparse layer with from_linear or from_conv2d")
    for layer in layers:
        reasons = (replaceability.why_not(module) or _no_counterpart(module) for module in layer.modules)
        reason = next(filter(None, reasons), None)
        if reason is None and own_thresholds and layer.tied_to:
            reason = f"shares its weight with {layer.tied_to[0]!r}, so it needs a pattern: one mask for both"
        if reason is None:
            found.append(layer)
        elif include:
            raise RecipeError(f"{layer.title}: {reason}.\nExclude it, or use a method that needs no sparse layer.")
        else:
            skipped.append(SkippedLayer(layer.name, type(layer.modules[0]).__name__, reason))
    if not found:
        listed = "\n".join(
            f"  {skip.name or '(the model itself)'} ({skip.kind}): {skip.reason}" for skip in skipped[:10]
        )
        raise RecipeError(f"the model has no layer that can learn its mask. Its modules with parameters:\n{listed}")
    return found, skipped


def _sparse(module: nn.Module, settings: MaskSettings) -> SparseLayer:
    """The sparse counterpart of a layer that has one."""
    if isinstance(module, nn.Conv2d):
        return SparseConv2d.from_conv2d(module, settings=settings)
    if isinstance(module, nn.Linear):
        return SparseLinear.from_linear(module, settings=settings)
    return SparseConv1D.from_conv1d(module, settings)


def _no_counterpart(module: nn.Module) -> str | None:
    plain = plain_class(module)
    if plain is None or plain not in (nn.Linear, nn.Conv2d, transposed_linear()):
        return f"only nn.Linear and nn.Conv2d have a counterpart that learns its mask, not {type(module).__name__}"
    return None
