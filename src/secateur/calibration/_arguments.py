"""Batches as loaders, tokenizers and numpy give them become what the model's forward takes, or an error says how."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur._errors import StatisticsError

_LABELS = frozenset({"label", "labels", "label_ids", "target", "targets", "y"})


@dataclass(frozen=True)
class Arguments:
    """Batches that fit the forward of a model.

    Args:
        batches: to call the model with.
        ignored: what was left out of them, for the report; empty if nothing was.
    """

    batches: list[Any]
    ignored: str = ""


def fit_arguments(model: nn.Module, batches: list[Any], device: torch.device) -> Arguments:
    """Return batches that the model can be called with: labels left out, numpy arrays and texts as tensors.

    A label is left out only where it cannot be anything else: the second of two items for a model with one input, or a
    key that is called so, and that the model does not take.

    Args:
        model: that will be called.
        batches: tensors, sequences and mappings of them.
        device: for new tensors.

    Raises:
        StatisticsError: a batch that does not fit, with the ways out.
    """
    model = _inner(model)
    sentences = is_sentence_transformer(model)
    signature = None if sentences else _signature(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    fitting: list[Any] = []
    ignored: set[str] = set()
    for index, given in enumerate(batches):
        batch = tree_map(lambda leaf: _tensor(leaf, dtype, device), given)
        if _is_text(batch):
            batch = _tokenized(model, batch, index, sentences, device)
        elif sentences and not isinstance(batch, Mapping):
            raise _unfit(index, batch, "a SentenceTransformer takes a mapping of tensors, or texts")
        elif signature is not None:
            batch = _without_labels(model, signature, batch, index, ignored)
        fitting.append(batch)
    return Arguments(fitting, " and ".join(sorted(ignored)))


def is_sentence_transformer(model: nn.Module) -> bool:
    """Whether a model is called with one mapping, as those of the sentence-transformers library are."""
    library = sys.modules.get("sentence_transformers")  # a model can only be one if it was imported
    return library is not None and isinstance(model, library.SentenceTransformer)


def _inner(model: nn.Module) -> nn.Module:
    """The model inside wrappers that take any argument and pass it on."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _signature(model: nn.Module) -> inspect.Signature | None:
    """The arguments that a model's class takes; None where Python does not know them."""
    forward: Callable[..., object] = type(model).forward
    try:
        _, *rest = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return None
    return inspect.Signature(rest)


def _tensor(leaf: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A numpy array of numbers as a tensor; floating-point ones in the dtype of the model, as numpy's is float64."""
    if not isinstance(leaf, np.ndarray) or leaf.dtype.kind not in "biuf":
        return leaf
    tensor = torch.from_numpy(np.array(leaf)).to(device)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _is_text(batch: Any) -> bool:
    return isinstance(batch, str) or (
        isinstance(batch, list | tuple) and len(batch) > 0 and all(isinstance(item, str) for item in batch)
    )


def _tokenized(model: nn.Module, batch: Any, index: int, sentences: bool, device: torch.device) -> dict[str, Any]:
    if not sentences:
        raise StatisticsError(
            f"batch {index} is text, but {type(model).__name__} takes tensors.\n"
            "Tokenize it first, such as: batches = [tokenizer(texts, padding=True, return_tensors='pt')]."
        )
    texts = [batch] if isinstance(batch, str) else list(batch)
    known: Any = model  # "preprocess" is the name since version 5.4 of the library, "tokenize" the one before
    features = known.preprocess(texts) if hasattr(known, "preprocess") else known.tokenize(texts)
    return {name: part.to(device) if isinstance(part, Tensor) else part for name, part in features.items()}


def _without_labels(model: nn.Module, signature: inspect.Signature, batch: Any, index: int, ignored: set[str]) -> Any:
    """The batch as the model takes it. What is left out is added to ``ignored``."""
    if isinstance(batch, Mapping):
        unknown = batch.keys() - signature.parameters.keys()
        if _takes(signature, {}, batch) or not unknown:
            return batch
        rest = {key: value for key, value in batch.items() if key not in unknown}
        if unknown <= _LABELS and _takes(signature, {}, rest):
            ignored.update(f"{key!r} of each batch, which the model does not take" for key in unknown)
            return rest
        raise _unfit(index, batch, f"{type(model).__name__} does not take {sorted(map(str, unknown))}")
    if not isinstance(batch, list | tuple) or _takes(signature, batch, {}):
        return batch
    takes = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(takes) == 1 and len(batch) == 2:
        ignored.add("the second item of each batch, a label, because the model takes one input")
        return (batch[0],)
    names = ", ".join(parameter.name for parameter in takes)
    raise _unfit(index, batch, f"{type(model).__name__} takes {len(takes)} ({names})")


def _takes(signature: inspect.Signature, positional: Any, named: Mapping[str, Any]) -> bool:
    try:
        signature.bind(*positional, **named)
    except TypeError:
        return False
    return True


def _unfit(index: int, batch: Any, why: str) -> StatisticsError:
    what = f"a {type(batch).__name__}"
    if isinstance(batch, Mapping):
        what += f" with {sorted(map(str, batch))}"
    elif isinstance(batch, list | tuple):
        what += f" of {len(batch)} items"
    return StatisticsError(
        f"batch {index} is {what}, but {why}.\n"
        "Say how to call the model, such as: forward=lambda model, batch: model(batch[0])."
    )
