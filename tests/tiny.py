"""What tests of model directories share."""

import shutil
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest


def with_tokenizer(path: Path) -> Path:
    """Put the demo's tokenizer into a model directory, and return the directory."""
    with as_file(files("secateur.demo") / "model") as demo:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo / name, path / name)
    return path


def demo_tokenizer() -> Any:
    """Return the demo's tokenizer, in a folder of its own only while it is read."""
    transformers = pytest.importorskip("transformers")
    with TemporaryDirectory() as folder:
        return transformers.AutoTokenizer.from_pretrained(with_tokenizer(Path(folder)))
