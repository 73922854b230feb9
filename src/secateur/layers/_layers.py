"""The only place that knows kinds of layers: the weight as ``[out, in]``, the inputs as rows, what to skip and why."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError, SparsityError
from secateur._types import Weight
from secateur.patterns import SparsityPattern, with_channel_width


@dataclass(frozen=True)
class LayerKind:
    """How one class of modules is read as a linear map of rows.

    Args:
        to_matrix: from the parameter to ``[out, in]``, a view where possible.
        from_matrix: from ``[out, in]`` and the module back to the parameter's own shape.
        input_rows: from the module and its first positional input, ``[..., features]``, to ``[groups, tokens, in]``,
            one row for each position of the input's leading dimensions, in order.
        parameter: the weight's attribute name.
        channel_width: neighbouring columns that read one input channel; kernel positions for a convolution.
    """

    to_matrix: Callable[[nn.Module, Tensor], Weight]
    from_matrix: Callable[[nn.Module, Weight], Tensor]
    input_rows: Callable[[nn.Module, Tensor], Tensor]
    parameter: str = "weight"
    channel_width: Callable[[nn.Module], int] = lambda module: 1


def _flat_rows(module: nn.Module, x: Tensor) -> Tensor:
    return x.reshape(1, -1, x.shape[-1])


def _unfolded_rows(module: nn.Module, x: Tensor) -> Tensor:
    """A convolution's input as ``[groups, positions, in / groups * kernel]``, in the order of its flattened weight."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    space = len(module.kernel_size)
    if x.ndim == space + 1:
        x = x.unsqueeze(0)
    reach = [dilation * (kernel - 1) for dilation, kernel in zip(module.dilation, module.kernel_size, strict=True)]
    padding: list[int] = []  # last dimension first, as F.pad wants it
    for axis in reversed(range(space)):
        if isinstance(module.padding, str):
            total = reach[axis] if module.padding == "same" else 0
            padding += [total // 2, total - total // 2]
        else:
            padding += [module.padding[axis]] * 2
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x, padding, mode=mode)
    for axis in range(space):
        windows = x.unfold(2 + axis, reach[axis] + 1, module.stride[axis])
        x = windows[..., :: module.dilation[axis]]
    # [batch, in, *positions, *kernel] -> [groups, batch * positions, in / groups * kernel]
    x = x.unflatten(1, (module.groups, -1)).flatten(3, 2 + space).flatten(4)
    return x.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)


_LINEAR = LayerKind(
    to_matrix=lambda module, weight: weight,
    from_matrix=lambda module, matrix: matrix,
    input_rows=_flat_rows,
)
_TRANSPOSED = LayerKind(
    to_matrix=lambda module, weight: weight.T,
    from_matrix=lambda module, matrix: matrix.T,
    input_rows=_flat_rows,
)
_CONVOLUTION = LayerKind(
    to_matrix=lambda module, weight: weight.flatten(1),
    from_matrix=lambda module, matrix: matrix.view_as(module.weight),  # type: ignore[arg-type]
    input_rows=_unfolded_rows,
    channel_width=lambda module: module.weight[0, 0].numel(),  # type: ignore[index]
)
_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: _LINEAR,
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
}

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Last name component of the layers that turn features into predictions, as the transformers library calls them.
_HEADS = frozenset({"lm_head", "embed_out", "classifier", "score", "qa_outputs", "output_projection"})


def register_layer(module_type: type[nn.Module], kind: LayerKind) -> None:
    """Make a class of modules, and its subclasses, prunable. A later registration of the same class replaces the first.

    Args:
        module_type: a subclass of ``nn.Module`` with one weight that acts linearly on rows.
        kind: how to read it.

    Raises:
        TypeError: not a module class, or not a ``LayerKind``.

    Example:
        >>> import torch, secateur
        >>> class Scaled(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.kernel = torch.nn.Parameter(torch.ones(4, 2))  # [in, out]
        ...     def forward(self, x):
        ...         return 2 * x @ self.kernel
        >>> secateur.register_layer(Scaled, secateur.LayerKind(
        ...     to_matrix=lambda module, kernel: kernel.T,
        ...     from_matrix=lambda module, matrix: matrix.T,
        ...     input_rows=lambda module, x: x.reshape(1, -1, x.shape[-1]),
        ...     parameter="kernel",
        ... ))
        >>> model = torch.nn.Sequential(Scaled())
        >>> secateur.prune_(model, pattern="2:4", method="magnitude").sparsity
        0.5
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of nn.Module, got {module_type!r}")
    if not isinstance(kind, LayerKind):
        raise TypeError(f"kind must be a LayerKind, got {type(kind).__name__}")
    _KINDS[module_type] = kind


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind registered for the module's class or its nearest base class, or None."""
    # Looked up only when transformers is loaded anyway, so that secateur never imports it for this.
    transformers = sys.modules.get("transformers.pytorch_utils")
    fallback = None
    if transformers is not None and isinstance(module, transformers.Conv1D):
        fallback = _TRANSPOSED
    return next((_KINDS[base] for base in type(module).__mro__ if base in _KINDS), fallback)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is sharded over processes (a DTensor); any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@dataclass(frozen=True)
