"""Recover the model in a Hugging Face model directory, and write it into another one."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.calibration import read_text
from secateur.evaluation import DataFile, DenseQuality, Pooling, read_data
from secateur.files import ModelDirectory, check_output, hash_files, work_folder
from secateur.huggingface import (
    CalibrationText,
    StoredWeights,
    check_head,
    directory_figures,
    load_model,
    open_model,
    pooling_of,
    reading_of,
    sentence_length,
    transformers_library,
)
from secateur.recovery._directory_match import check_buffers, check_models, check_processes, check_tokenizers
from secateur.recovery._directory_text import LearningText
from secateur.recovery._directory_write import freeze_unstored_, round_as_stored_
from secateur.recovery._recover import recover_
from secateur.recovery._settings import Loss, Settings
from secateur.reports import PRUNING_REPORT, Evaluation, RecoveryReport, Stage, stages_to_json
from secateur.shrinking import stages_in


def recover_directory(
    source: str | Path,
    output: str | Path,
    *,
    dense: str | Path,
    calibration: str | Path | CalibrationText,
    method: str = "full",
    loss: str | Loss = "auto",
    minutes: float | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    evaluate: Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    restart: bool = False,
    work: Path | None = None,
    keep_on_interrupt: bool = True,
    progress: Progress = lambda description, done, total: None,
) -> RecoveryReport:
    """Train the model in a directory to give again what the dense one gives, and write it into another directory.

    The output has the input's shards, dtypes, tokenizer and other files. Zeros stay zeros, also as they are stored, and
    a model that was shrunk keeps its sizes. ``secateur.json`` holds the reports of all that was done to the model.

    The run keeps its state in ``OUTPUT.work`` beside the output. The same call goes on where an earlier one was ended.

    Args:
        source: model directory with safetensors weights: pruned, shrunk, or both.
        output: directory to write; it appears complete or not at all.
        dense: directory of the model that it was made from.
        calibration: text to learn from: plain, or JSON lines with a ``text`` field. All of it is used, or of a
            :class:`CalibrationText` as many samples as it says.
        method, loss, minutes, steps, learning_rate: see :func:`recover_`.
        batch_size: rows of a step; None for 64 sentences, or windows of 2,048 tokens together.
        sequence_length: most tokens of a sentence or window; None for what the model takes, at most 256.
        seed: of all that is drawn at random.
        evaluate: file to measure on before and after: text for the perplexity of causal language models and the mean
            cosine similarity of the outputs of any other to the dense model's; or pairs, or labels, see ``evaluate``.
            It should not be the text to learn from.
        device: where to compute; None for a GPU if there is one.
        dtype: to compute in; None for float32. Weights are stored in the checkpoint's dtype, and measured as stored.
        overwrite: replace an existing output directory.
        restart: ignore what earlier runs left.
        work: folder for the run's state, which then stays; None for ``OUTPUT.work``, which is removed at the end.
        keep_on_interrupt: on Ctrl-C write the best state so far. The report says ``interrupted``.
        progress: called with a description, and how much of how much is done.

    Raises:
        FormatError: a directory is not a safetensors model directory, or the output cannot be written.
        RecipeError: the models do not correspond.
        SparsityError: its other children, for settings and texts that do not fit.
        ImportError: transformers is missing.
    """
    asked = Settings(method=method, loss=loss, minutes=minutes, steps=steps, learning_rate=learning_rate, seed=seed)
    check_processes()
    if work is not None and restart:
        raise RecipeError(
            "restart concerns the state beside the output, and work= gives another folder. Leave out one."
        )
    directory, original = open_model(source), open_model(dense)
    check_output(directory.path, Path(output), overwrite, directory.num_bytes)
    text = calibration if isinstance(calibration, CalibrationText) else Path(calibration)
    path = text.path if isinstance(text, CalibrationText) else text
    known = check_tokenizers(directory, original, read_text(path))
    heldout = None if evaluate is None else read_data(evaluate)
    if evaluate is not None and hash_files(evaluate) == hash_files(path):
        known = (*known, f"{evaluate.name} is the text that the model learned from, so its figure says little")
    pooling = _pooling(directory)
    if pooling is not None:
        sequence_length = sequence_length or sentence_length(directory.path)

    progress("loading the models", 0, 2)
    dtype = dtype or torch.float32
    model, missing = load_model(directory, device, dtype, with_head=True)
    progress("loading the models", 1, 2)
    teacher, _ = load_model(original, device, dtype, with_head=True)
    check_models(directory, model, original, teacher)
    check_buffers(directory, model)
    learning = LearningText.of(
        model,
        directory,
        text,
        is_embedder=pooling is not None,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
    )
    trainable = [name for name, _ in model.named_parameters() if name not in missing]
    stored = StoredWeights(model, directory, trainable)
    frozen = freeze_unstored_(model, teacher, stored, missing)
    quality = None
    if heldout is not None:
        quality = _Quality.of(model, teacher, directory, missing, heldout, progress)
    facts = {
        "model": hash_files(directory.path),
        "dense model": hash_files(original.path),
        "text": hash_files(path),
        **{name: str(value) for name, value in asked.to_dict().items()},
        "batches": str(dict(learning.provenance)),
        "device and dtype": f"{next(model.parameters()).device} {dtype}",
    }
    stages = stages_in(directory.path)
    with _state(Path(output), work, restart, facts) as folder:
        report = recover_(
            model,
            teacher,
            learning.batches,
            method=method,
            loss=loss,
            minutes=minutes,
            steps=steps,
            learning_rate=learning_rate,
            pooling=pooling,
            history=_since(stages, stages_in(original.path)),
            seed=seed,
            checkpoint=folder,
            progress=progress,
        )
        if report.interrupted and not keep_on_interrupt:
            raise KeyboardInterrupt
        kept = round_as_stored_(model, stored, directory)
        evaluation, found = (None, ()) if quality is None else quality.compare(model, progress)
        report = replace(
            report,
            calibration=dict(learning.provenance),
            versions={**report.versions, "transformers": transformers_library().__version__},
            evaluation=evaluation,
            notes=(*report.notes, *known, *found, *_notes(frozen, kept)),
        )
        progress("writing", 0, 1)
        directory.write_pruned(output, stored, {PRUNING_REPORT: stages_to_json([*stages, report]) + "\n"}, overwrite)
        if work is None and not report.interrupted:
            shutil.rmtree(folder, ignore_errors=True)
    return report


@contextmanager
def _state(output: Path, work: Path | None, restart: bool, facts: Mapping[str, str]) -> Iterator[Path]:
    """Yield the folder for the state of a run: the one that was given, or that of these facts beside the output."""
    if work is not None:
        yield work
        return
    with work_folder(output, restart=restart) as folder:
        step = folder.step("recover", facts)
        if step.changed:
            warnings.warn(
                f"{folder.path} holds an earlier run, but with another {' and another '.join(step.changed)}, so this "
                "one begins anew.\nThe earlier one stays there; remove it if you no longer need it.",
                stacklevel=4,
            )
        yield step.path


def _pooling(directory: ModelDirectory) -> Pooling | None:
    """The pooling of a sentence-transformers directory."""
    try:
        return pooling_of(directory.path)
    except RecipeError as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(
            f"{reason}\nRecover it in Python: secateur.recover_(model, teacher, batches, pooling=...), with your own "
            "way to embed."
        ) from None


def _since(stages: Sequence[Stage], before: Sequence[Stage]) -> Sequence[Stage]:
    """What was done to a model since it was the dense one, which may itself have been pruned or shrunk."""
    return stages[len(before) :] if list(stages[: len(before)]) == list(before) else stages


def _notes(frozen: Sequence[str], kept: int) -> list[str]:
    found = []
    if frozen:
        found.append(
            f"{len(frozen)} parameters did not learn, because the files have them in another form than the model uses "
            f"them: {', '.join(frozen[:5])}"
        )
    if kept:
        found.append(f"{kept:,} weights keep the value that they had, because the new one would be stored as zero")
    return found


@dataclass(frozen=True)
class _Quality:
    """The quality of the dense model on some text, and of the model before it learned.

    Args:
        dense: that of the dense model.
        start: that of the model as it came; None where the outputs cannot be compared.
    """

    dense: DenseQuality
    start: Evaluation | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        teacher: nn.Module,
        directory: ModelDirectory,
        missing: set[str],
        file: DataFile,
        progress: Progress,
    ) -> _Quality:
        """Measure both models on a file."""
        directory_figures(directory, file, has_dense=True)
        if file.kind == "labels":
            check_head(directory, model, missing)
        reading = reading_of(directory, pools=file.kind == "pairs")
        dense = DenseQuality.of(teacher, file, reading, progress)
        return cls(dense, dense.compare(model, progress)[0])

    def compare(self, model: nn.Module, progress: Progress) -> tuple[Evaluation | None, tuple[str, ...]]:
        """Return the figure as the model came and as it is now, and what that is of the gap to the dense model."""
        found, notes = self.dense.compare(model, progress)
        if found is None or self.start is None:
            return None, notes
        gap = found.before - self.start.after
        was_worse = gap < 0 if found.metric == "perplexity" else gap > 0
        closed = f"; {(found.after - self.start.after) / gap:.0%} of the gap is closed" if was_worse else ""
        words = f"{found.metric} of the dense model: {found.before:.4g}{closed}"
        return replace(found, before=self.start.after), (*notes, words)
