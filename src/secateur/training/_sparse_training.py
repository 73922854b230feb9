"""Sparse training: one object beside the optimizer, whose ``step()`` comes after the optimizer's."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from secateur._checks import integer
from secateur._errors import FormatError, RecipeError, naming
from secateur._types import Mask
from secateur.nn import MaskSettings, densify_, sparse_layers, sparsify_
from secateur.patterns import SparsityPattern, Unstructured
from secateur.reports import Report, StoredMasks
from secateur.schedules import Schedule
from secateur.training._find import FoundLayers, find_layers
from secateur.training._masked_model import STATE_VERSION, MaskedModel, check_optimizer, check_trained, report_layer
from secateur.training._method import Method, Progress
from secateur.training._reads import ServedReads
from secateur.training._settings import TrainingSettings, fit_schedule
from secateur.training._state import check_generator, check_keys, check_plain, check_step
from secateur.training._weights import LearnedWeight, MaskedGradient, MaskedWeight, TrainedWeight


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
        method: the name of one in ``secateur.training.METHODS``, such as ``"gate"``, or a :class:`Method` with settings
            of your own.
        pattern: a :class:`SparsityPattern` or its text; unstructured by default, or that of the model's sparse
            layers.
        sparsity: fraction of the units of each layer to prune; to be left out for N:M, which fixes its own.
        steps: optimizer steps of the whole training, over which the method plans its ramp and its updates.
        schedule: the sparsity at each step, a :class:`~secateur.schedules.Schedule` or ``"one_shot"``, ``"linear"`` or
            ``"cubic"`` over the method's own ramp. By default the method's own.
        update_every: steps between updates of hard masks, by default a hundredth of the steps. Soft masks are updated
            at every step.
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
        settings = TrainingSettings.of(
            method=method,
            pattern=pattern,
            sparsity=sparsity,
            steps=steps,
            schedule=schedule,
            update_every=update_every,
            include=include,
            exclude=exclude,
            seed=seed,
        )
        self._set_up(model, optimizer, settings)
        self._update()

    @classmethod
    def from_settings(
        cls,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: TrainingSettings,
        *,
        to_resume: bool = False,
    ) -> Self:
        """Return a training whose settings are one value.

        Args:
            model: see the class, like ``optimizer``.
            optimizer: see the class.
            settings: with their number of steps.
            to_resume: leave the model and the optimizer as they are, since both go on from a checkpoint. Call
                :meth:`load_state_dict` next. By default they are put at their first masks, as the class does.

        Raises:
            RecipeError: as for the class.
            PatternError: as for the class.
            TypeError: as for the class.
        """
        training = cls.__new__(cls)
        training._set_up(model, optimizer, settings)
        if not to_resume:
            training._update()
        return training

    def _set_up(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: TrainingSettings) -> None:
        check_trained(model, optimizer)
        self.model, self.optimizer, self.method = model, optimizer, settings.method
        self.steps, self.seed = integer("steps", settings.steps, 1), settings.seed
        self.update_every = settings.update_every or max(1, self.steps // 100)
        found = find_layers(model, settings)
        pattern, sparsity = found.budget or (settings.pattern or Unstructured(), settings.sparsity)
        self.pattern, self.sparsity = pattern, pattern.resolve(sparsity)
        self.schedule = fit_schedule(settings.schedule, self.method, self.sparsity, self.steps)
        patterns = [layer.fit(self.pattern) for layer in found.layers]
        check_optimizer(optimizer, found.layers)

        weights: list[TrainedWeight]
        if self.method.learns:
            weights = self._learned_weights(found)
        else:
            gradients: dict[int, MaskedGradient] = {}
            weights = [
                MaskedWeight(layer, own, self.sparsity, gradients)
                for layer, own in zip(found.layers, patterns, strict=True)
            ]
        self._masked: MaskedModel[TrainedWeight] = MaskedModel(
            model,
            {weight.layer.name: weight for weight in weights},
            found.skipped,
            closed="the training is finalized: its layers are plain again. Make a new SparseTraining.",
        )
        self._reads = ServedReads(model) if self.method.learns else None
        self._step = 0
        self._without_gradient: set[str] = set()  # at some update that reads gradients
        self._generator = torch.Generator().manual_seed(self.seed)

    def _learned_weights(self, found: FoundLayers) -> list[TrainedWeight]:
        """Swap layers that learn their mask in, unless the model has them already."""
        sparse = found.sparse
        if not sparse:
            names = [(layer.name, *layer.tied_to) for layer in found.layers]
            settings = MaskSettings(pattern=self.pattern, sparsity=self.sparsity)
            sparsify_(self.model, settings=settings, include=[glob.escape(name) for tied in names for name in tied])
            by_name = sparse_layers(self.model)
            sparse = [tuple(by_name[name] for name in tied) for tied in names]
        return [LearnedWeight(layer, modules) for layer, modules in zip(found.layers, sparse, strict=True)]

    @property
    def step_count(self) -> int:
        """Optimizer steps seen so far."""
        return self._step

    @property
    def current_sparsity(self) -> float:
        """The sparsity of the schedule at the present step."""
        return self.schedule(self._step)

    @property
    def masks(self) -> dict[str, Mask]:
        """The hard masks, ``[out, in]`` bool, True = kept, by layer name; of soft ones what they would keep: copies."""
        return self._masked.masks

    @property
    def parameter_masks(self) -> StoredMasks:
        """The same masks in the shape of their parameters and by the names of these, for :func:`apply_masks_`."""
        return self._masked.parameter_masks

    @torch.no_grad()
    def step(self) -> None:
        """Update the masks. Call it once after each ``optimizer.step()`` and before ``optimizer.zero_grad()``.

        Raises:
            RecipeError: the training is finalized, or a gradient that the method reads is gone; nothing has changed.
        """
        self._masked.make_ready()
        if self._wants_gradient(self._step + 1):
            self._check_gradients()
        self._step += 1
        self._update()

    def _wants_gradient(self, step: int) -> bool:
        return self.method.wants_gradient(step, self.steps, self.update_every)

    def _check_gradients(self) -> None:
        """Raise if no layer has a gradient. One that has none keeps its mask, and the report says so."""
        gradients = {name: weight.gradient() for name, weight in self._masked.weights.items()}
        without = {name for name, gradient in gradients.items() if gradient is None}
        if len(without) == len(gradients):
            raise RecipeError(
                f"{self.method.name} needs gradients after step {self._step + 1}, but there are none.\n"
                "Call step() before zero_grad()."
            )
        if not any(bool(gradient.any()) for gradient in gradients.values() if gradient is not None):
            raise RecipeError(
                f"{self.method.name} needs gradients after step {self._step + 1}, but those of all layers are zero."
                "\nCall step() before zero_grad()."
            )
        self._without_gradient |= without

    @torch.no_grad()
    def _update(self) -> None:
        """Let the method change every mask for the present step."""
        progress = Progress(
            step=self._step,
            steps=self.steps,
            sparsity=self.schedule(self._step),
            update_every=self.update_every,
            is_last_of_schedule=self._step == self.schedule.end,
            generator=self._generator,
            optimizer=self.optimizer,
        )
        dense_gradient = self._wants_gradient(self._step + 1)
        for weight in self._masked.weights.values():
            with self._masked.timed([weight]), naming(weight.layer.title):
                weight.hold_zeros_()
                weight.expect_gradient(dense_gradient)
                self.method.update(weight, progress)

    @torch.no_grad()
    def finalize(self) -> Report:
        """Leave plain modules with real zeros, exactly as many as asked for, and report.

        May be called before the last step: what is missing is pruned at once, by magnitude, and the report notes it.
        A second call returns the same report.

        Raises:
            SparsityError: weights of which no mask can be made, because they are NaN: nothing has changed; or a mask
                that breaks its pattern or count, which would be an error of the method.
        """
        if self._masked.report is not None:
            return self._masked.report
        self._masked.make_ready()
        weights = list(self._masked.weights.values())
        # All masks before the first weight changes: an error leaves the model as it is.
        masks = []
        for weight in weights:
            with naming(weight.layer.title):
                masks.append(self._final_mask(weight))
        layers = []
        for weight, (mask, count, early) in zip(weights, masks, strict=True):
            notes = early + weight.finish(mask, self.optimizer)
            if weight.layer.name in self._without_gradient:
                notes.append(f"had no gradient at some updates, where {self.method.name} kept its mask")
            layers.append(
                report_layer(weight, mask, pattern=weight.pattern, asked=weight.sparsity, count=count, notes=notes)
            )
        self._release_reads()
        if self.method.learns and not any(weight.layer.is_sharded for weight in weights):
            densify_(self.model)
        return self._masked.close(self._masked.describe(layers, self._recipe(), self._masked.seconds))

    def _final_mask(self, weight: TrainedWeight) -> tuple[Mask, int, list[str]]:
        """The mask to end with, how many weights it prunes, and notes."""
        count = weight.pattern.num_pruned(weight.matrix().shape, weight.sparsity)
        mask = weight.mask
        if mask is not None and mask.numel() - int(mask.count_nonzero()) == count:
            return mask, count, []
        mask = weight.pattern.mask(weight.magnitudes(), weight.sparsity)
        return mask, count, [f"finalized at step {self._step} of {self.steps}, before the mask was final"]

    def release(self) -> None:
        """Give the model up as it is, without a report: another training takes over its weights."""
        self._release_reads()
        self._masked.release()

    def _release_reads(self) -> None:
        if self._reads is not None:
            self._reads.release()

    def _recipe(self) -> dict[str, Any]:
        """Everything that decides which masks are made, as plain values."""
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
        self._masked.must_be_open()
        state = {
            "version": STATE_VERSION,
            "recipe": self._recipe(),
            "step": self._step,
            "generator": self._generator.get_state(),
            "weights": {name: weight.state_dict() for name, weight in self._masked.weights.items()},
        }
        if self._reads is not None and self._reads.names:
            state["reads"] = {reader: list(layers) for reader, layers in self._reads.names.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, on a training made with the same settings.

        Make the training first, as at the start, since that prunes; then load its state, the model's and the
        optimizer's, in any order.

        Raises:
            RecipeError: it is of another recipe, other layers or another version, or this training is finalized.
            FormatError: it is not what :meth:`state_dict` returned: something is missing, or has another type, shape or
                dtype, or is no number. After any of these errors nothing has changed.
        """
        self._check_state(state)
        dense_gradient = self._wants_gradient(state["step"] + 1)
        entries = {
            name: _moved(state["weights"][name], weight.layer.parameter.device)
            for name, weight in self._masked.weights.items()
        }
        for name, weight in self._masked.weights.items():
            weight.load_state_dict(entries[name])
            weight.expect_gradient(dense_gradient)
        self._step = state["step"]
        self._generator.set_state(state["generator"])
        if self._reads is not None and "reads" in state:
            self._reads.serve(state["reads"])

    def layers_unlike(self, state: Mapping[str, Any]) -> list[str]:
        """Return the names of the layers whose weights in the model are not those that a state was saved with.

        What can be seen is a pruned weight that is not zero, or a sparse layer with another mask or threshold. Load the
        state of the model before.

        Raises:
            RecipeError: as for :meth:`load_state_dict`.
            FormatError: as for :meth:`load_state_dict`.
        """
        self._check_state(state)
        weights = self._masked.weights
        return [name for name, weight in weights.items() if not weight.belongs_to(state["weights"][name])]

    def _check_state(self, state: Mapping[str, Any]) -> None:
        self._masked.must_be_open()
        self._masked.check_state(state, "SparseTraining", "recipe")
        check_keys(state, ("step", "generator", "weights"))
        recipe = check_keys(state["recipe"], ())
        check_plain("recipe", recipe)
        ours = self._recipe()
        different = [key for key in ours if ours[key] != recipe.get(key)]
        if different:
            lines = "\n".join(f"  {key}: saved {recipe.get(key)!r:.200}, here {ours[key]!r}" for key in different)
            raise RecipeError(f"the state was saved by a training with another recipe:\n{lines}")
        check_step(state["step"])
        check_generator(state["generator"])
        modules = dict(self.model.named_modules())
        for reader, layers in check_keys(state.get("reads", {}), ()).items():
            names = [reader, *layers] if isinstance(layers, list) else [None]
            if not all(isinstance(name, str) and name in modules for name in names):
                raise FormatError("the state says that modules read layers that are not there. Restore the checkpoint.")
        saved = check_keys(state["weights"], ())
        self._masked.check_names(map(str, saved))
        for name, weight in self._masked.weights.items():
            with naming(weight.layer.title):
                weight.check_state(saved[name])


def _moved(entry: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The state of one weight on its device: what can fail, a full device, fails before anything is replaced."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in entry.items()}
