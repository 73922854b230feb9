"""Which layers of a model are selected, and why the others are skipped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from secateur._checks import globs
from secateur._errors import RecipeError, naming
from secateur._types import Weight, dtype_name
from secateur.layers._kinds import LayerKind, kind_of
from secateur.layers._models import check_model, computed_by, why_no_values
from secateur.layers._replace import reads_without_calling
from secateur.layers._sharding import full_tensor, is_sharded, write_whole_
from secateur.patterns import SparsityPattern, with_channel_width
from secateur.reports import SkippedLayer

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# The last part of the name of an output head, which turns features into predictions, in models of transformers.
_HEADS = frozenset({"lm_head", "embed_out", "classifier", "score", "qa_outputs", "output_projection"})


@dataclass(frozen=True)
class Layer:
    """One weight to prune: a parameter, and every module that uses it.

    Args:
        name: qualified name of the first module.
        modules: the modules that share the parameter.
        kind: how it is read.
        tied_to: qualified names of the other modules.
    """

    name: str
    modules: tuple[nn.Module, ...]
    kind: LayerKind
    tied_to: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name for messages: the model itself has an empty name."""
        return self.name or "(the model itself)"

    @property
    def parameter(self) -> nn.Parameter:
        parameter = getattr(self.modules[0], self.kind.parameter)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def parameter_name(self) -> str:
        """Qualified name of the parameter, under the first module."""
        return f"{self.name}.{self.kind.parameter}".lstrip(".")

    @property
    def is_sharded(self) -> bool:
        """Whether the weight is sharded over processes."""
        return is_sharded(self.parameter)

    @property
    def channel_width(self) -> int:
        return self.kind.channel_width(self.modules[0])

    def to_matrix(self, tensor: Tensor) -> Weight:
        """Return a tensor of the parameter's shape, such as its gradient, as a whole matrix ``[out, in]``.

        It is a view where possible.
        """
        return self.kind.to_matrix(self.modules[0], full_tensor(tensor))

    def from_matrix(self, matrix: Weight) -> Tensor:
        """Return a matrix ``[out, in]``, such as a mask, in the shape of the parameter."""
        return self.kind.from_matrix(self.modules[0], matrix)

    def matrix(self) -> Weight:
        """Return the whole weight as ``[out, in]``, detached: a view where possible."""
        return self.to_matrix(self.parameter.detach())

    def fit(self, pattern: SparsityPattern) -> SparsityPattern:
        """Return the pattern as it applies to this layer, after checking the weight and its shape.

        Raises:
            RecipeError: the weight has no values, or values that are not finite. The message names the layer.
            PatternError: the pattern does not fit the shape. The message names the layer.
        """
        pattern = with_channel_width(pattern, self.channel_width)
        weight = self.matrix()
        with naming(self.title):
            if weight.is_meta:
                raise RecipeError(why_no_values(self.modules))
            if not (finite := weight.isfinite()).all():
                raise RecipeError(f"{int((~finite).sum())} of its weights are NaN or infinite. Exclude the layer.")
            pattern.validate(weight.shape)
        return pattern

    @torch.no_grad()
    def write_(self, matrix: Weight) -> None:
        """Copy a matrix ``[out, in]`` into the weight, which keeps its dtype."""
        write_whole_(self.parameter, self.from_matrix(matrix))


