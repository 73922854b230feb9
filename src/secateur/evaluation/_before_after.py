"""The quality of a model before and after it was changed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from secateur._types import Progress
from secateur.evaluation._data_file import DataFile
from secateur.evaluation._inputs import Inputs, Reading
from secateur.evaluation._measure import DenseOutcome, measure, run_dense
from secateur.reports import Evaluation

# The figure of running text that is cheap enough to come with every run: embeddings and ranks come with `evaluate`.
_OF_TEXT = {True: "perplexity", False: "similarity"}
_NAMES = {"similarity": "output similarity"}  # what reports have called it from the start


@dataclass(frozen=True, eq=False)
class DenseQuality:
    """What a dense model gives for a file, to compare the changed model with.

    Args:
        inputs: the file as what the model takes.
        dense: what the dense model gave.
    """

    inputs: Inputs
    dense: DenseOutcome

    @classmethod
    def of(cls, model: nn.Module, data: DataFile, reading: Reading, progress: Progress) -> DenseQuality:
        """Run a dense model on a file: running text, pairs or labels.

        Args:
            model: to run. It needs its head for labels.
            data: the file.
            reading: how the model reads.
            progress: called with a description, and how many batches of how many are done.
        """
        metrics = (_OF_TEXT[reading.causal],) if data.kind == "text" else None
        inputs = Inputs.of(data, reading, True, metrics)
        return cls(inputs, run_dense(inputs, model, progress))

    def compare(self, model: nn.Module, progress: Progress) -> tuple[Evaluation | None, tuple[str, ...]]:
        """Run the changed model on the same file.

        Returns:
            The figure of both, or None where their outputs cannot be compared; and notes that say why.
        """
        measured = measure(self.inputs, model, self.dense, progress)
        for found in measured.figures:
            assert found.dense is not None
            name = _NAMES.get(found.metric, found.metric)
            return Evaluation(name, found.dense, found.value, found.count), measured.notes
        return None, measured.notes
