"""Which families of models do pruning, training, packing and files serve, and what does a user read where they do not?

Tiny models with random weights, one line a family, without a download.

    python benchmarks/zoo --only 'Mi*'
    python benchmarks/zoo --output docs/models.md
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from examine import Line, examine_named, set_up
from families import FAMILIES

MARK = "<!-- what follows is made by benchmarks/zoo -->"
PACKAGES = ("torch", "transformers", "torchvision", "timm", "diffusers")


def numbered(lines: list[Line]) -> dict[str, str]:
    """The sentences that many families share, each with a number."""
    shared = Counter(note.partition(": ")[2] for line in lines for note in line.notes)
    often = [sentence for sentence, count in shared.most_common() if count >= 5]
    return {sentence: f"({index})" for index, sentence in enumerate(often, 1)}


def table(lines: list[Line]) -> str:
    numbers = numbered(lines)
    text = [f"{number} {sentence}\n" for sentence, number in numbers.items()]
    for group in dict.fromkeys(line.group for line in lines):
        rows = [line for line in lines if line.group == group]
        text.append(f"## {group[0].upper()}{group[1:]}\n")
        text.append(
            "| family | parameters | coverage | pruned | calibration | trains | packed | reload | what a user reads |"
        )
        text.append("|---" * 9 + "|")
        for line in rows:
            coverage = "" if line.coverage is None else f"{100 * line.coverage:.1f} %"
            parts = [note.partition(": ") for note in line.notes]
            notes = "; ".join(f"{stage}: {numbers.get(said, said)}" for stage, _, said in parts).replace("|", "\\|")
            cells = (line.name, f"{line.parameters:,}", coverage, line.prune, line.replay, line.train, line.pack)
            text.append("| " + " | ".join((*cells, line.reload, notes)) + " |")
        text.append("")
    return "\n".join(text)


def summary(lines: list[Line]) -> str:
    reached = [line for line in lines if (line.coverage or 0) >= 0.95]
    default = [line for line in lines if line.prune and ": " not in line.prune]
    trains = [line for line in lines if line.train.startswith("yes")]
    again = [line for line in lines if line.reload.startswith("equal")]
    return (
        f"{len(lines)} families: the default call prunes {len(default)} to both targets, and reaches 95 % or more of "
        f"the matrices of {len(reached)}; {len(trains)} train with a mask that acts; {len(again)} are packed, saved "
        "and reloaded with equal outputs."
    )


def versions() -> str:
    found = (name for name in PACKAGES if importlib.util.find_spec(name))
    return ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Which families of models are served, and how far?")
    parser.add_argument("--only", metavar="GLOB", default="*", help="families whose name matches")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, by default one for each core")
    parser.add_argument("--output", type=Path, help="the document whose tables to replace")
    parser.add_argument("--json", type=Path, help="a file for one JSON line for each family")
    options = parser.parse_args()
    chosen = [family for family in FAMILIES if fnmatchcase(family.name, options.only)]
    missing = [family for family in chosen if not all(map(importlib.util.find_spec, family.needs))]
    able = [family for family in chosen if family not in missing]
    lines = []
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), set_up) as pool:
        for line in pool.map(examine_named, [family.name for family in able]):
            lines.append(line)
            print(f"{line.seconds:5.1f} s  {line.name}", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text("".join(json.dumps(asdict(line)) + "\n" for line in lines))
    text = f"{summary(lines)} With {versions()}.\n\n{table(lines)}"
    if missing:
        text += "\nNot run, because a package is missing: " + ", ".join(family.name for family in missing) + ".\n"
    if options.output is None:
        print(text)
    else:
        head = options.output.read_text() if options.output.exists() else f"{MARK}\n"
        options.output.write_text(head.partition(MARK)[0] + f"{MARK}\n\n{text}")


if __name__ == "__main__":
    main()
