"""Load the model or the tokenizer in a Hugging Face model directory. Needs transformers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from secateur._errors import FormatError, RecipeError
from secateur.evaluation import is_language_model
from secateur.files import ModelDirectory, is_shrunk_claim, read_config
from secateur.huggingface._architecture import check_named, classes, named
from secateur.huggingface._plausible import check_counts, check_size


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


def open_model(path: str | Path) -> ModelDirectory:
    """Return a model directory, checked, with the class of the model in its config: read off its tensors if need be.

    Raises:
        FormatError: it is not a model directory with safetensors weights.
        ImportError: transformers is missing.
    """
    directory = ModelDirectory.open(path)
    if directory.config.get("architectures"):
        return directory
    try:
        config = load_config(directory.path)
    except ImportError:
        raise
    except Exception:  # a config that transformers cannot read: loading says why
        return directory
    return named(directory, config)


def load_model(
    directory: ModelDirectory,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    with_head: bool = False,
) -> tuple[nn.Module, set[str]]:
    """Return the model in a directory, in evaluation mode, and the names of tensors that the checkpoint lacks.

    The class comes from transformers' own tables by the config's model type, and no code in the directory is run.

    Args:
        directory: of the model.
        device: None for a GPU if there is one.
        dtype: None for the checkpoint's on a GPU, and for float32 on a CPU.
        with_head: use the class that the config names, if transformers has it for the model type, so that no weight of
            the checkpoint is left out; else a causal language model or a base model.

    Raises:
        FormatError: transformers does not know the model type, or cannot load the weights; or the class is not known.
    """
    transformers = transformers_library()
    if (part := directory.first_part) is not None:
        name, stored = part
        advice = "Prune the model in full or half precision, and quantize it afterwards."
        if name.endswith((".compressed", ".bitmask", ".row_offsets")):
            advice = f"Write it dense first: secateur export {directory.path} --output DENSE."
        raise FormatError(
            f"{directory.path} is quantized or packed: it stores {name!r} as {stored}, no plain weight.\n{advice}"
        )
    device = _usable(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else directory.widest_dtype
    auto: Any = transformers.AutoModelForCausalLM if is_causal(directory) else transformers.AutoModel
    shapes = list(directory.shapes.values())
    check_counts(directory.path, directory.config, shapes)
    try:
        config = load_config(directory.path)
        made_by = None
        if with_head:
            check_named(directory, config)
            names = directory.config["architectures"]
            made_by = model_class(config, names[0] if isinstance(names, list) and names else None)
        auto = made_by or auto
        if not hasattr(config, "quantization_config"):  # a model to be shrunk may be larger: it gets no memory before
            check_size(directory.path, lambda: _build(made_by or auto.from_config, config), shapes)
        model, info = auto.from_pretrained(
            directory.path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ImportError, FormatError):
        raise  # says what to install, or to correct
    except Exception as error:  # whatever transformers makes of a config that it does not check
        raise FormatError(f"{directory.path} cannot be loaded by transformers: {error}") from None
    return model.to(device).eval(), set(info["missing_keys"])


def load_body(
    directory: ModelDirectory, device: str | torch.device | None, dtype: torch.dtype | None, with_head: bool
) -> tuple[nn.Module, nn.Module, set[str]]:
    """Return a model, the part of it that :func:`load_model` returns without a head, and what the checkpoint lacks.

    Args:
        directory, device, dtype: see :func:`load_model`.
        with_head: whether the first has the head of its class; else both are the same.

    Returns:
        The model, its body, and the names in the body of tensors that the checkpoint lacks.

    Raises:
        RecipeError: the checkpoint lacks the values of the head.
        FormatError: see :func:`load_model`.
    """
    if not with_head:
        model, missing = load_model(directory, device, dtype)
        return model, model, missing
    model, missing = load_model(directory, device, dtype, with_head=True)
    check_head(directory, model, missing)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    body = getattr(model, "base_model", model)
    return model, body, {name.removeprefix(prefix) for name in missing}


def check_head(directory: ModelDirectory, model: nn.Module, missing: set[str]) -> None:
    """Raise if the checkpoint lacks values of the head of a model: nobody trained them.

    Args:
        directory: of the model.
        model: as it was loaded.
        missing: names of the tensors that the checkpoint lacks.

    Raises:
        RecipeError: it does.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if absent := sorted(name for name in missing if not name.startswith(prefix)):
        raise RecipeError(
            f"{directory.path} has no values for {', '.join(absent[:3])}, the head of {type(model).__name__}, so that "
            "what it says of classes means nothing.\nGive a model with a trained head, or a file without labels."
        )


def load_config(path: Path) -> Any:
    """Return the config in a directory, without what it claims of quantized weights: what is stored was looked at.

    How a model was shrunk stays in it: it is needed to load the weights.
    """
    config = transformers_library().AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    for part in (config, config.get_text_config(), config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config") and not is_shrunk_claim(part.quantization_config):
            del part.quantization_config
    if hasattr(config, "transformers_weights") and not hasattr(config, "quantization_config"):
        del config.transformers_weights  # which file has the weights was looked at, too
    return config


def model_class(config: Any, name: object) -> type[nn.Module] | None:
    """Return the class of that name among those which transformers itself has for a config, or None.

    A name in a checkpoint chooses from transformers' tables and nothing else.
    """
    return next((made for made in classes(config) if made.__name__ == name), None)


def model_without_weights(path: Path, name: str, *, initialise: bool, shapes: Sequence[Sequence[int]]) -> nn.Module:
    """Return the model of a directory with values that nobody trained, to be filled in.

    Args:
        path: of the directory.
        name: of the class to prefer; else what the config names.
        initialise: give it the values that transformers would; otherwise any.
        shapes: of the tensors that will be filled in. A config that asks for far more is refused.

    Raises:
        FormatError: there is no config, it does not fit the tensors, or transformers makes no model of it.
        ImportError: transformers is missing.
    """
    if not (path / "config.json").is_file():
        raise FormatError(
            f"{path} is not a model directory: it has no config.json. Load its file into a module instead."
        )
    transformers = transformers_library()
    check_counts(path, read_config(path), shapes)
    try:
        config = load_config(path)
        names = [name, *(getattr(config, "architectures", None) or ())]
        made_by = next(filter(None, (model_class(config, known) for known in names)), None)
        if made_by is None:
            raise ValueError(f"transformers has no class {names} for the model type {config.model_type!r}")
        check_size(path, lambda: _build(made_by, config), shapes)
        model = made_by(config) if initialise else _build(made_by, config)
        model.tie_weights()  # type: ignore[operator]
        if (path / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    except (ImportError, FormatError):
        raise  # says what to install, or to correct
    except Exception as error:  # whatever transformers makes of a config that it does not check
        raise FormatError(f"{path} cannot be made into a model by transformers: {error}") from None
    return model


def _build(make: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """Make a model without computing its first values."""
    with importlib.import_module("transformers.initialization").no_init_weights():
        return make(config)


def skeleton(make: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """Return a model without memory for values, on the ``meta`` device.

    Args:
        make: a class of transformers, or a function of a config.
        config: of transformers.
    """
    with torch.device("meta"):
        return _build(make, config)


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
    return any(isinstance(name, str) and is_language_model(name) for name in architectures)


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
