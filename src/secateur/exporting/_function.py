"""A model as a function of tensors in order, which returns tensors in order. That is what an exporter takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError
from secateur.calibration import quiet
from secateur.evaluation import Pooling, is_language_model
from secateur.exporting._inputs import BATCH, PAST, SEQUENCE, TOTAL, Inputs
from secateur.huggingface import cache_after, call_with_cache, keeps_cache

EMBEDDING, STATES, SCORES = "sentence_embedding", "last_hidden_state", "logits"
OF_TOKENS = (STATES,)  # outputs with a row for each token
_PARTS = ("key", "value")
_TOKENS_BEFORE = 3  # in the cache of the example


class ExportedFunction(nn.Module):
    """A model, its inputs in order, and the names of its outputs in order.

    Args:
        model: in evaluation mode, with plain weights of float32 on the CPU.
        inputs: that it takes.
        pooling: also return embeddings of sentences; None for none.
        leave_out: names of outputs that are not wanted.

    Raises:
        RecipeError: the model returns no tensor, or no states of tokens where there is a pooling.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, pooling: Pooling | None = None, leave_out: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling
        self.cached = 0  # layers of a cache that is an input and an output
        self.notes: tuple[str, ...] = ()
        self._leave_out = frozenset(leave_out)
        self.inputs = inputs
        if pooling is None and is_language_model(type(model).__name__) and keeps_cache(model):
            self._take_cache()
        for module in model.modules():  # of a copy, or of a model that was loaded for this
            if getattr(getattr(module, "config", None), "use_cache", False) is True:
                module.config.use_cache = False  # type: ignore[union-attr]
        with quiet(self):
            found = self._run(tuple(self.inputs.tensors.values()))
        self.outputs = tuple(found)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return all outputs in order."""
        return tuple(self._run(tensors).values())

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs by name, for inputs by name."""
        with quiet(self):
            found = self(*(tensors[name] for name in self.inputs.names))
        return dict(zip(self.outputs, found, strict=True))

    def _run(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        if self.cached:
            return self._run_cached(dict(zip(self.inputs.names, tensors, strict=True)))
        output = self.inputs.call(self.model, tensors)
        found = dict(_tensors_of(output))
        if self.pooling is not None:
            if STATES not in found:
                raise RecipeError(
                    f"{type(self.model).__name__} returns {', '.join(found) or 'no tensor'}, and a pooling needs "
                    f"{STATES}.\nGive the model without its head, or no pooling."
                )
            mask = dict(zip(self.inputs.names, tensors, strict=True)).get("attention_mask")
            return {STATES: found[STATES], EMBEDDING: self.pooling(found[STATES], mask)}
        if SCORES in found:
            found = {SCORES: found[SCORES]}
        found = {name: tensor for name, tensor in found.items() if name not in self._leave_out}
        if not found:
            raise RecipeError(
                f"{type(self.model).__name__} returned a {type(output).__name__} without a tensor.\nGive a module that "
                "returns tensors, with a few lines that call this one."
            )
        return found

    # The cache of a language model

    def _take_cache(self) -> None:
        """Add the keys and values of earlier tokens to the inputs, if the model keeps them as plain tensors."""
        given = self.inputs.tensors
        if (
            set(given) - {"input_ids", "attention_mask", "position_ids"}
            or SEQUENCE not in self.inputs.sizes.get("input_ids", {}).values()
        ):
            self.notes += ("exported without a cache, because it has other inputs than tokens",)
            return
        ids = given["input_ids"]
        with quiet(self.model):
            parts, instead = cache_after(self.model, ids)
        if not parts:
            self.notes += (f"exported without a cache: {instead}",)
            return
        self.cached = len(parts)
        rows, length = ids.shape
        numbers = torch.arange(_TOKENS_BEFORE, _TOKENS_BEFORE + length).expand(rows, length).contiguous()
        tensors = {"input_ids": ids, "attention_mask": torch.ones(rows, _TOKENS_BEFORE + length, dtype=torch.long)}
        sizes = {"input_ids": {0: BATCH, 1: SEQUENCE}, "attention_mask": {0: BATCH, 1: TOTAL}}
        defaults = {"attention_mask": "ones"}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            tensors["position_ids"], sizes["position_ids"] = numbers, {0: BATCH, 1: SEQUENCE}
            defaults["position_ids"] = "positions"
        generator = torch.Generator().manual_seed(0)
        for number, pair in enumerate(parts):
            for part, tensor in zip(_PARTS, pair, strict=True):
                name = f"past_key_values.{number}.{part}"
                shape = (rows, tensor.shape[1], _TOKENS_BEFORE, tensor.shape[3])
                tensors[name], sizes[name] = torch.randn(shape, generator=generator), {0: BATCH, 2: PAST}
                defaults[name] = "empty"
        self.inputs = replace(self.inputs, tensors=tensors, sizes=sizes, positional=0, defaults=defaults)

    def _run_cached(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [[f"past_key_values.{number}.{part}" for part in _PARTS] for number in range(self.cached)]
        before = [(tensors.pop(key), tensors.pop(value)) for key, value in names]
        logits, after = call_with_cache(self.model, tensors, before)
        present = {
            f"present.{number}.{part}": tensor
            for number, pair in enumerate(after)
            for part, tensor in zip(_PARTS, pair, strict=True)
        }
        return {SCORES: logits, **present}


def _tensors_of(output: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in what a model returned, by name: those of a mapping, ``output``, or ``output.0`` and so on."""
    for name, value in output.items() if isinstance(output, Mapping) else [("output", output)]:
        yield from _parts(str(name), value)


def _parts(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple | list):
        for number, part in enumerate(value):
            yield from _parts(f"{name}.{number}", part)
