"""The recurrent modules of a model that could run packed: measured as a whole, on sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import SparsityError
from secateur._types import dtype_name
from secateur.formats import Format, stored_share
from secateur.kernels import PRECISIONS, BitmaskRoute, Route, RoutePlan, default_plan
from secateur.layers import Layer, Replaceability
from secateur.nn import PackedLinear, PackedRecurrent, PackedStack, packed_recurrents
from secateur.packing._decide import Decision, decide, fastest_plan
from secateur.packing._measure import DENSE, Measurement, key_of, measure
from secateur.packing._settings import PackSettings
from secateur.packing._weights import NO_ZEROS, pack_weight, packed_again, precisions_of
from secateur.patterns import SparsityPattern, satisfied
from secateur.reports import PackedLayer, SkippedLayer
from secateur.timing import MeasurementCache, Timer, time_in_turn

STEPS = 32  # of the sequences that are measured


@dataclass(frozen=True)
class RecurrentWeight:
    """One weight of a recurrent module, dense and packed.

    Args:
        name: of the parameter.
        weight: ``[out, in]``.
        packed: the same weight, packed.
        patterns: the patterns that its zeros satisfy.
    """

    name: str
    weight: Tensor
    packed: Format
    patterns: tuple[SparsityPattern, ...]


@dataclass(frozen=True)
class RecurrentJob:
    """An LSTM, GRU or RNN with weights that have zeros.

    Args:
        name: qualified name of the module.
        module: the dense module, or the packed one that it was before.
        dense: the dense module.
        weights: those with zeros. Others stay dense.
        pattern_was_found: whether a pattern was found from the zeros, and not taken from the history.
        precisions: the arithmetic that products with the weights may have.
    """

    name: str
    module: nn.Module
    dense: nn.RNNBase
    weights: tuple[RecurrentWeight, ...]
    pattern_was_found: bool = False
    precisions: tuple[str, ...] = ("exact",)

    @property
    def title(self) -> str:
        """The name for messages."""
        return self.name

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weights."""
        return sum(weight.weight.nbytes for weight in self.weights)

    def decide(
        self, settings: PackSettings, cold: bool, known: MeasurementCache[Measurement], timer: Timer
    ) -> tuple[Decision, PackedRecurrent | None]:
        """Return how the module should run, and the packed module if that is packed.

        First the fastest routes of each weight are found, for the rows of one step or of all. With these the module is
        measured on sequences, as many at a time as the batch sizes say, and compared with the dense one.
        """
        plans = {}
        for weight in self.weights:
            plan = self._plan(weight, settings, cold, known, timer)
            if plan is None:
                names = " or ".join(self.precisions)
                reason = f"no route of {names} arithmetic runs {weight.name} on this machine within the limit of memory"
                return Decision(None, reason, (), 0), None
            plans[weight.name] = plan
        packed = self._build(plans)
        first = self.weights[0]
        # The report names one route: that of the last weight, which reads states.
        label = next((route for route in plans[self.weights[-1].name].routes if route != DENSE), BitmaskRoute())
        own = f"{self.dense.mode} {self.dense.num_layers}x{1 + self.dense.bidirectional} of {len(self.weights)} "
        share = sum(weight.packed.nbytes for weight in self.weights)
        key = (
            own
            + key_of(
                first.weight, first.packed, first.patterns, f"{share}", settings.batch_sizes, cold, self.precisions
            )
            + f" {plans}"
        )
        measured = known.get(key)
        if measured is None:
            measured = self._measure(packed, label, settings, timer)
            known.put(key, measured, lasting=not measured.noisy)
        decision = decide(measured, self.dense_bytes, settings.memory, PRECISIONS)  # of the label, whatever it names
        return decision, packed if decision.plan is not None else None

    def _plan(
        self,
        weight: RecurrentWeight,
        settings: PackSettings,
        cold: bool,
        known: MeasurementCache[Measurement],
        timer: Timer,
    ) -> RoutePlan | None:
        """The routes of one weight that are fastest within the limit of memory, whether they beat dense or not."""
        rows = settings.batch_sizes
        if "weight_ih" in weight.name:  # it is multiplied by the inputs of all steps
            rows = tuple(sorted({STEPS * n for n in rows}))
        key = key_of(weight.weight, weight.packed, weight.patterns, "recurrent", rows, cold, self.precisions)
        measured = known.get(key)
        if measured is None:
            made = nn.Linear(weight.weight.shape[1], weight.weight.shape[0], bias=False, device="meta")
            made.weight = nn.Parameter(weight.weight, requires_grad=False)
            generator = torch.Generator().manual_seed(0)
            inputs = [(n, torch.randn(n, made.in_features, generator=generator).to(weight.weight)) for n in rows]
            measured = measure(
                made,
                lambda plan: PackedLinear(weight.packed, None, plan, weight.weight.dtype),
                weight.packed,
                inputs,
                (*weight.patterns, weight.packed.pattern),
                cold,
                timer,
                self.precisions,
            )
            known.put(key, measured, lasting=not measured.noisy)
        found = fastest_plan(measured, weight.weight.nbytes, settings.memory, self.precisions)
        return default_plan(weight.packed) if found is None and "exact" in self.precisions else found

    def _build(self, plans: Mapping[str, RoutePlan]) -> PackedRecurrent:
        stacks = {
            weight.name: PackedStack(
                {"0": PackedLinear(weight.packed, None, plans[weight.name], weight.weight.dtype)}, stacked=False
            )
            for weight in self.weights
        }
        return PackedRecurrent(self.dense, stacks)

    @torch.no_grad()
    def _measure(self, packed: PackedRecurrent, label: Route, settings: PackSettings, timer: Timer) -> Measurement:
        training = self.dense.training
        seconds: dict[int, dict[Route, list[float]]] = {}
        try:
            modules: tuple[nn.Module, nn.Module] = self.dense.eval(), packed.eval()
            for rows in settings.batch_sizes:
                shape = (rows, STEPS) if self.dense.batch_first else (STEPS, rows)
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(*shape, self.dense.input_size, generator=generator).to(self.weights[0].weight)
                calls: dict[Route, Any] = {DENSE: _caller(modules[0], x), label: _caller(modules[1], x)}
                seconds[rows] = time_in_turn(calls, DENSE, timer, None, keep=(label,))
        finally:
            self.dense.train(training)
            packed.train(training)
        taken = sum(module.runtime_nbytes for module in packed.modules() if isinstance(module, PackedLinear))
        return Measurement(seconds, {DENSE: self.dense_bytes, label: taken})

    def report(self, decision: Decision) -> PackedLayer:
        """Return the entry of the module in the report."""
        formats = [weight.packed for weight in self.weights]
        return PackedLayer(
            name=self.name,
            shape=formats[0].shape,
            pattern=", ".join(dict.fromkeys(str(packed.pattern) for packed in formats)),
            density=fmean(map(stored_share, formats)),
            format=", ".join(dict.fromkeys(packed.name for packed in formats)),
            value_dtype=dtype_name(formats[0].value_dtype),
            error=max(weight.packed.error(weight.weight) for weight in self.weights),
            dense_bytes=self.dense_bytes,
            stored_bytes=sum(packed.nbytes for packed in formats),
            runtime_bytes=decision.nbytes,
            packed=decision.plan is not None,
            reason=decision.reason,
            choices=decision.choices,
            matrices=len(formats),
            precision="exact" if decision.plan is None else decision.plan.precision,
        )


