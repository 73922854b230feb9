"""Model directories: a pruned one becomes a packed one, and a packed one becomes a dense one again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn

from secateur._errors import FormatError, RecipeError
from secateur.calibration import batched, call_model, quiet, read_text
from secateur.files import (
    INDEX,
    SINGLE,
    ModelDirectory,
    check_file,
    check_output,
    copy_all_but_weights,
    find_shards,
    is_there,
    whole_directory,
)
from secateur.formats import VALUE_DTYPES
from secateur.huggingface import CalibrationText, Progress, TextReader, example_inputs, load_model, open_model
from secateur.packing._measure import cache_at
from secateur.packing._model import FILE, load_directory, save_with
from secateur.packing._pack import pack_
from secateur.packing._settings import PackSettings
from secateur.reports import PackReport
from secateur.shapes import save_shrunk
from secateur.shrinking import pruned_before, stages_in

REPORT = "secateur.pack.json"
_LONGEST = 128  # tokens of a window of text, unless more are asked for


def pack_directory(
    source: str | Path,
    output: str | Path,
    settings: PackSettings | None = None,
    *,
    calibration: CalibrationText | None = None,
    cache: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda description, done, total: None,
) -> PackReport:
    """Pack a pruned Hugging Face model directory into another one that :func:`load` reads.

    The patterns are those of the pruning report in the directory. Without a report they are found from the zeros.
    The whole model is timed before and after, and layers that do not pay are taken back, as with ``batches`` of
    :func:`pack_`. The inputs are made up: texts of as many tokens as the batch sizes say, or up to 8 images. If the
    model takes neither, the report says so.

    Args:
        source: model directory with safetensors weights.
        output: directory to write. It appears complete or not at all.
        settings: how to pack; None for the defaults. Without a value dtype and a precision, values are stored in the
            dtype of the checkpoint. Layers are measured in float32, in which CPUs are fast.
        calibration: text to measure the errors of outputs on, which a tolerance needs. Its windows have up to 128
            tokens, unless it asks for more.
        cache: a JSON file of measurements, to read and to add to.
        overwrite: replace an existing output directory.
        progress: called with a description, how much is done, and how much there is in total.

    Returns:
        The report of :func:`pack_`, which is also written to the directory.

    Raises:
        FormatError: the source is not a model directory with safetensors files, or the output or the cache cannot be
            written.
        RecipeError: no layer to pack, a glob that matches nothing, or a tolerance without a text.
        StatisticsError: the model does not take the text.
        ImportError: transformers is missing.
    """
    directory = open_model(source)
    check_output(directory.path, Path(output), overwrite, directory.num_bytes)
    if cache is not None:
        check_file(Path(cache), Path(output), inside=False)
        cache_at(cache)  # is it a cache?
    settings = PackSettings() if settings is None else settings
    if settings.tolerance is not None and calibration is None:
        raise RecipeError(
            f"tolerance={settings.tolerance:g} was given, but no text. The errors of layers are measured on inputs of "
            "the model. Give some with --calibration TEXT_FILE, or a precision instead."
        )
    text = None if calibration is None else read_text(calibration.path)
    progress("loading the model", 0, 1)
    model, missing = load_model(directory, "cpu", with_head=True)
    stored = directory.widest_dtype
    batches: list[dict[str, Tensor]] | None
    note: tuple[str, ...] = ()
    if calibration is not None and text is not None:
        batches = _windows(model, directory, text, calibration)
    else:
        batches, note = _examples(model, settings.batch_sizes)
        if batches is not None and settings.is_asked:
            note = (*note, "errors of outputs are those of made-up inputs; give a text for those of real ones")
    if settings.stored is None and settings.tolerance is None and stored in VALUE_DTYPES:
        settings = replace(settings, value_dtype=stored)
    untrained = [name for name, _ in model.named_modules() if f"{name}.weight" in missing]
    history = pruned_before(stages_in(directory.path), model)
    report = pack_(
        model,
        replace(settings, exclude=(*settings.exclude, *untrained)),
        batches=batches,
        cache=cache,
        history=history,
        progress=progress,
    )
    report = replace(report, notes=(*report.notes, *note))
    absent = [name for name in model.state_dict() if name in missing]
    progress("writing", 0, 1)
    extra = {REPORT: report.to_json() + "\n"}
    save_with(
        model, output, source=source, dtype=stored, overwrite=overwrite, history=history, absent=absent, extra=extra
    )
    return report


def _windows(
    model: nn.Module, directory: ModelDirectory, text: str, calibration: CalibrationText
) -> list[dict[str, Tensor]]:
    """Windows of a text, in batches as the model takes them."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise RecipeError(
            f"{directory.path} is an encoder-decoder model, which reads pairs of texts, and a text file has no pairs.\n"
            "Pack it in Python: secateur.pack_(model, batches=...), then secateur.save."
        )
    reader = TextReader(model, directory, calibration.sequence_length, _LONGEST)
    windows = reader.sample(text, calibration)
    return [{"input_ids": ids} for ids in batched(reader.tried(windows))]


