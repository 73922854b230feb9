"""What a configuration claims of the weights beside it, and what is stored. What is stored is believed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Keys by which other tools say that weights are quantized or compressed, in config.json or in a part of it.
_CLAIMS = frozenset({"quantization_config", "compression_config", "sparsity_config"})

# One method quantizes nothing: it says to which sizes a model was shrunk where the rest of the config cannot, or that
# the weights are packed.
SHRUNK_METHOD = "secateur"
_PACKED = "packed"

# transformers reads from this entry which file has the weights. It refuses a name of another kind with an error that
# shows the name. So a process without our quantizer says what to do.
_WEIGHTS_FILE = "transformers_weights"
IMPORT_FIRST = 'run "import secateur.huggingface" first, which lets transformers load this model'

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

    How a model was shrunk is no such claim, and stays. That weights are packed is one.

    Example:
        >>> from secateur.files import without_claims
        >>> without_claims({"hidden_size": 8, "quantization_config": {"quant_method": "compressed-tensors"}})
        {'hidden_size': 8}
    """
    is_shrunk = is_shrunk_claim(config.get("quantization_config"))
    return {
        key: without_claims(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if (key not in _CLAIMS or is_shrunk_claim(value)) and (is_shrunk or not _is_hint(key, value))
    }


def with_claim(config: Mapping[str, Any], claim: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with a claim of ours, and with what to do for a process that does not know it.

    Args:
        config: contents of ``config.json``.
        claim: the ``quantization_config``.
    """
    return {**config, "quantization_config": dict(claim), _WEIGHTS_FILE: IMPORT_FIRST}


def packed_claim() -> dict[str, Any]:
    """Return the ``quantization_config`` of a directory with packed weights."""
    return {"quant_method": SHRUNK_METHOD, _PACKED: 1}


def is_shrunk_claim(value: object) -> bool:
    """Return whether a ``quantization_config`` quantizes nothing, but says how a model was shrunk."""
    return isinstance(value, Mapping) and value.get("quant_method") == SHRUNK_METHOD and _PACKED not in value


def is_packed_claim(value: object) -> bool:
    """Return whether a ``quantization_config`` says that the weights are packed."""
    return isinstance(value, Mapping) and value.get("quant_method") == SHRUNK_METHOD and _PACKED in value


def _is_hint(key: str, value: object) -> bool:
    """Whether an entry is what :func:`with_claim` adds. No file of weights can have such a name."""
    return key == _WEIGHTS_FILE and isinstance(value, str) and not value.endswith((".safetensors", ".json", ".bin"))
