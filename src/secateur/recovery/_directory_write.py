"""Put a recovered model where its weights were: the same tensors in the same files, with the same zeros."""

from __future__ import annotations

import torch
from torch import nn

from secateur.files import ModelDirectory
from secateur.huggingface import StoredWeights, load_model
from secateur.recovery._zeros import rounded_like


def freeze_unstored_(model: nn.Module, teacher: nn.Module, stored: StoredWeights, missing: set[str]) -> tuple[str, ...]:
    """Keep from learning what could not be written. Return the names of parameters that are in the checkpoint so.

    Args:
        model: that will learn.
        teacher: gives the values of what no checkpoint has, so that both models add the same.
        stored: where the parameters lie.
        missing: names of parameters that the checkpoint lacks.
    """
    values = dict(teacher.named_parameters(remove_duplicate=False))
    frozen = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in missing:
            parameter.requires_grad_(False)
            if name in values and values[name].shape == parameter.shape:
                with torch.no_grad():
                    parameter.copy_(values[name])
        elif name in stored.lost:
            parameter.requires_grad_(False)
            frozen.append(name)
    return tuple(frozen)


@torch.no_grad()
def round_as_stored_(model: nn.Module, stored: StoredWeights, directory: ModelDirectory) -> int:
    """Round a recovered model as its files will hold it, with exactly the zeros that they had.

    A weight that rounds to zero, but was none before, keeps the value that it had. So a mask that is read from the
    zeros of the files is the same as before.

    Args:
        model: as it learned.
        stored: made of it before it learned.
        directory: with the model as it was.

    Returns:
        How many weights keep their old value, because the new one rounds to zero.
    """
    stored.round_()
    like = next(model.parameters())
    original, missing = load_model(directory, "cpu", like.dtype, with_head=True)
    before = dict(original.named_parameters())
    kept = 0
    for name, parameter in model.named_parameters():
        if name not in missing:
            value = rounded_like(parameter, before[name].to(like.device))
            kept += int((value != parameter).count_nonzero())
            parameter.copy_(value)
    return kept
