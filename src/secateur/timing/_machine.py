"""The machine that times were measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from secateur.reports import versions


def describe_machine(kernels: str) -> dict[str, str]:
    """Return what times depend on besides the code: processor, instruction set, threads and versions.

    Args:
        kernels: the instruction set of the native kernels, or "none".
    """
    known = versions()
    return {
        "processor": _processor(),
        "kernels": kernels,
        "threads": str(torch.get_num_threads()),
        "secateur": known["secateur"],
        "torch": known["torch"],
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
