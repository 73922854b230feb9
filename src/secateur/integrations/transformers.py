"""Sparse training in the Trainer of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._errors import FormatError, RecipeError
from secateur.integrations._shared import (
    STATE_FILE,
    begin,
    finish,
    known_steps,
    read_state,
    restore,
    swap_,
    tell,
    warn_of_lost_zeros,
    write_state,
)
from secateur.patterns import SparsityPattern
from secateur.reports import Report
from secateur.schedules import Schedule
from secateur.training import Method, SparseTraining, TrainingSettings

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "secateur.integrations.transformers needs transformers and accelerate: pip install 'secateur[trainer]'"
    ) from error


class SparseTrainingCallback(TrainerCallback):  # type: ignore[misc]
    """Make the model sparse while ``transformers.Trainer`` trains it, by any method of :class:`SparseTraining`.

    Give it to the Trainer when that is made, so that methods that learn the mask can swap their layers before the model
    is wrapped or loaded. The masks are updated after each optimizer step. When training ends the model is plain again,
    with real zeros, and what ``save_model`` writes then is an ordinary model.

    Give it as the last callback: it cannot order itself here, as it does in Lightning. A later one that writes averaged
    weights (EMA, SWA) into the model when training ends writes over the zeros. ``evaluate`` and ``predict`` after
    training warn of that; ``callback.report.verify(trainer.model)`` raises, and
    ``secateur.apply_masks_(trainer.model, callback.report)`` sets the zeros again.

    A checkpoint that the Trainer writes is for resuming: it holds the layers that learn, if there are any, and the
    state of the masks in ``sparse_training.safetensors``. A run resumed from it goes on exactly as one that was not
    interrupted. With ``load_best_model_at_end`` the masks of the best checkpoint come back with its weights; one from
    before the masks were final is pruned at once, and the report notes it.

    Args:
        method: see :class:`SparseTraining`, like all that follow but for ``checkpoint``.
        pattern: see there.
        sparsity: see there.
        steps: optimizer steps that the method shares out; by default all those of the Trainer.
        schedule: see there.
        update_every: see there.
        include: see there.
        exclude: see there.
        seed: see there.
        checkpoint: the directory that ``train(resume_from_checkpoint=...)`` gets, which the Trainer does not tell its
            callbacks. Needed only if it is not the one in ``output_dir`` or in the training arguments.

    Attributes:
        training: the :class:`SparseTraining`, once training has begun.
        report: its :class:`Report`, once training has ended.

    Raises:
        RecipeError: what :class:`SparseTraining` cannot carry out; checkpoints in a hyper-parameter search; when
            resuming, a state of another recipe or of other weights.
        PatternError: an unknown pattern, one that does not fit a layer, which is named, or an impossible sparsity.
        FormatError: when resuming, a state that is missing or damaged.
        TypeError: an argument of the wrong type.

    Example:
        >>> import tempfile, torch, transformers
        >>> from secateur.integrations.transformers import SparseTrainingCallback
        >>> class Regression(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
        ...     def forward(self, x, labels):
        ...         return {"loss": (self.layers(x) - labels).square().mean()}
        >>> callback = SparseTrainingCallback(sparsity=0.9)
        >>> data = [{"x": torch.randn(8), "labels": torch.ones(1)} for _ in range(64)]
        >>> folder = tempfile.TemporaryDirectory()
        >>> args = transformers.TrainingArguments(folder.name, use_cpu=True, report_to="none", disable_tqdm=True)
        >>> trainer = transformers.Trainer(Regression(), args, train_dataset=data, callbacks=[callback])
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...
        >>> callback.report.num_pruned, callback.report.recipe["steps"]
        (259, 24)
        >>> folder.cleanup()
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
        checkpoint: str | Path | None = None,
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
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._reasons: dict[str, str] = {}  # why modules stay plain
        self.training: SparseTraining | None = None
        self.report: Report | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Swap layers, before the Trainer wraps the model or loads a checkpoint into it."""
        self._reasons = swap_(model, self._settings)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Begin, or go on: weights and optimizer are loaded by now."""
        if state.is_hyper_param_search and args.save_strategy != "no":
            raise RecipeError(
                "a hyper-parameter search keeps its checkpoints where callbacks cannot find them.\n"
                "Search with save_strategy='no', and train once more with what it found."
            )
        if self.training is not None:  # it was interrupted
            self.training.release()
        self.training = self.report = None
        optimizer = _bare(optimizer)
        settings = replace(self._settings, steps=self._settings.steps or known_steps(state.max_steps))
        if not state.global_step:
            self.training = begin(model, optimizer, settings)
            return
        path = self._find_state(args, state)
        saved = read_state(path)
        if saved.get("step") != state.global_step:
            raise RecipeError(
                f"{path} is of step {saved.get('step')}, but the Trainer resumes at step {state.global_step}.\n"
                "Tell the callback which directory it resumes from: checkpoint=..."
            )
        self.training = begin(model, optimizer, settings, state=saved, source=str(path))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the masks: the Trainer calls this between ``optimizer.step()`` and ``zero_grad()``."""
        assert self.training is not None
        self.training.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the state of the masks into the checkpoint that was just written."""
        assert self.training is not None
        saved = self.training.state_dict()  # in every process: sharded weights are gathered for it
        if args.should_save:
            write_state(_folder(args, state) / STATE_FILE, saved)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave a plain model with real zeros, and the report."""
        assert self.training is not None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            path = Path(state.best_model_checkpoint) / STATE_FILE
            restore(self.training, read_state(path), source=str(path))
        self.report = finish(self.training, self._reasons)
        if state.is_world_process_zero:
            tell(self.report)

    def on_evaluate(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Warn if, since the training ended, something wrote to pruned weights."""
        if self.report is not None:
            warn_of_lost_zeros(model, self.report)

    def on_predict(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Warn if, since the training ended, something wrote to pruned weights."""
        if self.report is not None:
            warn_of_lost_zeros(model, self.report)

    def _find_state(self, args: Any, state: Any) -> Path:
        folder = self._checkpoint
        if folder is None:
            told = args.resume_from_checkpoint
            folder = Path(told) if isinstance(told, str | Path) and Path(told).is_dir() else _folder(args, state)
        path = folder / STATE_FILE
        if not path.is_file():
            raise FormatError(
                f"{folder} has no {STATE_FILE}, so sparse training cannot resume from it.\n"
                "If it is not the directory that you resume from, tell the callback: checkpoint=... If that run had no "
                "SparseTrainingCallback, load the model from it and train without resume_from_checkpoint."
            )
        return path


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that PyTorch made, inside of accelerate's wrapper."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer
