"""Which way runs a layer fastest at which batch: measured, within a budget of memory, and never slower than dense."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from secateur import kernels
from secateur._errors import FormatError
from secateur._types import Weight
from secateur.files import write_text
from secateur.formats import Format
from secateur.kernels import Plan, candidates, stored_share, why_not_prepacked
from secateur.patterns import SparsityPattern
from secateur.reports import Choice, versions

CACHE_VERSION = 1
GAIN = 1.05  # a packed layer must be faster than dense by this somewhere,
LOSS = 0.97  # and nowhere slower than this: the noise of a quiet machine
SLACK = 0.05  # a smaller gain in speed is not worth more memory
_BUDGET = 0.25  # seconds for one batch of one layer, beyond the fewest rounds
_PATIENCE = 4  # times the budget, while the machine is busy with something else
_NOISY = 1.25  # upper over lower quartile of the dense layer's own times
_FEWEST, _MOST = 7, 31  # rounds
_HOPELESS = 2.0  # times slower than the fastest after two rounds: dropped from the race
_SHORT = 2e-4  # seconds; shorter calls are repeated within a round
_EVICTED = 32 << 20  # bytes read between calls where a layer finds its weight in no cache

Timer = Callable[[], float]
_Seconds = dict[int, dict[str, list[float]]]  # rows -> way -> seconds in each round; dropped ways have fewer


@dataclass(frozen=True)
class Measurement:
    """What was measured of one kind of layer.

    Args:
        seconds: by rows and way, one number for each round; rounds of different ways with the same index ran in turn.
        nbytes: of memory that each way needs besides the stored weight.
    """

    seconds: _Seconds
    nbytes: dict[str, int]

    @property
    def noisy(self) -> bool:
        """Whether the machine was busy with something else."""
        return any(len(ways["dense"]) > 1 and _is_noisy(ways["dense"]) for ways in self.seconds.values())


@dataclass(frozen=True)
class Decision:
    """How a layer should run.

    Args:
        plan: which way at which batch; None where the layer should stay dense.
        reason: why it should; empty where it should not.
        choices: what the plan gives at each batch, or the best there was within memory where dense stays.
        nbytes: of memory besides the stored weight.
    """

    plan: Plan | None
    reason: str
    choices: tuple[Choice, ...]
    nbytes: int


def race(
    calls: Mapping[str, Callable[[], object]],
    timer: Timer = time.perf_counter,
    before: Callable[[], object] | None = None,
    keep: Collection[str] = ("dense", "prepacked"),
) -> dict[str, list[float]]:
    """Call each in turn, round after round, and return the seconds of each round.

    Args:
        calls: by name.
        timer: seconds from any origin.
        before: run before each call, outside of its time.
        keep: these stay to the end; others that are hopelessly slow are dropped.
    """
    repeats = {}
    for name, call in calls.items():
        call()  # makes ready what is made at the first call
        began = timer()
        call()
        taken = timer() - began
        repeats[name] = 1 if before else min(20, max(1, math.ceil(_SHORT / taken))) if taken > 0 else 1
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    running = list(calls)
    began = timer()
    for number in range(_MOST):
        if number >= _FEWEST and timer() - began > _BUDGET * (_PATIENCE if _is_noisy(seconds["dense"]) else 1):
            break
        if number == 2:
            limit = _HOPELESS * min(min(times) for times in seconds.values())
            running = [name for name in running if name in keep or min(seconds[name]) <= limit]
        for name in running:
            if before:
                before()
            call, times = calls[name], range(repeats[name])
            start = timer()
            for _ in times:
                call()
            seconds[name].append((timer() - start) / len(times))
    return seconds


def _is_noisy(times: Sequence[float]) -> bool:
    low, _, high = quantiles(times, n=4, method="inclusive")
    return high > _NOISY * low


@torch.no_grad()
def measure(
    dense: nn.Module,
    packed_as: Callable[[Plan], nn.Module],
    packed: Format,
    inputs: Sequence[tuple[int, Tensor]],
    patterns: Sequence[SparsityPattern],
    cold: bool,
    timer: Timer,
) -> Measurement:
    """Race every way against the dense layer, on modules as they would run in the model.

    Args:
        dense: the layer.
        packed_as: its packed counterpart with a plan.
        packed: the weight.
        inputs: rows, and an input with as many.
        patterns: that the zeros satisfy.
        cold: whether the layer will find its weight in memory rather than in a cache, as in a model of many layers.
        timer: seconds from any origin.
    """
    ways = [way for way in candidates(packed, patterns) if way != "dense"]
    if why_not_prepacked():
        ways = [way for way in ways if "prepacked" not in way]
    dtype = inputs[0][1].dtype
    modules: dict[str, Any] = {"dense": dense, **{way: packed_as(Plan((way,))) for way in ways}}
    evicting = torch.zeros(_EVICTED // 4) if cold else None
    seconds: _Seconds = {}
    for rows, x in inputs:
        calls = {way: (lambda module=module, x=x: module(x)) for way, module in modules.items()}
        seconds[rows] = race(calls, timer, None if evicting is None else evicting.sum)
    nbytes = {way: modules[way].runtime_nbytes for way in ways}
    return Measurement(seconds, {**nbytes, "dense": dtype.itemsize * packed.shape[0] * packed.shape[1]})


def decide(measured: Measurement, dense_bytes: int, memory: float) -> Decision:
    """Choose the ways that gain most over all batches among those that fit in memory together and never lose.

    Args:
        measured: from :func:`measure`.
        dense_bytes: of the dense weight.
        memory: how many times as many the ways may need together.
    """
    rows = sorted(measured.seconds)
    ratios = {batch: {way: ratio_of(times, way) for way in times} for batch, times in measured.seconds.items()}
    ways = [way for way in measured.nbytes if all(way in ratios[batch] for batch in rows)]
    ways = [way for way in ways if measured.nbytes[way] <= memory * dense_bytes]
    plans: list[tuple[float, int, dict[int, str]]] = []  # score, bytes, way by batch
    for count in range(1, min(len(ways), len(rows)) + 1):
        for chosen in combinations(ways, count):
            nbytes = sum(measured.nbytes[way] for way in chosen)
            taken = {batch: max(chosen, key=lambda way, of=ratios[batch]: of[way][1]) for batch in rows}  # type: ignore[misc]
            if nbytes <= memory * dense_bytes and set(taken.values()) == set(chosen) != {"dense"}:
                reached = [ratios[batch][way][1] for batch, way in taken.items()]
                worst = min(reached)  # any plan that nowhere loses comes before any that does
                score = worst - 1000 if worst < LOSS else sum(map(math.log, reached)) / len(rows)
                plans.append((score, nbytes, taken))
    if not plans:
        return Decision(None, f"no way fits in {memory:g} times the bytes of the dense weight", (), 0)
    top = max(score for score, _, _ in plans)
    near = [plan for plan in plans if plan[0] >= top - SLACK]
    _, nbytes, taken = min(near, key=lambda plan: (plan[1], -plan[0]))
    choices = tuple(_choice(batch, way, measured.seconds[batch], ratios[batch][way]) for batch, way in taken.items())
    slowest, fastest = (pick(choices, key=lambda choice: choice.ratio) for pick in (min, max))
    reason = ""
    if slowest.ratio < LOSS:
        reason = (
            f"at batch {slowest.rows} the best within {memory:g} times the dense bytes ({slowest.route}) takes "
            f"{1 / slowest.ratio:.2f} of the dense layer's time"
        )
    elif not any(choice.ratio >= GAIN and choice.low > 1 for choice in choices):
        reason = f"nothing is faster than dense beyond noise: at best {fastest.ratio:.2f} ({fastest.route})"
    return Decision(None if reason else Plan.of(list(taken.items())), reason, choices, 0 if reason else nbytes)


def ratio_of(times: Mapping[str, Sequence[float]], way: str) -> tuple[float, float, float]:
    """Return dense time over a way's: lower quartile, median, upper quartile of the rounds that both ran."""
    pairs = [dense / own for dense, own in zip(times["dense"], times[way], strict=False) if own > 0] or [1.0]
    if len(pairs) == 1:
        return pairs[0], pairs[0], pairs[0]
    low, middle, high = quantiles(pairs, n=4, method="inclusive")
    return low, middle, high


