"""Which loss suits a model? Decided by what it returns for one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from secateur._errors import RecipeError
from secateur.recovery._seen import Seen
from secateur.recovery._settings import Settings
from secateur.recovery._terms import Embeddings, Given, Kept, Logits, Outputs, Pool, States, Term, TokenStates


@dataclass(frozen=True)
class Criterion:
    """The sum of some terms.

    Args:
        terms: of the loss.
        needs_states: whether blocks are compared, so that their outputs must be recorded.
        notes: on what is not compared, and why.
    """

    terms: tuple[Term, ...]
    needs_states: bool
    notes: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """What is compared."""
        return " + ".join(term.words for term in self.terms)

    def keep(self, seen: Seen) -> dict[str, Tensor]:
        """Return what is needed of the teacher, in half precision where rounding does no harm."""
        kept: dict[str, Tensor] = {}
        for number, term in enumerate(self.terms):
            for name, tensor in term.keep(seen).items():
                half = name not in term.exact and tensor.is_floating_point()
                kept[f"{number}.{name}"] = (_in_half(tensor) if half else tensor).detach().cpu().contiguous()
        return kept

    def loss(self, seen: Seen, kept: Kept) -> Tensor:
        """Return the sum of the terms."""
        parts = []
        for number, term in enumerate(self.terms):
            start = f"{number}."
            own = {name.removeprefix(start): tensor for name, tensor in kept.items() if name.startswith(start)}
            parts.append(term.loss(seen, own))
        return torch.stack(parts).sum()


def _in_half(tensor: Tensor) -> Tensor:
    """A tensor in float16, or in bfloat16 where numbers are too large for that."""
    half = tensor.to(torch.float16)
    return half if bool(half.isfinite().all()) else tensor.to(torch.bfloat16)


def choose_loss(ours: Seen, theirs: Seen, settings: Settings, pool: Pool | None) -> Criterion:
    """Return the loss for a model.

    Args:
        ours: a forward pass of the model, with the states of its blocks.
        theirs: the same of the teacher.
        settings: with the loss that was asked for.
        pool: how token states become embeddings; None for their mean.

    Raises:
        RecipeError: the outputs cannot be compared, or have no such tensors.
    """
    if callable(settings.loss):
        return Criterion((Given(settings.loss),), needs_states=False)
    kind = settings.loss
    logits, states = logits_of(ours.output), states_of(ours.output)
    if kind == "auto":
        if logits is not None and logits.shape[-1] > 1:
            kind = "logits"
        elif states is not None or _own_embeddings(ours.output) is not None:
            kind = "embeddings"
        else:
            kind = "outputs"
    if kind == "logits":
        return _by_logits(ours, theirs, settings)
    if kind == "embeddings":
        return _by_embeddings(ours, theirs, pool)
    return _by_outputs(ours, theirs)


def _by_logits(ours: Seen, theirs: Seen, settings: Settings) -> Criterion:
    own, other = logits_of(ours.output), logits_of(theirs.output)
    if own is None or other is None:
        raise RecipeError(
            f"the loss 'logits' needs an output with logits, and the {'model' if own is None else 'teacher'} has none. "
            "Load it with its head, or use another loss."
        )
    if own.shape != other.shape:
        what = "vocabularies or classes" if own.shape[:-1] == other.shape[:-1] else "logits"
        raise RecipeError(
            f"model and teacher do not correspond: their {what} differ, {tuple(own.shape)} and {tuple(other.shape)}.\n"
            "Give the dense model from which this one was made."
        )
    terms: list[Term] = [Logits(_needed_logits, settings.temperature, settings.top_k)]
    notes: list[str] = []
    compared = own.ndim == 3 and _compare_states(ours, theirs, notes)
    if compared:
        terms.append(States())
    return Criterion(tuple(terms), compared, tuple(notes))


def _compare_states(ours: Seen, theirs: Seen, notes: list[str]) -> bool:
    """Whether the streams behind blocks can be compared; why not is added to the notes."""
    if not ours.states:
        return False
    for own, other in zip(ours.states, theirs.states, strict=True):
        if own.shape != other.shape:
            notes.append(
                f"states behind blocks are not compared, because their sizes differ ({own.shape[-1]} channels, and "
                f"{other.shape[-1]} in the teacher)"
            )
            return False
    return all(state.ndim == 3 for state in ours.states)


def _by_embeddings(ours: Seen, theirs: Seen, pool: Pool | None) -> Criterion:
    own, other = states_of(ours.output), states_of(theirs.output)
    if (own is None or other is None) and _own_embeddings(ours.output) is None:
        raise RecipeError(
            f"the loss 'embeddings' needs token states, and the {'model' if own is None else 'teacher'} returns none. "
            "Use the loss 'outputs', or a function of your own."
        )
    terms: list[Term] = []
    if own is not None and other is not None:
        if own.shape != other.shape:
            raise RecipeError(
                f"model and teacher do not correspond: their hidden sizes differ, {own.shape[-1]} and "
                f"{other.shape[-1]}.\nGive the dense model from which this one was made, or a loss of your own: "
                "loss=lambda student, teacher, batch: ..."
            )
        terms.append(TokenStates(_needed_states))
    notes: list[str] = []
    compared = _compare_states(ours, theirs, notes)
    if compared:
        terms.append(States())
    terms.append(Embeddings(_Embedding(pool)))
    return Criterion(tuple(terms), compared, tuple(notes))


def _by_outputs(ours: Seen, theirs: Seen) -> Criterion:
    own, other = float_tensors(ours.output), float_tensors(theirs.output)
    if not own:
        raise RecipeError(
            "the model returns no floating-point tensor that could be compared. Give a loss of your own: "
            "loss=lambda student, teacher, batch: ..."
        )
    shapes, expected = [tuple(t.shape) for t in own], [tuple(t.shape) for t in other]
    if shapes != expected:
        raise RecipeError(
            f"model and teacher do not correspond: their outputs have the shapes {shapes} and {expected}.\n"
            "Give the dense model from which this one was made, or a loss of your own."
        )
    return Criterion((Outputs(float_tensors),), needs_states=False)


@dataclass(frozen=True)
class _Embedding:
    """The embeddings of a forward pass: the model's own, or token states pooled."""

    pool: Pool | None

    def __call__(self, seen: Seen) -> Tensor:
        own = _own_embeddings(seen.output)
        if own is not None and self.pool is None:
            return own
        states = _needed_states(seen.output)
        real = seen.real(states)
        if self.pool is not None:
            return self.pool(states, real)
        weights = real.to(states.dtype).unsqueeze(-1)
        return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


def _entry(output: Any, *names: str) -> Tensor | None:
    for name in names:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor) and found.is_floating_point():
            return found
    return None


def logits_of(output: Any) -> Tensor | None:
    """Return the logits ``[..., outcomes]`` in an output, or None."""
    return _entry(output, "logits")


def states_of(output: Any) -> Tensor | None:
    """Return the token states ``[batch, length, hidden]`` in an output, or None."""
    found = _entry(output, "last_hidden_state", "token_embeddings")
    return found if found is not None and found.ndim == 3 else None


def _own_embeddings(output: Any) -> Tensor | None:
    return _entry(output, "sentence_embedding")


def _needed_logits(output: Any) -> Tensor:
    found = logits_of(output)
    assert found is not None
    return found


def _needed_states(output: Any) -> Tensor:
    found = states_of(output)
    assert found is not None
    return found


def float_tensors(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in an output, in order."""
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) and not isinstance(output, dict) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0]
