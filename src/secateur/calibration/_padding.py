"""Which rows of a layer's input belong to real tokens, and which to padding?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur._errors import StatisticsError


def padding_masks(batch: Any) -> list[Tensor]:
    """The batch's two-dimensional attention masks as bool, True = a real token. An empty list if nothing is padded.

    Masks of more dimensions say which token attends to which, not what is padding, and are left out.

    Raises:
        StatisticsError: the masks of an encoder and of a decoder have the same shape but different padding.
    """
    if not isinstance(batch, Mapping):
        return []
    masks = [batch.get("attention_mask"), batch.get("decoder_attention_mask")]
    if masks[1] is None and isinstance(decoded := batch.get("decoder_input_ids"), Tensor):
        masks[1] = torch.ones_like(decoded)
    found = [mask != 0 for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2]
    if all(bool(mask.all()) for mask in found):
        return []
    if len(found) == 2 and found[0].shape == found[1].shape and not torch.equal(found[0], found[1]):
        raise StatisticsError(
            f"attention_mask and decoder_attention_mask have the same shape {tuple(found[0].shape)} but different "
            "values, so it is not known which of them belongs to a layer's inputs.\nUse batches without padding."
        )
    return found


def without_padding(rows: Tensor, x: Tensor, masks: list[Tensor]) -> Tensor:
    """The rows ``[groups, tokens, in]`` of an input ``x`` that belong to real tokens.

    Raises:
        StatisticsError: no mask has the shape of the input's positions.
    """
    if not masks:
        return rows
    positions = tuple(x.shape[:-1]) if math.prod(x.shape[:-1]) == rows.shape[1] else (rows.shape[1],)
    for mask in masks:
        batch, length = mask.shape
        if positions[:2] == (batch, length):
            keep = mask.view(batch, length, *[1] * (len(positions) - 2)).expand(positions)
        elif positions == (length, batch):
            keep = mask.T
        elif len(positions) == 3 and (positions[0], positions[2]) == (batch, length):
            keep = mask.unsqueeze(1).expand(positions)  # heads before tokens
        elif positions == (batch * length,):
            keep = mask
        else:
            continue
        return rows[:, keep.reshape(-1).to(rows.device)]
    if positions == (masks[0].shape[0],):
        return rows  # one row for each sequence, such as a pooled token
    raise StatisticsError(
        f"inputs of shape {tuple(x.shape)} cannot be aligned with an attention mask of shape {tuple(masks[0].shape)}, "
        "so padding cannot be kept out of the statistics.\nUse batches without padding, or exclude the layer."
    )
