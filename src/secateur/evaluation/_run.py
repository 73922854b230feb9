"""Run a model to measure it: the states of its tokens, embeddings of sentences, scores of classes."""

from __future__ import annotations

import inspect
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur._errors import StatisticsError
from secateur.calibration import call_model, is_sentence_transformer, quiet
from secateur.evaluation._pooling import Pooling

_IN_MEMORY = 1 << 30  # bytes of outputs of a dense model; what is beyond goes to a temporary file


def is_language_model(name: str) -> bool:
    """Return whether a class of transformers is a causal language model, by its name."""
    return name.endswith(("ForCausalLM", "LMHeadModel"))


def device_of(model: nn.Module) -> torch.device:
    """Return where a model computes; the CPU for one without tensors."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def body_of(model: nn.Module) -> nn.Module:
    """Return the part of a transformers model that gives the states of tokens: all but its head. Else the model."""
    base = getattr(model, "base_model", None)
    return base if isinstance(base, nn.Module) else model


def outputs_of(model: nn.Module, batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield what a model returns for each batch, and the batch as the model got it.

    In evaluation mode and without gradients. ``token_type_ids`` are left out where a model does not take them, because
    tokenizers give them to all models.

    Args:
        model: to run.
        batches: as the model takes them, on any device. A tensor is token ids for a model that takes ``input_ids``.

    Raises:
        StatisticsError: the model fails on a batch.
    """
    device = device_of(model)
    reads_tokens, takes_types = _reads(model)
    for batch in batches:
        given = _on(device, batch)
        if isinstance(given, Tensor) and reads_tokens:
            given = {"input_ids": given}
        if isinstance(given, dict) and not takes_types:
            given.pop("token_type_ids", None)
        with quiet(model):  # within the loop: who asks for outputs may stop early
            try:
                output = call_model(model, given)
            except Exception as error:  # whatever a model makes of inputs that are not its own
                raise StatisticsError(
                    f"{type(model).__name__} fails on {_described(given)}: {error}\nCheck that it takes such inputs: "
                    "for text, that the tokenizer is the model's own and the inputs are not too long."
                ) from None
        yield output, given


def states_of(output: Any) -> Tensor:
    """Return the first tensor of what a model returned; of a SentenceTransformer the states of tokens."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "token_embeddings" in output:
        output = [output["token_embeddings"]]
    values = list(output.values()) if isinstance(output, Mapping) else output
    found = next((value for value in values if isinstance(value, Tensor)), None) if _is_many(values) else None
    if found is None:
        raise StatisticsError(
            f"the model returned a {type(output).__name__} without a tensor. Measure it with a function of your own: "
            "metric=lambda model, data: ..."
        )
    return found


def embeddings_of(output: Any, batch: Any, pooling: Pooling) -> Tensor:
    """Return what a model returned as one vector for each row of the batch, float32 ``[batch, width]``, on the CPU.

    Args:
        output: of the model. States of tokens are pooled; a matrix is taken as it is.
        batch: that the model got, whose ``attention_mask`` says what is padding.
        pooling: of the states.
    """
    if isinstance(output, Mapping) and "sentence_embedding" in output:
        return as_float32(output["sentence_embedding"])
    states = states_of(output)
    if states.ndim == 3:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        states = pooling(states, mask)
    return as_float32(states.flatten(1))


def class_scores_of(output: Any) -> Tensor:
    """Return the scores of classes in what a model returned, ``[batch, classes]``.

    Raises:
        StatisticsError: it has none.
    """
    scores = getattr(output, "logits", None)
    scores = output if isinstance(output, Tensor) else states_of(output) if scores is None else scores
    if scores.ndim != 2 or scores.shape[1] < 2 or (not isinstance(output, Tensor) and not hasattr(output, "logits")):
        raise StatisticsError(
            f"the model returned {type(output).__name__} {list(scores.shape)}, and accuracy needs the scores of two or "
            "more classes for each text. Give a model with a head for classification."
        )
    return scores


def as_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 on the CPU."""
    return tensor.detach().float().cpu()


class KeptTensors:
    """Tensors to be gone through again: in memory up to a budget, the others in a temporary file.

    Args:
        budget: bytes that may stay in memory.
    """

    def __init__(self, budget: int = _IN_MEMORY) -> None:
        self._budget, self._kept = budget, list[Tensor | tuple[int, torch.Size]]()
        self._file: Any = None

    def append(self, tensor: Tensor) -> None:
        """Keep a tensor, as float32."""
        tensor = as_float32(tensor)
        self._budget -= tensor.nbytes
        if self._budget >= 0:
            self._kept.append(tensor.clone())
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it has no name, and goes when it is closed
            weakref.finalize(self, self._file.close)
        start = self._file.seek(0, 2)
        self._file.write(tensor.contiguous().numpy().tobytes())
        self._kept.append((start, tensor.shape))

    def __iter__(self) -> Iterator[Tensor]:
        for kept in self._kept:
            if isinstance(kept, Tensor):
                yield kept
                continue
            start, shape = kept
            self._file.seek(start)
            content = bytearray(self._file.read(4 * shape.numel()))
            yield torch.from_numpy(np.frombuffer(content, dtype=np.float32)).view(shape)


def _is_many(values: Any) -> bool:
    return isinstance(values, list | tuple)


def _reads(model: nn.Module) -> tuple[bool, bool]:
    """Whether a model takes token ids by their name, and whether it takes the types of tokens."""
    if is_sentence_transformer(model):
        return True, True
    names = inspect.signature(model.forward).parameters
    return "input_ids" in names, "token_type_ids" in names


def _on(device: torch.device, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _on(device, value) for name, value in batch.items()}
    return type(batch)(_on(device, value) for value in batch) if type(batch) in (tuple, list) else batch


def _described(batch: Any) -> str:
    ids = batch.get("input_ids") if isinstance(batch, dict) else batch
    if not isinstance(ids, Tensor) or not ids.numel():
        return f"a {type(batch).__name__}"
    return f"a batch {list(ids.shape)}" + ("" if ids.is_floating_point() else f" with ids up to {int(ids.max())}")