def _examples(model: nn.Module, sizes: Sequence[int]) -> tuple[list[dict[str, Tensor]] | None, tuple[str, ...]]:
    """Made-up inputs to time a model with, and notes on those that it does not take; or None instead of inputs."""
    untimed = "the whole model was not timed before and after: "
    try:
        batches = [example_inputs(model, rows) for rows in sizes]
    except RecipeError as error:
        return None, (untimed + str(error).partition("\n")[0],)
    taken, notes = list[dict[str, Tensor]](), list[str]()
    for batch in batches:
        try:
            with quiet(model):
                call_model(model, batch)
            taken.append(batch)
        except Exception as error:  # whatever the code of a model raises at an input that it does not take
            reason = str(error).partition("\n")[0] or type(error).__name__
            notes.append(f"{type(model).__name__} fails with made-up {' and '.join(batch)}: {reason}")
    if not taken:
        return None, (untimed + notes[0],)
    return taken, tuple(f"the whole model was not timed with one of the inputs: {note}" for note in notes)


def export_directory(source: str | Path, output: str | Path, *, overwrite: bool = False) -> None:
    """Write a packed model directory as a dense one, zeros included, that other tools read.

    Args:
        source: a directory that :func:`save` or :func:`pack_directory` wrote.
        output: directory to write. It appears complete or not at all.
        overwrite: replace an existing output directory.

    Raises:
        FormatError: the source is not a packed model directory, or the output cannot be written.
        ImportError: transformers is missing.
    """
    source, output = Path(source), Path(output)
    if not (is_there(source) and source.is_dir()):
        what = "is a file, not a directory" if is_there(source) else "does not exist"
        raise FormatError(f"{source} {what}. Give a directory that secateur pack wrote.")
    check_output(source, output, overwrite, 0)
    model, contents = load_directory(source, dense=True, into=None, dtype=None)
    shards = (FILE,) if (source / FILE).exists() else find_shards(source)
    if contents.shrunk:
        left_out = (*shards, REPORT)
        absent = contents.absent
        save_shrunk(
            model, contents.shrunk, output, source=source, overwrite=overwrite, absent=absent, leave_out=left_out
        )
        return
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    check_output(source, output, overwrite, size)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in contents.absent}
    with whole_directory(output, overwrite=overwrite) as made:
        weights = made / ".weights"
        try:
            model.save_pretrained(weights, state_dict=state)  # type: ignore[operator]
        except (OSError, SafetensorError):
            raise
        except Exception as error:  # transformers does not check the config, and fails with any exception
            raise FormatError(f"{source} cannot be written by transformers: {error}") from None
        found = [entry for entry in sorted(weights.iterdir()) if entry.name in (SINGLE, INDEX) or "-of-" in entry.name]
        for entry in found:
            entry.rename(made / entry.name)
        shutil.rmtree(weights)
        copy_all_but_weights(source, made, (*shards, INDEX, REPORT))
