"""The quality of a model: perplexity for language models, similarity to the dense model for all others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration import quiet


def perplexity(model: nn.Module, batches: Iterable[Tensor]) -> tuple[float, int]:
    """Return the perplexity of a causal language model and the number of tokens predicted.

    ``exp`` of the mean cross-entropy over all tokens but the first of each window, in float32 or better.

    Args:
        model: whose output has ``logits`` of shape ``[batch, length, vocabulary]``.
        batches: token ids ``[batch, length]``.
    """
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with quiet(model):
        for ids in batches:
            target = ids[:, 1:].to(device)
            logits: Tensor = model(input_ids=ids.to(device)).logits[:, :-1]
            for scores, right in zip(logits, target, strict=True):  # one window's logits at a time in float32
                losses = nn.functional.cross_entropy(scores.float(), right, reduction="none")
                total += float(losses.sum(dtype=torch.float64))
            count += target.numel()
    mean = total / max(count, 1)
    return (math.exp(mean) if mean < 700 else math.inf), count


@torch.no_grad()
def outputs(model: nn.Module, batches: Iterable[Tensor]) -> list[Tensor]:
    """Return the model's first output, ``[batch, length, features]``, for each batch of token ids, on the CPU."""
    device = next(model.parameters()).device
    with quiet(model):
        return [_first_tensor(model(input_ids=ids.to(device))).float().cpu() for ids in batches]


def similarity(dense: Iterable[Tensor], pruned: Iterable[Tensor]) -> tuple[float, int]:
    """Return the mean cosine similarity of two models' outputs over tokens, and the number of tokens."""
    total, count = 0.0, 0
    for before, after in zip(dense, pruned, strict=True):
        cosines = nn.functional.cosine_similarity(before, after, dim=-1)
        total += float(cosines.sum(dtype=torch.float64))
        count += cosines.numel()
    return total / max(count, 1), count


def _first_tensor(output: Any) -> Tensor:
    return (
        output if isinstance(output, Tensor) else next(iter(output.values() if hasattr(output, "values") else output))
    )
