"""Does sentence-transformers load an exported directory, and does it give the embeddings of the model?

    secateur export MODEL_DIR --to onnx --output OUT
    python benchmarks/sentence_transformers_onnx.py OUT --model MODEL_DIR

``SentenceTransformer(OUT, backend="onnx")`` needs optimum-onnx, and ``backend="openvino"`` needs optimum-intel. Both
need an older transformers than secateur. So each runs in an environment of its own, in the folder ``--environments``,
which is made once. It sees the packages of this environment, such as torch, behind its own. The embeddings are
compared with those of ``SentenceTransformer(MODEL_DIR)`` in this environment; MODEL_DIR may be packed or shrunk.
OpenVINO computes in bfloat16 where the processor can, so that its embeddings in float32 are compared, too.

A backend is run if OUT has its file: ``onnx/model.onnx`` or ``openvino/openvino_model.xml``. Exits with 1 if an
embedding in float32 differs by more than ``--tolerance``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy
from sentence_transformers import SentenceTransformer

import secateur.huggingface  # MODEL_DIR may be packed

SENTENCES = [
    "A small test.",
    "Another one that is longer than the first, so that the first is padded.",
    "Sparse models are small.",
]
PROGRAM = """
import json, sys
import numpy, sentence_transformers, transformers
from importlib.metadata import PackageNotFoundError, version
from sentence_transformers import SentenceTransformer

backend, path, sentences, to, options = sys.argv[1:]
model = SentenceTransformer(path, backend=backend, model_kwargs=json.loads(options))
numpy.save(to, model.encode(json.loads(sentences)))
found = {"class": type(model[0].auto_model).__name__}
for name in ("sentence-transformers", "transformers", "optimum", "optimum-onnx", "optimum-intel", "onnxruntime",
             "openvino", "torch"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Backend:
    """How sentence-transformers runs a model, and what that needs.

    Args:
        file: of the model, in the exported directory.
        packages: for pip.
        unwanted: what is removed again.
        ways: options for the model, by a name for the table.
    """

    file: str
    packages: tuple[str, ...]
    unwanted: tuple[str, ...]
    ways: dict[str, dict[str, object]]


BACKENDS = {
    "onnx": Backend(
        "onnx/model.onnx",
        # optimum-onnx 0.1.0 needs transformers < 4.58, which sentence-transformers 6 does not take.
        ("sentence-transformers[onnx]==5.7.0", "optimum-onnx[onnxruntime]==0.1.0"),
        (),
        {"float32": {"file_name": "model.onnx"}},
    ),
    "openvino": Backend(
        "openvino/openvino_model.xml",
        ("sentence-transformers[openvino]==6.2.0", "optimum-intel[openvino]==2.2.0"),
        ("torchvision",),  # made for another torch than a CPU one; nothing here needs it
        {"usual": {}, "float32": {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}},
    ),
}


def environment(folder: Path, backend: Backend) -> Path:
    """Return the Python of an environment with the packages of a backend, which is made if it is not there."""
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    mine = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    shared = [entry for entry in sys.path if Path(entry).name == "site-packages"]
    Path(mine.stdout.strip(), "zz_shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
    constraints = folder / "constraints.txt"
    constraints.write_text(f"torch=={version('torch').partition('+')[0]}\n", encoding="utf-8")
    pip = [str(python), "-m", "pip", "--quiet"]
    subprocess.run([*pip, "install", "-c", str(constraints), *backend.packages], check=True)
    for package in backend.unwanted:
        subprocess.run([*pip, "uninstall", "--yes", package], check=True)
    (folder / "complete").touch()
    return python


def main() -> int:
    """Compare the embeddings, print a table and one JSON line, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory that secateur export wrote")
    parser.add_argument("--model", type=Path, required=True, help="the directory that was exported")
    parser.add_argument("--environments", type=Path, default=Path("sentence-transformers-environments"))
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of an embedding in float32 (default 1e-4)")
    arguments = parser.parse_args()
    wanted = {name: backend for name, backend in BACKENDS.items() if (arguments.output / backend.file).exists()}
    if not wanted:
        parser.error(f"{arguments.output} has none of {', '.join(backend.file for backend in BACKENDS.values())}")
    reference = SentenceTransformer(str(arguments.model)).encode(SENTENCES)
    rows, failed = [], False
    print("| backend | computes in | class | largest difference | versions |\n|---|---|---|---|---|")
    for name, backend in wanted.items():
        folder = arguments.environments.resolve() / name
        python = environment(folder, backend)
        for way, options in backend.ways.items():
            made = folder / "embeddings.npy"
            done = subprocess.run(
                [python, "-c", PROGRAM, name, arguments.output, json.dumps(SENTENCES), made, json.dumps(options)],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            versions = json.loads(done.stdout.splitlines()[-1])
            difference = float(numpy.abs(numpy.load(made) - reference).max())
            failed |= way == "float32" and not difference <= arguments.tolerance
            kind = versions.pop("class")
            text = ", ".join(f"{package} {number}" for package, number in versions.items())
            print(f"| {name} | {way} | {kind} | {difference:.1e} | {text} |")
            rows.append({"backend": name, "way": way, "class": kind, "difference": difference, "versions": versions})
    print(json.dumps({"benchmark": "sentence_transformers_onnx", "secateur": secateur.__version__, "rows": rows}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
