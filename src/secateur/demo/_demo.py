"""The demo: the language model that comes with secateur, pruned by every method under several patterns, and packed."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration import Windows, batched, read_text
from secateur.evaluation import perplexity
from secateur.files import ModelDirectory, check_file, write_text
from secateur.huggingface import load_model, load_tokenizer
from secateur.packing import pack_, save
from secateur.pruning import Recipe, prune_
from secateur.reports import Comparison, Report, Table, TableColumn, comparison_page, require_page_extra
from secateur.solvers import method_name

METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "magnitude+refit", "wanda+refit", "sparsegpt+refit")
TARGETS: tuple[tuple[str, float | None], ...] = (
    ("unstructured", 0.5),
    ("unstructured", 0.6),
    ("unstructured", 0.7),
    ("2:4", None),
)
SAMPLES = 64  # calibration windows
LENGTH = 256  # tokens in a window, the context that the model was trained with
HELDOUT_WINDOWS = 96

INTRO = (
    "A Llama with 4.2 million parameters, trained on the source of the Python standard library. Each row is one run: "
    "the model is pruned, calibrated on modules that it was trained on, and its perplexity is measured on modules that "
    "it never saw. It is a small model: read the order of the methods from it, not the size of the gaps in a large one."
)


class DemoModel:
    """The model, its calibration batches for any seed, and its held-out text."""

    def __init__(self) -> None:
        with as_file(files("secateur.demo") / "model") as path:
            directory = ModelDirectory.open(path)
            tokenizer = load_tokenizer(directory)
            self.model = load_model(directory, device="cpu", dtype=torch.float32)[0]
            self._calibration = Windows(tokenizer, read_text(path / "calibration.txt"), LENGTH)
            heldout = Windows(tokenizer, read_text(path / "heldout.txt"), LENGTH)
        self.heldout = list(batched(list(heldout.all())[:HELDOUT_WINDOWS]))

    def batches(self, seed: int = 0, samples: int = SAMPLES, select: str = "random") -> list[dict[str, Tensor]]:
        """Return the calibration batches that a seed draws."""
        return [{"input_ids": ids} for ids in batched(self._calibration.sample(samples, seed, select))]

    def perplexity(self, model: nn.Module) -> float:
        """Return the perplexity of a version of the model on held-out text."""
        return perplexity(model, self.heldout)[0]

    def prune(self, recipe: Recipe, batches: Sequence[Any], before: float) -> tuple[Comparison, Report]:
        """Prune a copy of the model; return the figures and the report."""
        model = copy.deepcopy(self.model)
        report = prune_(model, batches, recipe)
        errors = [layer.relative_error for layer in report.layers if layer.relative_error is not None]
        comparison = Comparison(
            method=method_name(recipe.method),
            target=target_name(str(recipe.pattern), recipe.sparsity),
            sparsity=report.sparsity,
            before=before,
            after=self.perplexity(model),
            error=sum(errors) / len(errors),
            seconds=report.seconds,
        )
        return comparison, report


def target_name(pattern: str, sparsity: float | None) -> str:
    """Return what runs are compared at, in words."""
    return pattern if sparsity is None else f"{pattern} {round(100 * sparsity)} %"


def run(output: Path, progress: Callable[[str, float, float], None]) -> list[dict[str, Any]]:
    """Prune the demo model by each method to each target; write ``report.html`` and return the rows of its table.

    Raises:
        ImportError: transformers, matplotlib or jinja2 is missing.
        FormatError: the page cannot be written.
    """
    check_file(output / "report.html")
    require_page_extra()
    recipes = [
        Recipe(pattern=pattern, sparsity=sparsity, method=method)  # type: ignore[arg-type]
        for pattern, sparsity in TARGETS
        for method in METHODS
    ]
    progress("loading the model", 0, len(recipes))
    demo = DemoModel()
    batches = demo.batches()
    before = demo.perplexity(demo.model)
    results = []
    for index, recipe in enumerate(recipes):
        progress(
            f"{recipe.pattern} {recipe.pattern.resolve(recipe.sparsity):.0%} {method_name(recipe.method)}",
            index,
            len(recipes),
        )
        results.append(demo.prune(recipe, batches, before))
    progress("writing the report", len(recipes), len(recipes))
    rows = [comparison for comparison, _ in results]
    page = comparison_page("secateur: one-shot pruning compared", INTRO, rows, results[-1][1])
    write_text(output / "report.html", page)
    return [asdict(row) for row in rows]


# What is packed: a target at which the best method loses little, and one at which kernels gain much.
PACKED: tuple[tuple[str, float | None], ...] = (("unstructured", 0.7), ("unstructured", 0.9))
INPUTS = ((1, 1), (1, 64), (8, 64))  # windows and tokens: one token of an answer, a prompt, a batch of prompts
ROUNDS = 15


def run_packed(progress: Callable[[str, float, float], None]) -> list[dict[str, Any]]:
    """Prune the demo model by the best method, pack it, and measure it beside the dense one.

    Returns:
        One row for each target and input: bytes of the dense weights and of the packed file, tokens a second, dense and
        packed, the median ratio of runs taken in turn, and the largest difference of the outputs, as a part of the
        largest output.
    """
    demo = DemoModel()
    rows = []
    for number, (pattern, sparsity) in enumerate(PACKED):
        progress(f"packing {pattern} {sparsity or 0.5:.0%}", number, len(PACKED))
        pruned = copy.deepcopy(demo.model)
        prune_(pruned, demo.batches(), pattern=pattern, sparsity=sparsity, method=METHODS[-1], measure_error=False)
        packed = copy.deepcopy(pruned)
        pack_(packed, batch_sizes=sorted({windows * length for windows, length in INPUTS}))
        sizes = {"dense_bytes": sum(p.nbytes for p in pruned.parameters()), "packed_bytes": _bytes_on_disk(packed)}
        for windows, length in INPUTS:
            ids = torch.cat(demo.heldout)[:windows, :length]
            row = {"target": target_name(pattern, sparsity), "windows": windows, "tokens": length, **sizes}
            rows.append(row | _compare(pruned, packed, ids))
    progress("packed", len(PACKED), len(PACKED))
    return rows


def packed_runs_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return what :func:`run_packed` returned as a table."""
    headings = ("weights, dense", "packed file", "tokens/s, dense", "packed", "ratio", "largest difference")
    columns = (
        TableColumn("packed"),
        TableColumn("input"),
        *(TableColumn(heading, is_number=True) for heading in headings),
    )
    cells = tuple(
        (
            row["target"],
            f"{row['windows']} x {row['tokens']}",
            f"{row['dense_bytes'] / 1e6:.1f} MB",
            f"{row['packed_bytes'] / 1e6:.1f} MB",
            f"{row['dense_speed']:,.0f}",
            f"{row['packed_speed']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['difference']:.0e}",
        )
        for row in rows
    )
    return Table("The best of them, packed; input is windows x tokens", columns, cells)


def _bytes_on_disk(model: nn.Module) -> int:
    """Return the size of the one file that holds all weights without their zeros."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model", tokenizer=None)
        return sum(file.stat().st_size for file in (Path(folder) / "model").glob("*.safetensors"))


@torch.inference_mode()
def _compare(dense: nn.Module, packed: nn.Module, ids: Tensor) -> dict[str, float]:
    expected, found = dense(input_ids=ids).logits, packed(input_ids=ids).logits
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for model, record in zip((dense, packed), seconds, strict=True):
            began = time.perf_counter()
            model(input_ids=ids)
            record.append(time.perf_counter() - began)
    return {
        "dense_speed": ids.numel() / statistics.median(seconds[0]),
        "packed_speed": ids.numel() / statistics.median(seconds[1]),
        "ratio": statistics.median(a / b for a, b in zip(*seconds, strict=True)),
        "difference": float((found - expected).abs().max() / expected.abs().max()),
    }
