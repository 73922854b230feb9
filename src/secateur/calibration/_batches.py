"""Calibration batches: read, hashed, and passed to a model that is in a quiet state meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_map

from secateur._errors import StatisticsError
from secateur.calibration._arguments import is_sentence_transformer

Forward: TypeAlias = Callable[[nn.Module, Any], object]


def call_model(model: nn.Module, batch: Any) -> object:
    """Call the model as the batch's type suggests: ``model(**mapping)``, ``model(*sequence)`` or ``model(batch)``.

    A ``SentenceTransformer`` is called with a mapping itself, of which it gets a copy, because it adds its outputs.
    """
    if isinstance(batch, Mapping):
        if is_sentence_transformer(model):
            return model(dict(batch))
        return model(**batch)
    if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        return model(*batch)
    return model(batch)


def load_batches(batches: Iterable[Any], device: torch.device) -> list[Any]:
    """Read all batches once (a shuffling loader would give others the next time) and move their tensors to the device.

    Raises:
        StatisticsError: there are no batches.
        TypeError: a single batch instead of an iterable of batches.
    """
    if isinstance(batches, Tensor | Mapping | str | np.ndarray):
        raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}; wrap it in a list")
    loaded = []
    for batch in batches:
        tree = dict(batch) if isinstance(batch, Mapping) else batch  # tree_map takes a BatchEncoding for a leaf
        loaded.append(tree_map(lambda leaf: leaf.detach().to(device) if isinstance(leaf, Tensor) else leaf, tree))
    if not loaded:
        raise StatisticsError("batches is empty: there is nothing to calibrate on.")
    return loaded


def evenly(count: int, total: int) -> tuple[int, ...]:
    """Return which of some batches to take so that they are spread evenly: they may be sorted by length, or by subject.

    Args:
        count: how many to take, from 1 to all.
        total: how many there are.
    """
    return tuple(int((number + 0.5) * total / count) for number in range(count))


def hash_batches(batches: Iterable[Any]) -> str:
    """SHA-256 over the containers and keys, and the dtype, shape and content of every tensor, in order."""
    leaves, structure = tree_flatten(list(batches))
    digest = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            data = leaf.detach().cpu().contiguous()
            digest.update(f"{data.dtype}{tuple(data.shape)}".encode())
            digest.update(data.view(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b"")
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def code_path(batch: Any) -> str:
    """What decides which code a batch runs, as far as can be seen.

    That is: containers, keys, the number of dimensions of each tensor, and the values of all other leaves.
    """
    leaves, structure = tree_flatten(batch)
    return repr((str(structure), [leaf.ndim if isinstance(leaf, Tensor) else leaf for leaf in leaves]))


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no key-value caches, experts one by one. All is restored on every exit."""
    modes = [(module, module.training) for module in model.modules()]
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    caching = [config for config in configs if getattr(config, "use_cache", False) is True]
    # Other ways to run the experts of transformers gather copies of their weights for every token.
    by_copies = {id(config): (config, way) for config in configs if (way := _way_of_experts(config)) is not None}
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # it runs layers without calling them, on nested tensors
        for config in caching:  # a cache filled by the first of a block's two runs would change the second
            config.use_cache = False
        for config, _ in by_copies.values():
            config._experts_implementation = "grouped_mm"
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        for config in caching:
            config.use_cache = True
        for config, way in by_copies.values():
            config._experts_implementation = way
        for module, training in modes:
            module.training = training


def _way_of_experts(config: Any) -> str | None:
    """How a configuration of transformers runs experts, if that does not multiply their weights as they are."""
    way = getattr(config, "_experts_implementation", None)
    return way if isinstance(way, str) and way not in ("eager", "grouped_mm") else None
