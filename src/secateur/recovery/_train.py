"""The loop: steps of an optimizer under a budget, the best state kept, and a state on disk to go on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur._errors import FormatError, RecipeError
from secateur.recovery._budget import Budget, Clock, Steps, WorkingTime, rate_at
from secateur.recovery._checkpoint import Checkpoint, copy_into_, optimizer_state, restore_optimizer_
from secateur.recovery._processes import agreed, mean_gradients_, total, world
from secateur.recovery._settings import Settings
from secateur.recovery._trained import Trained
from secateur.recovery._zeros import to_the_end
from secateur.reports import CurvePoint

_POINTS = 16  # of the curve, beside the start
_PATIENCE = 0.4  # of the budget, after which a run that has gained nothing more is stopped
_FIRST_RATE = 0.05  # of the highest learning rate
_FEWEST = 8  # steps before that: fewer do not show whether there is more to gain
_RECENT = 3  # points of a curve that falls: the lowest of them is below the lowest of as many before
_FEWEST_POINTS = 8  # of a budget in steps
_MOST_MEASURING = 0.1  # of the working time

USED, NOTHING_GAINED, NOT_FINITE, INTERRUPTED = (
    "the budget is used",
    "nothing was gained",
    "the loss is not finite",
    "interrupted",
)


class Problem(Protocol):
    """What is trained, and on what."""

    @property
    def trained(self) -> Trained:
        """What moves."""

    @property
    def train(self) -> Sequence[int]:
        """Numbers of the training batches."""

    @property
    def measure(self) -> Sequence[int]:
        """Numbers of the held-out batches."""

    def loss(self, index: int) -> Tensor:
        """Return the loss of the model on a training batch, inside ``trained.using()``."""

    def held_out(self) -> float:
        """Return the mean loss on the held-out batches, inside ``trained.using()``."""


@dataclass
class Progress:
    """Where a training is: all that a checkpoint says of it beside tensors."""

    step: int = 0
    best: float = math.inf
    best_step: int = 0
    best_used: float = 0.0
    stopped: str = ""
    begin: float = 0.0
    curve: list[CurvePoint] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        # Once it has begun all numbers are finite: a point that is not is no point of the curve.
        return {**vars(self), "curve": [vars(point) for point in self.curve]}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Progress:
        """Return what :meth:`to_dict` gave."""
        return cls(**{**table, "curve": [CurvePoint(**point) for point in table["curve"]]})


@dataclass(frozen=True)
class Loop:
    """How problems are trained.

    Args:
        settings: of the run.
        clock: of its working time.
        device: of the model.
        tell: called with a description and the part of the budget that is used.
    """

    settings: Settings
    clock: Clock
    device: torch.device
    tell: Callable[[str, float], None]

    def run(
        self,
        problem: Problem,
        budget: Callable[[float, float], Budget],
        checkpoint: Checkpoint,
        *,
        part: str = "",
        more: Mapping[str, Any] | None = None,
    ) -> Progress:
        """Train one problem. What it trains is left in the best state that was seen.

        Args:
            problem: to train.
            budget: made when training begins, from the working time then and the seconds of a held-out pass.
            checkpoint: to go on from, and to write to.
            part: name of what is trained, for the curve.
            more: what the checkpoint shall say beside the state.

        Returns:
            What happened; without a curve, if it was interrupted before the first held-out loss.
        """
        leaves = problem.trained.leaves()
        optimizer, rates = self._optimizer(leaves)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.precision == torch.float16)
        best = [leaf.detach().clone() for leaf in leaves]
        checkpoint.identify({"optimizer settings": _described_optimizer(optimizer, rates)})
        progress = Progress()
        losses: list[float] = []
        try:
            self._resume_(progress, checkpoint, leaves, best, optimizer, scaler)
            if not progress.curve:
                self._begin_(progress, problem, part)
            measuring = progress.curve[0].seconds - progress.begin
            limit = budget(progress.curve[0].seconds, measuring)
            points = self._points(measuring, limit, len(problem.measure))
            was_stopped = bool(progress.stopped)
            while not progress.stopped:
                used = agreed(limit.used(progress.step), self.device)
                if used >= 1:
                    progress.stopped = USED
                    break
                # Not zero in the first step, which may be the only one. It is small: AdamW knows no scale yet.
                rate = rate_at(used) or _FIRST_RATE
                for group, highest in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = highest * rate
                loss = self._step(problem, leaves, optimizer, scaler, progress.step)
                progress.step += 1
                if not math.isfinite(loss):
                    progress.stopped = NOT_FINITE
                    break
                losses.append(loss)
                after = agreed(limit.used(progress.step), self.device)
                self.tell(self._described(progress, loss, part), min(after, 1.0))
                if after >= 1 or math.floor(after * points) > math.floor(used * points):
                    self._measure(problem, progress, leaves, best, losses, after, rates[0] * rate, part)
                    losses = []
                    if not progress.stopped:
                        self._save(checkpoint, progress, leaves, best, optimizer, scaler, more or {})
            if not was_stopped:
                self._save(checkpoint, progress, leaves, best, optimizer, scaler, more or {}, always=True)
        except KeyboardInterrupt as interrupt:
            progress.stopped = INTERRUPTED
            if type(interrupt) is not KeyboardInterrupt:
                raise
        finally:
            optimizer.zero_grad(set_to_none=True)
            to_the_end(lambda: copy_into_(leaves, best))
        return progress

    def _begin_(self, progress: Progress, problem: Problem, part: str) -> None:
        """Measure the held-out loss before the first step."""
        progress.begin = self.clock.seconds
        with problem.trained.using(stored=True):
            loss = problem.held_out()
        check_finite(loss, part)
        progress.best = loss
        progress.curve.append(CurvePoint(0, self.clock.seconds, None, loss, 0.0, part))

    def _described(self, progress: Progress, loss: float, part: str) -> str:
        """What the user sees of a step."""
        passed = self.clock.seconds - progress.curve[0].seconds
        rate = f"{progress.step / passed:.3g} steps/s, " if passed > 0 else ""
        held_out = f"held out {progress.curve[-1].held_out:.4g} (start {progress.curve[0].held_out:.4g})"
        return f"{f'{part}: ' if part else ''}step {progress.step}, {rate}loss {loss:.4g}, {held_out}"

    def _optimizer(self, leaves: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, list[float]]:
        settings = self.settings
        if settings.optimizer is None:
            fused = all(leaf.device.type in ("cpu", "cuda") for leaf in leaves)
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                leaves, lr=settings.rate, weight_decay=settings.weight_decay, fused=fused
            )
        else:
            optimizer = settings.optimizer(leaves)
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__}")
        return optimizer, [float(group["lr"]) for group in optimizer.param_groups]

    def _points(self, measuring: float, limit: Budget, measured: int) -> int:
        """How often the held-out loss is measured: often enough for a curve, but little beside the work."""
        if isinstance(limit, WorkingTime):
            length = limit.end - limit.begin
            most = _MOST_MEASURING * length / measuring if length > 0 and measuring > 0 else _POINTS
            return int(agreed(max(2, min(_POINTS, most)), self.device))
        # By numbers alone, so that it is the same in each run. A step takes about three forward passes.
        assert isinstance(limit, Steps)
        batches = limit.total * self.settings.accumulate * world()[1]
        return int(max(_FEWEST_POINTS, min(_POINTS, 3 * _MOST_MEASURING * batches / measured)))

    def _step(
        self,
        problem: Problem,
        leaves: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        step: int,
    ) -> float:
        """Make one step of the optimizer and return the loss before it."""
        settings = self.settings
        optimizer.zero_grad(set_to_none=True)
        mean = 0.0
        for index in batches_of(step, settings.accumulate, len(problem.train), settings.seed):
            with torch.enable_grad(), problem.trained.using():
                loss = problem.loss(index) / settings.accumulate
                scaler.scale(loss).backward()
            mean += float(loss.detach())
        _, size = world()
        if size > 1:
            mean = total([mean], self.device)[0] / size
        if not math.isfinite(mean):
            return mean
        mean_gradients_(leaves)
        scaler.unscale_(optimizer)
        problem.trained.mask_gradients_()
        norm = nn.utils.clip_grad_norm_([leaf for leaf in leaves if leaf.grad is not None], settings.clip)
        if not bool(norm.isfinite()) and not scaler.is_enabled():
            return math.nan
        scaler.step(optimizer)
        scaler.update()
        problem.trained.hold_zeros_()
        return mean

    def _measure(
        self,
        problem: Problem,
        progress: Progress,
        leaves: list[nn.Parameter],
        best: list[Tensor],
        losses: list[float],
        used: float,
        rate: float,
        part: str,
    ) -> None:
        """Add a point to the curve, and keep the state if it is the best."""
        with problem.trained.using(stored=True):
            held_out = problem.held_out()
        if not math.isfinite(held_out):
            progress.stopped = NOT_FINITE
            return
        mean = sum(losses) / len(losses) if losses else None
        progress.curve.append(CurvePoint(progress.step, self.clock.seconds, mean, held_out, rate, part))
        if held_out < progress.best:
            progress.best, progress.best_step, progress.best_used = held_out, progress.step, used
            to_the_end(lambda: copy_into_(best, leaves))
        elif (
            used < 1
            and used - progress.best_used > _PATIENCE
            and progress.step - progress.best_step >= _FEWEST
            and not _falls(progress.curve)
        ):
            progress.stopped = NOTHING_GAINED

    def _save(
        self,
        checkpoint: Checkpoint,
        progress: Progress,
        leaves: Sequence[Tensor],
        best: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        more: Mapping[str, Any],
        always: bool = False,
    ) -> None:
        if not checkpoint.is_due(always):
            return
        tensors, numbers = optimizer_state(optimizer)
        state = {f"leaf.{number}": leaf for number, leaf in enumerate(leaves)}
        state |= {f"best.{number}": kept for number, kept in enumerate(best)}
        state |= {f"optimizer.{name}": tensor for name, tensor in tensors.items()}
        table = {
            **more,
            "progress": progress.to_dict(),
            "optimizer": numbers,
            "scaler": scaler.state_dict(),
            "seconds": self.clock.seconds,
        }
        checkpoint.save(state, table)

    def _resume_(
        self,
        progress: Progress,
        checkpoint: Checkpoint,
        leaves: list[nn.Parameter],
        best: list[Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Put everything into the state in which an earlier run left it; do nothing without one."""
        found = checkpoint.load()
        if found is None:
            return
        tensors, table = found
        start = "optimizer."
        own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        try:
            states = [tensors[f"leaf.{number}"] for number in range(len(leaves))]
            bests = [tensors[f"best.{number}"].to(leaf) for number, leaf in enumerate(leaves)]
            for leaf, state, kept in zip(leaves, states, bests, strict=True):
                if not leaf.shape == state.shape == kept.shape:
                    raise ValueError(f"a tensor of shape {tuple(state.shape)} for one of shape {tuple(leaf.shape)}")
            earlier = Progress.from_dict(table["progress"])
            restore_optimizer_(optimizer, own, table["optimizer"])
            if scaler.is_enabled():
                scaler.load_state_dict(table["scaler"])
            self.clock.go_on_from(float(table["seconds"]))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FormatError(
                f"{checkpoint.path} is damaged: {type(error).__name__}: {error}.\nRemove it to begin anew."
            ) from None
        best[:] = bests
        copy_into_(leaves, states)
        vars(progress).update(vars(earlier))


