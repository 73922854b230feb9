"""The weights of a model that could run packed, and their packed layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError, SparsityError
from secateur._types import Weight
from secateur.formats import Format, stored_share, value_name
from secateur.kernels import RoutePlan
from secateur.layers import Layer, Observed, Reading, Replaceability, select_layers
from secateur.nn import Packed, PackedAs, PackedEmbedding, PackedMatrix, linear_of, packed_layers, why_no_counterpart
from secateur.packing._decide import Decision, decide
from secateur.packing._images import Size, describe_images, image_inputs
from secateur.packing._measure import Measurement, key_of, measure
from secateur.packing._recurrent import RecurrentJob, find_recurrent, packed_recurrent_jobs
from secateur.packing._settings import PackSettings
from secateur.packing._stacks import StackJob, find_stacks, packed_stack_jobs
from secateur.packing._weights import NO_ZEROS, pack_weight, packed_again, precisions_of
from secateur.patterns import SparsityPattern, satisfied
from secateur.reports import PackedLayer, SkippedLayer
from secateur.timing import MeasurementCache, Timer


@dataclass(frozen=True)
class Job:
    """One weight, dense and packed.

    Args:
        name: name of the first module.
        modules: the modules that use the weight. They are packed if the model was packed before.
        dense: the first module, dense.
        weight: ``[out, in]``.
        packed: the same weight, packed.
        patterns: the patterns that its zeros satisfy.
        tied_to: names of the other modules.
        pattern_was_found: whether the pattern was found from the zeros, and not taken from the history.
        precisions: the arithmetic that it may have.
        sizes: of the inputs of a convolution in the model; none if they are not known.
    """

    name: str
    modules: tuple[nn.Module, ...]
    dense: nn.Module
    weight: Weight
    packed: Format
    patterns: tuple[SparsityPattern, ...]
    tied_to: tuple[str, ...] = ()
    pattern_was_found: bool = False
    precisions: tuple[str, ...] = ("exact",)
    sizes: tuple[Size, ...] = ()

    @property
    def title(self) -> str:
        """The name for messages: the model itself has an empty name."""
        return self.name or "(the model itself)"

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight."""
        return self.weight.nbytes

    def decide(
        self,
        settings: PackSettings,
        cold: bool,
        known: MeasurementCache[Measurement],
        timer: Timer,
    ) -> Decision:
        """Return how the layer should run, by a known measurement of a layer that runs alike, or else a new one."""
        measured = self.measured(settings, cold, known, timer)
        return decide(measured, self.dense_bytes, settings.memory, self.precisions)

    def measured(
        self,
        settings: PackSettings,
        cold: bool,
        known: MeasurementCache[Measurement],
        timer: Timer,
    ) -> Measurement:
        """Return the times of the routes that may run the layer: those of a layer that runs alike, or else new ones."""
        inputs, described = self._inputs(settings)
        rows = [n for n, _ in inputs]
        key = key_of(self.weight, self.packed, self.patterns, described, rows, cold, self.precisions)
        measured = known.get(key)
        if measured is None:
            patterns = (*self.patterns, self.packed.pattern)
            measured = measure(self.dense, self.built, self.packed, inputs, patterns, cold, timer, self.precisions)
            known.put(key, measured, lasting=not measured.noisy)
        return measured

    def _inputs(self, settings: PackSettings) -> tuple[list[tuple[int, Tensor]], str]:
        """Inputs to measure with, each with its number of rows, and what they are a measurement of."""
        if isinstance(self.dense, nn.Conv1d | nn.Conv2d):
            images = image_inputs(self.dense, self.sizes)
            return images, describe_images(self.dense, images)
        shape = (max(settings.batch_sizes), self.weight.shape[1])
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.weight.dtype)
        return [(rows, x[:rows]) for rows in settings.batch_sizes], type(self.dense).__name__

    def built(self, plan: RoutePlan) -> Packed:
        """Return the packed layer with a plan, which is not put into the model."""
        return self._build(self.dense, plan)

    def _build(self, dense: nn.Module, plan: RoutePlan, like: PackedMatrix | None = None) -> Packed:
        packed_as = PackedAs.of(dense)
        assert packed_as is not None
        made = packed_as.build(self.packed, dense.bias, plan, self.weight.dtype)  # type: ignore[arg-type]
        if like is not None:
            linear_of(made).share_(like)
        return made.train(dense.training)

    def pairs(self, decision: Decision) -> list[tuple[nn.Module, nn.Module]]:
        """Return what has to be replaced in the model, and by what, so that the layer runs as was decided."""
        if decision.plan is not None:
            return self._packed_modules(decision.plan)
        return [(module, self.dense) for module in self.modules if isinstance(module, Packed)]

    def _packed_modules(self, plan: RoutePlan) -> list[tuple[nn.Module, nn.Module]]:
        """Return each module with its replacement.

        Modules that share the weight get layers that share its tensors. If they also share the bias, they get the same
        layer.
        """
        made: dict[int, Packed] = {}
        swaps: list[tuple[nn.Module, nn.Module]] = []
        first: PackedMatrix | None = None
        for module in self.modules:
            was_packed = isinstance(module, Packed)
            inside = linear_of(module) if was_packed else module  # type: ignore[arg-type]
            same = was_packed and inside.values is self.packed.values
            # A layer that changes its arithmetic is a new one, so that the model can be compared with what it was.
            if same and inside.plan.precision == plan.precision:  # type: ignore[union-attr]
                inside.plan = plan  # type: ignore[assignment]
                continue
            key = id(inside.bias)
            if key not in made:
                made[key] = self._build(self.dense if was_packed else module, plan, first)
                first = first or linear_of(made[key])
            swaps.append((module, made[key]))
        return swaps

    def report(self, decision: Decision, output_error: float | None = None) -> PackedLayer:
        """Return the entry of the layer in the report.

        Args:
            decision: how it should run.
            output_error: the relative error of its outputs, where it was measured.
        """
        return PackedLayer(
            name=self.name,
            shape=self.packed.shape,
            pattern=str(self.packed.pattern),
            density=stored_share(self.packed),
            format=self.packed.name,
            value_dtype=value_name(self.packed.value_dtype),
            error=self.packed.error(self.weight),
            dense_bytes=self.dense_bytes,
            stored_bytes=self.packed.nbytes,
            runtime_bytes=decision.nbytes,
            packed=decision.plan is not None,
            reason=decision.reason,
            choices=decision.choices,
            tied_to=self.tied_to,
            precision="exact" if decision.plan is None else decision.plan.precision,
            output_error=output_error,
        )


