"""The native module. It is loaded at its first use."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # noqa: F401  first, so that the native module uses torch's OpenMP library and loads no second one

_loaded: ModuleType | str | None = None


def load() -> ModuleType | str:
    """Return the native module, or the reason why it cannot be loaded."""
    global _loaded  # noqa: PLW0603
    if _loaded is None:
        try:
            _loaded = importlib.import_module("secateur.kernels._native")
        except ImportError as error:
            _loaded = f"the native module is missing ({error}); reinstall secateur where there is a C++17 compiler"
    return _loaded
