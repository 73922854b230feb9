"""Give batch norms the statistics of the inputs that they get now."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from secateur._checks import flag
from secateur._errors import StatisticsError, naming
from secateur._types import Progress, dtype_name
from secateur.calibration import Forward, Padding, PaddingSource, call_model, parameter_names, quiet

NO_STATISTICS = "it keeps no running statistics"
NOT_REACHED = "no batch reached it"


@dataclass(frozen=True)
class Reestimated:
    """What :func:`reestimate_` did.

    Args:
        norms: names of the batch norms that have new statistics, in the order in which they run.
        left: the others, by name: why each stayed as it was.
    """

    norms: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)


def reestimate_(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward = call_model,
    *,
    padding: PaddingSource | None = None,
    exact: bool = True,
    progress: Progress = lambda description, done, total: None,
) -> Reestimated:
    r"""Compute the running mean and variance of every batch norm of a model again, from the inputs that it gets now.

    A pruned network gives its norms other inputs than those whose statistics they keep. This mends it without training:
    the statistics become those of all rows of all batches, pooled. Over batches b with :math:`n_b` rows,

    .. math:: \mu = \sum_b \frac{n_b}{n} \mu_b, \qquad
              \sigma^2 = \frac{1}{n - 1} \sum_b n_b \left(\sigma_b^2 + (\mu_b - \mu)^2\right),

    in float64, and not a mean of the variances of batches. How rows are cut into batches does not matter, nor does the
    momentum of a norm.

    The inputs of a norm depend on the norms before it. ``exact`` runs the batches once for each norm, up to it, with
    the new statistics of all norms before: the result is what the model will compute. That costs about half as many
    passes over the batches as there are norms. ``exact=False`` runs the batches once, and a norm passes on each batch
    normalised by the statistics of that batch, as in training. Batches should then be as large as in training.

    Nothing else about the model changes: not its modes, and not ``num_batches_tracked``. Dropout is off meanwhile.
    After an error or an interrupt, all statistics are as before. Processes exchange nothing: give all the same batches.

    Args:
        model: any. Its batch norms are found by class: ``BatchNorm1d``, ``2d``, ``3d``, ``SyncBatchNorm``, and classes
            derived from them. Norms that keep no statistics, and such that no batch reaches, are left as they are.
        batches: inputs on the model's device, gone through several times.
        forward: how to call the model on a batch.
        padding: which tokens are real, as for :func:`secateur.prune_`. Padding does not count.
        exact: see above.
        progress: called with a description, and how many of how many forward passes are done.

    Raises:
        StatisticsError: naming the norm, whose inputs are not finite, or are one row only, or whose statistics are
            beyond the range of its dtype.

    Example:
        >>> import torch
        >>> from secateur.recovery import reestimate_
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> reestimate_(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[8.0]])]).norms
        ('0',)
        >>> model[0].running_mean.tolist(), model[0].running_var.tolist()
        ([4.0], [13.0])

    Reference:
        Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, arXiv:2105.07576.
    """
    flag("exact", exact)
    found = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    norms = {name: norm for name, norm in found.items() if norm.running_mean is not None}
    left = {name: NO_STATISTICS for name in found if name not in norms}
    if not norms:
        return Reestimated((), left)
    names = parameter_names(model) if forward is call_model else ()
    passes = _Passes(model, batches, forward, [Padding.of(batch, names, padding) for batch in batches])
    before = {name: [statistic.clone() for statistic in _statistics(norm)] for name, norm in norms.items()}
    total = float(len(batches) * (len(norms) if exact else 1))

    def tell(number: int, done: int) -> None:
        progress("estimating batch norms", number * len(batches) + done, total)

    try:
        with quiet(model):
            pooled = passes.run(norms, partial(tell, 0), by_batch=not exact)
            order = list(pooled)
            for number, name in enumerate(order):
                if exact and number:
                    repeated = pooled[name].calls > len(batches)
                    pooled |= passes.run({name: norms[name]}, partial(tell, number), stops=not repeated)
                with naming(name or "(the model itself)"):
                    pooled[name].write_(norms[name])
    except BaseException:
        for name, statistics in before.items():
            for statistic, old in zip(_statistics(norms[name]), statistics, strict=True):
                statistic.copy_(old)
        raise
    return Reestimated(tuple(order), left | {name: NOT_REACHED for name in norms if name not in order})


def _statistics(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


class _Pooled:
    """Mean and variance of the rows that were added, in float64."""

    def __init__(self) -> None:
        self.calls = 0
        self._rows = 0
        self._mean = self._squares = torch.zeros(0)  # [channels]; squares of the distances from the mean

    def add(self, rows: Tensor) -> None:
        """Add ``[rows, channels]``.

        Raises:
            StatisticsError: a value that is NaN or infinite.
        """
        self.calls += 1
        count = len(rows)
        if not count:
            return
        if not rows.isfinite().all():
            bad = int((~rows.isfinite()).sum())
            raise StatisticsError(
                f"{bad} of {rows.numel()} input values are NaN or infinite, so nothing can be learned from them.\n"
                "Check that the model computes finite outputs on the batches in its current dtype."
            )
        variance, mean = torch.var_mean(rows.double(), dim=0, correction=0)
        if not self._rows:
            self._rows, self._mean, self._squares = count, mean, variance * count
            return
        apart = mean - self._mean
        total = self._rows + count
        self._squares = self._squares + variance * count + apart.square() * (self._rows * count / total)
        self._mean = self._mean + apart * (count / total)
        self._rows = total

    def write_(self, norm: BatchNorm) -> None:
        """Make the mean and the unbiased variance those of a norm.

        Raises:
            StatisticsError: fewer than two rows, or values that the norm's dtype cannot hold.
        """
        if self._rows < 2:
            raise StatisticsError(
                f"the batches give it {self._rows} row, and a variance needs two.\nGive more samples, or larger ones."
            )
        for statistic, value in zip(_statistics(norm), (self._mean, self._squares / (self._rows - 1)), strict=True):
            if not value.to(statistic.dtype).isfinite().all():
                raise StatisticsError(
                    f"its statistics reach {float(value.abs().max()):.3g}, beyond the range of "
                    f"{dtype_name(statistic.dtype)}.\nKeep the norm in float32: norm.float()."
                )
            statistic.copy_(value)


class _Reached(BaseException):
    """Ends a forward pass at a norm. Not an Exception, so that no model's own handler catches it."""


