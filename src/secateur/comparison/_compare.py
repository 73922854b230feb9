"""Compare all ways to run a model on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from secateur._checks import flag, instance, integer
from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.comparison._directory import compare_directory
from secateur.comparison._modules import compare_modules
from secateur.reports import ComparisonReport


def compare(
    model: nn.Module | str | Path,
    data: Any,
    *,
    dense: nn.Module | str | Path | None = None,
    batches: Iterable[Any] | None = None,
    shapes: Iterable[Sequence[int]] | None = None,
    ways: Iterable[str] | None = None,
    metric: str | Callable[[nn.Module, Any], float] | None = None,
    threads: int | None = None,
    memory: bool = True,
    progress: Progress = lambda description, done, total: None,
) -> ComparisonReport:
    """Run a model, and the dense one that it was made from, in every way that this machine has, and compare them.

    The ways are PyTorch (eager, ``torch.compile``, dynamic int8), ONNX Runtime and OpenVINO in several precisions, and
    secateur's packed layers. What is not installed, or does not work for this model, has a row with the reason. All
    ways are timed in turn, so that a busy machine affects them alike. Figures of quality are those of
    :func:`secateur.evaluate`, the same for all ways. Everything runs on the CPU, and the models are not changed.

    Args:
        model: a module, or a model directory: dense, pruned, shrunk or packed.
        data: what quality is measured on: for a module batches that it takes, for a directory the path of a file.
        dense: the model that it was made from, as a module or a directory, in the same way; None to compare only the
            ways to run ``model``.
        batches: for a module the inputs to time, one for each shape; None for the first batch of ``data``, and its
            first row alone.
        shapes: for a directory the inputs to time, texts and tokens in each; None for 1 x 16, 1 x 128, 8 x 64 and
            32 x 64.
        ways: by their names, such as ``["onnx-int8", "packed"]``; None for all. That of PyTorch is always among them.
        metric: the figure that the comparison is about; None for similarity to the dense model, and for what a file
            gives. For a module also a function that is called with the model and the data, and returns a number that
            is higher for better models.
        threads: to compute with; None for PyTorch's number.
        memory: whether to measure the memory that a model takes, each way in a process of its own.
        progress: called with a description, and how much of how much is done.

    Returns:
        A frozen report: for each way times with their spread, bytes, memory and quality; which ways no other one
        beats; and with ``to_html()`` a page with a picture of them.

    Raises:
        RecipeError: an unknown way or metric, or arguments that do not go together.
        StatisticsError: data that cannot be read, or does not fit the model.
        FormatError: a directory is not that of a model.
        TypeError: an argument of another type.

    Example:
        >>> import copy, torch, secateur
        >>> _ = torch.manual_seed(0)
        >>> dense = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> model = copy.deepcopy(dense)
        >>> _ = secateur.prune_(model, sparsity=0.5, method="magnitude")
        >>> report = secateur.compare(model, [torch.randn(8, 64)], dense=dense, ways=["torch-int8"], memory=False)
        >>> [way.name for way in report.ways if not way.absence]
        ['PyTorch, dense', 'PyTorch int8, dense', 'PyTorch, Sequential', 'PyTorch int8, Sequential']
        >>> report.shapes
        ((1, 64), (8, 64))
    """
    flag("memory", memory)
    if threads is not None:
        integer("threads", threads, 1)
    if isinstance(model, str | Path):
        if dense is not None:
            instance("dense", dense, (str | Path), "a directory, as the model is")  # type: ignore[arg-type]
        if batches is not None:
            raise RecipeError("batches are for modules. Give shapes for a directory, such as [(8, 64)].")
        if metric is not None:
            instance("metric", metric, str, "a name for a directory")
        return compare_directory(
            model,
            instance("data", data, (str | Path), "the path of a file for a directory"),  # type: ignore[arg-type]
            dense=dense,  # type: ignore[arg-type]
            shapes=shapes,
            ways=ways,
            metric=metric,  # type: ignore[arg-type]
            threads=threads,
            memory=memory,
            progress=progress,
        )
    instance("model", model, nn.Module, "a module or a directory")
    known = None if dense is None else instance("dense", dense, nn.Module, "a module, as the model is")
    if shapes is not None:
        raise RecipeError("shapes are for directories. Give batches for a module: one input for each shape.")
    if isinstance(data, str | Path):
        raise RecipeError(
            "a module is measured on batches, and data is a file.\nGive batches that the model takes; or save the "
            "model, and compare its directory."
        )
    return compare_modules(
        model,
        data,
        dense=known,
        batches=batches,
        ways=ways,
        metric=metric,
        threads=threads,
        memory=memory,
        progress=progress,
    )
