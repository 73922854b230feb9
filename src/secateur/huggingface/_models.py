"""Hugging Face model directories as models: loaded, pruned, measured and written back. Needs transformers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import FormatError, RecipeError, StatisticsError
from secateur.calibration import Windows, batched, read_text
from secateur.evaluation import outputs, perplexity, similarity
from secateur.files import ModelDirectory, check_output
from secateur.layers import Layer, select_layers
from secateur.pruning import Recipe, prune_
from secateur.reports import Evaluation, Report, SkippedLayer

REPORT_NAME = "secateur.json"
MAX_SEQUENCE_LENGTH = 2048
_NOT_STORED = "not in the checkpoint, so its values are not trained"

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class CalibrationText:
    """Which text a method sees.

    Args:
        path: plain text, or JSON lines with a ``text`` field.
        samples: windows drawn at random from the text.
        sequence_length: tokens in a window; None for the longest that the model takes, at most 2048.
        seed: of the draw.
    """

    path: Path
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0

    def provenance(self, length: int) -> dict[str, Any]:
        """Return what the report says of the text, given the length of windows that was used."""
        return {"file": self.path.name, "samples": self.samples, "sequence_length": length, "seed": self.seed}


def prune_directory(
    source: str | Path,
    output: str | Path,
    recipe: Recipe,
    *,
    calibration: CalibrationText | None = None,
    evaluate: Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress = lambda description, done, total: None,
) -> Report:
    """Prune a Hugging Face model directory into another one that ``from_pretrained`` loads unchanged.

    The output has the input's shards, dtypes, tokenizer and other files; pruned weights are zeros in dense tensors.
    ``config.json`` gains a top-level ``"sparsity"`` key, and ``secateur.json`` holds the report. Tensors that are not
    pruned, those of heads that the base model lacks among them, are copied bit for bit.

    Args:
        source: model directory with safetensors weights.
        output: directory to write; it appears complete or not at all.
        recipe: how to prune.
        calibration: text for methods that need it.
        evaluate: text to measure on before and after: perplexity for causal language models, mean cosine similarity of
            the outputs to the dense model's for any other.
        device: where to compute; None for a GPU if there is one.
        dtype: to compute in; None for the checkpoint's on a GPU, and for float32 on a CPU, whose arithmetic in half
            precision is slow. Weights are stored in the checkpoint's dtype, and measured as stored.
        overwrite: replace an existing output directory.
        progress: called with a description, and how much of how much is done.

    Raises:
        FormatError: the source is not a safetensors model directory, or the output cannot be written.
        SparsityError: its other children, for recipes and texts that do not fit.
        ImportError: transformers is missing.
    """
    directory = ModelDirectory.open(source)
    check_output(directory.path, Path(output), overwrite, directory.num_bytes)
    if recipe.method.needs and calibration is None:
        raise RecipeError(
            "this method learns from text: give some with --calibration TEXT_FILE, or use --method magnitude."
        )
    text = None if calibration is None else read_text(calibration.path)
    heldout = None if evaluate is None else read_text(evaluate)

    progress("loading the model", 0, 1)
    model, missing = load_model(directory, device, dtype)
    recipe, stored = _match_checkpoint(model, directory, recipe, missing)
    asked = None if calibration is None else calibration.sequence_length
    reader = _Reader(model, directory, asked) if text or heldout else None

    batches = None
    if calibration is not None:
        assert reader is not None
        assert text is not None
        windows = reader.windows(text, calibration.path).sample(calibration.samples, calibration.seed)
        batches = [{"input_ids": ids} for ids in batched(reader.tried(windows))]
    measure = None
    if evaluate is not None:
        assert reader is not None
        assert heldout is not None
        windows = list(reader.windows(heldout, evaluate).all())
        measure = _Measure(model, is_causal(directory), reader.tried(windows), progress)

    report = prune_(model, batches, recipe, progress=progress)
    for stored_name, parameter_name in stored.items():
        _round_like_stored_(model, parameter_name, directory, stored_name)

    reasons = {entry.name: _NOT_STORED for entry in report.skipped if entry.name in missing}
    report = replace(
        report,
        evaluation=None if measure is None else measure.after(),
        calibration={} if calibration is None or reader is None else calibration.provenance(reader.length),
        versions={**report.versions, "transformers": transformers_library().__version__},
        skipped=tuple(
            SkippedLayer(entry.name, entry.kind, reasons.get(entry.name, entry.reason)) for entry in report.skipped
        ),
    )
    progress("writing", 0, 1)
    directory.write_pruned(
        output,
        {name: model.get_parameter(parameter) for name, parameter in stored.items()},
        {"config.json": _config_with_sparsity(directory, report), REPORT_NAME: report.to_json() + "\n"},
        overwrite,
    )
    return report


def _config_with_sparsity(directory: ModelDirectory, report: Report) -> str:
    sparsity = {
        "method": "secateur",
        "recipe": report.recipe,
        "sparsity": report.sparsity,
        "layers": [layer.name for layer in report.layers],
    }
    return json.dumps({**directory.config, "sparsity": sparsity}, indent=2) + "\n"


def load_model(
    directory: ModelDirectory,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    with_head: bool = False,
) -> tuple[nn.Module, set[str]]:
    """Return the model in a directory, in evaluation mode, and the names of modules that the checkpoint lacks.

    The class comes from transformers' own tables by the config's model type, and no code in the directory is run.

    Args:
        directory: of the model.
        device: None for a GPU if there is one.
        dtype: None for the checkpoint's on a GPU, and for float32 on a CPU.
        with_head: use the class that the config names, if transformers has it for the model type, so that no weight of
            the checkpoint is left out; else a causal language model or a base model.

    Raises:
        FormatError: transformers does not know the model type, or cannot load the weights.
    """
    transformers = transformers_library()
    if directory.config.get("quantization_config"):
        raise FormatError(
            f"{directory.path} is quantized, and its packed weights cannot be pruned.\n"
            "Prune the model in full or half precision, and quantize it afterwards."
        )
    device = _usable(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else directory.widest_dtype
    auto = transformers.AutoModelForCausalLM if is_causal(directory) else transformers.AutoModel
    try:
        if with_head:
            names = directory.config.get("architectures")
            config = transformers.AutoConfig.from_pretrained(
                directory.path, local_files_only=True, trust_remote_code=False
            )
            auto = model_class(config, names[0] if isinstance(names, list) and names else None) or auto
        model, info = auto.from_pretrained(
            directory.path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ImportError:
        raise  # says what to install
    except Exception as error:  # whatever transformers makes of a config that it does not check
        raise FormatError(f"{directory.path} cannot be loaded by transformers: {error}") from None
    if getattr(model.config, "is_encoder_decoder", False):
        raise FormatError(
            f"{directory.path} is an encoder-decoder model, which needs pairs of texts to calibrate on.\n"
            "Use secateur.prune_ in Python, with batches of your own."
        )
    missing = {name.removesuffix(".weight") for name in info["missing_keys"] if name.endswith(".weight")}
    return model.to(device).eval(), missing


def model_class(config: Any, name: object) -> type[nn.Module] | None:
    """Return the class of that name among those which transformers itself has for a config, or None.

    A name in a checkpoint chooses from transformers' tables and nothing else.
    """
    for table in vars(importlib.import_module("transformers.models.auto.modeling_auto")).values():
        mapping = getattr(table, "_model_mapping", None)
        try:
            found = () if mapping is None else mapping[type(config)]
        except KeyError:
            continue
        for made in found if isinstance(found, tuple | list) else (found,):
            if made.__name__ == name:
                return made  # type: ignore[no-any-return]
    return None


def load_tokenizer(directory: ModelDirectory) -> Any:
    """Return the tokenizer in a model directory.

    Raises:
        FormatError: there is none.
    """
    try:
        return transformers_library().AutoTokenizer.from_pretrained(
            directory.path, local_files_only=True, trust_remote_code=False
        )
    except ImportError:
        raise
    except Exception as error:
        raise FormatError(
            f"{directory.path} has no tokenizer that transformers can load, so text cannot be read: {error}"
        ) from None


def is_causal(directory: ModelDirectory) -> bool:
    """Whether the config says that the checkpoint is a causal language model."""
    architectures = directory.config.get("architectures")
    if not isinstance(architectures, list):
        return False
    return any(isinstance(name, str) and name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)


def _usable(name: str | torch.device) -> torch.device:
    """Return the device, after asking it for a tensor."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(
            f"the device {str(name)!r} cannot be used: {reason}\nGive another --device, or cpu."
        ) from None
    return torch.device(name)


