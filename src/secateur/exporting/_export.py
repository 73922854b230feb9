"""Export a module to another engine."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from secateur._checks import instance
from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.calibration import is_sentence_transformer
from secateur.evaluation import Pooling
from secateur.exporting._function import ExportedFunction
from secateur.exporting._inputs import inputs_of
from secateur.exporting._settings import ExportSettings, Shapes
from secateur.exporting._write import Source, write_exported
from secateur.files import check_output, whole_directory
from secateur.layers import check_model
from secateur.nn import check_dense
from secateur.packing import unpack_
from secateur.reports import ExportReport


def export(
    model: nn.Module,
    batch: Any,
    output: str | Path,
    *,
    to: str = "onnx",
    int8: bool = False,
    bfloat16: bool = False,
    packed: bool = False,
    pooling: Pooling | None = None,
    tokenizer: Any = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    calibration: Iterable[Any] | None = None,
    tolerance: float = 1e-4,
    shapes: Shapes | None = None,
    overwrite: bool = False,
    progress: Progress = lambda description, done, total: None,
) -> ExportReport:
    """Write a model as a directory that ONNX Runtime or OpenVINO runs, and check it against the model.

    The graph is made with ``torch.onnx.export``. Its outputs are compared with those of the model in float32 on inputs
    of several sizes, with padding. Packed layers are written dense, and a shrunk model keeps its sizes. The model
    itself is not changed.

    A causal language model that uses a cache gets its keys and values as inputs ``past_key_values.N.key`` and
    ``past_key_values.N.value``, and returns ``present.N.key`` and ``present.N.value``. Set ``model.config.use_cache``
    to False to leave them out.

    Args:
        model: any module: dense, pruned, shrunk or packed.
        batch: one example input: a tensor, a tuple of tensors, or a mapping of arguments by name. Inputs get the names
            of the arguments.
        output: directory to make. It appears complete or not at all.
        to: ``"onnx"``, or ``"openvino"``.
        int8: compute matrix products in 8 bits, and store weights of 8 bits.
        bfloat16: let OpenVINO compute the rest in bfloat16.
        packed: let layers with many zeros run by secateur's own kernels, inside the engine. What runs the file then
            needs the library of :func:`secateur.engines.library`.
        pooling: also return embeddings of sentences, as the output ``sentence_embedding``.
        tokenizer: to write beside the model; any object with ``save_pretrained``.
        dynamic: sizes that may be any, such as ``{"x": {0: "batch", 2: "width"}}``; ``{}`` for none. By default the
            first size of each input, and for token ids the second, too.
        calibration: batches from which OpenVINO takes the ranges of numbers for 8 bits, which is faster than to find
            them in each call; None to do that.
        tolerance: the largest difference to the model in float32, as a part of the largest number in an output.
        shapes: at which speed is measured: texts, and tokens in each; ``()`` for no measurement, None for 1 x 16,
            1 x 128, 8 x 64 and 32 x 64. For other inputs only the first number counts.
        overwrite: replace an existing directory.
        progress: called with a description, and how much of how much is done.

    Returns:
        What was written, how it compares with the model, and how fast it is.

    Raises:
        FormatError: the exporter cannot follow the model, what it made is another function, or the output cannot be
            written. Nothing is written then.
        RecipeError: arguments that do not go together, or inputs that no exported model can have.
        KernelError: the processor has no bfloat16; or ``packed``, and the library that the engine needs was not built.
        TypeError: no module, or no batch.
        ImportError: a package is missing; the message names the extra to install.

    Example:
        >>> import tempfile, torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = secateur.export(model, torch.randn(2, 8), f"{folder}/out", shapes=())
        >>> report.file, report.outputs, report.error < 1e-4
        ('onnx/model.onnx', ('output',), True)
    """
    began = time.perf_counter()
    settings = ExportSettings(to, int8, bfloat16, tolerance, shapes, packed)
    model = check_model(getattr(model, "_orig_mod", model))  # of a compiled one
    if is_sentence_transformer(model):
        raise RecipeError(
            "a SentenceTransformer reads dicts, and an exported model takes tensors.\nSave it, and export its "
            "directory: secateur export MODEL_DIR --to onnx --output OUT."
        )
    if pooling is not None:
        instance("pooling", pooling, Pooling)
    settings.check_calibration(calibration)
    settings.check_installed()
    output = Path(output)
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    check_output(None, output, overwrite, nbytes)
    progress("copying the model", 0, 1)
    copied = plain(copy.deepcopy(model))
    inputs = inputs_of(copied, batch, dynamic, longest_text(copied))
    function = ExportedFunction(copied, inputs, pooling)
    source = Source(nbytes, (), began, None if calibration is None else list(calibration))
    with whole_directory(output, overwrite=overwrite) as made:
        described: list[Any] = [getattr(model, name, None) for name in ("config", "generation_config")]
        for entry in (*described, tokenizer):
            if hasattr(entry, "save_pretrained"):
                entry.save_pretrained(made)
        return write_exported(function, made, settings, source, progress)


def plain(model: nn.Module) -> nn.Module:
    """Give a model plain weights of float32 on the CPU, in evaluation mode. The model is changed, and returned."""
    unpack_(model)
    check_dense(model, "it cannot be exported")
    return model.cpu().float().eval()


def longest_text(model: nn.Module) -> int | None:
    """Return how many tokens a model of transformers takes; None if nothing limits them."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return longest - module.padding_idx - 1  # positions begin after that of padding
    return longest