def check_finite(loss: float, part: str = "") -> None:
    """Raise unless the held-out loss before the first step is finite.

    Raises:
        RecipeError: it is not.
    """
    if not math.isfinite(loss):
        raise RecipeError(
            f"the held-out loss is {loss} before the first step{f' of {part}' if part else ''}. The model, its teacher "
            "or a batch has numbers that are not finite; mend these first."
        )


def _described_optimizer(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> str:
    """What two optimizers have in common that go on from each other's state."""
    groups = [
        {name: repr(value) for name, value in sorted(group.items()) if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__} {list(rates)} {groups}"


def batches_of(step: int, accumulate: int, count: int, seed: int) -> Iterator[int]:
    """Yield the numbers of the batches that this process runs in a step.

    All batches are gone through in a random order, again and again, each time in another one. The order follows from
    the seed alone, so that a run that goes on needs to know nothing but its step.
    """
    rank, size = world()
    for number in range(accumulate):
        position = (step * accumulate + number) * size + rank
        epoch, place = divmod(position, count)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield int(torch.randperm(count, generator=generator)[place])


def _falls(curve: Sequence[CurvePoint]) -> bool:
    """Whether the held-out loss still falls: high learning rates may first raise it far above that of the start."""
    count = min(_RECENT, (len(curve) - 1) // 2)
    recent, before = curve[len(curve) - count :], curve[len(curve) - 2 * count : len(curve) - count]
    return count > 0 and min(point.held_out for point in recent) < min(point.held_out for point in before)


@contextmanager
def computing(autocast: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Compute a forward pass in half precision where that is asked, and gradients are.

    What is only measured is computed in the model's own precision, in which it will be used.
    """
    if autocast is None or not torch.is_grad_enabled():
        yield
        return
    with torch.autocast(device.type, dtype=autocast):
        yield
