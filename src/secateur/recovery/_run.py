"""One recovery, after its arguments were checked: batch norms, training, batch norms again, the report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.files import scratch_folder
from secateur.recovery._batches import Batches
from secateur.recovery._batchnorm import reestimate_
from secateur.recovery._budget import Budget, Clock, Steps, WorkingTime
from secateur.recovery._by_block import train_blocks_, undo_
from secateur.recovery._checkpoint import Checkpoint
from secateur.recovery._correspond import Correspondence
from secateur.recovery._losses import Criterion, choose_loss
from secateur.recovery._processes import check_same, world
from secateur.recovery._runs import Runner, WholeModel, kept_of, to_device
from secateur.recovery._settings import Settings
from secateur.recovery._teacher import TeacherOutputs
from secateur.recovery._terms import Pool, States
from secateur.recovery._train import INTERRUPTED, NOT_FINITE, NOTHING_GAINED, USED, Loop
from secateur.recovery._trained import trained_by
from secateur.recovery._zeros import no_new_zeros, widened, zeros_of
from secateur.reports import CurvePoint, RecoveryReport, versions

_NORM_BATCHES = 32  # for a first estimate of batch norms before and after training


@dataclass(frozen=True)
class _Made:
    """What training did.

    Args:
        steps: optimizer steps.
        best: held-out loss of the state that was kept.
        best_step: when that was.
        stopped: why it ended.
        curve: of the held-out loss.
        trained: weights that could move.
        parts: how many things were trained one after the other.
        notes: on it.
    """

    steps: int
    best: float
    best_step: int
    stopped: str
    curve: tuple[CurvePoint, ...]
    trained: int
    parts: int = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recovery:
    """One call of :func:`secateur.recover_`.

    Args:
        student: runs the model.
        teacher: runs the dense model.
        batches: to learn from, and held out.
        pair: which blocks correspond.
        settings: of the run.
        clock: of its working time.
        pool: makes embeddings of token states; None for their mean.
        folder: for the state of the run; None keeps none.
        tell: called with a description, and how much of how much is done.
    """

    student: Runner
    teacher: Runner
    batches: Batches
    pair: Correspondence
    settings: Settings
    clock: Clock
    pool: Pool | None
    folder: Path | None
    tell: Progress

    def run(self) -> RecoveryReport:
        """Train the model, in the state that :func:`secateur.calibration.quiet` establishes for it and its teacher."""
        model, settings = self.student.model, self.settings
        digest = self.batches.digest
        check_same(digest, self.student.device)
        identity = self._identity(digest)
        by_block = settings.method == "blocks"
        if by_block:
            self._check_blocks()
        parameters = [p for p in model.parameters() if p.is_floating_point() and p.requires_grad]
        zeros = zeros_of(model)
        narrow = [] if by_block else parameters
        with scratch_folder(self.folder) as scratch, no_new_zeros(parameters), widened(narrow):
            criterion = self._criterion()
            outputs = self._outputs(kept_of(self.teacher, self.batches.all, criterion), scratch)
            problem = WholeModel(
                trained_by(settings.method, model, settings.rank, settings.seed),
                self.student,
                criterion,
                self.batches.all,
                self.batches.train,
                self.batches.measure,
                outputs,
                settings.gradient_checkpointing,
            )
            start = problem.held_out()
            made = self._train(problem, identity, scratch, start)
        notes = [*criterion.notes, *outputs.notes, *made.notes]
        uses_blocks = criterion.needs_states or by_block
        if uses_blocks:
            notes.append(f"blocks correspond by their place: {self.pair.how}")
        if self.batches.ignored:
            notes.append(f"left out of the batches: {self.batches.ignored}")
        return RecoveryReport(
            method=settings.method,
            loss=criterion.words,
            steps=made.steps,
            seconds=self.clock.seconds,
            asked=settings.budget,
            start=start,
            best=made.best,
            best_step=made.best_step,
            stopped=made.stopped,
            curve=made.curve,
            trained=made.trained,
            weights=sum(p.numel() for p in model.parameters() if p.is_floating_point()),
            zeros=(zeros, zeros_of(model)),
            samples=self.batches.rows(self.batches.train),
            held_out_samples=self.batches.rows(self.batches.measure),
            epochs=made.steps * settings.accumulate * world()[1] / len(self.batches.train) / made.parts,
            blocks=dict(self.pair.names) if uses_blocks else {},
            settings=settings.to_dict(),
            versions=versions(),
            model_name=type(model).__name__,
            teacher_name=type(self.teacher.model).__name__,
            batches_hash=digest,
            notes=tuple(notes),
        )

    def _train(self, problem: WholeModel, identity: dict[str, str], scratch: Path, start: float) -> _Made:
        """Estimate batch norms, train, and estimate them again; each is undone where it does not help."""
        first = CurvePoint(0, self.clock.seconds, None, start)
        norms = _norms_of(self.student.model)
        after, notes = self._norms(problem, norms, start) if norms else (start, [])
        if self.settings.method == "batchnorm":
            if not norms:
                raise RecipeError(
                    "method='batchnorm' needs a model with batch norms, and this one has none. Use 'full'."
                )
            stopped = USED if after < start else NOTHING_GAINED
            points = (first, CurvePoint(0, self.clock.seconds, None, after))
            return _Made(0, after, 0, stopped, points, 0, notes=tuple(notes))
        if self.settings.method == "blocks":
            made = self._by_blocks(problem, identity, scratch, after)
        else:
            made = self._whole(problem, identity)
        if norms:
            best, more = self._norms(problem, norms, made.best)
            made = replace(
                made, best=best, curve=(first, *made.curve, CurvePoint(made.steps, self.clock.seconds, None, best))
            )
            notes += more
        return replace(made, notes=(*notes, *made.notes))

    def _whole(self, problem: WholeModel, identity: dict[str, str]) -> _Made:
        rank, _ = world()
        checkpoint = Checkpoint(self.folder, identity, writes=rank == 0)
        progress = self._loop().run(problem, self._budget, checkpoint)
        problem.trained.finish_()
        return _Made(
            progress.step,
            progress.best,
            progress.best_step,
            progress.stopped,
            tuple(progress.curve),
            problem.trained.weights,
        )

    def _by_blocks(self, problem: WholeModel, identity: dict[str, str], scratch: Path, start: float) -> _Made:
        names = list(self.pair.names)
        rank, _ = world()

        def checkpoint(name: str) -> Checkpoint:
            return Checkpoint(self.folder, {**identity, "block": name}, rank == 0, f"block.{names.index(name)}")

        began = self.clock.seconds
        problem.held_out()  # the teacher's outputs are there now, so that this takes as long as at the end
        reserve = 1.2 * (self.clock.seconds - began)
        targets = self._outputs(self._streams(len(names)), scratch)
        here = [to_device(batch, self.student.device) for batch in self.batches.all]
        points = [CurvePoint(0, self.clock.seconds, None, start)]
        with torch.no_grad():
            done, weights = train_blocks_(
                self.student,
                names,
                targets,
                here,
                self.batches.train,
                self.batches.measure,
                self.settings,
                self.clock,
                checkpoint,
                scratch,
                self._tell,
                reserve,
            )
        steps = sum(progress.step for _, progress in done)
        for _, progress in done:
            points += progress.curve
        best = problem.held_out()
        points.append(CurvePoint(steps, self.clock.seconds, None, best))
        stopped = next(
            (progress.stopped for _, progress in done if progress.stopped in (INTERRUPTED, NOT_FINITE)), USED
        )
        notes: tuple[str, ...] = targets.notes
        if without := [name for name, progress in done if not progress.step]:
            notes = (*notes, f"the budget had no step for {len(without)} of {len(names)} blocks: {', '.join(without)}")
        if not best < start:
            undo_(self.student.model, names, scratch)
            notes = (*notes, f"all blocks were put back: together they gave a held-out loss of {best:.4g}")
            best, stopped = start, stopped if stopped != USED else NOTHING_GAINED
        return _Made(
            steps, best, steps if best < start else 0, stopped, tuple(points), weights, max(1, len(done)), notes
        )

    def _streams(self, blocks: int) -> Callable[[int], dict[int, dict[str, Tensor]]]:
        """Run the teacher on a batch, and return what its blocks gave, each under a number of its own."""
        criterion = Criterion((States(),), needs_states=True)

        def compute(number: int) -> dict[int, dict[str, Tensor]]:
            batch = number // blocks
            with torch.no_grad():
                seen = self.teacher.run(self.batches.all[batch], states=True)
                kept = criterion.keep(seen)
            return {batch * blocks + place: {"state": kept[f"0.{place}"]} for place in range(blocks)}

        return compute

    def _outputs(self, compute: Callable[[int], dict[int, dict[str, Tensor]]], scratch: Path) -> TeacherOutputs:
        settings = self.settings
        return TeacherOutputs(compute, int(settings.max_memory), settings.keep_teacher_outputs, scratch)

    def _loop(self) -> Loop:
        return Loop(self.settings, self.clock, self.student.device, self._tell)

    def _tell(self, description: str, part: float) -> None:
        """Say where the run is: steps of how many, or seconds of how many."""
        budget = self.settings.budget
        whole = budget["steps"] if "steps" in budget else 60 * budget["minutes"]
        self.tell(description, part * whole, whole)

    def _budget(self, now: float, measuring: float) -> Budget:
        """The budget of a training of the whole model, less what is to be done after it."""
        if self.settings.steps is not None:
            return Steps(self.settings.steps)
        assert self.settings.minutes is not None
        end = 60 * self.settings.minutes - measuring * (2 if _norms_of(self.student.model) else 1)
        if end <= now:
            raise RecipeError(
                f"the budget of {self.settings.minutes:g} minutes is too small for one step: measuring the held-out "
                f"batches took {now:.1f} s before it, and takes {measuring:.1f} s after it. Give more minutes."
            )
        return WorkingTime(self.clock, now, end)

    @torch.no_grad()
    def _criterion(self) -> Criterion:
        """The loss, chosen by what both models return for a batch."""
        batch = self.batches.all[self.batches.measure[0]]
        ours = self.student.run(batch, states=True)
        theirs = self.teacher.run(batch, states=True)
        return choose_loss(ours, theirs, self.settings, self.pool)

    def _check_blocks(self) -> None:
        if not self.pair.blocks:
            raise RecipeError(
                f"method='blocks' needs repeated blocks that both models have: {self.pair.how}.\nUse method='full', or "
                "give the report of shrinking as history=."
            )
        steps = self.settings.steps
        if steps is not None and steps < len(self.pair.blocks):
            raise RecipeError(
                f"the budget of {steps} steps is too small for one step of each of {len(self.pair.blocks)} blocks."
            )

    @torch.no_grad()
    def _norms(self, problem: WholeModel, norms: list[nn.Module], before: float) -> tuple[float, list[str]]:
        """Estimate the statistics of batch norms again; undo it unless the held-out loss falls."""
        model = self.student.model
        old = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
        exact = self.settings.method == "batchnorm"
        numbers = self.batches.train if exact else self.batches.train[:_NORM_BATCHES]
        here = [to_device(self.batches.all[number], self.student.device) for number in numbers]
        found = reestimate_(model, here, self.student.forward, padding=self.student.padding, exact=exact)
        after = problem.held_out()
        if after < before:
            left = [f"batch norm {name} keeps its statistics: {why}" for name, why in found.left.items()]
            return after, [f"the statistics of {len(found.norms)} batch norms were estimated again", *left]
        for norm, buffers in zip(norms, old, strict=True):
            for name, buffer in norm.named_buffers(recurse=False):
                buffer.copy_(buffers[name])
        return before, []

    def _identity(self, batches: str) -> dict[str, str]:
        """What the state of a run on disk belongs to, as named hashes. Hashing a large model takes a while."""
        if self.folder is None:
            return {}
        return {
            "batches": batches,
            "model": _hash_model(self.student.model),
            "teacher": _hash_model(self.teacher.model),
            "settings": repr(sorted(self.settings.to_dict().items(), key=lambda entry: entry[0])),
        }


def _norms_of(model: nn.Module) -> list[nn.Module]:
    """The batch norms of a model that keep statistics."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [module for module in model.modules() if isinstance(module, kinds) and module.running_mean is not None]


def _hash_model(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
