"""The perplexity of a language model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import StatisticsError
from secateur.evaluation._run import outputs_of


def perplexity(model: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]]) -> tuple[float, int]:
    """Return the perplexity of a causal language model and the number of tokens predicted.

    ``exp`` of the mean cross-entropy over all tokens but the first of each window, in float32 or better. Padding is
    neither predicted nor predicted from.

    Args:
        model: whose output has ``logits`` of shape ``[batch, length, vocabulary]``.
        batches: token ids ``[batch, length]``, or mappings with ``input_ids`` and, where there is padding,
            ``attention_mask``.

    Raises:
        StatisticsError: the output has no logits, or a batch no token ids.
    """
    total, count = 0.0, 0
    inputs = ({"input_ids": batch} if isinstance(batch, Tensor) else _without_labels(batch) for batch in batches)
    for output, batch in outputs_of(model, inputs):
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[:2] != batch["input_ids"].shape:
            raise StatisticsError(
                f"{type(model).__name__} returned no logits [batch, length, vocabulary], which perplexity is computed "
                "from. Give a causal language model."
            )
        target, mask = batch["input_ids"][:, 1:], batch.get("attention_mask")
        real = torch.ones_like(batch["input_ids"]) if mask is None else mask
        predicted = (real[:, 1:] * real[:, :-1]).bool()
        for scores, right, kept in zip(logits[:, :-1], target, predicted, strict=True):
            # One window's logits at a time in float32.
            losses = nn.functional.cross_entropy(scores.float(), right, reduction="none")[kept]
            total += float(losses.sum(dtype=torch.float64))
        count += int(predicted.sum())
    mean = total / max(count, 1)
    return (math.inf if mean >= 700 else math.exp(mean)), count


def _without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(batch.get("input_ids") if isinstance(batch, Mapping) else None, Tensor):
        raise StatisticsError("perplexity needs batches of token ids, or mappings with input_ids.")
    return {name: value for name, value in batch.items() if name != "labels"}