@dataclass(frozen=True)
class _Passes:
    """Forward passes of a model on all batches, in which norms are watched."""

    model: nn.Module
    batches: Sequence[Any]
    forward: Forward
    paddings: Sequence[Padding]

    def run(
        self,
        norms: Mapping[str, BatchNorm],
        tell: Callable[[int], None],
        *,
        by_batch: bool = False,
        stops: bool = False,
    ) -> dict[str, _Pooled]:
        """Return what each norm got, by name, in the order in which they first run; one that does not run is left out.

        Args:
            norms: to watch, by name.
            tell: called after each batch with how many are done.
            by_batch: each norm normalises by the statistics of each batch alone, and its own are lost.
            stops: end each pass at the first of the norms.
        """
        found: dict[str, _Pooled] = {}

        def watch(name: str, padding: Padding, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert isinstance(norm, BatchNorm)
            with naming(name or "(the model itself)"):
                rows = _real_rows(name, args[0] if args else next(iter(kwargs.values())), padding)
                found.setdefault(name, _Pooled()).add(rows)
                if by_batch and len(rows):
                    variance, mean = torch.var_mean(rows.double(), dim=0, correction=0)
                    for statistic, value in zip(_statistics(norm), (mean, variance), strict=True):
                        statistic.copy_(value)
            if stops:
                raise _Reached

        for done, (batch, padding) in enumerate(zip(self.batches, self.paddings, strict=True), 1):
            with suppress(_Reached), ExitStack() as stack:
                for name, norm in norms.items():
                    hook = norm.register_forward_pre_hook(partial(watch, name, padding), with_kwargs=True)
                    stack.callback(hook.remove)
                stack.enter_context(padding.following())
                self.forward(self.model, copy.deepcopy(batch))
            tell(done)
        return found


def _real_rows(name: str, x: Tensor, padding: Padding) -> Tensor:
    """The rows ``[rows, channels]`` of an input ``[batch, channels, ...]`` that are no padding."""
    x = x.detach().movedim(1, -1)
    kept = padding.kept(name, x)
    return x.flatten(0, -2) if kept is None else x[kept.to(x.device)]
