"""Sparse training in the Trainer of PyTorch Lightning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from secateur._errors import FormatError, RecipeError
from secateur.integrations._shared import begin, finish, keep_zeros_, known_steps, restore, swap_, tell
from secateur.patterns import SparsityPattern
from secateur.reports import Report
from secateur.schedules import Schedule
from secateur.training import Method, SparseTraining, TrainingSettings

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as error:
    raise ImportError("secateur.integrations.lightning needs lightning: pip install 'secateur[lightning]'") from error


class SparseTrainingCallback(Callback):  # type: ignore[misc]
    """Make the model sparse while ``lightning.pytorch.Trainer`` trains it, by any method of :class:`SparseTraining`.

    Methods that learn the mask swap their layers when ``fit`` sets up, before optimizers are made and checkpoints
    loaded. The masks are updated after each step of the optimizer, with automatic and with manual optimization. When
    training ends the model is plain again, with real zeros, and what ``trainer.save_checkpoint`` writes then is an
    ordinary checkpoint.

    When ``fit`` sets up, the callback moves behind all others but those that write checkpoints. So the weights that
    ``StochasticWeightAveraging`` or ``WeightAveraging`` leave are pruned, too. When ``fit`` ends it checks the model,
    and if anything wrote to pruned weights, it sets them to zero again and warns.

    Checkpoints from the middle of training hold the layers that learn, if there are any, and the state of this
    callback. A run resumed from one goes on exactly as one that was not interrupted.

    A module that builds its layers in ``configure_model`` has none yet at set-up: to resume a method that learns the
    mask, and under ``fully_shard``, call :func:`secateur.sparsify_` at the end of ``configure_model``.

    Args:
        method: see :class:`SparseTraining`, like all that follow.
        pattern: see there.
        sparsity: see there.
        steps: optimizer steps that the method shares out; by default ``trainer.estimated_stepping_batches``.
        schedule: see there.
        update_every: see there.
        include: see there; names begin at the LightningModule, as in ``"encoder.*"``. With several optimizers, the
            layers of one of them.
        exclude: see there.
        seed: see there.

    Attributes:
        training: the :class:`SparseTraining`, once training has begun.
        report: its :class:`Report`, once training has ended.

    Raises:
        RecipeError: what :class:`SparseTraining` cannot carry out; a number of steps that the Trainer does not know;
            when resuming, a state of another recipe.
        PatternError: an unknown pattern, one that does not fit a layer, which is named, or an impossible sparsity.
        FormatError: when resuming, a checkpoint without a state of this callback.
        TypeError: an argument of the wrong type.

    Example:
        >>> import torch, lightning.pytorch as pl
        >>> from secateur.integrations.lightning import SparseTrainingCallback
        >>> class Regression(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
        ...     def training_step(self, batch, index):
        ...         return (self.layers(batch) - 1).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters())
        >>> callback = SparseTrainingCallback(sparsity=0.9)
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...     enable_model_summary=False)
        >>> trainer = pl.Trainer(max_steps=20, accelerator="cpu", callbacks=[callback], **quiet)
        >>> trainer.fit(Regression(), torch.utils.data.DataLoader(torch.randn(256, 8), batch_size=8))
        >>> callback.report.num_pruned, callback.report.recipe["steps"]
        (259, 20)
    """

    def __init__(
        self,
        *,
        method: Method | str = "gate",
        pattern: SparsityPattern | str | None = None,
        sparsity: float | None = None,
        steps: int | None = None,
        schedule: Schedule | str | None = None,
        update_every: int | None = None,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        self._settings = TrainingSettings.of(
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
        self._state: dict[str, Any] | None = None  # loaded before there is a training
        self._hook: RemovableHandle | None = None
        self._reasons: dict[str, str] = {}  # why modules stay plain
        self.training: SparseTraining | None = None
        self.report: Report | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Swap layers, before the optimizers are made and a checkpoint is loaded."""
        if stage != "fit":
            return
        self._let_go()
        if self.training is not None:  # it was interrupted
            self.training.release()
        self.training = self.report = self._state = None
        self._reasons = {}
        if not is_overridden("configure_model", pl_module):
            self._reasons = swap_(pl_module, self._settings)
        # A new list, because the Trainer is going through the old one. Checkpoints are to hold what this one leaves.
        others = [callback for callback in trainer.callbacks if callback is not self]
        savers = [callback for callback in others if isinstance(callback, Checkpoint)]
        trainer.callbacks = [*(callback for callback in others if callback not in savers), self, *savers]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, or go on: the optimizers are made and the weights loaded by now."""
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._check_loaded(trainer)
        steps = self._settings.steps or known_steps(trainer.estimated_stepping_batches)
        self.training = self._begin(pl_module, trainer.optimizers, replace(self._settings, steps=steps))
        # The hook is the one place after a step and before gradients are cleared in both kinds of optimization.
        self._hook = self.training.optimizer.register_step_post_hook(self._after_step)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that a strategy that loads late has loaded the masks, too."""
        self._check_loaded(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave a plain model with real zeros, and the report. Later the strategy moves the model off its device."""
        assert self.training is not None
        self._let_go()
        self.report = finish(self.training, self._reasons)
        if trainer.is_global_zero:
            tell(self.report)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Check the model that is left: hooks of the module and of the strategy ran since the training ended."""
        if self.report is not None:
            keep_zeros_(pl_module, self.report)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint; nothing before training and after it, when the model is plain."""
        return {} if self.training is None or self.report is not None else self.training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, now or as soon as there is a training."""
        self._state = state_dict
        if self.training is not None and self.report is None:
            restore(self.training, state_dict)

    def _begin(self, model: Any, optimizers: list[torch.optim.Optimizer], settings: TrainingSettings) -> SparseTraining:
        """Return the training with the first optimizer that holds the weights. An error has changed nothing."""
        refused: RecipeError | None = None
        for optimizer in optimizers:
            try:
                return begin(model, optimizer, settings, state=self._state)
            except RecipeError as error:
                refused = refused or error
        raise refused or RecipeError("the module has no optimizer: configure_optimizers must return one.")

    def _check_loaded(self, trainer: Any) -> None:
        if trainer.ckpt_path is not None and self._state is None:
            raise FormatError(
                f"{trainer.ckpt_path} has no state of a SparseTrainingCallback, so sparse training cannot resume from "
                "it.\nLoad the weights alone, with load_from_checkpoint, and fit without ckpt_path."
            )

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert self.training is not None
        self.training.step()

    def _let_go(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
