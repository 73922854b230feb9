"""Inputs that a model of transformers takes, made up: enough to see how data passes through it, and to time it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError

_TOKENS = 32
_LONGEST = 512  # tokens of one text
_MOST_IMAGES = 8  # of one input


def example_inputs(model: nn.Module, rows: int | None = None) -> dict[str, Tensor]:
    """Return one input for a model, by the names of its arguments: random tokens, or random pixels.

    Args:
        model: of transformers, that reads ``input_ids`` or ``pixel_values``.
        rows: how many tokens, in one text or in several of equal length, or how many images, at most 8. None for one
            short text or one image.

    Raises:
        RecipeError: it reads something else.

    Example:
        >>> import transformers
        >>> from secateur.huggingface import example_inputs
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "max_position_embeddings": 64}
        >>> model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, **sizes))
        >>> [tuple(example_inputs(model, rows)["input_ids"].shape) for rows in (1, 32, 100)]
        [(1, 1), (1, 32), (4, 32)]
    """
    config: Any = model.config
    name = getattr(model, "main_input_name", "input_ids")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        shape = (min(rows or 1, _MOST_IMAGES), getattr(config, "num_channels", 3), height, width)
        pixels = torch.randn(shape, generator=generator)
        return {"pixel_values": pixels.to(device, next(model.parameters()).dtype)}
    text = config.get_text_config()
    if name != "input_ids" or not isinstance(getattr(text, "vocab_size", None), int):
        raise RecipeError(
            f"{type(model).__name__} reads {name}, for which no example can be made up here.\n"
            "Give inputs of your own in Python: secateur.shrink_(model, batches, ...) or pack_(model, batches=...)."
        )
    positions = getattr(text, "max_position_embeddings", None) or 2 * _LONGEST
    # Half of the positions, because some models do not begin with the first one.
    length = min(_TOKENS, positions) if rows is None else min(rows, _LONGEST, max(1, positions // 2))
    texts = 1 if rows is None else -(-rows // length)
    # Padding, and tokens with a meaning for the model, are left out: some models read a mask off them.
    special = {value for key, value in vars(text).items() if key.endswith("_token_id") and isinstance(value, int)}
    plain = [token for token in range(text.vocab_size) if token not in special] or [0]
    drawn = torch.randint(len(plain), (texts, length), generator=generator)
    ids = torch.tensor(plain)[drawn].to(device)
    if getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}
