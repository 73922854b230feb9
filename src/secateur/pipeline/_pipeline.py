"""A pipeline as a value: read from TOML, looked at, and run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from secateur._checks import instance
from secateur._errors import RecipeError, naming
from secateur._types import Progress
from secateur.pipeline._forecast import Forecast, forecast
from secateur.pipeline._recipe import PipelineRecipe
from secateur.pipeline._run import run_pipeline
from secateur.reports import PipelineReport


@dataclass(frozen=True)
class Pipeline:
    """Stages that make a model, one after the other, and gates that it must pass after each.

    Args:
        recipe: the stages, as :meth:`from_toml` reads them.

    Example:
        >>> import secateur
        >>> pipeline = secateur.Pipeline.from_toml('''
        ... schema = 1
        ...
        ... [[stage]]
        ... run = "prune"
        ... method = "magnitude"
        ... sparsity = 0.8
        ... gates = ["sparsity >= 0.8", "minutes <= 30"]
        ... ''')
        >>> pipeline.stages
        ('prune',)
    """

    recipe: PipelineRecipe

    @classmethod
    def from_toml(cls, text: str) -> Pipeline:
        """Return the pipeline that TOML text describes. Files in it are relative to the working directory.

        Raises:
            RecipeError: not TOML, an unknown key, a value of the wrong type, or a gate on what nobody measures.
        """
        return cls(PipelineRecipe.from_toml(instance("text", text, str), Path()))

    @classmethod
    def load(cls, path: str | Path) -> Pipeline:
        """Return the pipeline in a TOML file. Files in it are relative to its folder.

        Raises:
            RecipeError: as :meth:`from_toml`, or no such file; the message begins with the file's name.
        """
        path = Path(path)
        with naming(path):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"cannot read the recipe: {error}") from None
            return cls(PipelineRecipe.from_toml(text, path.parent))

    @property
    def stages(self) -> tuple[str, ...]:
        """What the stages do, in order."""
        return tuple(stage.run for stage in self.recipe.stages)

    def run(
        self,
        model_dir: str | Path,
        output: str | Path,
        *,
        device: str | torch.device | None = None,
        overwrite: bool = False,
        restart: bool = False,
        progress: Progress = lambda description, done, total: None,
    ) -> PipelineReport:
        """Run all stages on the model in a directory. The output appears at the end, and only if all gates passed.

        The results of the stages are in ``OUTPUT.work`` beside the output. The same call goes on there where an earlier
        one was stopped, at any moment. Where the model, a text or a setting is another, the stages from there on are
        done again in new folders, and the report says what changed.

        Args:
            model_dir: model directory with safetensors weights.
            output: directory to write.
            device: where to compute; None for a GPU if there is one.
            overwrite: replace an existing output directory.
            restart: ignore what earlier runs did.
            progress: called with a description, and how much of how much is done.

        Returns:
            The report. If ``passed`` is False, a gate ended the run: ``failed`` has it, and nothing was written to
            ``output``.

        Raises:
            FormatError: the source is not a safetensors model directory, the output cannot be written, or another
                process works on it.
            SparsityError: its other children, with the number of the stage.
            ImportError: transformers is missing.
        """
        return run_pipeline(
            self.recipe,
            Path(model_dir),
            Path(output),
            device=None if device is None else str(device),
            overwrite=overwrite,
            restart=restart,
            progress=progress,
        )

    def dry_run(self, model_dir: str | Path, progress: Progress = lambda description, done, total: None) -> Forecast:
        """Return what :meth:`run` would do, without writing anything.

        Args:
            model_dir: model directory with safetensors weights.
            progress: called with a description, and how much of how much is done.

        Raises:
            FormatError: the source is not a safetensors model directory.
            ImportError: transformers is missing.
        """
        return forecast(self.recipe, Path(model_dir), progress)