class _Reader:
    """Cuts texts into windows for one model.

    Args:
        model: that will read them.
        directory: with its tokenizer.
        length: of the windows in tokens; None for the longest that the model takes, at most 2048.

    Raises:
        RecipeError: the model takes no windows of that length.
        FormatError: there is no tokenizer.
    """

    def __init__(self, model: nn.Module, directory: ModelDirectory, length: int | None) -> None:
        self._model = model
        self._tokenizer = load_tokenizer(directory)
        self._special_tokens = not is_causal(directory)
        limits = [MAX_SEQUENCE_LENGTH, self._tokenizer.model_max_length]
        limits.append(getattr(model.config, "max_position_embeddings", None) or MAX_SEQUENCE_LENGTH)
        longest = int(min(limits))
        self.length = length or longest
        if self.length > longest:
            raise RecipeError(f"--sequence-length {length} is more than the {longest} tokens that the model takes.")

    def windows(self, text: str, source: Path) -> Windows:
        """Return a text as windows."""
        return Windows(self._tokenizer, text, self.length, self._special_tokens, source=str(source))

    def tried(self, windows: list[Tensor]) -> list[Tensor]:
        """Return the windows after running the one with the highest token id.

        Raises:
            StatisticsError: the model does not take ids that high, or windows that long.
        """
        window = max(windows, key=lambda ids: int(ids.max()))
        try:
            outputs(self._model, [window[None]])
        except Exception as error:
            raise StatisticsError(
                f"the model fails on a window of {len(window)} tokens with ids up to {int(window.max())}: {error}\n"
                "Give a shorter --sequence-length; check that the model reads text and that the tokenizer is its own."
            ) from None
        return windows