def with_sizes(
    jobs: Sequence[Job | StackJob | RecurrentJob], sizes: Mapping[int, tuple[Size, ...]]
) -> list[Job | StackJob | RecurrentJob]:
    """Return the jobs, those of convolutions with the sizes of their inputs.

    Args:
        jobs: from :func:`find_jobs`.
        sizes: by the id of a module.
    """
    found: list[Job | StackJob | RecurrentJob] = []
    for job in jobs:
        if isinstance(job, Job):
            own = dict.fromkeys(size for module in job.modules for size in sizes.get(id(module), ()))
            found.append(replace(job, sizes=tuple(own)))
        else:
            found.append(job)
    return found


def find_jobs(
    model: nn.Module,
    settings: PackSettings,
    known: Mapping[str, SparsityPattern],
    read: Mapping[int, Reading] = MappingProxyType({}),
) -> tuple[list[Job | StackJob | RecurrentJob], list[SkippedLayer]]:
    """Return the weights to measure, and the modules that are skipped, each with the reason.

    Args:
        model: the model to pack.
        settings: how to pack. With an ``include``, layers that are already packed are not measured again.
        known: the patterns that layers were pruned to, by name.
        read: by their id, how functions multiply parameters of modules of no known kind.

    Raises:
        RecipeError: no layer to pack, or a glob that matches nothing.
    """
    include, exclude = settings.include, settings.exclude
    unseen = settings.without_tolerance  # of matrices that no module multiplies, so that their errors are not seen
    jobs: list[Job | StackJob | RecurrentJob] = []
    unread: list[SkippedLayer] = []
    if not include:
        packed, unread = _packed_jobs(model, settings)
        stacks, more = packed_stack_jobs(model, unseen, _why_not_here)
        modules, still_more = packed_recurrent_jobs(model, unseen, _why_not_here)
        jobs += [*packed, *stacks, *modules]
        unread += [*more, *still_more]
    try:
        layers, skipped = select_layers(model, include, exclude, Observed(read=read, all_reached=True))
    except RecipeError:
        if not (jobs or unread) or exclude:
            raise
        return jobs, unread
    skipped += unread
    replaceability = Replaceability(model, "use PackedLinear.from_linear", reads_are_served=True)
    parts = [layer for layer in layers if layer.kind.name or layer.kind.parameter != "weight"]
    recurrent = [layer for layer in parts if isinstance(layer.modules[0], nn.RNNBase)]
    stacked = [layer for layer in parts if not isinstance(layer.modules[0], nn.RNNBase)]
    new_stacks, unserved = find_stacks(stacked, known, unseen, lambda layer: _why_not_here(layer.matrix()))
    new_modules, more = find_recurrent(recurrent, known, unseen, replaceability)
    jobs += [*new_stacks, *new_modules]
    skipped += [*unserved, *more]
    taken = set(map(id, parts))
    for layer in layers:
        if id(layer) in taken:
            continue
        weight = layer.matrix()
        reason = _why_not(replaceability, layer, weight)
        if reason is None:
            try:
                made = _job(layer, weight, settings, known.get(layer.name))
                if made is None:
                    reason = NO_ZEROS
                else:
                    jobs.append(made)
            except SparsityError as error:
                reason = f"cannot be packed: {str(error).splitlines()[0]}"
        if reason is not None:
            skipped.append(SkippedLayer(layer.name, type(layer.modules[0]).__name__, reason))
    return jobs, skipped


