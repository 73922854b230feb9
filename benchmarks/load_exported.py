"""Does the sentence-transformers library load a directory that was exported, and are its embeddings the same?

Its backend needs an older transformers than secateur does, so that this runs in an environment of its own:

    python -m venv .loading && .loading/bin/pip install 'sentence-transformers[onnx]'
    .loading/bin/python benchmarks/load_exported.py OUT DENSE

where OUT is what `secateur export DENSE --to onnx --output OUT` wrote. Nothing of secateur is imported.
"""

import importlib.util
import sys
from importlib import metadata
from typing import Any

import numpy as np

PACKAGES = ("sentence-transformers", "optimum", "optimum-onnx", "transformers", "onnxruntime", "torch")
TEXTS = ["A first sentence.", "Another one, which is longer than the first.", "Cats sleep for most of the day."]


def main() -> None:
    if len(sys.argv) != 3 or importlib.util.find_spec("optimum") is None:
        print("left out: it needs two directories, and an environment with 'sentence-transformers[onnx]'")
        return
    library: Any = importlib.import_module("sentence_transformers")  # which is not installed where types are checked
    exported = library.SentenceTransformer(sys.argv[1], backend="onnx")
    dense = library.SentenceTransformer(sys.argv[2])
    found, right = exported.encode(TEXTS), dense.encode(TEXTS)
    cosines = np.sum(found * right, axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(right, axis=1)
    print(", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES))
    print(f"cosines of {len(TEXTS)} embeddings with those of PyTorch: {', '.join(f'{value:.5f}' for value in cosines)}")


if __name__ == "__main__":
    main()
