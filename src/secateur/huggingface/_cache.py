"""The keys and values of earlier tokens, which a causal language model keeps in a cache, as tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from secateur.huggingface._loading import transformers_library

KeysAndValues = Sequence[tuple[Tensor, Tensor]]  # of each block: [batch, heads, tokens, width]


def keeps_cache(model: nn.Module) -> bool:
    """Return whether a model takes a cache, and its config asks for one."""
    asked = getattr(getattr(model, "config", None), "use_cache", False) is True
    return asked and "past_key_values" in inspect.signature(model.forward).parameters


def cache_after(model: nn.Module, ids: Tensor) -> tuple[KeysAndValues, str]:
    """Return the keys and values of each block after some tokens; or none, and what the model keeps instead.

    Args:
        model: of transformers, in evaluation mode.
        ids: of the tokens, ``[batch, tokens]``.
    """
    cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    found = _parts(cache)
    rows = len(ids)
    plain = all(isinstance(t, Tensor) and t.ndim == 4 and t.shape[0] == rows for pair in found for t in pair)
    if not found or not plain:
        return (), f"a {type(cache).__name__} is not keys and values alone"
    return found, ""


def call_with_cache(
    model: nn.Module, inputs: Mapping[str, Tensor], before: KeysAndValues
) -> tuple[Tensor, KeysAndValues]:
    """Return the logits of new tokens, and the keys and values of all tokens.

    Args:
        model: of transformers.
        inputs: of the new tokens, by name; an ``attention_mask`` has those of the cache, too.
        before: of the earlier tokens.
    """
    cache: Any = transformers_library().DynamicCache()
    for number, (key, value) in enumerate(before):
        cache.update(key, value, number)
    output = model(**inputs, past_key_values=cache, use_cache=True)
    return output.logits, _parts(output.past_key_values)


def _parts(cache: Any) -> list[tuple[Any, Any]]:
    layers = getattr(cache, "layers", None) or ()
    return [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
