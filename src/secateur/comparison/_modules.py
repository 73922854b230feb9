"""Compare the ways to run a module: one that reads no text, or is of no library."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from secateur._errors import RecipeError, StatisticsError
from secateur._types import Progress
from secateur.calibration import fit_arguments, load_batches
from secateur.comparison._directory import ways_named
from secateur.comparison._run import Measure, Settings, Shape, engine_versions, run_ways, use_threads
from secateur.comparison._subject import Deployed, Subject, check_packed, state_bytes
from secateur.evaluation import evaluate
from secateur.exporting import export
from secateur.files import scratch_folder
from secateur.layers import check_model
from secateur.nn import packed_layers, packed_recurrents, packed_stacks
from secateur.packing import machine, pack_, save, unpack_
from secateur.reports import ComparisonReport, Figure, versions


@dataclass(frozen=True, eq=False)
class ModuleSubject:
    """A module in memory, which is never changed.

    Args:
        module: dense, pruned, shrunk or packed.
        name: in tables.
        is_dense: whether it is the dense model, which the other one is compared with.
        batch: one input.
    """

    module: nn.Module
    name: str
    is_dense: bool
    batch: Any
    _exported: dict[tuple[str, bool, bool], Deployed] = field(default_factory=dict)

    def _copy(self, dense: bool = True) -> nn.Module:
        made = copy.deepcopy(self.module).eval()
        if dense:
            unpack_(made)
        return made

    def in_torch(self, folder: Path) -> Deployed:
        """The module with dense layers."""
        made = self._copy()
        return Deployed(_written(made, folder), state_bytes(made, folder), made)

    def packed(self, folder: Path, precision: str | None) -> Deployed:
        """The module with packed layers: as they are, or with products of fewer bits."""
        made = self._copy(dense=False)
        as_it_is = precision is None and bool(packed_layers(made) or packed_recurrents(made) or packed_stacks(made))
        if not as_it_is:
            check_packed(pack_(made, batches=[self.batch], precision=precision))
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "module.sparse.safetensors"
        save(made, file)
        return Deployed(_written(made, folder), file.stat().st_size, made, ("as it is",) if as_it_is else ())

    def exported(self, folder: Path, to: str, int8: bool, packed: bool) -> Deployed:
        """The module for another engine. What two ways share is written once."""
        if (key := (to, int8, packed)) not in self._exported:
            output = folder / "exported"
            report = export(self._copy(), self.batch, output, to=to, int8=int8, packed=packed, shapes=())
            self._exported[key] = Deployed(output, report.nbytes)
        return self._exported[key]


def _written(module: nn.Module, folder: Path) -> Path | None:
    """Write a module for another process; None where it cannot be pickled."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "module.pt"
    try:
        torch.save(module, file)
    except Exception:  # a class inside of a function, a lambda: whatever pickle makes of it
        file.unlink(missing_ok=True)
        return None
    return file


def compare_modules(
    model: nn.Module,
    data: Iterable[Any],
    *,
    dense: nn.Module | None,
    batches: Iterable[Any] | None,
    ways: Iterable[str] | None,
    metric: str | Callable[[nn.Module, Any], float] | None,
    threads: int | None,
    memory: bool,
    progress: Progress,
) -> ComparisonReport:
    """Compare the ways to run a module. For the arguments see :func:`secateur.compare`."""
    began = time.perf_counter()
    check_model(model)
    chosen = ways_named(ways)
    reference = model if dense is None else check_model(dense)
    cpu = torch.device("cpu")
    for part in (model, reference):
        if any(tensor.device.type != "cpu" for tensor in (*part.parameters(), *part.buffers())):
            raise RecipeError("compare runs on the CPU, and the model is elsewhere. Move it first: model.cpu().")
    known = load_batches(data, cpu)
    inputs = fit_arguments(reference, known, cpu).batches
    timed = by_shape(usual(inputs[0]) if batches is None else fit_arguments(reference, list(batches), cpu).batches)
    measure = _measure(metric, known, inputs, reference)
    names = (type(model).__name__, type(reference).__name__)
    with use_threads(threads) as number, scratch_folder(None) as folder:
        batch = next(iter(timed.values()))
        subjects: list[Subject] = [] if dense is None else [ModuleSubject(dense, "dense", True, batch)]
        subjects.append(ModuleSubject(model, names[0], False, batch))
        settings = Settings(timed, measure, folder, False, False, number, memory, progress)
        results, place = run_ways(subjects, chosen, settings)
        first = results[place].figures[0]
        return ComparisonReport(
            ways=results,
            shapes=tuple(timed),
            reference=place,
            model=names[0],
            dense="" if dense is None else names[1],
            metric=first.metric,
            higher_is_better=first.higher_is_better is not False,
            threads=number,
            seconds=time.perf_counter() - began,
            machine=machine(),
            versions={**versions(), **engine_versions()},
        )


def _measure(
    metric: str | Callable[[nn.Module, Any], float] | None, known: list[Any], inputs: list[Any], reference: nn.Module
) -> Measure:
    """Similarity to the dense model, or what was asked for. Labels stay where they are needed."""
    name = "similarity" if metric is None else metric
    data = inputs if name in ("similarity", "embedding_similarity", "rank") else known

    def measure(model: nn.Module) -> tuple[tuple[Figure, ...], tuple[str, ...]]:
        report = evaluate(model, data, name, reference)
        return report.figures, report.notes

    return measure


def usual(batch: Any) -> list[Any]:
    """Return the first input of a batch alone, and the whole batch."""
    rows = {leaf.shape[0] for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.ndim}
    if len(rows) != 1 or rows == {1}:
        return [batch]
    return [tree_map(lambda leaf: leaf[:1] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch), batch]


def by_shape(batches: Sequence[Any]) -> dict[Shape, Any]:
    """Return batches by the shape of their first tensor.

    Raises:
        StatisticsError: one has no tensor, or there is none.
    """
    found: dict[Shape, Any] = {}
    for index, batch in enumerate(batches):
        first = next((leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)), None)
        if first is None:
            raise StatisticsError(f"batch {index} has no tensor, and the shape of the first one names what is timed.")
        found.setdefault(tuple(first.shape), batch)
    if not found:
        raise StatisticsError("batches is empty. Give at least one input to time, or leave it out.")
    return found
