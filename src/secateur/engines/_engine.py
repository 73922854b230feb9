"""The engines that run exported models. One file and one line in the table is all that a further one needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from secateur._errors import RecipeError
from secateur.engines import _onnxruntime, _openvino


class Session(Protocol):
    """A model that an engine has loaded."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        ...

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return all outputs by name. An input that the model does not have is a mistake of the caller."""
        ...


@dataclass(frozen=True)
class Engine:
    """An engine that runs models of a file format.

    Args:
        name: as people write it, and as its package is called.
        title: in tables.
        extra: of secateur that installs it.
        suffix: of its files.
        precisions: in which it can compute a model of float32 weights, the usual one first.
        load: opens a file: its path, the precision, and how many threads; None for PyTorch's number.
        lacks: why this processor cannot compute in one of its precisions; empty if it can.
    """

    name: str
    title: str
    extra: str
    suffix: str
    precisions: tuple[str, ...]
    load: Callable[[Path, str, int | None], Session]
    lacks: Callable[[str], str]

    @property
    def absence(self) -> str:
        """Why the engine cannot be used here; empty if it can."""
        if find_spec(self.name) is not None:
            return ""
        return f'{self.title} is not installed; install it with: pip install "secateur[{self.extra}]"'

    @property
    def version(self) -> str:
        """Of its package."""
        return metadata.version(self.name)

    def check(self) -> None:
        """Raise ``ImportError`` with the extra to install, unless the engine is here."""
        if self.absence:
            raise ImportError(self.absence)


ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("onnxruntime", "ONNX Runtime", "onnx", ".onnx", ("float32",), _onnxruntime.load, _onnxruntime.lacks),
        Engine(
            "openvino",
            "OpenVINO",
            "openvino",
            ".xml",
            ("float32", "bfloat16"),
            _openvino.load,
            _openvino.lacks,
        ),
    )
}


def engine_for(path: Path) -> Engine:
    """Return the engine that runs a file, by its suffix.

    Raises:
        RecipeError: no engine runs such files.
    """
    for engine in ENGINES.values():
        if path.suffix == engine.suffix:
            return engine
    known = ", ".join(f"{engine.suffix} ({engine.title})" for engine in ENGINES.values())
    raise RecipeError(f"{path.name} is no file of an engine; known are {known}.")
