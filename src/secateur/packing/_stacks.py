"""The parameters of a model whose matrices could run packed in their place, and their packed stacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name that PyTorch's own documentation uses

from secateur._errors import SparsityError
from secateur._types import Weight, dtype_name
from secateur.formats import Format, stored_share
from secateur.kernels import PRECISIONS, RoutePlan
from secateur.layers import Layer
from secateur.nn import PackedLinear, PackedStack, packed_recurrents, packed_stacks
from secateur.packing._decide import Decision, decide
from secateur.packing._measure import Measurement, key_of, measure
from secateur.packing._settings import PackSettings
from secateur.packing._weights import NO_ZEROS, pack_weight, packed_again, precisions_of
from secateur.patterns import SparsityPattern, satisfied
from secateur.reports import PackedLayer, SkippedLayer
from secateur.timing import MeasurementCache, Timer


@dataclass(frozen=True)
class Matrix:
    """One matrix of a parameter, dense and packed.

    Args:
        name: of the part of the stack.
        weight: ``[out, in]``.
        packed: the same weight, packed.
        patterns: the patterns that its zeros satisfy.
        pattern_was_found: whether the pattern was found from the zeros, and not taken from the history.
    """

    name: str
    weight: Weight
    packed: Format
    patterns: tuple[SparsityPattern, ...]
    pattern_was_found: bool = False


@dataclass(frozen=True)
class StackJob:
    """A parameter that consists of matrices with zeros.

    Args:
        name: qualified name of the parameter.
        old: the parameter, or the stack that it was packed to before.
        matrices: of the parameter.
        stacked: whether they are the matrices of a stack; else they follow on one another in the first dimension.
        transposed: whether the parameter has them as ``[in, out]``.
        tied_to: further names of the parameter.
        precisions: the arithmetic that products with it may have.
    """

    name: str
    old: nn.Parameter | PackedStack
    matrices: tuple[Matrix, ...]
    stacked: bool
    transposed: bool
    tied_to: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("exact",)

    @property
    def title(self) -> str:
        """The name for messages."""
        return self.name

    @property
    def pattern_was_found(self) -> bool:
        """Whether the pattern of a matrix was found from the zeros, and not taken from the history."""
        return any(matrix.pattern_was_found for matrix in self.matrices)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight."""
        return sum(matrix.weight.nbytes for matrix in self.matrices)

    @property
    def _together(self) -> bool:
        """Whether the matrices are multiplied by one input: those with a name, q, k and v, and not a number."""
        likeness = {(matrix.packed.name, matrix.packed.pattern, matrix.packed.value_dtype) for matrix in self.matrices}
        return not self.matrices[0].name.isdigit() and len(likeness) == 1

    def decide(
        self, settings: PackSettings, cold: bool, known: MeasurementCache[Measurement], timer: Timer
    ) -> list[Decision]:
        """Return how each matrix should run. Of matrices that run alike, one is measured."""
        found: dict[str, Decision] = {}
        decisions = []
        for matrix in self.matrices:
            measured_as = self.matrices if self._together else (matrix,)
            form = f"{'stack' if self.stacked else f'{len(measured_as)} rows'}{' transposed' * self.transposed}"
            key = key_of(
                matrix.weight, matrix.packed, matrix.patterns, form, settings.batch_sizes, cold, self.precisions
            )
            if key not in found:
                found[key] = self._decide(key, measured_as, settings, cold, known, timer)
            decisions.append(found[key])
        return decisions

    def _decide(
        self,
        key: str,
        matrices: tuple[Matrix, ...],
        settings: PackSettings,
        cold: bool,
        known: MeasurementCache[Measurement],
        timer: Timer,
    ) -> Decision:
        first = matrices[0]
        measured = known.get(key)
        if measured is None:
            generator = torch.Generator().manual_seed(0)
            columns = first.weight.shape[1]
            inputs = [(n, torch.randn(n, columns, generator=generator).to(first.weight)) for n in settings.batch_sizes]
            patterns = (*first.patterns, first.packed.pattern)
            whole = torch.stack if self.stacked else torch.cat
            dense = whole([matrix.weight.T if self.transposed else matrix.weight for matrix in matrices]).contiguous()
            measured = measure(
                _Reader(dense, self.stacked, self.transposed),
                lambda plan: _Reader(self._build(matrices, [plan] * len(matrices)), self.stacked, self.transposed),
                first.packed,
                inputs,
                patterns,
                cold,
                timer,
                self.precisions,
            )
            known.put(key, measured, lasting=not measured.noisy)
        return decide(measured, sum(matrix.weight.nbytes for matrix in matrices), settings.memory, self.precisions)

    def _build(self, matrices: Iterable[Matrix], plans: Iterable[RoutePlan | None]) -> PackedStack:
        parts = {
            matrix.name: PackedLinear(matrix.packed, None, plan, matrix.weight.dtype)
            for matrix, plan in zip(matrices, plans, strict=True)
        }
        return PackedStack(parts, stacked=self.stacked, transposed=self.transposed)

    def swaps(self, decisions: list[Decision]) -> list[tuple[nn.Parameter | PackedStack, nn.Parameter | PackedStack]]:
        """Return what has to be replaced, and by what: a parameter by a stack, or a stack by a parameter."""
        if all(decision.plan is not None for decision in decisions):
            if isinstance(self.old, PackedStack) and all(
                part.packed.values is matrix.packed.values
                for part, matrix in zip(self.old.parts.values(), self.matrices, strict=True)
            ):
                for part, decision in zip(self.old.parts.values(), decisions, strict=True):
                    part.plan = decision.plan  # type: ignore[assignment]
                return []
            return [(self.old, self._build(self.matrices, [decision.plan for decision in decisions]))]
        if isinstance(self.old, PackedStack):
            return [(self.old, nn.Parameter(self.old.to_dense()))]
        return []

    def report(self, decisions: list[Decision]) -> PackedLayer:
        """Return the entry of the parameter in the report."""
        shown, reason = decisions[0], ""
        for matrix, decision in zip(self.matrices, decisions, strict=True):
            if decision.plan is None:  # the first one that stays dense says why all do
                shown = decision
                reason = decision.reason if len(decisions) == 1 else f"matrix {matrix.name}: {decision.reason}"
                break
        first = self.matrices[0].packed
        dense, stored = self.dense_bytes, sum(matrix.packed.nbytes for matrix in self.matrices)
        weights = [matrix.packed.error(matrix.weight) for matrix in self.matrices]
        return PackedLayer(
            name=self.name,
            shape=first.shape,
            pattern=", ".join(dict.fromkeys(str(matrix.packed.pattern) for matrix in self.matrices)),
            density=fmean(stored_share(matrix.packed) for matrix in self.matrices),
            format=", ".join(dict.fromkeys(matrix.packed.name for matrix in self.matrices)),
            value_dtype=dtype_name(first.value_dtype),
            error=max(weights),
            dense_bytes=dense,
            stored_bytes=stored,
            runtime_bytes=0 if reason else self._runtime_bytes(decisions),
            packed=not reason,
            reason=reason,
            choices=shown.choices,
            tied_to=self.tied_to,
            matrices=len(self.matrices),
            precision="exact" if reason else max((d.plan.precision for d in decisions if d.plan), key=PRECISIONS.index),
        )

    def _runtime_bytes(self, decisions: list[Decision]) -> int:
        return decisions[0].nbytes if self._together else sum(decision.nbytes for decision in decisions)


