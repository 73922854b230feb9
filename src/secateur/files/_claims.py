"""What a configuration claims of the weights beside it, and what is stored. What is stored is believed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Keys by which other tools say that weights are quantized or compressed, in config.json or in a part of it.
_CLAIMS = frozenset({"quantization_config", "compression_config", "sparsity_config"})

# One method quantizes nothing: it says to which sizes a model was shrunk where the rest of the config cannot.
SHRUNK_METHOD = "secateur"

# Endings of names that only parts of packed weights have, and scales without which values mean nothing:
# compressed-tensors, 8-bit floats, bitsandbytes. Among integers, those of GPTQ, AWQ and 4-bit floats, too.
_PARTS = (
    *(".compressed", ".bitmask", ".row_offsets", "weight_packed", "weight_scale", "weight_scale_inv"),
    *("weight_zero_point", "weight_global_scale", ".absmax", ".quant_map", ".SCB"),
)
_INTEGER_PARTS = ("weight", "weight_shape", ".qzeros", ".g_idx", "_blocks", "_scales")
_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})


def is_part(name: str, dtype: str) -> bool:
    """Return whether a stored tensor is a part of a packed or quantized weight, and no weight by itself.

    Args:
        name: as stored.
        dtype: in safetensors' spelling, such as ``"F32"``.

    Example:
        >>> from secateur.files import is_part
        >>> is_part("up.weight", "BF16"), is_part("up.weight", "F8_E4M3"), is_part("up.qweight", "I32")
        (False, True, True)
    """
    whole = dtype in ("F64", "F32", "F16", "BF16")
    small = dtype.startswith(("F", "E")) and not whole  # floats of 8 bits or fewer
    return small or name.endswith(_PARTS) or (dtype in _INTEGERS and name.endswith(_INTEGER_PARTS))


def first_part(tensors: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Return the name and dtype of the first tensor that is a part of a packed or quantized weight, or None."""
    return next(((name, dtype) for name, dtype in tensors if is_part(name, dtype)), None)


def without_claims(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what it says of quantized or compressed weights, in its parts too.

    How a model was shrunk is no such claim, and stays.

    Example:
        >>> from secateur.files import without_claims
        >>> without_claims({"hidden_size": 8, "quantization_config": {"quant_method": "compressed-tensors"}})
        {'hidden_size': 8}
    """
    return {
        key: without_claims(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _CLAIMS or is_shrunk_claim(value)
    }


def is_shrunk_claim(value: object) -> bool:
    """Return whether a ``quantization_config`` quantizes nothing, but says how a model was shrunk."""
    return isinstance(value, Mapping) and value.get("quant_method") == SHRUNK_METHOD
