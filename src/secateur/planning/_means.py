"""What may be done to a part of a model, and which engines may run the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from secateur._checks import one_of
from secateur._errors import RecipeError
from secateur.comparison import WAYS
from secateur.engines import ENGINES as ENGINES_BY_NAME
from secateur.patterns import SparsityPattern
from secateur.planning._parts import Part

# Kinds of units with the fractions that may stay, and kinds of zeros with their sparsity.
FRACTIONS: Mapping[str, tuple[float, ...]] = {
    "ffn": (0.875, 0.75, 0.625, 0.5, 0.375, 0.25),
    "heads": (0.75, 0.5, 0.25),
    "channels": (0.875, 0.75, 0.625, 0.5, 0.375, 0.25),
    "experts": (0.75, 0.5),
}
_ZEROS: Mapping[str, tuple[tuple[str, float], ...]] = {
    "unstructured": (("unstructured", 0.8),),
    "2:4": (("2:4", 0.5),),
    "block": (("block:1x4", 0.7),),
}
_PRECISIONS = ("int8", "bfloat16")
ALLOWED = ("layers", *FRACTIONS, *_ZEROS, *_PRECISIONS)

# The ways of which a stage of a pipeline makes the model, in the order in which equals are preferred.
_STAGES: Mapping[str, Mapping[str, Any]] = {
    "torch": {},
    "onnx": {"run": "export", "to": "onnx"},
    "onnx-int8": {"run": "export", "to": "onnx", "int8": True},
    "onnx-packed-int8": {"run": "export", "to": "onnx", "packed": True, "int8": True},
    "onnx-packed": {"run": "export", "to": "onnx", "packed": True},
    "openvino": {"run": "export", "to": "openvino"},
    "openvino-bfloat16": {"run": "export", "to": "openvino", "bfloat16": True},
    "openvino-int8": {"run": "export", "to": "openvino", "int8": True},
    "packed-int8": {"run": "pack", "precision": "int8"},
    "packed": {"run": "pack"},
}
_TORCH = ("torch", "packed", "packed-int8")
_NEED_ZEROS = ("onnx-packed", "packed")  # nothing is packed in a model without zeros
_KNOW_ZEROS = ("onnx-packed", "onnx-packed-int8", "packed", "packed-int8")
ENGINES = ("torch", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Choice:
    """What happens to one part.

    Args:
        is_removed: the whole block goes.
        kept: for each dimension of the part, the fraction that stays.
        pattern: of the zeros in its layers; empty for none.
        sparsity: of these layers.
    """

    is_removed: bool = False
    kept: tuple[float, ...] = ()
    pattern: str = ""
    sparsity: float = 0.0


@dataclass(frozen=True)
class Means:
    """What may be done, and what may run it.

    Args:
        allowed: names of ``ALLOWED``.
        ways: that can be used on this machine, by name.
        absent: ways that were asked for and cannot be used, with the reason.
    """

    allowed: tuple[str, ...]
    ways: tuple[str, ...]
    absent: Mapping[str, str]

    @classmethod
    def of(cls, allow: Iterable[str] | None, engines: Iterable[str] | None) -> Means:
        """Return the means that a user allows; None for all.

        Raises:
            RecipeError: an unknown name, or no engine that is installed.
            TypeError: one text in place of several.
        """
        for name, given in (("allow", allow), ("engines", engines)):
            if isinstance(given, str):
                raise TypeError(f"{name} must be several names, got one str; wrap it in a list: [{given!r}]")
        allowed = tuple(one_of("means in allow", name, ALLOWED) for name in (ALLOWED if allow is None else allow))
        chosen = [one_of("engine", name, ENGINES) for name in (ENGINES if engines is None else engines)]
        ways, absent = [], {}
        for name in _STAGES:
            way = WAYS[name]
            if (way.engine or "torch") not in chosen:
                continue
            if any(precision in name and precision not in allowed for precision in _PRECISIONS):
                continue
            if name in _KNOW_ZEROS and name in _NEED_ZEROS and not set(allowed) & set(_ZEROS):
                continue
            if absence := way.absence or _lacks(name):
                absent[name] = absence
            else:
                ways.append(name)
        if not ways:
            raise RecipeError(
                f"no engine can be used: {'; '.join(f'{name}: {why}' for name, why in absent.items()) or 'none asked'}."
                "\nAllow another one, such as engines=['torch']."
            )
        return cls(allowed, tuple(ways), absent)

    @property
    def dense_ways(self) -> tuple[str, ...]:
        """The ways that run a model without zeros."""
        return tuple(name for name in self.ways if name not in _NEED_ZEROS)

    @property
    def zeros(self) -> tuple[tuple[str, float], ...]:
        """Patterns with the sparsity that layers may get."""
        return tuple(found for name in self.allowed for found in _ZEROS.get(name, ()))

    def fractions(self, kind: str) -> tuple[float, ...]:
        """Return the fractions of a kind of units that may stay besides all."""
        return FRACTIONS.get(kind, ()) if kind in self.allowed else ()

    def choices(self, part: Part, way: str) -> list[Choice]:
        """Return what may happen to a part that stays, first nothing."""
        kept = product(*((1.0, *self.fractions(found.kind)) for found in part.dimensions))
        zeros: list[tuple[str, float]] = [("", 0.0)]
        if way in _KNOW_ZEROS:
            zeros += [found for found in self.zeros if _fits(part, found[0])]
        return [Choice(False, fractions, *found) for fractions in kept for found in zeros]


def _fits(part: Part, pattern: str) -> bool:
    """Whether all layers of a part have a size that a pattern takes. What cannot be pruned is no option."""
    try:
        for layer in part.layers:
            SparsityPattern.parse(pattern).validate(layer.matrix().shape)
    except ValueError:
        return False
    return bool(part.layers)


def _lacks(name: str) -> str:
    """What the processor lacks for a way."""
    way = WAYS[name]
    return ENGINES_BY_NAME[way.engine].lacks(way.precision) if way.engine and way.precision else ""


def stage_of(way: str) -> dict[str, Any]:
    """Return the stage of a pipeline that makes a model for a way; empty for PyTorch."""
    return dict(_STAGES[way])