def select_layers(
    model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> tuple[list[Layer], list[SkippedLayer]]:
    """Split the modules that own parameters into the layers to prune and the rest, each with its reason.

    Args:
        model: any module.
        include: glob patterns on qualified names. If there are any, exactly the prunable layers that match one are
            selected. If there is none, all prunable layers are, except output heads and layers tied to an embedding.
        exclude: glob patterns on qualified names. What matches is not selected, even if it matches ``include``.

    Returns:
        The layers, and the other modules that own parameters, each with the reason why it is skipped.

    Raises:
        RecipeError: a glob matches no module with parameters, or no layer is left to prune.
        TypeError: a glob that is not a str.
    """
    check_model(model)
    include, exclude = globs("include", include), globs("exclude", exclude)
    owners = [(name, module) for name, module in model.named_modules() if _own_parameters(module)]
    for glob in (*include, *exclude):
        if not any(fnmatchcase(name, glob) for name, _ in owners):
            raise RecipeError(
                f"{glob!r} matches none of the {len(owners)} modules with parameters.\n"
                f"A glob must match a whole qualified name, such as {owners[0][0]!r}."
                if owners
                else f"{glob!r} matches nothing: the model has no parameters."
            )

    attention = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    reasons = {
        name: _why_not_possible(name, module, attention) or _why_not_chosen(name, module, include, exclude, head)
        for name, module in owners
    }
    # A shared weight is left unchanged if any module that uses it is: pruning it would change that module, too. Only an
    # embedding does not count where `include` is given, because then the user named the layer.
    left_alone: dict[int, tuple[str, nn.Module]] = {}
    for name, module in owners:
        if reasons[name] and not (include and isinstance(module, _EMBEDDINGS)):
            for parameter in _own_parameters(module).values():
                left_alone.setdefault(id(parameter), (name, module))

    found: dict[int, Layer] = {}
    skipped: list[SkippedLayer] = []
    for name, module in owners:
        reason = reasons[name]
        kind = kind_of(module)
        weight = id(getattr(module, kind.parameter, None)) if kind is not None else 0
        if reason is None and weight in left_alone:
            other, user = left_alone[weight]
            if isinstance(user, _EMBEDDINGS):
                reason = f"tied to the embedding {other!r}; include=[{name!r}] prunes both"
            else:
                reason = f"shares its weight with {other!r}: {reasons[other]}"
        if reason is not None:
            skipped.append(SkippedLayer(name, type(module).__name__, reason))
            continue
        assert kind is not None
        first = found.get(weight)
        if first is None:
            found[weight] = Layer(name, (module,), kind)
        else:
            found[weight] = Layer(first.name, (*first.modules, module), first.kind, (*first.tied_to, name))
    if not found:
        listed = "\n".join(f"  {s.name or '(the model itself)'} ({s.kind}): {s.reason}" for s in skipped[:10])
        nothing = "  none; a packed model has none until secateur.unpack_"
        raise RecipeError(f"the model has no layer to prune. Its modules with parameters:\n{listed or nothing}")
    return list(found.values()), skipped


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


def _why_not_possible(name: str, module: nn.Module, attention: set[str]) -> str | None:
    """The reason why a module cannot be pruned, or None."""
    kind = kind_of(module)
    if kind is None:
        if isinstance(module, _EMBEDDINGS):
            return "embedding"
        if all(parameter.ndim < 2 for parameter in _own_parameters(module).values()):
            return "no weight matrix"
        if isinstance(module, torch.jit.ScriptModule):
            return "scripted or traced by torch.jit; prune the module that it was made from"
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            return "holds the weight of a parametrized layer"
        return f"{type(module).__name__} is no known kind of layer; see secateur.register_layer"
    weight = getattr(module, kind.parameter, None)
    if not isinstance(weight, nn.Parameter):
        return f"its {kind.parameter} is computed by {computed_by(module, kind.parameter)}"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight has no shape yet; run the model once"
    if not weight.is_floating_point() or weight.element_size() == 1:
        return f"its weight is {dtype_name(weight.dtype)}, and not of 16 or more floating-point bits"
    if name.rpartition(".")[0] in attention:
        return reads_without_calling("nn.MultiheadAttention")
    return None


def _why_not_chosen(
    name: str, module: nn.Module, include: tuple[str, ...], exclude: tuple[str, ...], head: nn.Module | None
) -> str | None:
    """The reason why a module that can be pruned is not selected, or None."""
    if any(fnmatchcase(name, glob) for glob in exclude):
        return "excluded"
    if include:
        return None if any(fnmatchcase(name, glob) for glob in include) else "not included"
    if module is head or name.rpartition(".")[2] in _HEADS:
        return f"output head; include=[{name!r}] prunes it"
    return None
