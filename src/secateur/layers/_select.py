"""Which layers of a model are selected, and why the others are skipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from secateur._checks import globs
from secateur._errors import RecipeError, naming
from secateur._sharding import full_tensor, is_sharded, write_whole_
from secateur._types import Weight, dtype_name
from secateur.layers._kind import LayerKind
from secateur.layers._kinds import kinds_of
from secateur.layers._models import check_model, computed_by
from secateur.layers._observed import NEVER_REACHED, Observed
from secateur.layers._plain import why_not_plain
from secateur.layers._roles import roles
from secateur.layers._stacks import observed_kinds
from secateur.patterns import SparsityPattern, with_channel_width
from secateur.reports import SkippedLayer

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Layer:
    """One weight to prune: a parameter, or a matrix inside it, and every module that uses it.

    Args:
        name: qualified name: that of the first module, and for one of several weights in it the name of the weight.
        modules: the modules that share the parameter.
        kind: how it is read.
        tied_to: qualified names in the other modules.
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
        owner = self.name.removesuffix(self.kind.name).rstrip(".") if self.kind.name else self.name
        return f"{owner}.{self.kind.parameter}".lstrip(".")

    @property
    def is_part(self) -> bool:
        """Whether the weight is a part of its parameter, such as one expert of a stack."""
        return self.kind.part is not None

    @property
    def runs_by_call(self) -> bool:
        """Whether a call of its module shows the inputs. Else they are seen where a function multiplies the weight."""
        return self.kind.input_rows is not None or self.kind.call_rows is not None

    def part(self, tensor: Tensor) -> Tensor:
        """Return a view of the part of a tensor of the parameter's shape that is this weight's."""
        return tensor if self.kind.part is None else tensor[self.kind.part]

    @property
    def is_sharded(self) -> bool:
        """Whether the weight is sharded over processes."""
        return is_sharded(self.parameter)

    @property
    def channel_width(self) -> int:
        return self.kind.channel_width(self.modules[0])

    def to_matrix(self, tensor: Tensor) -> Weight:
        """Return this weight's part of a tensor of the parameter's shape, such as its gradient, as ``[out, in]``.

        It is a view where possible.
        """
        return self.kind.to_matrix(self.modules[0], self.part(full_tensor(tensor)))

    def from_matrix(self, matrix: Weight) -> Tensor:
        """Return a matrix ``[out, in]``, such as a mask, in the shape of the parameter or of this weight's part."""
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
                raise RecipeError("its weight is on the meta device, without values. Load the weights first.")
            if not (finite := weight.isfinite()).all():
                raise RecipeError(f"{int((~finite).sum())} of its weights are NaN or infinite. Exclude the layer.")
            pattern.validate(weight.shape)
        return pattern

    @torch.no_grad()
    def write_(self, matrix: Weight) -> None:
        """Copy a matrix ``[out, in]`` into the weight, which keeps its dtype."""
        if self.is_part:  # of a parameter that is not sharded
            self.part(self.parameter).copy_(self.from_matrix(matrix))
        else:
            write_whole_(self.parameter, self.from_matrix(matrix))


@dataclass(frozen=True)
class _Candidate:
    """A weight that might be selected, or those parameters of a module that are none (then without a kind)."""

    name: str
    module_name: str
    module: nn.Module
    kind: LayerKind | None
    known: frozenset[str] = frozenset()  # the parameters of the module that are weights

    @property
    def unknown_weights(self) -> list[tuple[int, str]]:
        """The parameters of the module that no kind describes."""
        own = self.module.named_parameters(recurse=False)
        return [(id(parameter), str(None)) for name, parameter in own if name not in self.known]

    @property
    def weight(self) -> tuple[int, str]:
        """What tells this weight from others: its parameter and its part."""
        assert self.kind is not None
        return id(getattr(self.module, self.kind.parameter, None)), str(self.kind.part)

    def matches(self, globs: Iterable[str]) -> bool:
        """Whether a glob matches the weight, the parameter that it is a part of, or its module."""
        names = {self.name, self.module_name}
        if self.kind is not None and self.kind.name:
            names.add(f"{self.module_name}.{self.kind.parameter}".lstrip("."))
        return any(fnmatchcase(name, glob) for name in names for glob in globs)


