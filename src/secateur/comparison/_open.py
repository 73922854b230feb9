"""Open what was deployed, in this process or in another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.comparison._subject import Deployed
from secateur.comparison._ways import Way
from secateur.engines import engine_for
from secateur.exporting import is_exported, open_exported, read_report
from secateur.pipeline import load_to_measure


class PlainOutputs(nn.Module):
    """A model of an engine that returns what the module returned that it was made from: a tensor, or several.

    Args:
        inner: the model, whose outputs are called ``output``, or ``output.0``, ``output.1`` and so on. Others stay as
            they are.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Run the model."""
        found = self.inner(*args, **inputs)
        if set(found) == {"output"}:
            return found["output"]
        return tuple(found.values()) if all(name.startswith("output.") for name in found) else found


def open_deployed(
    deployed: Deployed, way: Way, *, with_head: bool, threads: int | None, is_directory: bool
) -> nn.Module:
    """Return a model, ready to run.

    Args:
        deployed: what the way made.
        way: to run it.
        with_head: whether the head of its class is needed, for a model directory.
        threads: of the engine; None for PyTorch's number.
        is_directory: whether it was made of a model directory, whose outputs have names.
    """
    if deployed.module is not None:
        return way.wrap(deployed.module.eval())
    assert deployed.path is not None
    return way.wrap(_opened(deployed.path, way, with_head, threads, is_directory).eval())


def _opened(path: Path, way: Way, with_head: bool, threads: int | None, is_directory: bool) -> nn.Module:
    if path.suffix == ".pt":
        module: nn.Module = torch.load(path, weights_only=False)  # written by this run, in a folder of its own
        return module
    if is_exported(path):
        engine = engine_for(path / read_report(path).file)
        if engine.name != way.engine:
            raise RuntimeError(f"what was exported is a file for {engine.title}")
        model = open_exported(path, precision=way.precision, threads=threads)
        return model if is_directory else PlainOutputs(model)
    return load_to_measure(path, with_head, "cpu")
