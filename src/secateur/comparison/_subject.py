"""A model that is run in several ways, and what each of them makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from secateur.reports import PackReport


@dataclass(frozen=True, eq=False)
class Deployed:
    """What a way made of a model: a place from which any process opens it, or a module of this process.

    Args:
        path: a model directory, one with a model for another engine, or a file that ``torch.save`` wrote; None where a
            module cannot be written.
        nbytes: of the weights on the disk.
        module: in memory already; None to open the path.
        notes: what else is worth knowing.
    """

    path: Path | None
    nbytes: int
    module: nn.Module | None = None
    notes: tuple[str, ...] = ()


class Subject(Protocol):
    """A model that is run in several ways. Every method writes into a new folder, and raises if that does not work."""

    @property
    def name(self) -> str:
        """In tables."""
        ...

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense model, which the other one is compared with."""
        ...

    def in_torch(self, folder: Path) -> Deployed:
        """The model in PyTorch, with dense layers."""
        ...

    def packed(self, folder: Path, precision: str | None) -> Deployed:
        """The model with packed layers: as they are, or with products of fewer bits."""
        ...

    def exported(self, folder: Path, to: str, int8: bool, packed: bool) -> Deployed:
        """The model for another engine: in 8 bits, or with packed layers."""
        ...


class NothingGainedError(RuntimeError):
    """A way that would be the same as another one."""


def check_packed(report: PackReport) -> None:
    """Raise unless some layer was packed, and say why none was."""
    if any(layer.packed for layer in report.layers):
        return
    if not report.layers:
        raise NothingGainedError("no layer has zeros, so that nothing was packed")
    reasons = [layer.reason for layer in report.layers]
    raise NothingGainedError(f"no layer was packed: {max(reasons, key=reasons.count)}")


def state_bytes(module: nn.Module, folder: Path) -> int:
    """Return the bytes of the file that ``torch.save`` writes of the tensors of a module."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "state.pt"
    torch.save(module.state_dict(), file)
    nbytes = file.stat().st_size
    file.unlink()
    return nbytes
