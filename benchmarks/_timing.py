"""Timing that survives a noisy machine: alternatives in turn, in one run, medians and their ratios."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch


def interleaved(
    functions: Sequence[Callable[[], object]], rounds: int = 5, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[float], str]:
    """Return the median seconds of each function, and the spread of the last one's ratio to the first over rounds."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, record in zip(functions, seconds, strict=True):
            began = clock()
            function()
            record.append(clock() - began)
    ratios = [last / first for first, last in zip(seconds[0], seconds[-1], strict=True)]
    return [statistics.median(record) for record in seconds], f"{min(ratios):.1f} to {max(ratios):.1f}"


def describe() -> str:
    """Machine and versions."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{model}, {capability}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