def _caller(module: nn.Module, x: Tensor) -> Any:
    return lambda: module(x)


def find_recurrent(
    layers: Iterable[Layer],
    known: Mapping[str, SparsityPattern],
    settings: PackSettings,
    replaceability: Replaceability,
) -> tuple[list[RecurrentJob], list[SkippedLayer]]:
    """Return the recurrent modules that can run packed, and those that cannot, with the reason.

    Args:
        layers: the selected weights of recurrent modules.
        known: the patterns that layers were pruned to, by name.
        settings: how to pack.
        replaceability: of the model's modules.
    """
    by_module: dict[int, list[Layer]] = {}
    for layer in layers:
        by_module.setdefault(id(layer.modules[0]), []).append(layer)
    jobs, skipped = [], []
    for own in by_module.values():
        module = own[0].modules[0]
        assert isinstance(module, nn.RNNBase)
        name = own[0].name.removesuffix(own[0].kind.name).rstrip(".")
        reason = _why_not(module, own, replaceability)
        if reason is None:
            try:
                weights, found = _weights(own, known, settings)
                if weights:
                    jobs.append(RecurrentJob(name, module, module, weights, found, settings.precisions))
                else:
                    reason = NO_ZEROS
            except SparsityError as error:
                reason = f"cannot be packed: {str(error).splitlines()[0]}"
        if reason is not None:
            skipped.append(SkippedLayer(name, type(module).__name__, reason))
    return jobs, skipped