def select_layers(
    model: nn.Module,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    observed: Observed | None = None,
) -> tuple[list[Layer], list[SkippedLayer]]:
    """Split the modules that own parameters into the layers to prune and the rest, each with its reason.

    Args:
        model: any module.
        include: glob patterns on qualified names. If there are any, exactly the prunable layers that match one are
            selected. If there is none, all prunable layers are, except output heads, routers, depthwise convolutions,
            adapters, and layers tied to an embedding.
        exclude: glob patterns on qualified names. What matches is not selected, even if it matches ``include``.
        observed: what forward passes showed. Given, layers that no input reached are skipped, and weights of unknown
            modules are found if a function multiplies them.

    Returns:
        The layers, and the other modules that own parameters, each with the reason why it is skipped.

    Raises:
        RecipeError: a glob matches no module with parameters, or no layer is left to prune.
        TypeError: a glob that is not a str.
    """
    check_model(model)
    include, exclude = globs("include", include), globs("exclude", exclude)
    candidates = [
        candidate for name, module in model.named_modules() for candidate in _candidates(name, module, observed)
    ]
    for glob in (*include, *exclude):
        if not any(candidate.matches([glob]) for candidate in candidates):
            owners = len({id(candidate.module) for candidate in candidates})
            raise RecipeError(
                f"{glob!r} matches none of the {owners} modules with parameters.\n"
                f"A glob must match a whole qualified name, such as {candidates[0].name!r}."
                if owners
                else f"{glob!r} matches nothing: the model has no parameters."
            )

    special = {} if include else roles(model)
    reasons = [
        (None if include else _role(candidate, exclude, special))
        or _why_not_possible(candidate, observed)
        or _why_not_chosen(candidate, include, exclude)
        or _why_not_reached(candidate, observed)
        for candidate in candidates
    ]
    # A shared weight is left unchanged if any module that uses it is: pruning it would change that module, too. Only an
    # embedding does not count where `include` is given, because then the user named the layer.
    left_alone: dict[tuple[int, str], tuple[_Candidate, str]] = {}
    for candidate, reason in zip(candidates, reasons, strict=True):
        if reason and not (include and isinstance(candidate.module, _EMBEDDINGS)):
            keys = [candidate.weight] if candidate.kind is not None else candidate.unknown_weights
            for key in keys:
                left_alone.setdefault(key, (candidate, reason))

    found: dict[tuple[int, str], Layer] = {}
    skipped: dict[tuple[str, str], SkippedLayer] = {}
    for candidate, reason in zip(candidates, reasons, strict=True):
        shared = None if reason else _why_not_shared(candidate, left_alone)
        if (why := reason or shared) is not None:
            where = candidate.name
            if candidate.kind is not None and isinstance(candidate.kind.part, int):  # one line for a whole stack
                where = where.removesuffix(f".{candidate.kind.part}")
            skipped.setdefault((where, why), SkippedLayer(where, type(candidate.module).__name__, why))
            continue
        kind, name, module = candidate.kind, candidate.name, candidate.module
        assert kind is not None
        first = found.get(candidate.weight)
        if first is None:
            found[candidate.weight] = Layer(name, (module,), kind)
        else:
            found[candidate.weight] = Layer(first.name, (*first.modules, module), first.kind, (*first.tied_to, name))
    if not found:
        listed = "\n".join(
            f"  {s.name or '(the model itself)'} ({s.kind}): {s.reason}" for s in list(skipped.values())[:10]
        )
        nothing = "  none; a packed model has none until secateur.unpack_"
        raise RecipeError(f"the model has no layer to prune. Its modules with parameters:\n{listed or nothing}")
    return list(found.values()), list(skipped.values())


