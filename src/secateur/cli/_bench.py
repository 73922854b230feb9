"""``secateur bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from secateur._checks import integer
from secateur._errors import RecipeError
from secateur.cli._app import say, show, show_progress, use_threads, user_errors
from secateur.cli._options import DEFAULT_BATCHES, AsJson, Batch, Html, Threads

_LARGEST = 65536  # outputs or inputs of a random layer


def bench(
    model: Annotated[
        Path | None, typer.Argument(help="Pruned Hugging Face model directory; each kind of its layers is measured.")
    ] = None,
    shape: Annotated[str, typer.Option(help="Outputs x inputs of a random layer to measure instead.")] = "4096x4096",
    pattern: Annotated[
        str, typer.Option(help="Its pattern: unstructured, 2:4, block:16x16, row, column.")
    ] = "unstructured",
    sparsity: Annotated[
        float | None, typer.Option(help="Its fraction of zeros. Default: 0.9, or what the pattern fixes.")
    ] = None,
    batch: Batch = None,
    threads: Threads = None,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Show how fast this machine runs sparse layers by every means: dense, prepacked, torch CSR, int8, and ours."""
    with user_errors(), use_threads(threads):
        from secateur import packing
        from secateur.files import check_file, write_text
        from secateur.patterns import SparsityPattern

        batches = [integer("--batch", rows, least=1) for rows in batch or DEFAULT_BATCHES]
        if html is not None:
            check_file(html)
        if model is not None:
            with show_progress() as progress:
                results = packing.bench_directory(model, batches, progress=progress)
        else:
            parsed = SparsityPattern.parse(pattern)
            if sparsity is None and parsed.sparsity is None:
                sparsity = 0.9
            results = packing.bench_weight(packing.made_weight(_shape(shape), parsed, sparsity), batches)
        if html is not None:
            write_text(html, packing.bench_page(results))
        if as_json:
            print(json.dumps(packing.bench_dict(results), indent=1))
            return
        show(*packing.bench_tables(results))
        say(packing.BENCH_UNIT)


def _shape(text: str) -> tuple[int, int]:
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and 0 < int(size) <= _LARGEST for size in sizes):
        raise RecipeError(f"--shape should be OUTxIN, such as 4096x4096, each at most {_LARGEST}, got {text!r}.")
    return int(sizes[0]), int(sizes[1])
