"""What pruning, training, packing and a packed file do with one family. Every stage makes its model anew.

- prune: 2:4 and 60 % with calibration by the default method. Zeros are counted in the parameters, not in the report.
- coverage: the share of all weights in matrices, outside embeddings and output heads, that pruning reaches.
- train: a few steps by gate and by SR-STE; the mask acts if finalize does not change the output.
- pack: with made-up times, so that every layer that can be packed is; then save, and load into a new model.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from families import FAMILIES, Family, first_line, matrices, run
from torch import Tensor, nn

import secateur
from secateur.calibration import call_model

TARGETS: tuple[tuple[str, float | None], ...] = (("2:4", None), ("unstructured", 0.6))
METHODS = ("gate", "sr-ste")
STEPS = 10


@dataclass
class Line:
    """What was found out about a family; an empty cell means that a stage was not reached."""

    name: str
    group: str
    parameters: int = 0
    coverage: float | None = None
    prune: str = ""
    replay: str = ""
    train: str = ""
    pack: str = ""
    reload: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def note(self, stage: str, text: str) -> None:
        known = next((note for note in self.notes if note.partition(": ")[2] == text), None)
        if known is None:
            self.notes.append(f"{stage}: {text}")
        else:
            self.notes[self.notes.index(known)] = f"{known.partition(': ')[0]}, {stage}: {text}"


def floats(output: Any) -> list[Tensor]:
    """All floating tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, torch.nn.utils.rnn.PackedSequence):
        return [output.data]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [tensor for value in values for tensor in floats(value)]


@torch.no_grad()
def outputs(family: Family, model: nn.Module) -> list[Tensor]:
    return floats(run(family, model, family.batches()[0]))


