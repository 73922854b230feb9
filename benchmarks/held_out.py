"""How much more does a layer lose on tokens that it was not solved on, and does a damping chosen there help?"""

from __future__ import annotations

import copy
import statistics
import sys
from collections import Counter

from _timing import describe

import secateur
from secateur.calibration import batched
from secateur.demo import DemoModel

SAMPLES = (4, 16, 64)
METHODS = ("wanda", "sparsegpt", "wanda+refit")
SPARSITY, HELD_OUT, SEED = 0.6, 0.25, 0
DEFAULT, CHOSEN, ALL = "default damping", "auto", "default damping, nothing held out"


def main() -> None:
    print(describe(), file=sys.stderr)
    demo = DemoModel()
    print(
        f"Demo model, {SPARSITY:.0%} pruned, {HELD_OUT:.0%} of the windows held out, seed {SEED}; means over layers\n"
    )
    print("| method | windows | damping | error on learned | on held-out | perplexity | layers by damping |")
    print(f"|{'---|' * 7}")
    for samples in SAMPLES:
        windows = [window for batch in demo.batches(SEED, samples) for window in batch["input_ids"]]
        batches = [{"input_ids": ids} for ids in batched(windows, tokens=len(windows[0]) * max(1, samples // 16))]
        for method in METHODS:
            for way in (DEFAULT, CHOSEN, ALL):
                if way == CHOSEN and method == "wanda":
                    continue
                model = copy.deepcopy(demo.model)
                report = secateur.prune_(
                    model,
                    batches,
                    sparsity=SPARSITY,
                    method=method,
                    held_out=None if way == ALL else HELD_OUT,
                    damping="auto" if way == CHOSEN else None,
                )
                learned = statistics.mean(layer.relative_error or 0 for layer in report.layers)
                held_out = statistics.mean(layer.held_out_error or 0 for layer in report.layers)
                notes = [note for layer in report.layers for note in layer.notes if "chosen by" in note]
                counts = Counter(note.split()[1] for note in notes)
                print(
                    f"| {method} | {samples} | {way} | {learned:.4f} | {f'{held_out:.4f}' if way != ALL else ''} "
                    f"| {demo.perplexity(model):.2f} "
                    f"| {', '.join(f'{damping}: {count}' for damping, count in sorted(counts.items()))} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