def _job(layer: Layer, weight: Weight, settings: PackSettings, known: SparsityPattern | None) -> Job | None:
    made = pack_weight(weight, known, settings)
    if made is None:
        return None
    packed, patterns, found = made
    dense, allowed = layer.modules[0], settings.precisions
    return Job(layer.name, layer.modules, dense, weight, packed, patterns, layer.tied_to, found, allowed)


def _packed_jobs(model: nn.Module, settings: PackSettings) -> tuple[list[Job], list[SkippedLayer]]:
    """The layers that are already packed, which are measured again, and those that cannot be."""
    if isinstance(model, Packed):
        raise RecipeError("the model is a bare layer, which cannot be replaced in place. Put it into a module.")
    jobs: dict[int, Job] = {}
    skipped: dict[int, SkippedLayer] = {}
    for name, module in packed_layers(model).items():
        if id(module) in jobs or id(module) in skipped or any(fnmatchcase(name, glob) for glob in settings.exclude):
            continue
        inner = linear_of(module)
        reason = "its rows are int8 already" if isinstance(module, PackedEmbedding) else _why_not_here(inner.values)
        if reason is not None:
            skipped[id(module)] = SkippedLayer(name, type(module).__name__, reason)
            continue
        weight = inner.matrix()
        stored, patterns = inner.packed, (inner.pattern, *satisfied(weight == 0))
        packed, precisions = packed_again(stored, weight, settings), precisions_of(inner.plan, stored, settings)
        jobs[id(module)] = Job(name, (module,), module.to_dense(), weight, packed, patterns, precisions=precisions)
    return list(jobs.values()), list(skipped.values())


def _why_not(replaceability: Replaceability, layer: Layer, weight: Weight) -> str | None:
    """The reason why a layer cannot be packed, or None."""
    for module in layer.modules:
        reason = replaceability.why_not(module) or why_no_counterpart(module)
        if reason is not None:
            return reason
    return _why_not_here(weight)


def _why_not_here(weight: Tensor) -> str | None:
    """The reason why a weight cannot be measured on this machine, or None."""
    if weight.is_meta:
        return "its weight is on the meta device, without values"
    return None if weight.device.type == "cpu" else f"its weight is on {weight.device}; kernels run on the CPU"
