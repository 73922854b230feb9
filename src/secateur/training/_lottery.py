"""Lottery tickets: train, prune, go back to where the training began, and train what is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from secateur._checks import integer, one_of
from secateur._errors import RecipeError
from secateur._types import Mask
from secateur.layers import select_layers
from secateur.patterns import SparsityPattern, as_pattern
from secateur.reports import Report, StoredMasks
from secateur.training._masked_model import (
    STATE_VERSION,
    MaskedModel,
    check_optimizer,
    check_trained,
    report_layer,
    trainable,
)
from secateur.training._rewind import Rewindable
from secateur.training._ticket_masks import TicketMasks, TicketScope, pattern_so_far
from secateur.training._weights import MaskedGradient, MaskedWeight

Rewinding: TypeAlias = Literal["weights", "learning-rate", "nothing"]


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
        check_trained(model, optimizer)
        if scheduler is not None and not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
            raise TypeError(f"scheduler must have state_dict and load_state_dict, got {type(scheduler).__name__}")
        self.model, self.optimizer, self.scheduler, self.pattern = model, optimizer, scheduler, as_pattern(pattern)
        layers, skipped = trainable(*select_layers(model, include, exclude))
        patterns = [layer.fit(self.pattern) for layer in layers]
        check_optimizer(optimizer, layers)

        gradients: dict[int, MaskedGradient] = {}
        weights = {
            layer.name: MaskedWeight(layer, own, 0.0, gradients) for layer, own in zip(layers, patterns, strict=True)
        }
        self._masked = MaskedModel(
            model, weights, skipped, closed="the ticket is finalized: its hooks are gone. Make a new LotteryTicket."
        )
        shapes = {name: weight.matrix().shape for name, weight in weights.items()}
        self._choice = TicketMasks(self.pattern, self._masked.weights, shapes)
        by_name = {layer.name: layer for layer in layers}
        parameters = {layer.name: layer.parameter for layer in layers}
        self._rewindable = Rewindable(model, optimizer, scheduler, by_name, parameters)
        self._snapshot: dict[str, Any] | None = None
        self._asked: float | None = None  # the sparsity that the masks were made for, if it was one
        self._plan: dict[str, Any] = {}

    @property
    def masks(self) -> dict[str, Mask]:
        """The masks, ``[out, in]`` bool, True = kept, by layer name: copies."""
        return self._masked.masks

    @property
    def parameter_masks(self) -> StoredMasks:
        """The same masks in the shape of their parameters and by the names of these, for :func:`apply_masks_`."""
        return self._masked.parameter_masks

    @property
    def sparsity(self) -> float:
        """Fraction of the layers' weights that is pruned now."""
        return self._choice.sparsity

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
        self._masked.make_ready()
        integer("step", step, 0)
        self._snapshot = self._rewindable.snapshot(step)

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
        self._rewindable.restore_optimizer_(snapshot)
        for weight in self._masked.weights.values():
            self._replace_mask(weight, weight.mask)
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
        chosen = {name: weight.mask for name, weight in self._masked.weights.items()}
        if masks is not None:
            self._choice.check(masks)
            self._asked, self._plan = None, {}
            chosen = {name: mask.clone() if (mask := masks.get(name)) is not None else None for name in chosen}
        self._rewindable.restore_model_(snapshot)
        self._rewindable.restore_optimizer_(snapshot)
        for name, weight in self._masked.weights.items():
            self._replace_mask(weight, chosen[name])
        return int(snapshot["step"])

    @torch.no_grad()
    def step(self) -> None:
        """Hold the pruned weights at zero. Call it after each ``optimizer.step()``.

        Raises:
            RecipeError: the ticket is finalized.
        """
        self._masked.make_ready()
        for weight in self._masked.weights.values():
            weight.hold_zeros_()

    @torch.no_grad()
    def prune(self, sparsity: float | None = None, *, scope: TicketScope = "global") -> dict[str, Mask]:
        """Prune the weights, or units of the pattern, of smallest magnitude; what is pruned already stays pruned.

        Args:
            sparsity: fraction of *all* units to prune, those that are pruned already included. For N:M its own, or
                less for a step towards it: each group of m keeps ``m - round(sparsity * m)``.
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
        self._masked.make_ready()
        sparsity = self._choice.resolve(sparsity, scope)
        with self._masked.timed():
            for name, mask in self._choice.make(sparsity, scope).items():
                self._masked.weights[name].set_mask(mask, self.optimizer)
        self._asked, self._plan = sparsity, {"scope": scope}
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
        integer("rounds", rounds, 1)
        one_of("rewind", rewind, get_args(Rewinding))
        sparsity = self._choice.resolve(sparsity, scope)
        began = time.perf_counter()
        for target in (*(1 - (1 - sparsity) ** (r / rounds) for r in range(1, rounds)), sparsity):
            counts = self._choice.counts(target, scope)
            prunes_more = any(count.pruned < count.wanted for count in counts)
            if prunes_more and all(count.pruned <= count.wanted for count in counts):
                train(self, self._begin(rewind))
                self.prune(target, scope=scope)
        train(self, self._begin(rewind))
        self._asked = sparsity
        self._plan = {"scope": scope, "rounds": rounds, "rewind": rewind, "step": snapshot["step"]}
        return self._describe(time.perf_counter() - began)

    def finalize(self) -> Report:
        """Leave the plain model with real zeros and no hooks, and report. A second call returns the same report."""
        if self._masked.report is not None:
            return self._masked.report
        report = self._masked.close(self._describe(self._masked.seconds))
        self._snapshot = None
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return the masks and the snapshot: plain values and tensors, not to be changed."""
        return {
            "version": STATE_VERSION,
            "pattern": str(self.pattern),
            "masks": {name: weight.mask for name, weight in self._masked.weights.items()},
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
        self._masked.make_ready()
        self._masked.check_state(state, "LotteryTicket", "masks")
        if state["pattern"] != str(self.pattern):
            raise RecipeError(f"the state was saved under the pattern {state['pattern']}, but this is {self.pattern}.")
        masks = state["masks"]
        self._masked.check_names(masks)
        self._choice.check({name: mask for name, mask in masks.items() if mask is not None})
        if state["snapshot"] is not None:
            self._rewindable.check(state["snapshot"])
        for name, weight in self._masked.weights.items():
            weight.load_state_dict({"mask": masks[name]})
        self._asked, self._plan, self._snapshot = state["asked"], dict(state["plan"]), state["snapshot"]

    def _usable_snapshot(self) -> dict[str, Any]:
        self._masked.make_ready()
        if self._snapshot is None:
            raise RecipeError(
                "there is no snapshot to go back to. Call snapshot(step) first, before or early in training."
            )
        self._rewindable.check(self._snapshot)
        return self._snapshot

    def _replace_mask(self, weight: MaskedWeight, mask: Mask | None) -> None:
        """Use this mask on restored weights, for which the optimizer's state is right wherever the mask keeps them."""
        weight.remove_mask()
        if mask is not None:
            weight.set_mask(mask.to(weight.layer.parameter.device), self.optimizer)

    def _begin(self, rewind: Rewinding) -> int:
        """Go to where the next training begins, and return its step."""
        if rewind == "weights" or not self.sparsity:
            return self.rewind_with_mask()
        if rewind == "learning-rate":
            return self.rewind(weights=False)
        return int(self._usable_snapshot()["step"])

    @torch.no_grad()
    def _describe(self, seconds: float) -> Report:
        self._masked.make_ready()
        layers = []
        for weight in self._masked.weights.values():
            weight.hold_zeros_()
            mask = weight.hard_mask()
            pattern = pattern_so_far(weight.pattern, mask)
            own = weight.num_pruned / max(1, mask.numel())
            notes = []
            if pattern != weight.pattern:
                notes.append(f"on the way to {weight.pattern}")
            if own == 1 and self._asked != 1:
                notes.append("nothing of it is kept: prune with scope='layer', or exclude it")
            asked = own if self._asked is None else self._asked
            layers.append(
                report_layer(weight, mask, pattern=pattern, asked=asked, count=weight.num_pruned, notes=notes)
            )
        recipe = {
            "method": {"name": "lottery", **self._plan},
            "pattern": str(self.pattern),
            "sparsity": self.sparsity if self._asked is None else self._asked,
        }
        return self._masked.describe(layers, recipe, seconds)
