"""The loss that a model directory has by itself: that of the next token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from secateur._errors import RecipeError
from secateur.files import ModelDirectory
from secateur.huggingface._loading import is_causal


def language_loss(
    directory: ModelDirectory, method: str, other: str, function: str
) -> Callable[[Any, Mapping[str, Tensor]], Tensor]:
    """Return the loss that a method learns from on the text of a causal language model.

    Args:
        directory: of the model.
        method: that needs a loss, for the message.
        other: the option that chooses a method which needs none.
        function: the public function that takes a loss.

    Raises:
        RecipeError: another kind of model, whose loss nobody knows.
    """
    if not is_causal(directory):
        raise RecipeError(
            f"the method {method} learns from a loss, and only causal language models have one here: that of the next "
            f"token.\nUse {other}, or give a loss in Python: {function}(model, batches, loss=...)."
        )
    return next_token_loss


def next_token_loss(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the next token of a causal language model, in float32 or better."""
    logits = output.logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits.float(), batch["input_ids"][:, 1:].flatten())