def _why_not_shared(candidate: _Candidate, left_alone: Mapping[tuple[int, str], tuple[_Candidate, str]]) -> str | None:
    """The reason why a weight that is used elsewhere, too, must stay as it is, or None."""
    parameter, part = candidate.weight
    user = left_alone.get((parameter, part)) or left_alone.get((parameter, str(None)))
    if user is None:
        return None
    other, why = user
    if isinstance(other.module, _EMBEDDINGS):
        return f"tied to the embedding {other.name!r}; include=[{candidate.name!r}] prunes both"
    return f"shares its weight with {other.name!r}: {why}"


def _candidates(name: str, module: nn.Module, observed: Observed | None) -> list[_Candidate]:
    """The weights of a module, and the module itself for the parameters that are none."""
    own = dict(module.named_parameters(recurse=False))
    kinds = kinds_of(module)
    if observed is not None and not isinstance(module, _EMBEDDINGS):
        in_parts = {key: p for key, p in own.items() if id(p) in observed.read and observed.read[id(p)].parts}
        seen = in_parts if kinds else own
        kinds = tuple(kind for kind in kinds if kind.parameter not in seen)
        kinds += tuple(kind for key, p in seen.items() for kind in observed_kinds(key, p, observed))
    known = {kind.parameter for kind in kinds}
    found = [_Candidate(f"{name}.{kind.name}".strip("."), name, module, kind) for kind in kinds if own or not kind.name]
    if not own and not any(hasattr(module, parameter) for parameter in known):
        return []
    has_one = len(kinds) == 1 and not kinds[0].name
    if not kinds or (
        not has_one and any(p.ndim > 1 for key, p in own.items() if key not in known and "bias" not in key)
    ):
        found.append(_Candidate(name, name, module, None, frozenset(known)))
    return found


def _why_not_possible(candidate: _Candidate, observed: Observed | None) -> str | None:
    """The reason why a weight cannot be pruned, or None."""
    module, kind = candidate.module, candidate.kind
    if kind is None:
        if isinstance(module, _EMBEDDINGS):
            return "embedding"
        own = dict(module.named_parameters(recurse=False))
        matrices = {n: p for n, p in own.items() if p.ndim > 1 and n not in candidate.known and "bias" not in n}
        if not matrices:
            return "no weight matrix"
        readings = [] if observed is None else [observed.read.get(id(p)) for p in matrices.values()]
        problem = next((reading.problem for reading in readings if reading is not None), None)
        if problem:
            return problem
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
    if kind.part is not None and is_sharded(weight):
        return "it is a part of a parameter that is sharded over processes"
    return why_not_plain(module)


def _role(candidate: _Candidate, exclude: tuple[str, ...], special: Mapping[int, str]) -> str | None:
    """What a weight does, if that is the reason to leave it dense, or None."""
    role = special.get(id(candidate.module))
    if role is None or candidate.kind is None or candidate.matches(exclude):
        return None
    return f"{role}; include=[{candidate.name!r}] prunes it"


def _why_not_chosen(candidate: _Candidate, include: tuple[str, ...], exclude: tuple[str, ...]) -> str | None:
    """The reason why a weight that can be pruned is not selected, or None."""
    if candidate.matches(exclude):
        return "excluded"
    return "not included" if include and not candidate.matches(include) else None


def _why_not_reached(candidate: _Candidate, observed: Observed | None) -> str | None:
    """The reason why calibration says nothing of a weight, or None."""
    if observed is None or candidate.kind is None:
        return None
    kind, parameter = candidate.kind, getattr(candidate.module, candidate.kind.parameter)
    reading = observed.read.get(id(parameter))
    if reading is not None and reading.problem:
        return reading.problem
    by_call = kind.input_rows is not None or kind.call_rows is not None
    return None if observed.reached(candidate.module, parameter, by_call=by_call) else NEVER_REACHED


def globs_of(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return glob patterns that match some qualified names and no others: with ``*`` for numbers, so that few will do.

    Args:
        names: to match.
        others: that must not match.
    """
    names, others = list(names), list(others)
    stars = {name: ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    if any(fnmatchcase(other, glob) for other in others for glob in stars.values()):
        return names
    return list(dict.fromkeys(stars.values()))
