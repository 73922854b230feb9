"""How much faster are weights that functions multiply, packed? A block of experts and an LSTM beside dense PyTorch.

The block is transformers' own mixture of experts (Mixtral's), with each of its three ways to run; a token goes to two
experts. The LSTM runs sequences of 64 steps. All are pruned, packed by ``pack_`` as it would on this machine, compared
with the dense module, and then timed in turn with it. `ratio` is the median of the dense module's time over the packed
one's in the same round, with its quartiles.

    python benchmarks/reads.py [--only experts|lstm] [--hidden 1024] [--experts 8] [--rounds 15] [--threads 1]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _timing import describe
from torch import nn

import secateur

SPARSITIES: tuple[tuple[str, float | None], ...] = (("unstructured", 0.8), ("unstructured", 0.9), ("2:4", None))
TIMER: Callable[[], float] = time.perf_counter
WAYS = ("grouped_mm", "batched_mm", "eager")


def compared(dense: Callable[[], Any], packed: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Check that both return the same, and time them in turn."""
    expected, found = (value[0] if isinstance(value, tuple) else value for value in (dense(), packed()))
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < 1e-4, f"the packed module is off by {error:.2g} of the largest output"
    seconds: dict[str, list[float]] = {"dense": [], "packed": []}
    repeats = 1
    for name, call in (("dense", dense), ("packed", packed)):
        began = TIMER()
        call()
        if name == "dense":
            repeats = max(1, min(50, int(0.02 / (TIMER() - began))))
    for _ in range(rounds):
        for name, call in (("dense", dense), ("packed", packed)):
            began = TIMER()
            for _ in range(repeats):
                call()
            seconds[name].append((TIMER() - began) / repeats)
    ratios = [one / other for one, other in zip(seconds["dense"], seconds["packed"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    times = {f"{name}_ms": 1000 * statistics.median(found) for name, found in seconds.items()}
    return {**times, "ratio": middle, "low": low, "high": high, "error": error}


def packed_copy(
    module: nn.Module, pattern: str, sparsity: float | None, batch_sizes: tuple[int, ...]
) -> tuple[Any, Any, str]:
    """A pruned module, the same packed, and what was packed."""
    dense = copy.deepcopy(module)
    history = secateur.prune_(dense, pattern=pattern, sparsity=sparsity, method="magnitude", include=["*"])
    packed = copy.deepcopy(dense)
    report = secateur.pack_(packed, batch_sizes=batch_sizes, history=history, include=["*"], timer=TIMER)
    said = [f"{layer.name}: {layer.reason or '; '.join(f'{c.rows}: {c.route}' for c in layer.choices)}"
            for layer in report.layers]  # fmt: skip
    return dense, packed, " | ".join(said)


def experts(hidden: int, count: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Transformers' block of experts at 1, 16 and 128 tokens."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=hidden, intermediate_size=2 * hidden, num_local_experts=count)
    torch.manual_seed(0)
    config._experts_implementation = "eager"
    block = MixtralExperts(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=hidden**-0.5)
    for pattern, sparsity in SPARSITIES:
        dense, packed, said = packed_copy(nn.ModuleDict({"experts": block}), pattern, sparsity, (1, 4, 32))
        print(f"# experts {pattern} {sparsity or ''}: {said}")
        for tokens in (1, 16, 128):
            x = torch.randn(tokens, hidden)
            chosen = torch.rand(tokens, count).topk(2).indices
            weights = torch.rand(tokens, 2).softmax(-1)
            for way in WAYS:
                config._experts_implementation = way
                for module in (dense, packed):
                    module["experts"].config._experts_implementation = way
                if way == "batched_mm" and tokens == 128:
                    continue  # copies the weights of an expert for each token
                one, other = (partial(module["experts"], x, chosen, weights) for module in (dense, packed))
                found = compared(one, other, rounds)
                yield {"what": "experts", "pattern": pattern, "sparsity": sparsity, "rows": tokens, "way": way, **found}


def lstm(hidden: int, rounds: int) -> Iterator[dict[str, Any]]:
    """An LSTM on sequences of 64 steps, one and eight at a time."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"lstm": nn.LSTM(hidden, hidden)})
    for pattern, sparsity in SPARSITIES:
        dense, packed, said = packed_copy(module, pattern, sparsity, (1, 8))
        print(f"# lstm {pattern} {sparsity or ''}: {said}")
        for batch in (1, 8):
            x = torch.randn(64, batch, hidden)

            one, other = (partial(module["lstm"], x) for module in (dense, packed))
            found = compared(one, other, rounds)
            yield {"what": "lstm", "pattern": pattern, "sparsity": sparsity, "rows": batch, "way": "", **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("experts", "lstm"))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--cpu-time", action="store_true", help="the thread's own time, on a machine that others use too"
    )
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.cpu_time:
        global TIMER  # noqa: PLW0603  the one setting of a script
        torch.set_num_threads(1)
        TIMER = time.thread_time
    print(f"# {describe()}")
    results = []
    with torch.no_grad():
        rows = {
            "experts": partial(experts, given.hidden, given.experts, given.rounds),
            "lstm": partial(lstm, given.hidden, given.rounds),
        }
        for what, made in rows.items():
            for row in made() if given.only in (None, what) else ():
                results.append(row)
                print(
                    f"{row['what']:8} {row['pattern']:13}{row['sparsity'] or '':>4} {row['rows']:4} {row['way']:11}"
                    f"dense {row['dense_ms']:8.3f} ms  packed {row['packed_ms']:8.3f} ms  {row['ratio']:5.2f} "
                    f"({row['low']:.2f}-{row['high']:.2f})",
                    flush=True,
                )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