class Layer:
    """One weight to prune: a parameter, and every module that uses it.

    Args:
        name: qualified name of the first module.
        modules: the modules that share the parameter, the first one first.
        kind: how to read it.
        tied_to: qualified names of the other modules.
    """

    name: str
    modules: tuple[nn.Module, ...]
    kind: LayerKind
    tied_to: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name, or words for the model itself, which has none."""
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
    def channel_width(self) -> int:
        return self.kind.channel_width(self.modules[0])

    def matrix(self) -> Weight:
        """The weight as ``[out, in]``, detached and whole; a view where possible."""
        return self.kind.to_matrix(self.modules[0], full_tensor(self.parameter.detach()))

    def fit(self, pattern: SparsityPattern) -> SparsityPattern:
        """Return the pattern as it applies to this layer, after checking that it fits and the weight can be worked on.

        Raises:
            RecipeError: the weight has no values, or values that are not finite; naming the layer.
            PatternError: the pattern does not fit; naming the layer.
        """
        pattern = with_channel_width(pattern, self.channel_width)
        weight = self.matrix()
        if weight.is_meta:
            raise RecipeError(
                f"{self.title}: its weight is on the meta device, without values. Load the weights first."
            )
        if not (finite := weight.isfinite()).all():
            raise RecipeError(f"{self.title}: {int((~finite).sum())} of its weights are NaN or infinite.\nExclude it.")
        try:
            pattern.validate(weight.shape)
        except SparsityError as error:
            raise type(error)(f"{self.title}: {error}") from None
        return pattern

    @torch.no_grad()
    def write_(self, matrix: Weight) -> None:
        """Set the weight from ``[out, in]``, in the parameter's own dtype."""
        self.parameter.copy_(self.kind.from_matrix(self.modules[0], matrix))


@dataclass(frozen=True)
class Skipped:
    """A module with parameters of its own that is left as it is, and why."""

    name: str
    kind: str
    reason: str


def select_layers(
    model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> tuple[list[Layer], list[Skipped]]:
    """Split the modules that own parameters into the layers to prune and the rest, each with its reason.

    Args:
        model: any module.
        include: glob patterns on qualified names. Given, exactly the layers they match are pruned and nothing is
            excluded by default; empty, all prunable layers but output heads and those tied to an embedding.
        exclude: glob patterns that win over ``include``.

    Raises:
        RecipeError: a glob that matches no module with parameters, or no layer left to prune.
    """
    include, exclude = tuple(include), tuple(exclude)
    owners = [(name, module) for name, module in model.named_modules() if _own_parameters(module)]
    for glob in (*include, *exclude):
        if not any(fnmatchcase(name, glob) for name, _ in owners):
            raise RecipeError(
                f"{glob!r} matches none of the {len(owners)} modules with parameters.\n"
                f"Globs are compared with whole qualified names, such as {owners[0][0]!r}."
                if owners
                else f"{glob!r} matches nothing: the model has no parameters."
            )

    attention = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    reasons = {
        name: _why_not_possible(name, module, attention) or _why_not_chosen(name, module, include, exclude, head)
        for name, module in owners
    }
    # A shared weight is left alone as soon as one module that uses it is; naming a layer frees it from an embedding.
    left_alone: dict[int, tuple[str, nn.Module]] = {}
    for name, module in owners:
        if reasons[name] and not (include and isinstance(module, _EMBEDDINGS)):
            for parameter in _own_parameters(module).values():
                left_alone.setdefault(id(parameter), (name, module))

    found: dict[int, Layer] = {}
    skipped: list[Skipped] = []
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
            skipped.append(Skipped(name, type(module).__name__, reason))
            continue
        assert kind is not None
        first = found.get(weight)
        if first is None:
            found[weight] = Layer(name, (module,), kind)
        else:
            found[weight] = Layer(first.name, (*first.modules, module), first.kind, (*first.tied_to, name))
    if not found:
        listed = "\n".join(f"  {s.name or '(the model itself)'} ({s.kind}): {s.reason}" for s in skipped[:10])
        raise RecipeError(f"the model has no layer to prune. Its modules with parameters:\n{listed or '  none'}")
    return list(found.values()), skipped


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


def _why_not_possible(name: str, module: nn.Module, attention: set[str]) -> str | None:
    """The reason that a module cannot be pruned, or None."""
    kind = kind_of(module)
    if kind is None:
        if isinstance(module, _EMBEDDINGS):
            return "embedding"
        if all(parameter.ndim < 2 for parameter in _own_parameters(module).values()):
            return "no weight matrix"
        return f"{type(module).__name__} is no known kind of layer; see secateur.register_layer"
    weight = getattr(module, kind.parameter, None)
    if not isinstance(weight, nn.Parameter):
        return f"its {kind.parameter} is computed from other parameters (parametrized or pruned by torch.nn.utils)"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight has no shape yet; run the model once"
    if not weight.is_floating_point() or weight.element_size() == 1:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not a floating-point matrix"
    if name.rpartition(".")[0] in attention:
        return "nn.MultiheadAttention reads its weight without calling it"
    return None


def _why_not_chosen(
    name: str, module: nn.Module, include: tuple[str, ...], exclude: tuple[str, ...], head: nn.Module | None
) -> str | None:
    """The reason that a module was not asked to be pruned, or None."""
    if any(fnmatchcase(name, glob) for glob in exclude):
        return "excluded"
    if include:
        return None if any(fnmatchcase(name, glob) for glob in include) else "not included"
    if module is head or name.rpartition(".")[2] in _HEADS:
        return f"output head; include=[{name!r}] prunes it"
    return None
