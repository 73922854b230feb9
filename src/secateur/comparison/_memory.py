"""The memory that running a model takes, measured in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.calibration import call_model
from secateur.comparison._open import open_deployed
from secateur.comparison._subject import Deployed
from secateur.comparison._ways import WAYS, Way
from secateur.huggingface import load_code

_PATIENCE = 900  # seconds for one process


@dataclass(frozen=True)
class Memory:
    """What a process of its own found.

    Args:
        nbytes: that became resident when the model was loaded and run; None if that is not known.
        reason: why it is not known.
        crashed: whether the process was ended by a signal, so that this one should not try.
    """

    nbytes: int | None
    reason: str = ""
    crashed: bool = False


def memory_of(
    deployed: Deployed,
    way: Way,
    batches: Sequence[Any],
    folder: Path,
    *,
    with_head: bool,
    threads: int,
    is_directory: bool,
) -> Memory:
    """Run a model once on each batch in a new process, and return the memory that it took.

    What the libraries take before that does not count: a server with one engine has only its own.

    Args:
        deployed: what the way made.
        way: to run it.
        batches: to run it on.
        folder: for a file with the batches.
        with_head, threads, is_directory: see :func:`open_deployed`.
    """
    if deployed.path is None:
        return Memory(None, "memory was not measured: the module cannot be written for another process")
    if resident() is None:
        return Memory(None, "memory was not measured: this system does not tell it")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(list(batches), folder / "batches.pt")
    request = {
        "path": str(deployed.path),
        "way": way.name,
        "batches": str(folder / "batches.pt"),
        "with_head": with_head,
        "threads": threads,
        "is_directory": is_directory,
    }
    command = [sys.executable, "-c", f"from {__name__} import main; main()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return Memory(None, f"a process that ran it did not end within {_PATIENCE} seconds", True)
    if done.returncode < 0:
        return Memory(None, f"a process that ran it was ended by signal {-done.returncode}", True)
    try:
        return Memory(int(json.loads(done.stdout.splitlines()[-1])["nbytes"]))
    except (ValueError, IndexError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return Memory(None, f"memory was not measured: the process that ran it failed: {last:.200}")


def main() -> None:
    """Answer a request on stdin: the part of the new process."""
    request = json.loads(sys.stdin.read())
    torch.set_num_threads(request["threads"])
    way = WAYS[request["way"]]
    batches = torch.load(request["batches"])
    importlib.import_module(way.engine or "torch.ao.quantization")
    if request["is_directory"] and not way.engine:
        load_code(Path(request["path"]))
    _ = torch.randn(64, 64) @ torch.randn(64, 64)  # what the first product of a process loads
    before = resident() or 0
    deployed = Deployed(Path(request["path"]), 0)
    model = open_deployed(
        deployed,
        way,
        with_head=request["with_head"],
        threads=request["threads"],
        is_directory=request["is_directory"],
    )
    with torch.no_grad():
        for batch in batches:
            call_model(model, batch)
    print(json.dumps({"nbytes": max((resident() or 0) - before, 0)}))


def resident() -> int | None:
    """Return the resident bytes of this process, after what is not needed was given back; None where unknown."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def available() -> int | None:
    """Return the bytes that the machine has left; None where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