class _Measure:
    """Measures a model when it is made, and the same model again after it was pruned."""

    def __init__(self, model: nn.Module, causal: bool, windows: list[Tensor], progress: Progress) -> None:
        self._model, self._causal, self._progress = model, causal, progress
        self._batches = list(batched(windows))
        self._dense = None if causal else outputs(model, self._counted("measuring the dense model"))
        self._before = perplexity(model, self._counted("measuring the dense model"))[0] if causal else 1.0

    def _counted(self, description: str) -> Any:
        for index, batch in enumerate(self._batches):
            self._progress(description, index, len(self._batches))
            yield batch

    def after(self) -> Evaluation:
        batches = self._counted("measuring the pruned model")
        if self._dense is None:
            value, tokens = perplexity(self._model, batches)
            return Evaluation("perplexity", self._before, value, tokens)
        value, tokens = similarity(self._dense, outputs(self._model, batches))
        return Evaluation("output similarity", self._before, value, tokens)


def _match_checkpoint(
    model: nn.Module, directory: ModelDirectory, recipe: Recipe, missing: set[str]
) -> tuple[Recipe, dict[str, str]]:
    """Map stored names to parameters to prune, and leave out layers whose values do not come from the checkpoint."""
    layers, _ = select_layers(model, recipe.include, recipe.exclude)
    untrained = tuple(layer.name for layer in layers if layer.name in missing)
    if untrained:
        recipe = replace(recipe, exclude=(*recipe.exclude, *untrained))
    names: dict[int, list[str]] = {}  # of each parameter; a tied one may be stored under some or all of them
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    stored: dict[str, str] = {}
    lost: list[Layer] = []
    for layer in layers:
        if layer.name in untrained:
            continue
        found = {directory.find(name, layer.parameter) for name in names[id(layer.parameter)]} - {None}
        if not found:
            lost.append(layer)
        stored.update({name: layer.parameter_name for name in found if name is not None})
    if lost:
        listed = ", ".join(layer.name for layer in lost[:5])
        raise FormatError(
            f"{directory.path} stores {len(lost)} layers in another form than the model uses them ({listed}), so they "
            "cannot be written back.\nUse secateur.prune_ in Python and model.save_pretrained, or exclude them."
        )
    return recipe, stored


@torch.no_grad()
def _round_like_stored_(model: nn.Module, parameter_name: str, directory: ModelDirectory, stored_name: str) -> None:
    """Give a computed weight the precision that it will have on disk."""
    parameter = model.get_parameter(parameter_name)
    parameter.copy_(parameter.to(directory.read(stored_name).dtype))


def transformers_library() -> ModuleType:
    """The transformers library, without its progress bars and advice.

    Raises:
        ImportError: it is missing.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f'model directories need transformers ({error}); install it with: pip install "secateur[transformers]"'
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