def _choice(rows: int, way: str, times: Mapping[str, Sequence[float]], ratio: tuple[float, float, float]) -> Choice:
    prepacked = median(times["prepacked"]) if "prepacked" in times else None
    low, middle, high = ratio
    return Choice(rows, way, middle, low, high, median(times[way]), median(times["dense"]), prepacked)


def machine() -> dict[str, str]:
    """Return what timings depend on besides the layer."""
    known = versions()
    native = kernels.available()["native"]
    return {
        "processor": _processor(),
        "kernels": kernels.isas()[0] if native == "ok" else "none",
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


def key_of(weight: Weight, packed: Format, kind: str, rows: Iterable[int], cold: bool) -> str:
    """Return the text under which layers that run alike share their measurement."""
    parts = (
        kind,
        f"{packed.shape[0]}x{packed.shape[1]}",
        packed.name,
        str(packed.pattern),
        f"{stored_share(packed):.2f}",
        str(packed.value_dtype).removeprefix("torch."),
        str(weight.dtype).removeprefix("torch."),
        ",".join(map(str, rows)),
        "cold" if cold else "warm",
    )
    return " ".join(parts)


class Cache:
    """Measurements by machine and kind of layer: in memory for the process, and in a JSON file if one is named.

    Args:
        path: of the file; it need not exist yet. None keeps them for this process only.

    Raises:
        FormatError: the file is none of ours, or says what cannot be.
    """

    _memory: dict[tuple[str, str], Measurement] = {}  # noqa: RUF012  shared on purpose, by all of the process

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._machine = json.dumps(machine(), sort_keys=True)
        self._others: dict[str, Any] = {}
        self._own: dict[str, Measurement] = {}
        if self._path is not None and self._path.exists():
            self._others = self._read(self._path)
            own = self._others.pop(self._machine, {})
            self._own = {key: _measurement(self._path, key, entry) for key, entry in own.items()}

    def get(self, key: str) -> Measurement | None:
        """Return what is known of a kind of layer on this machine."""
        return self._own.get(key) or self._memory.get((self._machine, key))

    def put(self, key: str, measured: Measurement) -> None:
        """Remember a measurement: in the file only if the machine was quiet."""
        self._memory[self._machine, key] = measured
        if not measured.noisy:
            self._own[key] = measured

    def write(self) -> None:
        """Write the file, whole or not at all."""
        if self._path is None:
            return
        own = {
            key: {"seconds": {str(n): times for n, times in entry.seconds.items()}, "nbytes": entry.nbytes}
            for key, entry in self._own.items()
        }
        table = {"secateur autotune": CACHE_VERSION, "machines": {**self._others, self._machine: own}}
        write_text(self._path, json.dumps(table, indent=1) + "\n")

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            version, machines = table["secateur autotune"], table["machines"]
            if version != CACHE_VERSION:
                return {}  # of another version: measured anew, and replaced
            if not isinstance(machines, dict) or not all(isinstance(entry, dict) for entry in machines.values()):
                raise TypeError("machines should be a table of tables")
        except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
            raise FormatError(
                f"{path} is not a file of autotune measurements: {error!r:.200}.\nGive another path, or delete it."
            ) from None
        return dict(machines)


def _measurement(path: Path, key: str, entry: Any) -> Measurement:
    """A measurement from a file, if it can be one."""
    try:
        seconds = {
            int(rows): {way: [float(s) for s in times] for way, times in ways.items()}
            for rows, ways in entry["seconds"].items()
        }
        nbytes = {way: int(n) for way, n in entry["nbytes"].items()}
        fine = seconds and min(seconds) >= 1 and all(n >= 0 for n in nbytes.values()) and "dense" in nbytes
        for ways in seconds.values():
            fine = fine and ways.keys() == nbytes.keys() and all(ways.values())
            fine = fine and all(0 < s < math.inf for times in ways.values() for s in times)
        for way in nbytes:
            Plan.parse(way)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        fine = False
    if not fine:
        raise FormatError(f"{path}: the measurement {key!r:.200} cannot be one.\nDelete the file to measure anew.")
    return Measurement(seconds, nbytes)
