"""What ``config.json`` says of a model of sizes that no config can say, and what transformers makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._errors import FormatError, naming
from secateur.files import SHRUNK, SHRUNK_METHOD
from secateur.huggingface import Changed, change_skeletons
from secateur.shapes._facts import Facts
from secateur.shapes._resize import remember_facts, resize_, structure_hash


def settings_for(model: nn.Module, facts: Facts) -> dict[str, Any]:
    """Return what ``config.json`` says of a model that no config can describe, as its ``quantization_config``.

    Args:
        model: of transformers, shrunk.
        facts: how it differs from the original.
    """
    return {"quant_method": SHRUNK_METHOD, "prefix": prefix_of(model), "shrunk": facts.to_dict()}


def prefix_of(model: Any) -> str:
    """Return the name of the base model in a model with a head; empty for a base model."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def resize_any_(model: nn.Module, facts: Facts, prefix: object) -> Facts:
    """Resize the skeleton of the saved class, or of one with another head or none. Return the facts of it.

    Args:
        model: changed in place.
        facts: how the saved model differs from the original.
        prefix: name of the base model in the saved one, from a file.

    Raises:
        FormatError: the prefix is no name, or the facts do not fit the model.
    """
    if not isinstance(prefix, str):
        raise FormatError(f"the prefix of the shrunk model is {prefix!r:.40}; expected a name.")
    if structure_hash(model) != facts.model_hash:
        base = facts.within(prefix) if prefix else replace(facts, model_hash="")
        here = prefix_of(model)
        facts = base.under(here) if here else base
    resize_(model, facts)
    return facts


def _change(model: nn.Module, settings: Mapping[str, Any], path: Path | None, dtype: torch.dtype) -> Changed:
    with naming("quantization_config of config.json"):
        facts = resize_any_(model, Facts.from_dict(settings.get("shrunk")), settings.get("prefix"))
    return Changed(lambda: remember_facts(model, facts), lambda: SHRUNK)


change_skeletons(SHRUNK, _change)
