"""Gather exactly the statistics that were asked for while a stage runs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
from torch import Tensor

from secateur._errors import StatisticsError, naming
from secateur.calibration._accumulators import Accumulator, Hook
from secateur.calibration._inputs import INPUTS, Gram, InputNorm
from secateur.calibration._padding import Kept, Padding, left_out
from secateur.calibration._replay import RouteChanged, StageSource
from secateur.calibration._statistics import LayerStatistics, Need
from secateur.layers import Layer

STATISTICS: dict[Need, type[Accumulator]] = {statistic.name: statistic for statistic in (InputNorm, Gram)}


def gather(
    source: StageSource,
    stage_index: int,
    needs: Iterable[Need],
    on_batch: Callable[[int], None] = lambda done: None,
    paddings: Sequence[Padding] | None = None,
) -> dict[str, LayerStatistics]:
    """Run a stage on all batches and return the statistics of each of its layers, by layer name.

    Args:
        source: whose stages are gathered in order. Between two stages the caller may change the weights of the first.
        stage_index: which of its stages.
        needs: the statistics to gather.
        on_batch: called after each batch with the number of batches done.
        paddings: what is padding in each batch, the same objects for all stages. None looks for it in the batches.

    Raises:
        StatisticsError: naming the layer whose inputs are missing, not finite, or not alignable with the mask.
    """
    layers = source.stages[stage_index].layers
    needs = frozenset(needs)
    hooks = dict.fromkeys([INPUTS, *(STATISTICS[need].hook for need in sorted(needs))])  # tokens are counted on inputs
    watches = [_Watch(hook, layers, [need for need in needs if STATISTICS[need].hook is hook]) for hook in hooks]
    paddings = [Padding.of(batch) for batch in source.batches] if paddings is None else paddings
    for index, padding in enumerate(paddings):
        finished = False
        while not finished:
            with suppress(RouteChanged), ExitStack() as stack:
                stack.enter_context(padding.following())
                for watch in watches:
                    stack.enter_context(watch.watching(padding))
                source.run(stage_index, index)
                finished = True
        on_batch(index + 1)
    return _statistics(layers, watches)


class RowSums:
    """Gathers the statistics that are computed from the same rows."""

    def __init__(self, needs: Iterable[Need]) -> None:
        wanted = {need: STATISTICS[need] for need in sorted(needs)}
        self._computed = {
            need: statistic.follows
            for need, statistic in wanted.items()
            if statistic.follows is not None and statistic.follows[0] in wanted
        }
        self._parts = {need: statistic() for need, statistic in wanted.items() if need not in self._computed}
        self.tokens = 0

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Add ``[groups, tokens, features]`` rows, in any floating dtype.

        Raises:
            StatisticsError: a value that is NaN or infinite.
        """
        if not rows.isfinite().all():
            bad = int((~rows.isfinite()).sum())
            raise StatisticsError(
                f"{bad} of {rows.numel()} input values are NaN or infinite, so nothing can be learned from them.\n"
                "Check that the model computes finite outputs on the calibration batches in its current dtype."
            )
        rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
        self.tokens += rows.shape[1]
        for part in self._parts.values():
            part.add(rows)

    def merge(self, other: RowSums) -> None:
        """Add what another one with the same needs has gathered."""
        self.tokens += other.tokens
        for name, part in self._parts.items():
            part.merge(other._parts[name])

    def copy(self) -> RowSums:
        """Return an independent one that has gathered the same."""
        return copy.deepcopy(self)

    def results(self) -> dict[Need, Tensor]:
        """Return the statistics by name.

        Raises:
            StatisticsError: no row was ever added, or sums overflow.
        """
        if not self.tokens:
            raise StatisticsError("no calibration input ever reached it.")
        found = {name: part.result() for name, part in self._parts.items()}
        return found | {name: compute(found[other]) for name, (other, compute) in self._computed.items()}


class _Watch:
    """Watches the layers of a stage through one hook. Layers that see the same tensors in every batch share sums."""

    def __init__(self, hook: Hook, layers: tuple[Layer, ...], needs: Iterable[Need]) -> None:
        self._hook = hook
        self._layers = layers
        self._needs = frozenset(needs)
        # All layers start with the same sums, and get their own when a batch gives them different tensors.
        self.sums = dict.fromkeys((layer.name for layer in layers), RowSums(self._needs))

    @contextmanager
    def watching(self, padding: Padding) -> Iterator[None]:
        """Add what the hook sees while one batch runs."""
        # By tensor. The tensor is kept alive, so that no other tensor can take its place in memory.
        parts: dict[Hashable, tuple[Tensor, RowSums]] = {}
        seen: dict[str, list[RowSums]] = {layer.name: [] for layer in self._layers}
        judged: list[tuple[str, Kept, int]] = []  # the judgement of each input, kept alive like the tensors

        def report(layer: Layer, x: Tensor, rows: Tensor) -> None:
            # Rows that are a copy, or a tensor that does not count its changes, cannot be recognised in another layer.
            view = not x.is_inference() and rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            with naming(layer.title):
                kept = padding.judged(layer.name, x, layer.modules[0])
            judged.append((layer.name, kept, rows.shape[1]))
            real = None if kept.real is None else id(kept)
            key = (rows.data_ptr(), rows.shape, rows.stride(), x.shape, x._version, real) if view else object()
            if key not in parts:
                part = RowSums(self._needs)
                with naming(layer.title):
                    part.add(left_out(rows, kept))
                parts[key] = (x if view else rows.new_empty(0), part)
            seen[layer.name].append(parts[key][1])

        with ExitStack() as stack:
            for layer in self._layers:
                for module in layer.modules:
                    stack.callback(self._hook.attach(layer, module, partial(report, layer)).remove)
            yield
        self._absorb(seen)
        if self._hook is INPUTS:
            for name, kept, total in judged:
                padding.count(name, kept, total)

    def _absorb(self, seen: dict[str, list[RowSums]]) -> None:
        """Add what each layer saw in one batch, once for all layers that have seen the same tensors so far."""
        alike: dict[tuple[int, ...], list[str]] = {}
        for name, sums in self.sums.items():
            alike.setdefault((id(sums), *map(id, seen[name])), []).append(name)
        users = Counter(key[0] for key in alike)
        for key, names in alike.items():
            sums = self.sums[names[0]]
            if users[key[0]] > 1:
                sums = sums.copy()
            for part in seen[names[0]]:
                sums.merge(part)
            self.sums.update(dict.fromkeys(names, sums))


def _statistics(layers: Iterable[Layer], watches: list[_Watch]) -> dict[str, LayerStatistics]:
    """What was gathered, by layer name; one object for all layers that share everything.

    Raises:
        StatisticsError: naming a layer that no input reached.
    """
    made: dict[tuple[int, ...], LayerStatistics] = {}
    found = {}
    for layer in layers:
        sums = [watch.sums[layer.name] for watch in watches]
        key = tuple(map(id, sums))
        if key not in made:
            advice = f"Exclude it with exclude=[{layer.name!r}], or calibrate on batches that use it."
            with naming(layer.title, advice):
                values = {name: value for part in sums for name, value in part.results().items()}
            made[key] = LayerStatistics(tokens=sums[0].tokens, **values)
        found[layer.name] = made[key]
    return found