def differ(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest difference of two outputs, relative to the largest value of the tensor."""
    return max(
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
        for a, b in zip(first, second, strict=True)
        if a.numel()
    )


@torch.no_grad()
def rounding(family: Family, model: nn.Module, expected: list[Tensor]) -> float:
    """How far an output moves when every matrix changes by about one unit in the last place: much, in a few models."""
    torch.manual_seed(family.seed)
    kept = [(parameter, parameter.clone()) for parameter in matrices(family, model).values()]
    for parameter, _ in kept:
        parameter.mul_(1 + 2e-7 * torch.randn_like(parameter))
    moved = differ(expected, outputs(family, model))
    for parameter, before in kept:
        parameter.copy_(before)
    return moved


@contextmanager
def every_route_wins() -> Iterator[None]:
    """Let each packed route be faster than the dense layer, without measuring."""

    def in_turn(calls: dict[Any, Callable[[], object]], *args: Any, **kwargs: Any) -> dict[Any, list[float]]:
        fixed = {"dense": 1.0, "prepacked": 2.0}
        return {name: [fixed.get(str(name), 0.25 + 0.01 * index)] * 3 for index, name in enumerate(calls)}

    with (
        mock.patch("secateur.packing._measure.time_in_turn", in_turn),
        mock.patch("secateur.packing._bench.time_in_turn", in_turn),
        mock.patch("secateur.timing.MeasurementCache._memory", {}),
    ):
        yield


@contextmanager
def noting_warnings(line: Line, stage: str) -> Iterator[None]:
    """Note what secateur warns of, which names this file as the caller; other libraries warn of much."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    for sentence in dict.fromkeys(str(one.message).partition("\n")[0] for one in said if one.filename == __file__):
        line.note(stage, f"warns: {sentence}")


def loss_of(family: Family, model: nn.Module, batch: Any) -> Tensor:
    return sum((tensor.square().mean() for tensor in floats(run(family, model, batch))), torch.zeros(()))


def zeros(parameters: dict[str, nn.Parameter]) -> dict[str, int]:
    return {name: int((parameter == 0).sum()) for name, parameter in parameters.items()}


def prune(family: Family, line: Line) -> nn.Module | None:
    """Prune to each target; return the model of the last one, or None."""
    cells, model = [], None
    for pattern, sparsity in TARGETS:
        label = pattern if sparsity is None else f"{100 * sparsity:g} %"
        model = family.model()
        before = zeros(dict(model.named_parameters()))
        settings: dict[str, Any] = {"pattern": pattern, "sparsity": sparsity, "forward": family.forward}
        try:
            with noting_warnings(line, f"prune {label}"):
                try:
                    report = secateur.prune_(model, family.batches(), **settings)
                except secateur.PatternError as error:
                    line.note(f"prune {label}", first_line(error))
                    report = secateur.prune_(
                        model, family.batches(), **settings | {"pattern": f"{pattern},remainder=dense"}
                    )
                    label += " but for the remainder"
        except Exception as error:
            line.note(f"prune {label}", first_line(error))
            cells.append(f"{label}: no")
            model = None
            continue
        line.replay = (
            report.calibration_mode.partition(" (")[0].removeprefix("sequential with ").removeprefix("sequential in ")
        )
        after = zeros(dict(model.named_parameters()))
        made = sum(after.values()) - sum(before.values())
        cells.append(label if made == report.num_pruned else f"{label}: {made} zeros, reported {report.num_pruned}")
        counted = matrices(family, model)
        total = sum(parameter.numel() for parameter in counted.values())
        reached = sum(after[name] - before[name] for name in counted)
        coverage = reached / total / report.sparsity if total and report.sparsity else 0.0
        line.coverage = round(min(coverage, line.coverage if line.coverage is not None else 1.0, 1.0), 4)
        if pattern != "2:4":
            explain_rest(line, model, report, counted, after)
    line.prune = ", ".join(cells)
    return model


def parameters_of(model: nn.Module, name: str) -> set[str]:
    """The parameters that a report means: those of a module, one by its own name, or the one that a part lies in."""
    known = dict(model.named_parameters(remove_duplicate=False))
    while name and name not in known:
        own = {key for key in known if key.rpartition(".")[0] == name}
        if own:
            return own
        name = name.rpartition(".")[0]
    return {name} & known.keys()


def explain_rest(
    line: Line, model: nn.Module, report: secateur.Report, counted: dict[str, nn.Parameter], after: dict[str, int]
) -> None:
    """Note why matrices stayed dense: what the report says of the modules that own them, the most weights first."""
    reasons = {skip.name: skip.reason for skip in report.skipped}
    untouched: dict[str, int] = {}
    for name, parameter in counted.items():
        owner = name.rpartition(".")[0]
        if not after[name]:
            inside = next((why for other, why in reasons.items() if other.startswith(f"{name}.")), "not in the report")
            reason = reasons.get(name, reasons.get(owner, inside))
            untouched[reason] = untouched.get(reason, 0) + parameter.numel()
    total = sum(parameter.numel() for parameter in counted.values())
    for reason, count in sorted(untouched.items(), key=lambda item: -item[1])[:2]:
        if count > 0.01 * total:
            line.note(f"{100 * count / total:.0f} % stay dense", reason)


def train(family: Family, line: Line) -> None:
    """A few steps of each method that learns its mask; the output just before and after finalize must be the same."""
    model = family.model()
    try:
        for batch in family.batches():
            loss_of(family, model, batch).backward()
    except RuntimeError as error:
        line.train = "not without secateur either"
        line.note("train", first_line(error))
        return
    cells = []
    for method in METHODS:
        model = family.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        try:
            training = secateur.SparseTraining(model, optimizer, method=method, sparsity=0.6, steps=STEPS)
            batches = family.batches()
            for step in range(STEPS):
                optimizer.zero_grad()
                loss_of(family, model, batches[step % len(batches)]).backward()
                optimizer.step()
                training.step()
            before = outputs(family, model)
            report = training.finalize()
        except Exception as error:
            cells.append("no")
            line.note(f"train {method}", first_line(error))
            continue
        change = differ(before, outputs(family, model))
        made = sum(zeros(dict(model.named_parameters())).values())
        counted = matrices(family, model)
        share = sum(zeros(counted).values()) / report.sparsity / sum(map(torch.numel, counted.values()))
        cells.append(
            f"{made} zeros, reported {report.num_pruned}"
            if made < report.num_pruned
            else ("yes" if share >= 0.95 else f"yes, {100 * share:.1f} % of the matrices")
            if change == 0
            else f"finalize changes the output by {change:.0e}"
        )
    line.train = cells[0] if len(set(cells)) == 1 else ", ".join(map(": ".join, zip(METHODS, cells, strict=True)))


def pack(family: Family, line: Line, model: nn.Module) -> None:
    expected = outputs(family, model)
    tolerance = max(1e-2, 10 * (noise := rounding(family, model, expected)))
    if noise > 1e-2:
        line.note("pack", f"one unit in the last place of its weights moves the output by {noise:.0%}")
    pruned = sum(zeros(matrices(family, model)).values())
    with every_route_wins():
        forward = family.forward or call_model
        report = secateur.pack_(model, batch_sizes=[1, 32], batches=family.batches(), forward=forward)
    packed = [layer for layer in report.layers if layer.packed]
    # Of all matrices of a layer, such as the experts of a stack; the models are float32.
    removed = sum(round((1 - layer.density) * layer.dense_bytes / 4) for layer in packed)
    after = outputs(family, model)
    change = differ(expected, after)
    line.pack = f"{100 * removed / pruned:.0f} %" if change < tolerance else f"the output changes: {change:.0%}"
    reasons: dict[str, set[str]] = {}  # the parameters with zeros that each one leaves dense
    dense_layers = [(layer.reason, layer.name) for layer in report.layers if not layer.packed]
    for reason, name in (*dense_layers, *((skip.reason, skip.name) for skip in report.skipped)):
        reasons.setdefault(reason, set()).update(parameters_of(model, name))
    counts = zeros(matrices(family, model))
    for reason, names in sorted(reasons.items(), key=lambda item: -sum(counts.get(name, 0) for name in item[1]))[:1]:
        if sum(counts.get(name, 0) for name in names) > 0.01 * pruned:
            line.note("not packed", reason)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        try:
            secateur.save(model, path)
            again = secateur.load(path, into=family.model())
            change = differ(after, outputs(family, again))
            line.reload = "equal" if change == 0 else "equal but for rounding" if change < 1e-5 else f"{change:.1e}"
        except Exception as error:
            line.reload = "no"
            line.note("reload", first_line(error))


def examine(family: Family) -> Line:
    line = Line(family.name, family.group)
    began = time.perf_counter()
    try:
        line.parameters = sum(parameter.numel() for parameter in family.model().parameters())
        outputs(family, family.model())
    except Exception as error:
        line.note("the model itself", first_line(error))
        return line
    pruned = None
    try:
        pruned = prune(family, line)
    except Exception as error:
        line.note("prune", first_line(error))
    try:
        if pruned is None:  # packing is another question
            pruned = family.model()
            secateur.prune_(pruned, pattern="unstructured", sparsity=0.6, method="magnitude")
        pack(family, line, pruned)
    except Exception as error:
        line.pack = "no"
        line.note("pack", first_line(error))
    train(family, line)
    line.seconds = time.perf_counter() - began
    return line


def set_up() -> None:
    """What each process does first."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # tiny tensors, and sums in one order


def examine_named(name: str) -> Line:
    """For another process, which finds the family by its name."""
    return examine(next(family for family in FAMILIES if family.name == name))
