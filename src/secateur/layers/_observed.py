"""What a forward pass showed of a model: which modules are called, and which weights are multiplied without that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

NEVER_REACHED = "no calibration input reached it"


@dataclass(frozen=True)
class Reading:
    """How functions multiply a parameter, apart from calls of the module that has it.

    Args:
        function: name of the first one.
        is_transposed: whether its matrices were used as ``[in, out]``.
        parts: begin and end of each block of rows that is a matrix of its own; empty if the parameter is one matrix, or
            a stack.
        joined: for a parameter of three dimensions that is one matrix, the first of the two that are read as one.
        problem: why it cannot be read as a linear map of rows; empty if it can.
    """

    function: str
    is_transposed: bool = False
    parts: tuple[tuple[int, int], ...] = ()
    joined: int | None = None
    problem: str = ""


@dataclass(frozen=True)
class Observed:
    """What forward passes on calibration batches showed.

    Args:
        called: ids of the modules that were called.
        read: by the id of a parameter, how functions multiply it.
        all_reached: whether every weight counts as reached: this says how weights are read, and not which ones.
    """

    called: frozenset[int] = frozenset()
    read: Mapping[int, Reading] = field(default_factory=dict)
    all_reached: bool = False

    def reached(self, module: nn.Module, parameter: nn.Parameter, *, by_call: bool) -> bool:
        """Return whether inputs of a weight were seen.

        Args:
            module: that has the weight.
            parameter: the weight.
            by_call: whether a call of the module shows them.
        """
        return self.all_reached or id(parameter) in self.read or (by_call and id(module) in self.called)
