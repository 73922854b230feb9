"""Gather exactly the statistics that were asked for while a stage runs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn

from secateur._errors import StatisticsError, naming
from secateur.calibration._accumulators import Accumulator, Hook
from secateur.calibration._inputs import INPUTS, Gram, InputMean, InputNorm
from secateur.calibration._observe import key_of
from secateur.calibration._padding import Kept, Padding, left_out
from secateur.calibration._reads import FunctionWatch, Product
from secateur.calibration._replay import RouteChanged, StageSource
from secateur.calibration._statistics import LayerStatistics, Need
from secateur.layers import Layer, Observed

FEWEST_TOKENS = 64  # below, a weight of a stack is calibrated on the inputs of the whole stack
_CACHED = 2**18  # values
STATISTICS: dict[Need, type[Accumulator]] = {statistic.name: statistic for statistic in (InputNorm, InputMean, Gram)}


def gather(
    source: StageSource,
    stage_index: int,
    needs: Iterable[Need],
    on_batch: Callable[[int], None] = lambda done: None,
    observed: Observed | None = None,
    strict: bool = True,
    paddings: Sequence[Padding] | None = None,
    numbers: Sequence[int] | None = None,
    pooled: bool = True,
) -> dict[str, LayerStatistics]:
    """Run a stage on batches and return the statistics of each of its layers, by layer name.

    A weight that is one of a stack, such as an expert, and that fewer than 64 inputs reach, gets the statistics of all
    inputs of its stack.

    Args:
        source: whose stages are gathered in order. Between two stages the caller may change the weights of the first.
        stage_index: which of its stages.
        needs: the statistics to gather.
        on_batch: called after each batch with the number of batches done.
        observed: what forward passes showed, where weights may be multiplied without a call of their layer.
        strict: refuse a layer that too few inputs reach. If False, one that none reached is left out of the result.
        paddings: what is padding in each batch, the same objects for all stages. None looks for it in the batches.
        numbers: of the batches to run; None for all. A batch that later stages run must be run in each before them.
        pooled: give a weight of a stack that few inputs reach those of its stack.

    Raises:
        StatisticsError: naming the layer whose inputs are missing, not finite, or not alignable with the mask; or a
            statistic that only a loss gives.
    """
    layers = source.stages[stage_index].layers
    needs = frozenset(needs)
    if others := sorted(needs - STATISTICS.keys()):
        raise StatisticsError(f"{', '.join(others)} cannot be gathered from inputs alone: it needs a loss.")
    hooks = dict.fromkeys([INPUTS, *(STATISTICS[need].hook for need in sorted(needs))])  # tokens are counted on inputs
    read = frozenset[int]() if observed is None else frozenset(observed.read)
    watches = [_Watch(hook, layers, [need for need in needs if STATISTICS[need].hook is hook], read) for hook in hooks]
    paddings = [Padding.of(batch) for batch in source.batches] if paddings is None else paddings
    for done, index in enumerate(range(len(paddings)) if numbers is None else numbers, 1):
        padding = paddings[index]
        finished = False
        while not finished:
            with suppress(RouteChanged), ExitStack() as stack:
                stack.enter_context(padding.following())
                for watch in watches:
                    stack.enter_context(watch.watching(padding))
                source.run(stage_index, index)
                finished = True
        on_batch(done)
    return _statistics(layers, watches, strict, pooled)


def _tokens_at_once(rows: Tensor) -> int:
    """How many tokens of some rows fit into the cache of a CPU, so that all sums of them take one read of memory."""
    return max(1, _CACHED // max(1, rows[:, :1].numel())) if rows.device.type == "cpu" else max(1, rows.shape[1])


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
        rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
        new = {name: type(part)() for name, part in self._parts.items() if part.splits}
        for some in rows.split(_tokens_at_once(rows), dim=1):
            # A sum of large values may be infinite, but no sum with NaN or an infinite value is finite.
            if not some.sum().isfinite() and not some.isfinite().all():
                bad = int((~rows.isfinite()).sum())
                raise StatisticsError(
                    f"{bad} of {rows.numel()} input values are NaN or infinite, so nothing can be learned from them.\n"
                    "Check that the model computes finite outputs on the calibration batches in its current dtype."
                )
            for part in new.values():
                part.add(some)
        self.tokens += rows.shape[1]
        for name, part in self._parts.items():
            if part.splits:
                part.merge(new[name])
            else:
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

    def __init__(
        self, hook: Hook, layers: tuple[Layer, ...], needs: Iterable[Need], read: frozenset[int] = frozenset()
    ) -> None:
        self._hook = hook
        self._layers = layers
        self._read = {key_of(layer.matrix()): layer for layer in layers if id(layer.parameter) in read}
        self._memory = {layer.parameter.untyped_storage().data_ptr() for layer in self._read.values()}
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

        def report(layer: Layer, x: Tensor, rows: Tensor, known: Kept | None = None) -> None:
            # Rows that are a copy, or a tensor that does not count its changes, cannot be recognised in another layer.
            view = not x.is_inference() and rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            with naming(layer.title):
                kept = known or padding.judged(layer.name, x, layer.modules[0])
            judged.append((layer.name, kept, rows.shape[1]))
            real = None if kept.real is None else id(kept)
            key = (rows.data_ptr(), rows.shape, rows.stride(), x.shape, x._version, real) if view else object()
            if key not in parts:
                part = RowSums(self._needs)
                with naming(layer.title):
                    part.add(left_out(rows, kept))
                parts[key] = (x if view else rows.new_empty(0), part)
            seen[layer.name].append(parts[key][1])

        running: Counter[int] = Counter()  # by the id of a parameter, the calls of its layer that have not returned

        def multiplied(product: Product) -> None:
            for layer, index in self._readers_of(product):
                if running[id(layer.parameter)]:
                    continue
                with naming(layer.title):
                    kept = padding.judged(layer.name, product.x)
                x, real = product.inputs_of(index, kept.real)
                if x.numel():
                    report(layer, x, x.reshape(1, -1, x.shape[-1]), kept if real is kept.real else Kept(real, kept.why))

        with ExitStack() as stack:
            for layer in self._layers:
                if not layer.runs_by_call:
                    continue
                for module in layer.modules:
                    stack.callback(self._hook.attach(layer, module, partial(report, layer)).remove)
                    if self._read:
                        stack.enter_context(_counted(module, running, id(layer.parameter)))
            if self._read:
                stack.enter_context(FunctionWatch(multiplied, self._is_weight))
            yield
        self._absorb(seen)
        if self._hook is INPUTS:
            for name, kept, total in judged:
                padding.count(name, kept, total)

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() in self._memory

    def _readers_of(self, product: Product) -> Iterator[tuple[Layer, int | None]]:
        """The layers whose weights a function multiplies, each with its index among them; None for an only one."""
        if product.matrix.ndim == 2:
            if (layer := self._read.get(key_of(product.matrix))) is not None:
                yield layer, None
            return
        for index, matrix in enumerate(product.matrix):
            if (layer := self._read.get(key_of(matrix))) is not None:
                yield layer, index

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


@contextmanager
def _counted(module: nn.Module, running: Counter[int], key: int) -> Iterator[None]:
    """Count the calls of a module that have not returned yet."""

    def begins(module: nn.Module, args: object) -> None:
        running[key] += 1

    def ends(module: nn.Module, args: object, output: object) -> None:
        running[key] -= 1

    handles = module.register_forward_pre_hook(begins), module.register_forward_hook(ends, always_call=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _statistics(
    layers: Iterable[Layer], watches: list[_Watch], strict: bool, pools: bool
) -> dict[str, LayerStatistics]:
    """What was gathered, by layer name; one object for all layers that share everything.

    Raises:
        StatisticsError: naming a layer that no input reached, if that is refused.
    """
    made: dict[tuple[int, ...], LayerStatistics] = {}
    found = {}
    stacks: dict[int, list[Layer]] = {}
    for layer in layers:
        if pools and isinstance(layer.kind.part, int):
            stacks.setdefault(id(layer.parameter), []).append(layer)
    pooled = {key: [_pooled(watch, members) for watch in watches] for key, members in stacks.items()}
    for layer in layers:
        own = [watch.sums[layer.name] for watch in watches]
        sums = own
        if pools and isinstance(layer.kind.part, int) and own[0].tokens < FEWEST_TOKENS:
            sums = pooled[id(layer.parameter)]
            if strict and sums[0].tokens > own[0].tokens:
                raise StatisticsError(
                    f"{layer.title}: only {own[0].tokens} calibration inputs reached it, and {FEWEST_TOKENS} are "
                    "needed.\nCalibrate on more, exclude it, or let it use those of its whole stack (strict=False)."
                )
        if not strict and not sums[0].tokens:
            continue
        key = (own[0].tokens if sums is not own else -1, *map(id, sums))
        if key not in made:
            advice = f"Exclude it with exclude=[{layer.name!r}], or calibrate on batches that use it."
            with naming(layer.title, advice):
                values = {name: value for part in sums for name, value in part.results().items()}
            made[key] = LayerStatistics(
                tokens=sums[0].tokens, own_tokens=None if sums is own else own[0].tokens, **values
            )
        found[layer.name] = made[key]
    return found


def _pooled(watch: _Watch, layers: Iterable[Layer]) -> RowSums:
    """The sums over all weights of a stack."""
    first, *others = (watch.sums[layer.name] for layer in layers)
    total = first.copy()
    for sums in others:
        if sums.tokens:
            total.merge(sums)
    return total