class _Reader(nn.Module):
    """Multiplies a matrix of a parameter, as code does that reads it."""

    def __init__(self, weight: Tensor | PackedStack, stacked: bool, transposed: bool) -> None:
        super().__init__()
        self.weight = weight
        self._stacked, self._transposed = stacked, transposed

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of x and the matrix."""
        weight = self.weight[0] if self._stacked else self.weight
        return torch.matmul(x, weight) if self._transposed else F.linear(x, weight)  # type: ignore[arg-type]

    @property
    def runtime_nbytes(self) -> int:
        """Bytes of memory that kernels have taken, besides the stored weight."""
        return self.weight.runtime_nbytes if isinstance(self.weight, PackedStack) else 0


def find_stacks(
    layers: Iterable[Layer],
    known: Mapping[str, SparsityPattern],
    settings: PackSettings,
    why_not: Callable[[Layer], str | None],
) -> tuple[list[StackJob], list[SkippedLayer]]:
    """Return the parameters whose matrices can run packed in their place, and those that cannot, with the reason.

    Args:
        layers: the selected ones that are parts of a parameter, or a parameter that functions multiply.
        known: the patterns that layers were pruned to, by name.
        settings: how to pack.
        why_not: returns the reason why a layer cannot be packed, or None.
    """
    by_parameter: dict[int, list[Layer]] = {}
    for layer in layers:
        by_parameter.setdefault(id(layer.parameter), []).append(layer)
    jobs, skipped = [], []
    for own in by_parameter.values():
        first = own[0]
        name = first.parameter_name
        reason = _why_not_whole(own) or next(filter(None, map(why_not, own)), None)
        if reason is None:
            try:
                made = _job(own, name, known, settings)
                if made is None:
                    reason = NO_ZEROS
                else:
                    jobs.append(made)
            except SparsityError as error:
                reason = f"cannot be packed: {str(error).splitlines()[0]}"
        if reason is not None:
            skipped.append(SkippedLayer(name, type(first.modules[0]).__name__, reason))
    return jobs, skipped


def _why_not_whole(layers: list[Layer]) -> str | None:
    """The reason why the matrices of a parameter do not make the whole parameter, or None."""
    parameter, parts = layers[0].parameter, [layer.kind.part for layer in layers]
    if parameter.ndim != (3 if type(parts[0]) is int else 2) or any(_is_turned(layer) is None for layer in layers):
        return "it is one matrix with joined dimensions, and no packed weight can take its place"
    if type(parts[0]) is int:
        missing = len(parameter) - len(layers)
        return None if not missing else f"{missing} of its {len(parameter)} matrices are left dense, and so are all"
    covered = sum(layer.part(parameter).shape[0] for layer in layers)
    if covered != len(parameter):
        return f"{len(parameter) - covered} of its {len(parameter)} rows are left dense, and so are all"
    return None


def _is_turned(layer: Layer) -> bool | None:
    """Whether a parameter has a matrix as ``[in, out]``; None if it has it in another way."""
    probe = torch.empty(2, 3, device="meta")
    try:
        rows, columns = layer.kind.to_matrix(layer.modules[0], probe).shape
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None
    return {(2, 3): False, (3, 2): True}.get((rows, columns))


def _job(
    layers: list[Layer], name: str, known: Mapping[str, SparsityPattern], settings: PackSettings
) -> StackJob | None:
    """The job of a parameter, or None if a matrix of it has no zeros and these are left alone."""
    matrices = []
    for layer in sorted(layers, key=_position):
        weight = layer.matrix()
        made = pack_weight(weight, known.get(layer.name), settings)
        if made is None:
            return None
        part = layer.name.removeprefix(name).strip(".") or "0"
        matrices.append(Matrix(part, weight, *made))
    first = layers[0]
    tied = tuple(dict.fromkeys(_parameter_of(other, first) for other in first.tied_to))
    stacked = type(first.kind.part) is int
    turned = bool(_is_turned(first))
    return StackJob(name, first.parameter, tuple(matrices), stacked, turned, tied, settings.precisions)


def _position(layer: Layer) -> int:
    part = layer.kind.part
    return part if isinstance(part, int) else 0 if part is None else part.start or 0


def _parameter_of(name: str, like: Layer) -> str:
    """The parameter in another module, given the name of the matrix there."""
    return replace(like, name=name).parameter_name


def packed_stack_jobs(
    model: nn.Module,
    settings: PackSettings,
    why_not: Callable[[Tensor], str | None],
) -> tuple[list[StackJob], list[SkippedLayer]]:
    """Return the stacks that are already packed, which are measured again, and those that cannot be.

    Args:
        model: that has them.
        settings: how to pack.
        why_not: returns the reason why a weight cannot be measured on this machine, or None.
    """
    jobs: dict[int, StackJob] = {}
    skipped: list[SkippedLayer] = []
    recurrent = packed_recurrents(model)
    for name, stack in packed_stacks(model).items():
        if name.rpartition(".")[0] in recurrent:  # measured as a whole
            continue
        if id(stack) in jobs:
            first = jobs[id(stack)]
            jobs[id(stack)] = replace(first, tied_to=(*first.tied_to, name))
            continue
        if any(fnmatchcase(name, glob) for glob in settings.exclude):
            continue
        values = next(iter(stack.parts.values())).values
        if (reason := why_not(values)) is not None:
            skipped.append(SkippedLayer(name, type(stack).__name__, reason))
            continue
        matrices, allowed = [], set[str]()
        for part, layer in stack.parts.items():
            weight, stored = layer.matrix(), layer.packed
            packed = packed_again(stored, weight, settings)
            allowed.update(precisions_of(layer.plan, stored, settings))
            matrices.append(Matrix(part, weight, packed, (layer.pattern, *satisfied(weight == 0))))
        precisions = tuple(precision for precision in PRECISIONS if precision in allowed)
        jobs[id(stack)] = StackJob(name, stack, tuple(matrices), stack.stacked, stack.transposed, precisions=precisions)
    return list(jobs.values()), skipped
