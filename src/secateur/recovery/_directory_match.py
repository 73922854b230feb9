"""Do the model of one directory and that of another correspond, so that one can learn from the other?"""

from __future__ import annotations

import os
from typing import Any

from torch import distributed, nn

from secateur._errors import RecipeError
from secateur.files import ModelDirectory
from secateur.huggingface import is_causal, load_tokenizer

_ADVICE = "Give with --dense the model that was pruned or shrunk, as it was before."
_SAMPLE = 20_000  # characters that both tokenizers cut


def check_models(source: ModelDirectory, model: nn.Module, dense: ModelDirectory, teacher: nn.Module) -> None:
    """Raise unless two models are of the same class and read and give the same things.

    Args:
        source: directory of the model that learns.
        model: loaded from it.
        dense: directory of the model that it learns from.
        teacher: loaded from it.

    Raises:
        RecipeError: naming what differs, with both values.
    """
    pairs = [("class", type(model).__name__, type(teacher).__name__), *_sizes(model, teacher, is_causal(source))]
    for what, ours, theirs in pairs:
        if ours != theirs:
            raise RecipeError(
                f"{source.path} and {dense.path} do not correspond: the {what} is {ours} in the first and {theirs} in "
                f"the second.\n{_ADVICE}"
            )


def check_buffers(directory: ModelDirectory, model: nn.Module) -> None:
    """Raise if a model has statistics that recovery changes beside its parameters.

    Raises:
        RecipeError: it has batch norms.
    """
    kinds = nn.modules.batchnorm._BatchNorm
    names = [name for name, part in model.named_modules() if isinstance(part, kinds) and part.running_mean is not None]
    if names:
        raise RecipeError(
            f"{directory.path} has {len(names)} batch norms ({names[0]}), whose statistics are no parameters and would "
            "not be written.\nRecover it in Python: secateur.recover_(model, teacher, batches), then save_pretrained."
        )


def check_tokenizers(source: ModelDirectory, dense: ModelDirectory, text: str) -> tuple[str, ...]:
    """Raise unless the tokenizers of two directories cut text alike. Return a note where that is not known.

    Args:
        source: of the model that learns.
        dense: of the model that it learns from. It may lack a tokenizer.
        text: some of it is cut by both.

    Raises:
        RecipeError: naming the first token that differs.
        FormatError: a tokenizer cannot be loaded.
    """
    if not any((dense.path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return (f"{dense.path.name} has no tokenizer, so that of {source.path.name} was taken for its own",)
    ours, theirs = load_tokenizer(source), load_tokenizer(dense)
    vocabularies = [{token: int(number) for token, number in one.get_vocab().items()} for one in (ours, theirs)]
    odd = dict(sorted(vocabularies[0].items() ^ vocabularies[1].items(), key=lambda item: item[1])[:1])
    reason = ""
    for token in odd:
        numbers = [vocabulary.get(token, "missing") for vocabulary in vocabularies]
        reason = f"the token {token!r:.60} is {numbers[0]} in the first and {numbers[1]} in the second"
    if not odd:
        ids = [one(text[:_SAMPLE], verbose=False)["input_ids"] for one in (ours, theirs)]
        if ids[0] != ids[1]:
            reason = f"they cut the same text into {len(ids[0])} and {len(ids[1])} tokens, which differ"
    if reason:
        raise RecipeError(
            f"the tokenizers of {source.path} and {dense.path} differ: {reason}, so one model cannot learn from the "
            f"other.\n{_ADVICE}"
        )
    return ()


def check_processes() -> None:
    """Raise where several processes were started to train one model: only one may write a directory.

    Raises:
        RecipeError: with how it is done instead.
    """
    together = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if together or os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise RecipeError(
            "a model directory recovers in one process, and this is one of several (torchrun, accelerate).\nStart it "
            "without them, or write a script for them: secateur.recover_(model, teacher, batches) in each process."
        )


def _sizes(model: nn.Module, teacher: nn.Module, causal: bool) -> list[tuple[str, Any, Any]]:
    """What must be equal. Language models compare their logits, so that their states may have another size."""
    tables = [one.get_input_embeddings().weight for one in (model, teacher)]  # type: ignore[operator]
    (ours, hidden), (theirs, wanted) = (table.shape for table in tables)
    labels = [getattr(one.config, "num_labels", None) for one in (model, teacher)]
    found: list[tuple[str, Any, Any]] = [("size of the vocabulary", ours, theirs)]
    if not causal:
        found += [("hidden size", hidden, wanted), ("number of labels", labels[0], labels[1])]
    return found