def _why_not(module: nn.RNNBase, layers: list[Layer], replaceability: Replaceability) -> str | None:
    """The reason why a recurrent module cannot run packed, or None."""
    if (reason := replaceability.why_not(module)) is not None:
        return reason
    if type(module) not in (nn.LSTM, nn.GRU, nn.RNN):
        return f"a packed module can replace only nn.LSTM, nn.GRU and nn.RNN, not {type(module).__name__}"
    if module.proj_size:
        return "an LSTM with proj_size has a projection in each step, which no packed one has"
    if shared := next((layer for layer in layers if layer.tied_to), None):
        return f"{shared.kind.name} is shared with {shared.tied_to[0]}"
    weight = layers[0].parameter
    if weight.is_meta:
        return "its weight is on the meta device, without values"
    return None if weight.device.type == "cpu" else f"its weight is on {weight.device}; kernels run on the CPU"


def _weights(
    layers: list[Layer], known: Mapping[str, SparsityPattern], settings: PackSettings
) -> tuple[tuple[RecurrentWeight, ...], bool]:
    """The weights that are packed, and whether a pattern was found from the zeros."""
    made, any_found = [], False
    for layer in layers:
        matrix = layer.matrix()
        if (own := pack_weight(matrix, known.get(layer.name), settings)) is not None:
            packed, patterns, found = own
            made.append(RecurrentWeight(layer.kind.name, matrix, packed, patterns))
            any_found |= found
    return tuple(made), any_found


def packed_recurrent_jobs(
    model: nn.Module,
    settings: PackSettings,
    why_not: Callable[[Tensor], str | None],
) -> tuple[list[RecurrentJob], list[SkippedLayer]]:
    """Return the recurrent modules that are already packed, which are measured again, and those that cannot be.

    Args:
        model: that has them.
        settings: how to pack.
        why_not: returns the reason why a weight cannot be measured on this machine, or None.
    """
    jobs: dict[int, RecurrentJob] = {}
    skipped: list[SkippedLayer] = []
    for name, module in packed_recurrents(model).items():
        if id(module) in jobs or any(fnmatchcase(name, glob) for glob in settings.exclude):
            continue
        values = [layer.values for layer in module.modules() if isinstance(layer, PackedLinear)]
        if (reason := next(filter(None, map(why_not, values)), None)) is not None:
            skipped.append(SkippedLayer(name, type(module).__name__, reason))
            continue
        weights, allowed = [], set[str]()
        for key, stack in module.named_children():
            assert isinstance(stack, PackedStack)
            (layer,) = stack.parts.values()
            weight, stored = layer.matrix(), layer.packed
            packed = packed_again(stored, weight, settings)
            allowed.update(precisions_of(layer.plan, stored, settings))
            weights.append(RecurrentWeight(key, weight, packed, (layer.pattern, *satisfied(weight == 0))))
        precisions = tuple(precision for precision in PRECISIONS if precision in allowed)
        jobs[id(module)] = RecurrentJob(name, module, module.to_dense(), tuple(weights), precisions=precisions)
    return list(jobs.values()), skipped
