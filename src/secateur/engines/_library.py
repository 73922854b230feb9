"""The libraries that bring our kernels into other engines, as the operation ``secateur.PackedLinear``."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from secateur import kernels
from secateur._checks import one_of
from secateur._errors import KernelError

DOMAIN = "secateur"  # of the operation, in ONNX files and in OpenVINO's
# By engine: what builds its library.
_BUILD = {
    "onnxruntime": "It is built with secateur's own kernels: reinstall secateur where there is a C++17 compiler",
    "openvino": "Build it in a checkout of secateur: make native OPENVINO=ON. docs/engines.md has the way without one",
}


def library(engine: str) -> Path:
    """Return the library that brings our kernels into an engine.

    An engine loads it by ``SessionOptions.register_custom_ops_library`` or ``Core.add_extension``. It needs neither
    Python nor PyTorch, so that it can be copied to where a model runs.

    Args:
        engine: ``"onnxruntime"`` or ``"openvino"``.

    Raises:
        RecipeError: there is no library for such an engine.
        KernelError: the library was not built. The message says how to build it.

    Example:
        >>> from secateur import engines
        >>> path = engines.library("onnxruntime")
        >>> path.stem
        'libsecateur_onnxruntime'
    """
    one_of("engine", engine, _BUILD)
    found = [path for folder in kernels.__path__ for path in Path(folder).glob(f"libsecateur_{engine}.*")]
    if not found:
        raise KernelError(
            f"the library that brings packed layers into {engine} is not here: libsecateur_{engine} was not built. "
            f"{_BUILD[engine]}. Or export the model without packed layers."
        )
    return found[0]


def does_not_fit(engine: str, error: object) -> str:
    """Return why an engine refused its library, given what it said: it was built for another version."""
    return (
        f"the library that brings packed layers into {engine} does not fit {engine} {version(engine)}: {error}. "
        f"{_BUILD[engine]}."
    )
