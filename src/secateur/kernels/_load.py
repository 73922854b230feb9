"""The native module, loaded when first asked for, or the reason why there is none."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # noqa: F401  first, so that the module finds torch's OpenMP and brings no second one

_loaded: ModuleType | str | None = None


def load() -> ModuleType | str:
    """The native module, or the reason why there is none."""
    global _loaded  # noqa: PLW0603
    if _loaded is None:
        try:
            _loaded = importlib.import_module("secateur.kernels._native")
        except ImportError as error:
            _loaded = f"the native module is not there ({error}); reinstall secateur where a C++17 compiler is found"
    return _loaded
