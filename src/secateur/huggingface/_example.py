"""An input that a model of transformers takes, made up: enough to see how data passes through it, and to time it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError

_TOKENS = 32


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return one input for a model, by the names of its arguments: random tokens, or random pixels.

    Args:
        model: of transformers, that reads ``input_ids`` or ``pixel_values``.

    Raises:
        RecipeError: it reads something else.
    """
    config: Any = model.config
    name = getattr(model, "main_input_name", "input_ids")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        shape = (1, getattr(config, "num_channels", 3), height, width)
        pixels = torch.randn(shape, generator=generator)
        return {"pixel_values": pixels.to(device, next(model.parameters()).dtype)}
    text = config.get_text_config()
    if name != "input_ids" or not isinstance(getattr(text, "vocab_size", None), int):
        raise RecipeError(
            f"{type(model).__name__} reads {name}, for which no example can be made up here.\n"
            "Shrink it in Python, with batches of your own: secateur.shrink_(model, batches, ...)."
        )
    length = min(_TOKENS, getattr(text, "max_position_embeddings", None) or _TOKENS)
    # Padding, and tokens with a meaning for the model, are left out: some models read a mask off them.
    special = {value for key, value in vars(text).items() if key.endswith("_token_id") and isinstance(value, int)}
    plain = [token for token in range(text.vocab_size) if token not in special] or [0]
    drawn = torch.randint(len(plain), (1, length), generator=generator)
    ids = torch.tensor(plain)[drawn].to(device)
    if getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}
