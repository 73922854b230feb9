"""What tests of model directories share."""

import shutil
from importlib.resources import as_file, files
from pathlib import Path


def with_tokenizer(path: Path) -> Path:
    """Put the demo's tokenizer into a model directory, and return the directory."""
    with as_file(files("secateur.demo") / "model") as demo:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo / name, path / name)
    return path
