"""Which class a checkpoint is of, where its config does not say: the one that has exactly the stored tensors."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from secateur._errors import FormatError
from secateur.files import ModelDirectory


def named(directory: ModelDirectory, config: Any) -> ModelDirectory:
    """Return the directory with the name of its class in its config, if only one class has exactly its tensors.

    Args:
        directory: of the model. If its config names a class, it is returned as it is.
        config: of transformers.
    """
    if directory.config.get("architectures"):
        return directory
    fitting = _fitting(directory, config)
    if len(fitting) != 1:
        return directory
    return replace(directory, config={**directory.config, "architectures": [fitting[0].__name__]})


def check_named(directory: ModelDirectory, config: Any) -> None:
    """Raise if a config does not say of which class the checkpoint is: without it, a head would be lost unnoticed.

    Raises:
        FormatError: it does not say it, and naming the classes to choose from.
    """
    if directory.config.get("architectures"):
        return
    names = [made.__name__ for made in _fitting(directory, config)] or [made.__name__ for made in classes(config)]
    raise FormatError(
        f"{directory.path / 'config.json'} has no 'architectures', and its tensors do not say of which class the model "
        f"is: {', '.join(names) or 'transformers knows none'}.\n"
        f'Add the right one, such as "architectures": ["{names[0] if names else "..."}"].'
    )


def classes(config: Any) -> Iterator[type[nn.Module]]:
    """Yield the classes that transformers itself has for a config, each once.

    A name in a checkpoint chooses among these and nothing else.
    """
    seen = set()
    for table in vars(importlib.import_module("transformers.models.auto.modeling_auto")).values():
        mapping = getattr(table, "_model_mapping", None)
        try:
            found = () if mapping is None else mapping[type(config)]
        except KeyError:
            continue
        for made in found if isinstance(found, tuple | list) else (found,):
            if made not in seen:
                seen.add(made)
                yield made


def _fitting(directory: ModelDirectory, config: Any) -> list[type[nn.Module]]:
    """The classes that have exactly the stored tensors. Below the head, transformers may rename what it loads."""
    base = importlib.import_module("transformers").AutoModel._model_mapping.get(type(config), None)
    # Most models with a head store their body under a prefix, and a body alone does not.
    prefix = f"{getattr(base, 'base_model_prefix', '')}."
    has_prefix = any(name.startswith(prefix) for name in directory.tensors)
    fitting = []
    for made in classes(config):
        with torch.device("meta"):
            try:
                model = made(config)
            except Exception:  # a class for another use of the config
                continue
        stored, names = set(directory.tensors), set(model.state_dict())
        if has_prefix:
            stored, names = ({name for name in all_ if not name.startswith(prefix)} for all_ in (stored, names))
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        if (made is not base or not has_prefix) and names - tied <= stored <= names:
            fitting.append(made)
    if not fitting and not has_prefix and isinstance(base, type):
        return [base]
    # An encoder with a head for masked words stores what it would as a decoder, which it seldom is.
    masked = [made for made in fitting if made.__name__.endswith("ForMaskedLM")]
    return masked if masked and not getattr(config, "is_decoder", False) else fitting
