"""The quality of a model before and after it was changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from secateur._types import Progress
from secateur.calibration import batched
from secateur.evaluation._quality import outputs, perplexity, similarity
from secateur.reports import Evaluation


@dataclass(frozen=True)
class DenseQuality:
    """What a dense model gives on held-out text, to compare the changed model with.

    Args:
        batches: token ids ``[batch, length]``.
        perplexity: of the dense model, None unless it is a causal language model.
        outputs: of the dense model for each batch, None if it is a causal language model.
    """

    batches: tuple[Tensor, ...]
    perplexity: float | None
    outputs: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, model: nn.Module, windows: list[Tensor], causal: bool, progress: Progress) -> DenseQuality:
        """Run a dense model on held-out text.

        Args:
            model: to run.
            windows: token ids, ``[length]`` each.
            causal: whether it is a language model whose perplexity counts; else its outputs are kept.
            progress: called with a description, and how many batches of how many are done.
        """
        batches = tuple(batched(windows))
        counted = _counted(batches, "measuring the dense model", progress)
        if causal:
            return cls(batches, perplexity(model, counted)[0], None)
        return cls(batches, None, tuple(outputs(model, counted)))

    def compare(self, model: nn.Module, progress: Progress) -> Evaluation:
        """Run the changed model on the same text, and return the figure of both."""
        batches = _counted(self.batches, "measuring the changed model", progress)
        if self.perplexity is not None:
            value, tokens = perplexity(model, batches)
            return Evaluation("perplexity", self.perplexity, value, tokens)
        assert self.outputs is not None
        value, tokens = similarity(self.outputs, outputs(model, batches))
        return Evaluation("output similarity", 1.0, value, tokens)


def _counted(batches: tuple[Tensor, ...], description: str, progress: Progress) -> Iterator[Tensor]:
    for index, batch in enumerate(batches):
        progress(description, index, len(batches))
        yield batch
