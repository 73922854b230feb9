"""Sparse training: one object beside the optimizer, one ``step()`` after its."""

from __future__ import annotations

import glob
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from secateur._errors import RecipeError, SparsityError
from secateur._types import Mask
from secateur.layers import FLATTENED, Layer, reshard, select_layers, sharded_modules
from secateur.nn import SparseConv2d, SparseLinear, densify_, replaceable_layers, sparse_layers, sparsify_
from secateur.patterns import Column, SparsityPattern, Unstructured, with_channel_width
from secateur.reports import LayerReport, Report, SkippedLayer, versions
from secateur.schedules import Cubic, Linear, OneShot, Schedule
from secateur.training._methods import Method, Moment, parse_method
from secateur.training._targets import LearnedWeight, MaskedWeight, check_optimizer, report_layer

_STATE_VERSION = 1


class SparseTraining:
    """Make a model sparse while it trains, whatever the loop: call :meth:`step` after ``optimizer.step()``.

    The layers to make sparse are those that ``prune_`` would prune: linear layers and convolutions but for output heads
    and layers tied to an embedding. Methods that learn the mask (``gate``, ``sr-ste``) swap ``nn.Linear`` and
    ``nn.Conv2d`` for sparse layers with the same parameters; the others leave the modules as they are. Everything that
    can be checked is checked before the model changes.

    A step means an optimizer step: with gradient accumulation, call both ``step()`` once for several backward passes,
    and this one before ``zero_grad()``. With a gradient scaler, call it after ``scaler.step(optimizer)``.

    Under ``DistributedDataParallel`` every process computes the same masks. Under ``fully_shard``, call
    :func:`sparsify_` before sharding for methods that learn the mask. With ``torch.compile``, construct this first.

    Args:
        model: any module.
        optimizer: that trains it; it must hold the weights already.
        method: ``"gate"``, ``"magnitude"``, ``"sr-ste"``, ``"set"``, ``"rigl"``, ``"static"``, or a :class:`Method`
            with settings of your own.
        pattern: a :class:`SparsityPattern` or its text; unstructured by default, or that of the model's sparse
            layers.
        sparsity: fraction of the units of each layer to prune; to be left out for N:M, which fixes its own.
        steps: optimizer steps of the whole training; the method shares them out.
        schedule: the sparsity at each step, a :class:`~secateur.schedules.Schedule` or ``"one_shot"``, ``"linear"`` or
            ``"cubic"`` over the method's own ramp. By default the method's own.
        update_every: steps between updates of hard masks, by default a hundredth of the steps. The gate moves every
            step.
        include: glob patterns on qualified layer names. Given, exactly those layers are made sparse.
        exclude: glob patterns that win over ``include``.
        seed: of the random choices of ``set`` and of random initial masks.

    Raises:
        RecipeError: an unknown method, no layer to make sparse, a weight that the optimizer does not hold, or a
            schedule that does not fit the method or the steps.
        PatternError: a pattern that does not fit a layer, which is named, or an impossible sparsity.
        TypeError: an argument of the wrong type.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> training = secateur.SparseTraining(model, optimizer, sparsity=0.9, steps=20)
        >>> x = torch.randn(64, 8)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        ...     training.step()
        >>> report = training.finalize()
        >>> report.num_pruned, int((model[0].weight == 0).sum()), model[0]
        (345, 230, Linear(in_features=8, out_features=32, bias=True))
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        method: Method | str = "gate",
        pattern: SparsityPattern | str | None = None,
        sparsity: float | None = None,
        steps: int,
        schedule: Schedule | str | None = None,
        update_every: int | None = None,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.model, self.optimizer = model, optimizer
        self.method = parse_method(method) if isinstance(method, str) else method
        if not isinstance(self.method, Method):
            raise TypeError(f"method must be a Method or its name, got {type(method).__name__}")
        self.steps = _positive("steps", steps)
        self.update_every = max(1, steps // 100) if update_every is None else _positive("update_every", update_every)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        self.seed = seed
        pattern = SparsityPattern.parse(pattern) if isinstance(pattern, str) else pattern
        if not isinstance(pattern, SparsityPattern | None):
            raise TypeError(f"pattern must be a SparsityPattern or its text, got {type(pattern).__name__}")
        if isinstance(schedule, Schedule) and sparsity is None:
            sparsity = schedule.final

        include, exclude = tuple(include), tuple(exclude)
        self._sharded = sharded_modules(model)
        self._gather_no_more()
        layers, skipped, made = self._find(pattern, sparsity, include, exclude)
        if made:
            pattern, sparsity = _budget(made[0][0])
        elif pattern is None:
            pattern = Unstructured()
        self.pattern, self.sparsity = pattern, pattern.resolve(sparsity)
        self.schedule = self._fit_schedule(schedule)
        fitted = [layer.fit(self.pattern) for layer in layers]
        check_optimizer(optimizer, layers)

        self._skipped = skipped
        self._step = 0
        self._report: Report | None = None
        self._generator = torch.Generator().manual_seed(seed)
        self._weights: dict[str, MaskedWeight | LearnedWeight] = {}
        if not self.method.learns:
            for layer, own in zip(layers, fitted, strict=True):
                self._weights[layer.name] = MaskedWeight(layer, own, self.sparsity)
        else:
            if not made:
                names = [glob.escape(name) for layer in layers for name in (layer.name, *layer.tied_to)]
                sparsify_(model, pattern=self.pattern, sparsity=self.sparsity, include=names)
                by_name = sparse_layers(model)
                made = [tuple(by_name[name] for name in (layer.name, *layer.tied_to)) for layer in layers]
            for layer, modules in zip(layers, made, strict=True):
                self._weights[layer.name] = LearnedWeight(layer, modules)
        self._update()

    def _find(
        self,
        pattern: SparsityPattern | None,
        sparsity: float | None,
        include: tuple[str, ...],
        exclude: tuple[str, ...],
    ) -> tuple[list[Layer], list[SkippedLayer], list[tuple[Any, ...]]]:
        """The layers to make sparse, the rest with reasons, and the sparse layers that the model has already."""
        existing = sparse_layers(self.model)
        if not self.method.learns:
            layers, skipped = select_layers(self.model, include, exclude)
            return layers, skipped, []
        if not existing:
            for layer in select_layers(self.model, include, exclude)[0]:
                if layer.is_sharded:
                    raise RecipeError(
                        f"{layer.title}: its weight is sharded already, and {self.method.name} needs layers of its "
                        "own.\nCall secateur.sparsify_(model, pattern=..., sparsity=...) before fully_shard."
                    )
            layers, skipped = replaceable_layers(self.model, include, exclude)
            self._check_readers(layers)
            return layers, skipped, []
        if "" in existing:
            raise RecipeError(
                "the model is itself a sparse layer, which cannot be made plain in place at the end.\n"
                "Put it into an nn.Sequential."
            )
        if include or exclude:
            raise RecipeError(
                f"the model has {len(existing)} sparse layers already, which are the ones to train; "
                "give include and exclude to sparsify_, not here."
            )
        for name, module in existing.items():
            if module.pattern is None:
                raise RecipeError(
                    f"{name}: it learns its threshold by gradient, without a pattern or budget.\n"
                    "Train it by its own gradients alone, or make it with a pattern and a sparsity."
                )
            own, target = _budget(module)
            if (pattern is not None and pattern not in (own, module.pattern)) or (
                sparsity is not None and sparsity != target
            ):
                raise RecipeError(
                    f"{name}: it was made for {own} at {target:g}, but {pattern or 'its pattern'} at "
                    f"{'its sparsity' if sparsity is None else f'{sparsity:g}'} was asked. Leave both out here."
                )
        budgets = {_budget(module): name for name, module in existing.items()}
        if len(budgets) > 1:
            listed = "\n".join(f"  {name}: {own} at {target:g}" for (own, target), name in budgets.items())
            raise RecipeError(
                f"the model's sparse layers were made for different patterns or sparsities, but a training has one:\n"
                f"{listed}"
            )
        layers, skipped, made = _existing_layers(self.model, existing)
        self._check_readers(layers)
        return layers, skipped, made

    def _check_readers(self, layers: list[Layer]) -> None:
        """Nothing but the sparse layer may read its weight, which holds what the mask hides until it is frozen."""
        readers: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, module in self.model.named_modules():
            for parameter in module.parameters(recurse=False):
                readers.setdefault(id(parameter), []).append((name, module))
        for layer in layers:
            for name, module in readers[id(layer.parameter)]:
                if module not in layer.modules:
                    raise RecipeError(
                        f"{layer.title}: {name!r} ({type(module).__name__}) reads the same weight, but would not see "
                        f"the mask that {self.method.name} learns.\n"
                        "Exclude the layer, or use a method that keeps plain layers, such as 'magnitude'."
                    )

    def _fit_schedule(self, schedule: Schedule | str | None) -> Schedule:
        own = self.method.schedule(self.sparsity, self.steps)
        if schedule is None:
            return own
        if isinstance(schedule, str):
            begin, end = getattr(own, "begin", 0), getattr(own, "end", 0)
            made: dict[str, Schedule] = {
                "one_shot": OneShot(self.sparsity, at=begin),
                "linear": Linear(self.sparsity, begin, end),
                "cubic": Cubic(self.sparsity, begin, end),
            }
            if schedule not in made:
                raise RecipeError(f"unknown schedule {schedule!r}. Valid are {', '.join(made)}, or a Schedule.")
            if isinstance(own, OneShot) and schedule != "one_shot":
                advice = "say where it begins and ends, as in Cubic(sparsity, begin, end)" if self.method.ramps else ""
                raise RecipeError(
                    f"{self.method.name} has no ramp over which a {schedule} schedule could run: "
                    f"{advice or 'it keeps the sparsity constant from the start. Leave it out'}."
                )
            schedule = made[schedule]
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule or its name, got {type(schedule).__name__}")
        if schedule.final != self.sparsity:
            raise RecipeError(f"the schedule ends at sparsity {schedule.final:g}, but {self.sparsity:g} was asked.")
        last = self.method.last_step(self.steps)
        if schedule.end > last:
            raise RecipeError(
                f"the schedule ends at step {schedule.end}, but {self.method.name} must have arrived by step {last} "
                f"of {self.steps}. End it earlier, or train for longer."
            )
        if not self.method.ramps and (schedule.end > 0):
            raise RecipeError(
                f"{self.method.name} keeps the sparsity constant from the start; {schedule} does not. Leave it out."
            )
        return schedule

    @property
    def step_count(self) -> int:
        """Optimizer steps seen so far."""
        return self._step

    @property
    def current_sparsity(self) -> float:
        """What the schedule asks for now."""
        return self.schedule(self._step)

    @property
    def masks(self) -> dict[str, Mask]:
        """The hard masks, ``[out, in]`` bool, True = kept, by layer name: where they are soft, what they would keep."""
        return {name: weight.hard_mask() for name, weight in self._weights.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Move the masks. Call it once after each ``optimizer.step()`` and before ``optimizer.zero_grad()``.

        Raises:
            RecipeError: the training is finalized, or a gradient that the method reads is gone; nothing has changed.
        """
        self._must_go_on()
        self._gather_no_more()
        if self._wants_gradient(self._step + 1):
            for name, weight in self._weights.items():
                if isinstance(weight, MaskedWeight) and weight.layer.parameter.grad is None:
                    raise RecipeError(
                        f"{name}: {self.method.name} needs its gradient after step {self._step + 1}, but there is none."
                        "\nCall step() before zero_grad(), and exclude layers that the loss does not depend on."
                    )
            masked = [weight for weight in self._weights.values() if isinstance(weight, MaskedWeight)]
            if masked and all(not weight.gradient().any() for weight in masked):  # type: ignore[union-attr]
                raise RecipeError(
                    f"{self.method.name} needs gradients after step {self._step + 1}, but those of all layers are zero."
                    "\nCall step() before zero_grad()."
                )
        self._step += 1
        self._update()

    def _must_go_on(self) -> None:
        if self._report is not None:
            raise RecipeError("the training is finalized: its layers are plain again. Make a new SparseTraining.")

    def _gather_no_more(self) -> None:
        """After a forward pass without a backward FSDP leaves weights whole for the next; changes to those get lost."""
        reshard(self._sharded)

    def _wants_gradient(self, step: int) -> bool:
        return self.method.wants_gradient(step, self.steps, self.update_every)

    @torch.no_grad()
    def _update(self) -> None:
        moment = Moment(
            step=self._step,
            steps=self.steps,
            sparsity=self.schedule(self._step),
            update_every=self.update_every,
            arrived=self._step == self.schedule.end,
            generator=self._generator,
            optimizer=self.optimizer,
        )
        dense_gradient = self._wants_gradient(self._step + 1)
        for name, weight in self._weights.items():
            began = time.perf_counter()
            if isinstance(weight, MaskedWeight):
                weight.zero_()
                weight.dense_gradient = dense_gradient
            try:
                self.method.update(weight, moment)
            except SparsityError as error:
                raise type(error)(f"{name}: {error}") from None
            weight.seconds += time.perf_counter() - began

    @torch.no_grad()
    def finalize(self) -> Report:
        """Leave plain modules with real zeros, exactly as many as asked for, and report.

        May be called before the last step: what is missing is pruned at once, by magnitude, and the report notes it.
        A second call returns the same report.

        Raises:
            SparsityError: weights of which no mask can be made, because they are NaN: nothing has changed; or a mask
                that breaks its pattern or count, which would be an error of the method.
        """
        if self._report is not None:
            return self._report
        self._gather_no_more()
        # All masks before the first weight changes: an error leaves the model as it is.
        masks = {}
        for name, weight in self._weights.items():
            try:
                masks[name] = self._final_mask(weight)
            except SparsityError as error:
                raise type(error)(f"{name}: {error}") from None
        layers = [self._settle(weight, *masks[name]) for name, weight in self._weights.items()]
        if self.method.learns and not any(w.layer.is_sharded for w in self._weights.values()):
            densify_(self.model)
        for weight in self._weights.values():
            if isinstance(weight, MaskedWeight):
                weight.release()
        self._report = Report(
            layers=tuple(layers),
            skipped=tuple(SkippedLayer(entry.name, entry.kind, entry.reason) for entry in self._skipped),
            recipe=self._recipe(),
            versions=versions(),
            seconds=sum(weight.seconds for weight in self._weights.values()),
        )
        return self._report

    def _final_mask(self, weight: MaskedWeight | LearnedWeight) -> tuple[Mask, int, list[str]]:
        """The mask to end with, how many weights it prunes, and notes."""
        asked = weight.pattern.num_pruned(weight.matrix().shape, weight.sparsity)
        mask, notes = weight.mask, []
        if mask is None or mask.numel() - int(mask.count_nonzero()) != asked:
            mask = weight.pattern.mask(weight.magnitudes(), weight.sparsity)
            notes.append(f"finalized at step {self._step} of {self.steps}, before the mask was final")
        return mask, asked, notes

    def _settle(self, weight: MaskedWeight | LearnedWeight, mask: Mask, asked: int, notes: list[str]) -> LayerReport:
        """Put a weight at its final mask and describe it."""
        if isinstance(weight, MaskedWeight):
            weight.set_mask(mask, self.optimizer)
        else:
            weight.set_mask(mask)
            if weight.layer.is_sharded:
                notes.append("sharded: stays a sparse layer; load its full state dict into a plain model")
        return report_layer(weight, mask, pattern=weight.pattern, asked=weight.sparsity, count=asked, notes=notes)

    def _recipe(self) -> dict[str, Any]:
        """Everything that decides how masks move, as plain values."""
        schedule = self.schedule
        return {
            "method": self.method.to_dict(),
            "pattern": str(self.pattern),
            "sparsity": self.sparsity,
            "steps": self.steps,
            "schedule": {"name": type(schedule).__name__} | dict(vars(schedule)),
            "update_every": self.update_every,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on beside the states of the model and the optimizer: plain values, tensors.

        An interrupted run that loads all three goes on exactly as the uninterrupted one.

        Raises:
            RecipeError: the training is finalized.
        """
        self._must_go_on()
        return {
            "version": _STATE_VERSION,
            "recipe": self._recipe(),
            "step": self._step,
            "generator": self._generator.get_state(),
            "weights": {name: weight.state_dict() for name, weight in self._weights.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, on a training made with the same settings.

        Make the training first, as at the start, since that prunes; then load its state, the model's and the
        optimizer's, in any order.

        Raises:
            RecipeError: it is of another recipe, other layers or another version, or this training is finalized;
                nothing has changed.
        """
        self._must_go_on()
        if not isinstance(state, Mapping) or state.get("version") != _STATE_VERSION:
            raise RecipeError("this is not the state of a SparseTraining, or one of another version of secateur.")
        ours, theirs = self._recipe(), state["recipe"]
        different = [key for key in ours if ours[key] != theirs.get(key)]
        if different:
            listed = "\n".join(f"  {key}: saved {theirs.get(key)!r}, here {ours[key]!r}" for key in different)
            raise RecipeError(f"the state was saved by a training with another recipe:\n{listed}")
        if list(state["weights"]) != list(self._weights):
            raise RecipeError(
                f"the state holds the layers {', '.join(state['weights'])}, but this model has "
                f"{', '.join(self._weights)}."
            )
        for name, weight in self._weights.items():
            saved, shape = tuple(state["weights"][name]["shape"]), tuple(weight.layer.parameter.shape)
            if saved != shape:
                raise RecipeError(f"{name}: the state is of a weight of shape {saved}, but this one has {shape}.")
        for name, weight in self._weights.items():
            weight.load_state_dict(state["weights"][name])
            if isinstance(weight, MaskedWeight):
                weight.dense_gradient = self._wants_gradient(state["step"] + 1)
        self._step = state["step"]
        self._generator.set_state(state["generator"])


def _budget(module: SparseLinear | SparseConv2d) -> tuple[SparsityPattern, float]:
    """The pattern and sparsity that a sparse layer was asked for: ``Column()`` also where channels are wider."""
    assert module.pattern is not None
    assert module.target is not None
    asked = Column() if module.pattern == with_channel_width(Column(), math.prod(module.weight.shape[2:])) else None
    return asked or module.pattern, module.target


def _existing_layers(
    model: nn.Module, existing: Mapping[str, Any]
) -> tuple[list[Layer], list[SkippedLayer], list[tuple[Any, ...]]]:
    """Sparse layers as layers, those that share a weight together."""
    shared: dict[int, list[str]] = {}
    for name, module in existing.items():
        shared.setdefault(id(module.weight), []).append(name)
    layers, made = [], []
    for names in shared.values():
        modules = tuple(existing[name] for name in names)
        layers.append(Layer(names[0], modules, FLATTENED, tuple(names[1:])))
        made.append(modules)
    skipped = [
        SkippedLayer(name, type(module).__name__, "not a sparse layer")
        for name, module in model.named_modules()
        if name not in existing and any(True for _ in module.parameters(recurse=False))
    ]
    return layers, skipped, made


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise RecipeError(f"{name} must be at least 1, got {value}.")
    return value
