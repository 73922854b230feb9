"""What is compared between a model and its teacher: each term keeps a little of the teacher, and measures against it.

What is kept is stored in half precision. A term must work on what comes back from there, so that it makes no difference
whether the teacher's outputs were kept or computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from secateur._errors import RecipeError
from secateur.recovery._seen import Seen

Kept = Mapping[str, Tensor]
Pool = Callable[[Tensor, Tensor], Tensor]  # states [batch, length, hidden] and real tokens to embeddings [batch, width]

_SMALL = 1e-6


class Term(Protocol):
    """A part of a loss."""

    @property
    def words(self) -> str:
        """What it compares."""

    @property
    def exact(self) -> frozenset[str]:
        """Names of what it keeps that must not be rounded."""

    def keep(self, seen: Seen) -> dict[str, Tensor]:
        """Return what is needed of the teacher."""

    def loss(self, seen: Seen, kept: Kept) -> Tensor:
        """Return how far the model is from it, one number in float32."""


def relative_error(ours: Tensor, theirs: Tensor, real: Tensor | None = None) -> Tensor:
    """Return ``|ours - theirs|^2 / |theirs|^2`` over real tokens, in float32."""
    theirs = theirs.to(ours.device, torch.float32)
    squares, sizes = (ours.float() - theirs).square().sum(-1), theirs.square().sum(-1)
    if real is not None:
        squares, sizes = squares * real, sizes * real
    return squares.sum() / sizes.sum().clamp_min(_SMALL)


@dataclass(frozen=True)
class Logits:
    r"""Kullback-Leibler divergence of the model's distribution from the teacher's, at each real token.

    With the teacher's k most likely outcomes :math:`K`, :math:`p = softmax(z_t / T)` and :math:`q = softmax(z_s / T)`:
    :math:`T^2 (\sum_K p_i log(p_i / q_i) + p_r log(p_r / q_r))`, where :math:`p_r` and :math:`q_r` are what is left of
    both. It is the whole divergence if k is at least the number of outcomes, and never above it.

    Args:
        get: the logits ``[..., outcomes]`` in an output.
        temperature: T.
        top_k: k.
    """

    get: Callable[[Any], Tensor]
    temperature: float = 1.0
    top_k: int = 512
    words: str = "distribution of the logits"
    exact: frozenset[str] = frozenset()

    def keep(self, seen: Seen) -> dict[str, Tensor]:
        """Return the log-probabilities of the likeliest outcomes, and which these are."""
        logs = torch.log_softmax(self.get(seen.output).float() / self.temperature, -1)
        if logs.shape[-1] <= self.top_k:
            return {"logs": logs}
        top = logs.topk(self.top_k, dim=-1)
        return {"logs": top.values, "indices": top.indices.to(torch.int32)}

    def loss(self, seen: Seen, kept: Kept) -> Tensor:
        """Return the mean divergence over real tokens."""
        logits = self.get(seen.output)
        real = seen.real(logits)
        # Only real tokens: for a large vocabulary the rest would cost as much memory as they do.
        ours = torch.log_softmax(logits[real].float() / self.temperature, -1)
        theirs = kept["logs"].to(ours.device, torch.float32)[real]
        chances = theirs.exp()
        if "indices" not in kept:
            return self.temperature**2 * nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        ours = ours.gather(-1, kept["indices"].to(ours.device, torch.long)[real])
        rest, own = (1 - chances.sum(-1)).clamp_min(_SMALL), (1 - ours.exp().sum(-1)).clamp_min(_SMALL)
        each = (chances * (theirs - ours)).sum(-1) + rest * (rest.log() - own.log())
        return self.temperature**2 * each.mean()


@dataclass(frozen=True)
class States:
    """Normalised error of the residual stream behind each block, averaged over the blocks (SquareHead).

    Reference:
        Eldar Kurtic, Denis Kuznedelev, Elias Frantar, Michael Goin, Dan Alistarh, "Sparse Fine-tuning for Inference
        Acceleration of Large Language Models", 2023, arXiv:2310.06927.
    """

    words: str = "states behind each block"
    exact: frozenset[str] = frozenset()

    def keep(self, seen: Seen) -> dict[str, Tensor]:
        """Return the streams."""
        return {str(place): state for place, state in enumerate(seen.states)}

    def loss(self, seen: Seen, kept: Kept) -> Tensor:
        """Return the mean error."""
        errors = [relative_error(state, kept[str(place)], seen.real(state)) for place, state in enumerate(seen.states)]
        return torch.stack(errors).mean()


@dataclass(frozen=True)
class TokenStates:
    """Normalised error of the last states ``[batch, length, hidden]``.

    Args:
        get: them in an output.
    """

    get: Callable[[Any], Tensor]
    words: str = "token states"
    exact: frozenset[str] = frozenset()

    def keep(self, seen: Seen) -> dict[str, Tensor]:
        """Return the states."""
        return {"states": self.get(seen.output)}

    def loss(self, seen: Seen, kept: Kept) -> Tensor:
        """Return the error."""
        states = self.get(seen.output)
        return relative_error(states, kept["states"], seen.real(states))


@dataclass(frozen=True)
class Embeddings:
    """Cosine of pooled embeddings, and the cosines between all pairs of a batch.

    ``mean(1 - cos(e_s, e_t)) + weight * mean((S_s - S_t)^2)`` with the matrices of cosines S, their diagonals left out.

    Args:
        get: embeddings ``[batch, width]`` of a forward pass.
        weight: of the second part, which is a square.
    """

    get: Callable[[Seen], Tensor]
    weight: float = 10.0
    words: str = "pooled cosine + similarity matrix"
    exact: frozenset[str] = frozenset({"embeddings"})

    def keep(self, seen: Seen) -> dict[str, Tensor]:
        """Return the embeddings, normalised."""
        return {"embeddings": nn.functional.normalize(self.get(seen).float(), dim=-1)}

    def loss(self, seen: Seen, kept: Kept) -> Tensor:
        """Return both parts."""
        ours = nn.functional.normalize(self.get(seen).float(), dim=-1)
        theirs = kept["embeddings"].to(ours)
        cosine = (1 - (ours * theirs).sum(-1)).mean()
        count = len(ours)
        if count < 2:
            return cosine
        squares = (ours @ ours.T - theirs @ theirs.T).square()
        return cosine + self.weight * (squares.sum() - squares.diagonal().sum()) / (count * (count - 1))


@dataclass(frozen=True)
class Outputs:
    """Normalised squared error of all floating-point tensors in the output, averaged over them.

    Args:
        get: the tensors in an output.
    """

    get: Callable[[Any], list[Tensor]]
    words: str = "output tensors"
    exact: frozenset[str] = frozenset()

    def keep(self, seen: Seen) -> dict[str, Tensor]:
        """Return the tensors."""
        return {str(place): tensor for place, tensor in enumerate(self.get(seen.output))}

    def loss(self, seen: Seen, kept: Kept) -> Tensor:
        """Return the mean error."""
        tensors = self.get(seen.output)
        errors = []
        for place, tensor in enumerate(tensors):
            real = seen.real(tensor) if tensor.ndim == 3 else None
            errors.append(relative_error(tensor, kept[str(place)], real))
        return torch.stack(errors).mean()


class Given:
    """A loss of the caller's own: ``loss(student_output, teacher_output, batch)``.

    Args:
        function: returns one number.
    """

    words: str
    exact: frozenset[str] = frozenset()

    def __init__(self, function: Callable[[Any, Any, Any], Tensor]) -> None:
        self._function = function
        self._rest: dict[TreeSpec, list[Any]] = {}
        self._specs: list[TreeSpec] = []
        self.words = f"{getattr(function, '__name__', type(function).__name__)}()"

    def keep(self, seen: Seen) -> dict[str, Tensor]:
        """Return all tensors of the teacher's output."""
        leaves, spec = tree_flatten(seen.output)
        if spec not in self._specs:
            self._specs.append(spec)
            self._rest[spec] = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        kept = {str(place): leaf for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        return {**kept, "spec": torch.tensor(self._specs.index(spec))}

    def loss(self, seen: Seen, kept: Kept) -> Tensor:
        """Return what the function returns."""
        spec = self._specs[int(kept["spec"])]
        device = _device(seen.output)
        leaves = [
            rest if (tensor := kept.get(str(place))) is None else tensor.to(device)
            for place, rest in enumerate(self._rest[spec])
        ]
        value = self._function(seen.output, tree_unflatten(leaves, spec), seen.batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise RecipeError(
                f"{self.words} returned {what}. Return one number as a tensor, such as the mean over the batch."
            )
        return value.reshape(()).float()


def _device(output: Any) -> torch.device:
    return next((leaf.device for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)), torch.device("cpu"))
