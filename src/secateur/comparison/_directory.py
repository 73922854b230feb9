"""Compare the ways to run the model in a directory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._checks import integer, one_of
from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.comparison._run import Measure, Settings, Shape, engine_versions, run_ways, use_threads
from secateur.comparison._subject import Deployed, Subject, check_packed
from secateur.comparison._ways import REFERENCE, WAYS, Way
from secateur.evaluation import METRICS, read_data
from secateur.exporting import export_directory, is_exported
from secateur.files import find_shards, is_there, read_header, scratch_folder
from secateur.huggingface import (
    directory_figures,
    directory_without_weights,
    is_measured_as_causal,
    reading_of,
    transformers_library,
)
from secateur.packing import FILE, PackSettings, machine, pack_directory
from secateur.packing import export_directory as write_dense
from secateur.pipeline import DirectoryEvaluation
from secateur.reports import ComparisonReport, Figure, versions

SHAPES: tuple[Shape, ...] = ((1, 16), (1, 128), (8, 64), (32, 64))

# Figures that a comparison is about, the first that a file gives. The others are measured beside it where they come
# with it at no cost.
_FIGURES = ("spearman", "accuracy", "perplexity", "rank", "embedding_similarity", "similarity")
_BESIDE = {"rank": ("rank", "embedding_similarity")}


@dataclass(frozen=True, eq=False)
class DirectorySubject:
    """The model in a directory: dense, pruned, shrunk or packed.

    Args:
        path: of the directory.
        name: in tables.
        is_dense: whether it is the dense model, which the other one is compared with.
        rows: numbers of input rows, for which layers are packed.
        folder: for what several ways share.
    """

    path: Path
    name: str
    is_dense: bool
    rows: tuple[int, ...]
    folder: Path
    _exported: dict[tuple[str, bool, bool], Deployed] = field(default_factory=dict)

    @property
    def _is_packed(self) -> bool:
        if is_there(self.path / FILE):
            return True
        return any(
            name.endswith(".compressed") for shard in find_shards(self.path) for name in _names(self.path, shard)
        )

    def _plain(self) -> Path:
        """The directory, or its dense form if it is packed, which is written once."""
        if not self._is_packed:
            return self.path
        dense = self.folder / "dense"
        if not dense.exists():
            write_dense(self.path, dense)
        return dense

    def in_torch(self, folder: Path) -> Deployed:
        """The model in PyTorch, with dense layers."""
        path = self._plain()
        return Deployed(path, _weight_bytes(path))

    def packed(self, folder: Path, precision: str | None) -> Deployed:
        """The model with packed layers: as they are, or with products of fewer bits."""
        if self._is_packed and precision is None:
            return Deployed(self.path, _weight_bytes(self.path), notes=("as it is stored",))
        settings = PackSettings(batch_sizes=self.rows, precision=precision)
        check_packed(pack_directory(self._plain(), folder / "packed", settings))
        return Deployed(folder / "packed", _weight_bytes(folder / "packed"))

    def exported(self, folder: Path, to: str, int8: bool, packed: bool) -> Deployed:
        """The model for another engine. What two ways share is written once."""
        if (key := (to, int8, packed)) not in self._exported:
            output = folder / "exported"
            report = export_directory(self._plain(), output, to=to, int8=int8, packed=packed, shapes=())
            assert report is not None  # it is for packed directories that are written dense
            self._exported[key] = Deployed(output, report.nbytes)
        return self._exported[key]


def _names(path: Path, shard: str) -> Iterable[str]:
    return read_header(path / shard)[0]


def _weight_bytes(path: Path) -> int:
    """Bytes of the weights of a model directory in PyTorch."""
    packed = path / FILE
    names = [packed.name] if is_there(packed) else find_shards(path)
    return sum((path / name).stat().st_size for name in names)


def compare_directory(
    source: str | Path,
    evaluate: str | Path,
    *,
    dense: str | Path | None = None,
    shapes: Iterable[Sequence[int]] | None = None,
    ways: Iterable[str] | None = None,
    metric: str | None = None,
    sequence_length: int | None = None,
    threads: int | None = None,
    memory: bool = True,
    progress: Progress = lambda description, done, total: None,
) -> ComparisonReport:
    """Compare the ways to run the model in a directory, and the dense one, on this machine's CPU.

    What is made for a way is written to a temporary folder, and is gone afterwards. Models stay in memory until all
    were timed, in turn.

    Args:
        source: model directory: dense, pruned, shrunk or packed.
        evaluate: file to measure on: text, pairs or labels.
        dense: directory of the dense model, which all is compared with; None for ``source`` itself.
        shapes: of the inputs to time, texts and tokens in each; None for 1 x 16, 1 x 128, 8 x 64 and 32 x 64, without
            those that are too long for the model.
        ways: by their names; None for all.
        metric: the figure that the comparison is about; None for the first of ``spearman``, ``accuracy``,
            ``perplexity``, ``rank``, ``embedding_similarity``, ``similarity`` that the file gives.
        sequence_length: tokens in a window of the file; None for the longest that the model takes, at most 2048.
        threads: to compute with; None for PyTorch's number.
        memory: whether to measure memory, each way in a process of its own.
        progress: called with a description, and how much of how much is done.

    Raises:
        FormatError: a directory is not that of a model.
        RecipeError: a way or a metric that does not exist, or a shape that the model does not take.
        StatisticsError: the file cannot be read, with the line.
        ImportError: transformers is missing.
    """
    began = time.perf_counter()
    source = Path(source)
    reference = source if dense is None else Path(dense)
    chosen = ways_named(ways)
    for path in dict.fromkeys((source, reference)):
        if is_exported(path):
            raise RecipeError(
                f"{path} has a model for another engine, and a comparison makes these itself.\nGive the directory that "
                "it was exported from."
            )
        directory_without_weights(path)
    directory = directory_without_weights(reference)
    longest = reading_of(directory, pools=False).length
    sizes, notes = _shapes(shapes, longest)
    data = read_data(evaluate)
    gives = directory_figures(directory, data, True)[0]
    about = next(name for name in _FIGURES if name in gives) if metric is None else one_of("metric", metric, gives)
    beside = [name for name in _BESIDE.get(about, (about,)) if name in gives]
    evaluation = DirectoryEvaluation(
        reference, [evaluate], has_dense=True, metrics=beside, sequence_length=sequence_length, device="cpu"
    )
    with use_threads(threads) as number, scratch_folder(None) as folder:
        rows = tuple(sorted({batch * tokens for batch, tokens in sizes}))
        subjects: list[Subject] = []
        if dense is not None:
            subjects.append(DirectorySubject(reference, "dense", True, rows, folder / "of-dense"))
        subjects.append(DirectorySubject(source, source.name, False, rows, folder / "of-model"))
        settings = Settings(
            batches={shape: _tokens(directory, shape) for shape in sizes},
            measure=_measure(evaluation, about),
            folder=folder,
            with_head=data.kind == "labels" or is_measured_as_causal(directory),
            is_directory=True,
            threads=number,
            memory=memory,
            progress=progress,
        )
        results, place = run_ways(subjects, chosen, settings)
        return ComparisonReport(
            ways=results,
            shapes=sizes,
            reference=place,
            model=source.name,
            dense="" if dense is None else reference.name,
            metric=about,
            higher_is_better=METRICS[about].higher_is_better,
            threads=number,
            seconds=time.perf_counter() - began,
            machine=machine(),
            notes=(*notes, *evaluation.notes),
            versions={**versions(), "transformers": transformers_library().__version__, **engine_versions()},
        )


def ways_named(names: Iterable[str] | None) -> list[Way]:
    """Return ways by their names, the one that others are compared with among them; None for all.

    Raises:
        RecipeError: there is no such way.
        TypeError: one name in place of several.
    """
    if isinstance(names, str):
        raise TypeError(f"ways must be several names, got one str; wrap it in a list: [{names!r}]")
    wanted = list(WAYS) if names is None else [one_of("way", name, WAYS) for name in names]
    return [way for name, way in WAYS.items() if name in wanted or name == REFERENCE]


def _shapes(shapes: Iterable[Sequence[int]] | None, longest: int) -> tuple[tuple[Shape, ...], list[str]]:
    """The shapes to time, and notes on those that were left out."""
    if shapes is None:
        kept = tuple(shape for shape in SHAPES if shape[1] <= longest)
        left = [shape for shape in SHAPES if shape[1] > longest]
        texts = " and ".join(f"{batch} x {tokens}" for batch, tokens in left)
        notes = [f"{texts} was left out: the model takes {longest} tokens"] if left else []
        return kept or ((1, longest),), notes
    found: list[Shape] = []
    for shape in shapes:
        if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) != 2:
            raise RecipeError(f"a shape is two numbers, texts and tokens in each, such as (8, 64); got {shape!r:.60}.")
        batch, tokens = (integer("a size of a shape", size, 1) for size in shape)
        if tokens > longest:
            raise RecipeError(
                f"a shape of {batch} x {tokens} is longer than the {longest} tokens that the model takes.\nGive "
                "shorter texts."
            )
        found.append((batch, tokens))
    if not found:
        raise RecipeError("shapes is empty. Give at least one, such as (1, 16).")
    return tuple(dict.fromkeys(found)), []


def _tokens(directory: Any, shape: Shape) -> dict[str, torch.Tensor]:
    """Texts without padding: how long they are decides how long they take, not what they say."""
    vocabulary = directory.config.get("vocab_size")
    most = vocabulary if isinstance(vocabulary, int) and vocabulary > 8 else 256
    first = min(1000, most // 2)  # tokens with a meaning for the model are mostly the first ones
    ids = torch.randint(first, most, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _measure(evaluation: DirectoryEvaluation, about: str) -> Measure:
    def measure(model: nn.Module) -> tuple[tuple[Figure, ...], tuple[str, ...]]:
        figures, notes = evaluation.measure_model(model)
        first = [found for found in figures if found.metric == about]
        return (*first, *(found for found in figures if found.metric != about)) if first else (), notes

    return measure
