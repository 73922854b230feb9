"""In which dtypes does a checkpoint hold the tensors of a model, and how large is it on the disk?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.files import ModelDirectory


def stored_dtypes(model: nn.Module, directory: ModelDirectory) -> dict[str, torch.dtype]:
    """Return the dtype in which the checkpoint stores each floating-point tensor, by its name in the model.

    What has another name in the checkpoint gets the dtype of most.
    """
    dtypes = {name: directory.dtype(name) for name in directory.tensors}
    floating = Counter(dtype for dtype in dtypes.values() if dtype.is_floating_point)
    usual = floating.most_common(1)[0][0] if floating else torch.float32
    return {name: dtypes.get(name, usual) for name, tensor in _tensors(model).items() if tensor.is_floating_point()}


def stored_bytes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> int:
    """Return how many bytes the tensors of a model take on disk, each shared one counted once."""
    found = {id(t): t.numel() * dtypes.get(name, t.dtype).itemsize for name, t in _tensors(model).items()}
    return sum(found.values())


@torch.no_grad()
def round_(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give the tensors of a model the precision that they will have on disk, without changing their dtype."""
    for tensor, dtype in _with_dtypes(model, dtypes):
        tensor.copy_(tensor.to(dtype))


@torch.no_grad()
def convert_(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give the tensors of a model the dtype that they will have on disk. Tied ones stay tied."""
    for tensor, dtype in _with_dtypes(model, dtypes):
        tensor.data = tensor.data.to(dtype)


def _with_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> list[tuple[Tensor, torch.dtype]]:
    found = {id(tensor): (tensor, dtypes[name]) for name, tensor in _tensors(model).items() if name in dtypes}
    return list(found.values())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict(keep_vars=True))
