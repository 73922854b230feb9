"""What a statistic is to the gatherer: what it looks at while the model runs, and how rows add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self, TypeAlias

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.calibration._statistics import Need
from secateur.layers import Layer

Report: TypeAlias = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Hook:
    """What a statistic looks at while the model runs.

    Args:
        attach: given a layer, one of its modules and a callback, it registers a hook on the module and returns the
            handle. The hook calls back with the tensor that it saw, ``[..., features]``, and with the same as rows,
            ``[groups, tokens, features]``.
    """

    attach: Callable[[Layer, nn.Module, Report], RemovableHandle]


class Accumulator(ABC):
    """Gathers one statistic of one layer, in float32 or better.

    A new statistic is one file with its accumulator, one line in the table of ``_gather.py``, and its name and field
    in ``_statistics.py``. A statistic of gradients differs from one of inputs only in its hook.
    """

    name: ClassVar[Need]
    hook: ClassVar[Hook]
    # Another statistic, and how this one is computed from it when both are needed. None: it is always gathered itself.
    follows: ClassVar[tuple[Need, Callable[[Tensor], Tensor]] | None]
    # Whether it costs no more to add few rows at a time than to add them all at once.
    splits: ClassVar[bool] = True

    @abstractmethod
    def add(self, rows: Tensor) -> None:
        """Add ``[groups, tokens, features]`` rows, finite and in float32 or better."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add what another accumulator of the same statistic has gathered. The other stays as it is."""

    @abstractmethod
    def result(self) -> Tensor:
        """Return the statistic, with a leading dimension for groups. At least one batch was added.

        Raises:
            StatisticsError: the sums overflow.
        """
