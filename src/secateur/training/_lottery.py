"""Lottery tickets: train, prune, go back to where the training began, and train what is left."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from secateur._errors import PatternError, RecipeError, SparsityError
from secateur._types import Mask
from secateur.layers import reshard, select_layers, sharded_modules
from secateur.patterns import (
    NM,
    SparsityPattern,
    Unstructured,
    at_partial_sparsity,
    check_sparsity,
    keep_top,
    units_to_prune,
)
from secateur.reports import Report, SkippedLayer, versions
from secateur.training._targets import MaskedWeight, check_optimizer, report_layer

Rewinding: TypeAlias = Literal["weights", "learning-rate", "nothing"]
TicketScope: TypeAlias = Literal["global", "layer"]

_STATE_VERSION = 1


class LotteryTicket:
    """Find a small network that trains as well as the large one: train, prune the smallest weights, rewind, repeat.

    :meth:`snapshot` remembers where to go back to: the start, or a few steps into the training, which large networks
    need. :meth:`prune` prunes, :meth:`rewind_with_mask` puts the rest back to its snapshot, and :meth:`search` does it
    all in rounds. The modules stay as they are: pruned weights are held at zero by :meth:`step`, to be called after
    each ``optimizer.step()``, and by a hook on each parameter that masks its gradient until :meth:`finalize`.

    The layers are those that ``prune_`` would prune. Random number generators and the order of the data are the
    loop's: seed them from the step that a rewind returns if runs are to repeat.

    Args:
        model: any module, on the device where it will train.
        optimizer: that trains it; it must hold the weights already.
        scheduler: of the learning rate, to be rewound too: any object with ``state_dict`` and ``load_state_dict``.
        pattern: a :class:`SparsityPattern` or its text.
        include: glob patterns on qualified layer names. Given, exactly those layers are pruned.
        exclude: glob patterns that win over ``include``.

    Raises:
        RecipeError: no layer to prune, or a weight that the optimizer does not hold or that takes no gradient.
        PatternError: a pattern that does not fit a layer, which is named.
        TypeError: an argument of the wrong type.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> ticket = secateur.LotteryTicket(model, optimizer)
        >>> ticket.snapshot(step=0)
        >>> def train(ticket, start):
        ...     for step in range(start, 20):
        ...         x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
        ...         optimizer.zero_grad()
        ...         (model(x) - x[:, :4]).square().mean().backward()
        ...         optimizer.step()
        ...         ticket.step()
        >>> report = ticket.search(train, sparsity=0.9, rounds=3)  # 68.4 to 90 % of both layers together
        >>> report.num_pruned, report.num_weights, ticket.finalize().num_pruned
        (346, 384, 346)

    Reference:
        Frankle and Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", 2019,
        arXiv:1803.03635. Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020,
        arXiv:1912.05671 (rewinding to a step after the first). Renda et al., "Comparing Rewinding and Fine-tuning in
        Neural Network Pruning", 2020, arXiv:2003.02389. Differs from the papers: counts are exact, and absolute.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: Any = None,
        pattern: SparsityPattern | str = "unstructured",
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if scheduler is not None and not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
            raise TypeError(f"scheduler must have state_dict and load_state_dict, got {type(scheduler).__name__}")
        pattern = SparsityPattern.parse(pattern) if isinstance(pattern, str) else pattern
        if not isinstance(pattern, SparsityPattern):
            raise TypeError(f"pattern must be a SparsityPattern or its text, got {type(pattern).__name__}")
        self.model, self.optimizer, self.scheduler, self.pattern = model, optimizer, scheduler, pattern
        self._report: Report | None = None
        self._sharded = sharded_modules(model)
        self._make_ready()
        layers, self._skipped = select_layers(model, include, exclude)
        fitted = [layer.fit(pattern) for layer in layers]
        check_optimizer(optimizer, layers)

        self._snapshot: dict[str, Any] | None = None
        self._asked: float | None = None  # the sparsity that the masks were made for, if it was one
        self._plan: dict[str, Any] = {}
        self._seconds = 0.0
        self._parameters = {layer.name: layer.parameter for layer in layers}
        self._shapes = {layer.name: layer.matrix().shape for layer in layers}
        self._weights = {layer.name: MaskedWeight(layer, own, 0.0) for layer, own in zip(layers, fitted, strict=True)}

    @property
    def masks(self) -> dict[str, Mask]:
        """The masks, ``[out, in]`` bool, True = kept, by layer name: copies."""
        return {name: weight.hard_mask() for name, weight in self._weights.items()}

    @property
    def sparsity(self) -> float:
        """Fraction of the layers' weights that is pruned now."""
        total = sum(shape.numel() for shape in self._shapes.values())
        return sum(weight.num_pruned for weight in self._weights.values()) / max(1, total)

    @torch.no_grad()
    def snapshot(self, step: int = 0) -> None:
        """Remember where to go back to; it replaces an earlier snapshot.

        Copied, on their own devices: every parameter and buffer of the model by name, and all that the optimizer and
        the scheduler keep, learning rates and momenta included. The masks are not part of it.

        Args:
            step: what :meth:`rewind` returns: the optimizer steps done, for the loop to go on from.

        Raises:
            RecipeError: a negative step, or the ticket is finalized.
            TypeError: a step that is no int.
        """
        self._make_ready()
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"step must be an int, got {type(step).__name__}")
        if step < 0:
            raise RecipeError(f"step counts the optimizer steps done, from 0; got {step}.")
        self._snapshot = {
            "step": step,
            "tensors": {name: tensor.detach().clone() for name, tensor in self._tensors().items()},
            "optimizer": _copied(self.optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else _copied(self.scheduler.state_dict()),
        }

    @torch.no_grad()
    def rewind(self, *, weights: bool = True) -> int:
        """Put everything back as it was at the snapshot, bit by bit, and remove the masks.

        All is restored in place: the parameters stay the same objects, so that the optimizer goes on working. Gradients
        are dropped.

        Args:
            weights: False keeps the model's parameters and buffers, and the masks, and rewinds the optimizer, the
                scheduler and the step alone: learning-rate rewinding.

        Returns:
            The step of the snapshot.

        Raises:
            RecipeError: there is no snapshot, the model or the optimizer is not the same any more, or the ticket is
                finalized; nothing has changed.

        Example:
            >>> import torch, secateur
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> ticket = secateur.LotteryTicket(model, optimizer)
            >>> ticket.snapshot(step=7)
            >>> before = model[0].weight.clone()
            >>> _ = ticket.prune(0.5)
            >>> ticket.rewind(), torch.equal(model[0].weight, before)
            (7, True)
        """
        if weights:
            return self.rewind_with_mask({})
        snapshot = self._usable_snapshot()
        self._restore_optimizer(snapshot)
        for weight in self._weights.values():
            self._put(weight, weight.mask)
        return int(snapshot["step"])

    @torch.no_grad()
    def rewind_with_mask(self, masks: Mapping[str, Mask] | None = None) -> int:
        """Put everything back as it was at the snapshot, then prune by masks and keep to them.

        The optimizer's state is zero in the pruned places too.

        Args:
            masks: ``[out, in]`` bool, True = kept, by layer name, such as another ticket's :attr:`masks`; layers that
                it does not name become dense. None, the default: the present masks.

        Returns:
            The step of the snapshot.

        Raises:
            RecipeError: as for :meth:`rewind`, or masks for unknown layers; nothing has changed.
            PatternError: a mask of the wrong shape or one that its pattern forbids; nothing has changed.
            TypeError: not a mapping of bool tensors.

        Example:
            >>> import torch, secateur
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> ticket = secateur.LotteryTicket(model, optimizer)
            >>> ticket.snapshot()
            >>> ticket.rewind_with_mask({"0": torch.tensor([[True, False]])})
            0
            >>> (model[0].weight == 0).tolist()
            [[False, True]]
        """
        snapshot = self._usable_snapshot()
        present = {name: weight.mask for name, weight in self._weights.items()}
        if masks is not None:
            self._check_masks(masks)
            self._asked, self._plan = None, {}
            present = {name: mask.clone() if (mask := masks.get(name)) is not None else None for name in present}
        now = self._tensors()
        for name, saved in snapshot["tensors"].items():
            now[name].copy_(saved)
        self._restore_optimizer(snapshot)
        for name, weight in self._weights.items():
            self._put(weight, present[name])
        return int(snapshot["step"])

    @torch.no_grad()
    def step(self) -> None:
        """Hold the pruned weights at zero. Call it after each ``optimizer.step()``.

        Raises:
            RecipeError: the ticket is finalized.
        """
        self._make_ready()
        for weight in self._weights.values():
            weight.zero_()

    @torch.no_grad()
    def prune(self, sparsity: float | None = None, *, scope: TicketScope = "global") -> dict[str, Mask]:
        """Prune the weights, or units of the pattern, of smallest magnitude; what is pruned already stays pruned.

        Args:
            sparsity: fraction of *all* units to prune, those that are pruned already included. For N:M its own, or
                less, on the way: each group of m keeps ``m - round(sparsity * m)``.
            scope: ``"global"`` compares all layers' units together by the root mean square of their weights, and prunes
                exactly ``round(sparsity * units)``; ``"layer"`` prunes as many of each layer, as its pattern counts
                them. N:M groups compare within themselves in either.

        Returns:
            The new masks, ``[out, in]`` bool by layer name.

        Raises:
            PatternError: an impossible sparsity, or a pattern that compares within rows under ``"global"``.
            RecipeError: less than is pruned already, an unknown scope, weights that are not finite, or the ticket is
                finalized; nothing has changed.
            TypeError: a sparsity that is not a number.

        Example:
            >>> import torch, secateur
            >>> model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Linear(1, 3))
            >>> _ = model[0].weight.data.copy_(torch.tensor([[0.1, 4.0, 0.3]]))
            >>> _ = model[1].weight.data.copy_(torch.tensor([[0.2], [0.4], [5.0]]))
            >>> ticket = secateur.LotteryTicket(model, torch.optim.SGD(model.parameters(), lr=0.1))
            >>> masks = ticket.prune(0.5)  # round(0.5 * 6) of both layers: 0.1, 0.2 and 0.3
            >>> masks["0"].tolist(), masks["1"].flatten().tolist()
            ([[False, True, False]], [False, True, True])
        """
        self._make_ready()
        sparsity = self._resolve(sparsity, scope)
        self._check_not_less(sparsity, scope)
        began = time.perf_counter()
        for weight in self._weights.values():
            matrix = weight.matrix()
            if not (finite := matrix.isfinite()).all():
                raise RecipeError(
                    f"{weight.layer.title}: {int((~finite).sum())} of its weights are NaN or infinite: the training "
                    "diverged.\nRewind, and train with a lower learning rate."
                )
        masks = self._global_masks(sparsity) if self._is_global(scope) else self._layer_masks(sparsity)
        for name, weight in self._weights.items():
            weight.set_mask(masks[name], self.optimizer)
        self._asked, self._plan = sparsity, {"scope": scope}
        self._count_seconds(began)
        return self.masks

    def search(
        self,
        train: Callable[[LotteryTicket, int], object],
        sparsity: float | None = None,
        *,
        rounds: int,
        rewind: Rewinding = "weights",
        scope: TicketScope = "global",
    ) -> Report:
        """Find a ticket in rounds of training and pruning, and train it: ``rounds + 1`` trainings.

        Round r of R trains, and prunes to ``1 - (1 - sparsity)^(r / R)``: the same part of what is left each time. The
        first training begins at the snapshot, whatever happened since, and each later one as ``rewind`` says. Rounds
        that would prune nothing, because the masks are there already or the sizes too small, are left out. So a search
        goes on where it was interrupted: load the states of model, optimizer and ticket and call it again.

        Args:
            train: called as ``train(ticket, step)``: your loop, from the snapshot's step to its end. It calls
                :meth:`step` after each ``optimizer.step()``. To be able to resume, let it save :meth:`state_dict` (and
                the model's and the optimizer's if weights are kept) before its first step.
            sparsity: of the last round, exact; see :meth:`prune`.
            rounds: of pruning, at least 1. Many small rounds find better tickets than one.
            rewind: what goes back to the snapshot between trainings. ``"weights"``: everything. ``"learning-rate"``:
                optimizer, scheduler and step, while weights keep what they learned; often as good and simpler to
                justify for large models. ``"nothing"``: plain fine-tuning; the loop gets the snapshot's step all the
                same, so that it can be as long, and the learning rate is where training left it.
            scope: see :meth:`prune`.

        Returns:
            The report. The ticket stays open: call :meth:`finalize` when all training is done.

        Raises:
            RecipeError: no snapshot, fewer than one round, an unknown ``rewind`` or ``scope``, less sparsity than there
                is, or the ticket is finalized; nothing has changed.
            PatternError: an impossible sparsity.
            TypeError: ``train`` is not callable, or ``rounds`` no int.
        """
        snapshot = self._usable_snapshot()
        if not callable(train):
            raise TypeError(f"train must be callable, got {type(train).__name__}")
        if isinstance(rounds, bool) or not isinstance(rounds, int):
            raise TypeError(f"rounds must be an int, got {type(rounds).__name__}")
        if rounds < 1:
            raise RecipeError(f"rounds must be at least 1, got {rounds}.")
        if rewind not in ("weights", "learning-rate", "nothing"):
            raise RecipeError(f"rewind must be 'weights', 'learning-rate' or 'nothing', got {rewind!r}.")
        sparsity = self._resolve(sparsity, scope)
        self._check_not_less(sparsity, scope)
        began = time.perf_counter()
        for target in (*(1 - (1 - sparsity) ** (r / rounds) for r in range(1, rounds)), sparsity):
            counts = self._counts(target, scope)
            if all(has <= wants for _, has, wants in counts) and any(has < wants for _, has, wants in counts):
                train(self, self._begin(rewind))
                self.prune(target, scope=scope)
        train(self, self._begin(rewind))
        self._asked = sparsity
        self._plan = {"scope": scope, "rounds": rounds, "rewind": rewind, "step": snapshot["step"]}
        return self._describe(time.perf_counter() - began)

    def finalize(self) -> Report:
        """Leave the plain model with real zeros and no hooks, and report. A second call returns the same report."""
        if self._report is None:
            self._report = self._describe(self._seconds)
            for weight in self._weights.values():
                weight.release()
            self._snapshot = None
        return self._report

    def state_dict(self) -> dict[str, Any]:
        """Return the masks and the snapshot: plain values and tensors, not to be changed."""
        return {
            "version": _STATE_VERSION,
            "pattern": str(self.pattern),
            "masks": {name: weight.mask for name, weight in self._weights.items()},
            "asked": self._asked,
            "plan": dict(self._plan),
            "snapshot": self._snapshot,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, on a ticket of a model and an optimizer of the same make.

        Load it before the states of model and optimizer or after; they hold the weights, which this does not touch.

        Raises:
            RecipeError: it is of another pattern, model, optimizer or version, or the ticket is finalized; nothing has
                changed.
            PatternError: a mask that does not fit; nothing has changed.
        """
        self._make_ready()
        if not isinstance(state, Mapping) or state.get("version") != _STATE_VERSION or "masks" not in state:
            raise RecipeError("this is not the state of a LotteryTicket, or one of another version of secateur.")
        if state["pattern"] != str(self.pattern):
            raise RecipeError(f"the state was saved under the pattern {state['pattern']}, but this is {self.pattern}.")
        if list(state["masks"]) != list(self._weights):
            raise RecipeError(
                f"the state holds the layers {_listed(state['masks'])}, but this ticket has {_listed(self._weights)}."
            )
        self._check_masks({name: mask for name, mask in state["masks"].items() if mask is not None})
        if state["snapshot"] is not None:
            self._check_same(state["snapshot"])
        for name, weight in self._weights.items():
            weight.load_state_dict({"mask": state["masks"][name]})
        self._asked, self._plan, self._snapshot = state["asked"], dict(state["plan"]), state["snapshot"]

    # Going back

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def _usable_snapshot(self) -> dict[str, Any]:
        self._make_ready()
        if self._snapshot is None:
            raise RecipeError(
                "there is no snapshot to go back to. Call snapshot(step) first, before or early in training."
            )
        self._check_same(self._snapshot)
        return self._snapshot

    def _check_same(self, snapshot: Mapping[str, Any]) -> None:
        """Raise unless model, optimizer and scheduler can take the snapshot."""
        now, saved = self._tensors(), snapshot["tensors"]
        differences = [f"{name} is gone" for name in saved if name not in now]
        differences += [f"{name} is new" for name in now if name not in saved]
        differences += [
            f"{name} was {_form(saved[name])} and is {_form(now[name])}"
            for name in saved
            if name in now and _form(saved[name]) != _form(now[name])
        ]
        differences += [
            f"{weight.layer.parameter_name} is another object"
            for name, weight in self._weights.items()
            if getattr(weight.layer.modules[0], weight.layer.kind.parameter, None) is not self._parameters[name]
        ]
        if differences:
            listed = "\n".join(f"  {line}" for line in differences[:10])
            raise RecipeError(
                f"the model is not the one of the snapshot, {len(differences)} tensors differ:\n{listed}\n"
                "Make a new LotteryTicket after changing modules, and take a new snapshot."
            )
        ours = [len(group["params"]) for group in self.optimizer.param_groups]
        theirs = [len(group["params"]) for group in snapshot["optimizer"]["param_groups"]]
        if ours != theirs:
            raise RecipeError(
                f"the optimizer has groups of {ours} parameters, but had {theirs} at the snapshot. Take a new snapshot."
            )
        if (self.scheduler is None) != (snapshot["scheduler"] is None):
            raise RecipeError(
                f"the snapshot was taken {'with' if self.scheduler is None else 'without'} a scheduler, unlike this "
                "ticket's state now. Take a new snapshot."
            )

    def _restore_optimizer(self, snapshot: Mapping[str, Any]) -> None:
        # Optimizers and schedulers keep what they load, and change it in place.
        self.optimizer.load_state_dict(_copied(snapshot["optimizer"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(_copied(snapshot["scheduler"]))
        self.model.zero_grad()

    def _put(self, weight: MaskedWeight, mask: Mask | None) -> None:
        """Use this mask, on a weight and an optimizer state that know nothing of the one before."""
        weight.remove_mask()
        if mask is not None:
            weight.set_mask(mask.to(weight.layer.parameter.device), self.optimizer)

    def _begin(self, rewind: Rewinding) -> int:
        """Go to where the next training begins."""
        if rewind == "weights" or not self.sparsity:
            return self.rewind_with_mask()
        if rewind == "learning-rate":
            return self.rewind(weights=False)
        return int(self._usable_snapshot()["step"])

    # Counting and choosing

    def _is_global(self, scope: TicketScope) -> bool:
        return scope == "global" and not isinstance(self.pattern, NM)

    def _resolve(self, sparsity: float | None, scope: TicketScope) -> float:
        if scope not in ("global", "layer"):
            raise RecipeError(f"scope must be 'global' or 'layer', got {scope!r}.")
        if scope == "global" and isinstance(self.pattern, Unstructured) and self.pattern.scope is not None:
            raise PatternError(
                f"{self.pattern} says itself what is compared with what, within a layer. Use scope='layer' with it."
            )
        if sparsity is not None and self.pattern.sparsity is not None:
            check_sparsity(sparsity)
            if sparsity < self.pattern.sparsity:
                return float(sparsity)
        return self.pattern.resolve(sparsity)

    def _counts(self, sparsity: float, scope: TicketScope) -> list[tuple[str, int, int]]:
        """What has to agree with the sparsity: its name, how many are pruned, and how many should be.

        All units of all layers together, or the weights of each layer.
        """
        if self._is_global(scope):
            sizes = {name: self._units_of(name) for name in self._weights}
            pruned = sum(self._weights[name].num_pruned // size for name, (units, size) in sizes.items() if units)
            return [("units", pruned, units_to_prune(sum(units for units, _ in sizes.values()), sparsity))]
        counts = []
        for name, weight in self._weights.items():
            pattern, own = at_partial_sparsity(weight.pattern, sparsity)
            counts.append(
                (f"weights of {weight.layer.title}", weight.num_pruned, pattern.num_pruned(self._shapes[name], own))
            )
        return counts

    def _check_not_less(self, sparsity: float, scope: TicketScope) -> None:
        for what, has, wants in self._counts(sparsity, scope):
            if wants < has:
                raise RecipeError(
                    f"sparsity {sparsity:g} prunes {wants} {what}, but {has} are pruned already and a ticket brings "
                    "none back.\nAsk for more, or call rewind() first: it removes the masks."
                )

    def _units_of(self, name: str) -> tuple[int, int]:
        """How many units a layer has, where all compete with one another, and the weights in each."""
        units = self._weights[name].pattern.units(self._shapes[name])
        return (units.count, units.size) if units.total * units.size else (0, 0)

    def _global_masks(self, sparsity: float) -> dict[str, Mask]:
        parts = {}
        for name, weight in self._weights.items():
            units = weight.pattern.units(self._shapes[name])
            if not units.total * units.size:
                continue
            scores = units.scores(weight.magnitudes())[0]
            if units.size > 1:
                scores = (scores / units.size).sqrt()  # root mean square, of units of one weight their magnitude
            if weight.mask is not None:
                kept = units.elements(units.crop(weight.mask))[0, :, 0]
                scores = scores.masked_fill(~kept, -1)  # below any other, so that they go first
            parts[name] = scores
        masks = {name: weight.hard_mask() for name, weight in self._weights.items()}
        if not parts:
            return masks
        device = next(iter(parts.values())).device
        scores = torch.cat([part.to(device) for part in parts.values()])
        keep = keep_top(scores[None], len(scores) - units_to_prune(len(scores), sparsity))
        for (name, part), kept in zip(parts.items(), keep.split([len(p) for p in parts.values()], dim=1), strict=True):
            masks[name] = self._weights[name].pattern.units(self._shapes[name]).mask(kept.to(part.device))
        return masks

    def _layer_masks(self, sparsity: float) -> dict[str, Mask]:
        masks = {}
        for name, weight in self._weights.items():
            pattern, own = at_partial_sparsity(weight.pattern, sparsity)
            masks[name] = pattern.mask(weight.magnitudes(), own)
        return masks

    def _check_masks(self, masks: Mapping[str, Mask]) -> None:
        if not isinstance(masks, Mapping):
            raise TypeError(f"masks must be a mapping from layer names to bool tensors, got {type(masks).__name__}")
        if unknown := [name for name in masks if name not in self._weights]:
            raise RecipeError(
                f"there are masks for {_listed(unknown)}, but the ticket's layers are {_listed(self._weights)}."
            )
        for name, mask in masks.items():
            weight = self._weights[name]
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = getattr(mask, "dtype", type(mask).__name__)
                raise TypeError(f"{weight.layer.title}: its mask must be a bool tensor, got {kind}")
            if mask.shape != self._shapes[name]:
                raise PatternError(
                    f"{weight.layer.title}: its mask has shape {tuple(mask.shape)}, but the weight as [out, in] has "
                    f"{tuple(self._shapes[name])}."
                )
            try:
                _as_far_as(weight.pattern, mask).check(mask)
            except SparsityError as error:
                raise type(error)(f"{weight.layer.title}: {error}") from None

    # Describing

    def _make_ready(self) -> None:
        if self._report is not None:
            raise RecipeError("the ticket is finalized: its hooks are gone. Make a new LotteryTicket.")
        reshard(self._sharded)

    def _count_seconds(self, began: float) -> None:
        seconds = time.perf_counter() - began
        self._seconds += seconds
        total = sum(shape.numel() for shape in self._shapes.values())
        for name, weight in self._weights.items():
            weight.seconds += seconds * self._shapes[name].numel() / max(1, total)

    @torch.no_grad()
    def _describe(self, seconds: float) -> Report:
        self._make_ready()
        layers = []
        for weight in self._weights.values():
            weight.zero_()
            mask = weight.hard_mask()
            pattern = _as_far_as(weight.pattern, mask)
            own = weight.num_pruned / max(1, mask.numel())
            notes = []
            if pattern != weight.pattern:
                notes.append(f"on the way to {weight.pattern}")
            if own == 1 and self._asked != 1:
                notes.append("nothing of it is kept: prune with scope='layer', or exclude it")
            layers.append(
                report_layer(
                    weight,
                    mask,
                    pattern=pattern,
                    asked=own if self._asked is None else self._asked,
                    count=weight.num_pruned,
                    notes=notes,
                )
            )
        return Report(
            layers=tuple(layers),
            skipped=tuple(SkippedLayer(entry.name, entry.kind, entry.reason) for entry in self._skipped),
            recipe={
                "method": {"name": "lottery", **self._plan},
                "pattern": str(self.pattern),
                "sparsity": self.sparsity if self._asked is None else self._asked,
            },
            versions=versions(),
            seconds=seconds,
        )


def _as_far_as(pattern: SparsityPattern, mask: Mask) -> SparsityPattern:
    """The pattern on the way to an N:M one that a mask shows; any other pattern as it is."""
    if isinstance(pattern, NM) and mask.shape[1] >= pattern.m and len(mask):
        return replace(pattern, n=max(pattern.n, int(mask[0, : pattern.m].count_nonzero())))
    return pattern


def _copied(value: Any) -> Any:
    """A deep copy of an optimizer's or a scheduler's state, sharded tensors included."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        result = copy.copy(value)
        for key, item in value.items():
            result[key] = _copied(item)
        return result
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return copy.deepcopy(value)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _listed(names: Iterable[str]) -> str:
    names = [name or "(the model itself)" for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
