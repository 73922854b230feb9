"""What ``README.md`` of a model directory says of loading it, where that needs an import first."""

from __future__ import annotations

import re
from pathlib import Path

from secateur.files._reading import is_there

_END = "<!-- end of how to load -->\n"
# At first the section had no mark at its end.
_SECTION = re.compile(
    rf"## How to load this model\n.*?(?:{re.escape(_END)}|\nnamed `model\.safetensors`\.\n)\n?", re.DOTALL
)
_TEXT = """\
## How to load this model

{reason} Loading it needs one more line:

```python
import secateur.huggingface
from {library} import {name}

model = {call}("path/to/this/directory")
```

Pipelines, servers and other programs that load models with transformers or sentence-transformers need this import, and
no other change. `secateur.load("path/to/this/directory")` returns the model, too. Without the import transformers says
that it should be run first.
"""


def say_how_to_load(folder: Path, reason: str, model: str) -> None:
    """Add to the model card, below its table of settings, what to import.

    Args:
        folder: a model directory.
        reason: why the import is needed, in sentences.
        model: name of the model's class.
    """
    forget_how_to_load(folder)
    if is_there(folder / "modules.json"):
        library, name = "sentence_transformers", "SentenceTransformer"
        call = name
    else:
        library, name = "transformers", _auto(model)
        call = f"{name}.from_pretrained"
    text = _TEXT.format(reason=reason, library=library, name=name, call=call) + _END
    path = folder / "README.md"
    if is_there(path):
        old = path.read_text(encoding="utf-8", errors="replace")
        front, end = "", "\n---\n"
        if old.startswith("---\n") and end in old[3:]:
            cut = old.index(end, 3) + len(end)
            front, old = old[:cut], old[cut:]
        text = f"{front}{text}\n{old.lstrip()}"
    path.write_text(text, encoding="utf-8")


def forget_how_to_load(folder: Path) -> None:
    """Remove what :func:`say_how_to_load` added, and the model card if nothing else is in it."""
    path = folder / "README.md"
    if not is_there(path):
        return
    old = path.read_text(encoding="utf-8", errors="replace")
    new = _SECTION.sub("", old)
    if not new.strip():
        path.unlink()
    elif new != old:
        path.write_text(new, encoding="utf-8")


def _auto(model: str) -> str:
    """The class of transformers that people load a model by."""
    heads = (
        "ForCausalLM",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForMaskedLM",
        "ForImageClassification",
    )
    return f"AutoModel{next((head for head in heads if model.endswith(head)), '')}"
