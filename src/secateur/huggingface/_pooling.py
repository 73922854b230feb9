"""How a directory of the sentence-transformers library says that sentences become embeddings. Needs no library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from secateur._errors import FormatError, RecipeError
from secateur.evaluation import POOLING_MODES, Pooling
from secateur.files import is_there, parse_json

MODULES = "modules.json"
_SETTINGS = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json")
_LIBRARY = "sentence_transformers."
_FOLDER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")  # one component, below the directory
_LARGEST = 1 << 20  # bytes of a file that describes a module
# What older versions of the library write for each mode.
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def pooling_of(path: str | Path) -> Pooling | None:
    """Return the pooling of a sentence-transformers directory, or None if it has no ``modules.json``.

    The file is read as data: the classes that it names are compared with known ones, and never imported.

    Args:
        path: of the model directory.

    Raises:
        FormatError: the file, or that of a module, is not what the library writes.
        RecipeError: the directory has a module beside a transformer, its pooling and its normalisation, such as
            ``Dense``, whose embeddings would be others.
    """
    path = Path(path)
    if not is_there(path / MODULES):
        return None
    modules = _read(path / MODULES)
    if not isinstance(modules, list) or not modules:
        raise FormatError(f"{path / MODULES} should list the modules of a model, with 'type' and 'path' each.")
    pooling: Pooling | None = None
    for number, module in enumerate(modules):
        kind, folder = _module(path, number, module)
        if kind == "Transformer" and number == 0 and folder == path:
            continue
        if kind == "Pooling" and number > 0 and pooling is None:
            pooling = Pooling(_modes(folder / "config.json"), normalize=False)
        elif kind == "Normalize" and pooling is not None and _is_plain(folder):
            pooling = Pooling(pooling.modes, normalize=True)
        elif kind != "Dropout":  # which does nothing in evaluation
            raise RecipeError(
                f"{path / MODULES}: module {number} is {_shown(module)}; only a Transformer in the directory itself, "
                "then one Pooling and Normalize are known here, so the embeddings would not be those of the model.\n"
                "Measure it in Python: secateur.evaluate(model, data, metric=...), with your own way to embed."
            )
    if pooling is None:
        raise RecipeError(
            f"{path / MODULES} has no Pooling, so it does not say how the states of tokens become an embedding.\n"
            "Give one in Python: pooling=Pooling(('mean',))."
        )
    return pooling


def sentence_length(path: str | Path) -> int | None:
    """Return the most tokens of a sentence that a sentence-transformers directory allows; None if it says nothing.

    Raises:
        FormatError: it says something that is no number of tokens.
    """
    for name in _SETTINGS:
        file = Path(path) / name
        if not is_there(file):
            continue
        table = _read(file)
        length = table.get("max_seq_length") if isinstance(table, dict) else 0
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise FormatError(f"{file}: max_seq_length is {length!r:.40}; expected how many tokens the model takes.")
        return length
    return None


def _module(path: Path, number: int, module: Any) -> tuple[str, Path]:
    """The name of a module's class without its library, empty for a class of another one, and where its files are."""
    fits = isinstance(module, dict) and all(isinstance(module.get(key), str) for key in ("type", "path"))
    if not fits or not (module["path"] == "" or _FOLDER.fullmatch(module["path"])):
        raise FormatError(
            f"{path / MODULES}: module {number} should have a 'type', and a 'path' that is empty or a folder of the "
            f"directory; got {module!r:.200}."
        )
    package, _, name = module["type"].rpartition(".")
    return (name if f"{package}.".startswith(_LIBRARY) else ""), path / module["path"]


def _modes(file: Path) -> tuple[str, ...]:
    """The modes in the file of a pooling: one key since version 5 of the library, a switch for each before."""
    table = _read(file)
    if not isinstance(table, dict):
        raise FormatError(f"{file} should hold a JSON object, but holds a {type(table).__name__}.")
    given = table.get("pooling_mode")
    if given is None:
        switches = {mode: table.get(name, False) for name, mode in _SWITCHES.items()}
        if not all(isinstance(value, bool) for value in switches.values()):
            raise FormatError(f"{file}: each of {', '.join(_SWITCHES)} should be true or false.")
        given = [mode for mode, value in switches.items() if value] or ["mean"]  # the library's own default
    modes = [given] if isinstance(given, str) else given
    if not isinstance(modes, list) or not modes or not all(mode in POOLING_MODES for mode in modes):
        raise FormatError(f"{file}: pooling_mode is {given!r:.80}; known are {', '.join(POOLING_MODES)}.")
    return tuple(modes)


def _is_plain(folder: Path) -> bool:
    """Whether a normalisation is that of the embedding: it may also be one of the states of tokens."""
    if not is_there(folder / "config.json"):
        return True
    table = _read(folder / "config.json")
    keys = ("module_input_name", "module_output_name")
    return isinstance(table, dict) and all(table.get(key) in (None, "sentence_embedding") for key in keys)


def _shown(module: dict[str, Any]) -> str:
    return f"{module['type']!r:.120}" + (f" in {module['path']!r:.80}" if module["path"] else "")


def _read(file: Path) -> Any:
    try:
        with file.open("rb") as opened:
            content = opened.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise FormatError(f"{file} is larger than {_LARGEST:,} bytes, which no description of a module is.")
        return parse_json(content.decode("utf-8"))
    except OSError as error:
        raise FormatError(f"{file} cannot be read: {error.strerror}.") from None
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not readable JSON: {error}.") from None
