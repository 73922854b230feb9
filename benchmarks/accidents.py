"""Is what we write whole or absent whenever a process dies? Runs are killed at random moments, and disks are filled.

    python benchmarks/accidents.py --kills 20 --seed 0

Every run is a process of its own, forked from this one, which has imported everything. Half of the kills come at any
moment, the other half while files are written. After each one the output must be the whole old one, the whole new one,
or absent where nothing was; what the command said of it must be true; and the next look at the output must delete what
was left over. ``--kills`` is the number for each case. POSIX only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
import transformers
from _timing import describe

import secateur
from secateur import FormatError
from secateur.cli import app
from secateur.files import _rename, _whole, check_file, check_output
from secateur.packing import read_packed
from secateur.timing import MeasurementCache

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
STATUS = {"SIGKILL": {-9}, "SIGTERM": {143, -15}, "SIGINT": {130, 99}}
REPORTS = {"secateur.json", "secateur.pack.json"}  # they hold seconds
Digest = dict[str, str] | None


@dataclass(frozen=True)
class Case:
    """One thing that is killed.

    Args:
        name: for the table.
        action: runs in the process that is killed.
        output: that it writes.
        old: makes the output that is there before; None if there is none.
        may_step_aside: the output may be absent until the next run has looked at it.
        speaks: the action is a command, which says what it wrote.
    """

    name: str
    action: Callable[[], object]
    output: Path
    old: Callable[[], object] | None = None
    may_step_aside: bool = False
    speaks: bool = True


class Child:
    """A forked process that runs one function."""

    def __init__(self, action: Callable[[], object], log: Path) -> None:
        self.log = log
        self.began = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(action)

    def _run(self, action: Callable[[], object]) -> None:
        status = 98
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            torch.set_num_threads(1)  # after a fork, two threads that are first to ask for PyTorch's pool would fail
            action()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except KeyboardInterrupt:
            status = 99  # outside of the command, in this script
        except BaseException:
            traceback.print_exc()
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)

    def ended(self) -> int | None:
        """The exit status, or minus the signal; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)

    def wait(self) -> int:
        """The exit status, or minus the signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def command(*arguments: object) -> Callable[[], object]:
    """The command line with these arguments."""
    return lambda: app([str(argument) for argument in arguments])


def digest(path: Path) -> Digest:
    """The contents of a file or directory; None if there is none."""
    if not os.path.lexists(path):
        return None
    found = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())
    return {str(entry.relative_to(path)): contents(entry) for entry in found}


def contents(path: Path) -> str:
    """What a file holds, but for what depends on measured times: the seconds of reports, and routes."""
    if path.name in REPORTS:
        return "report of " + ", ".join(json.loads(path.read_text()))
    with suppress(FormatError):  # which checks all of it
        packed = read_packed(path)
        return "packed " + ", ".join(
            sorted({name.removesuffix(".weight") for name in (*packed.layers, *packed.tensors)})
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(output: Path) -> list[Path]:
    """What lies beside an output that no user put there."""
    return [entry for entry in output.parent.iterdir() if entry.name.startswith(".")]


def remove(path: Path) -> None:
    """Delete a file or directory, if there is one."""
    subprocess.run(["rm", "-rf", str(path)], check=True)


class LostError(Exception):
    """What must never be."""


class Campaign:
    """Kills the runs of one case."""

    def __init__(self, case: Case, work: Path, draw: random.Random) -> None:
        self.case, self.work, self.draw = case, work, draw
        self.counts: Counter[str] = Counter()
        self.old, self.new, self.seconds, self.writing = self._learn()

    def _learn(self) -> tuple[Digest, Digest, float, float]:
        """The two contents that the output may have, how long a run takes, and how long it writes."""
        self._reset()
        old = digest(self.case.output)
        child, status, started = Child(self.case.action, self.work / "log"), None, 0.0
        while status is None:
            status = child.ended()
            started = started or (time.perf_counter() if self._is_writing() else 0.0)
            time.sleep(0.0005)
        now = time.perf_counter()
        if status != 0:
            raise LostError(f"{self.case.name} fails: {child.log.read_text()}")
        return old, digest(self.case.output), now - child.began, now - (started or now - 0.02)

    def _reset(self) -> None:
        remove(self.case.output)
        if self.case.old is not None:
            self.case.old()

    def _is_writing(self) -> bool:
        return any((entry / "new").exists() for entry in leftovers(self.case.output))

    def kill(self, name: str) -> None:
        """Start a run, kill it, and check everything."""
        self._reset()
        child = Child(self.case.action, self.work / "log")
        status = self._strike(child, SIGNALS[name])
        self.counts[name] += 1
        found = digest(self.case.output)
        state = "new" if found == self.new else "old" if found == self.old and found is not None else "absent"
        if found is not None and state == "absent":
            raise LostError(f"the output is neither old nor new: {found}")
        if state == "absent" and self.old is not None and not self.case.may_step_aside:
            raise LostError("the old output is lost")
        if status not in {0} | STATUS[name] or (status == 0 and state != "new"):
            raise LostError(f"{name} ended with {status}: {child.log.read_text()}")
        if self.case.speaks and status in (130, 143):
            self._check_words(child.log.read_text(), state == "new")
        self.counts["finished before" if status == 0 else state] += 1
        if status == 0:  # this one was faster than what the moments are drawn from
            self.seconds = min(self.seconds, time.perf_counter() - child.began)
        left = leftovers(self.case.output)
        if left and name != "SIGKILL" and status != -15:
            raise LostError(f"{name} left {left}")
        self.counts["left over"] += bool(left)
        self._look()
        if state == "absent" and self.old is not None:
            if digest(self.case.output) not in (self.old, self.new):
                raise LostError("the old output was not put back")
            self.counts["put back"] += 1
        if left := leftovers(self.case.output):
            inside = [str(path) for folder in left for path in sorted(folder.rglob("*"))]
            raise LostError(f"{left} are still there, with {inside}")

    def _check_words(self, said: str, written: bool) -> None:
        told = f"{self.case.output} was written" in said
        if "Traceback" in said or told != written or (written and "nothing was written" in said):
            raise LostError(f"the output was {'' if written else 'not '}written, but the command said: {said}")

    def _strike(self, child: Child, number: signal.Signals) -> int:
        """Send the signal at a random moment. Meanwhile see that an old output is never absent."""
        anytime = self.draw.random() < 0.5
        moment = self.draw.uniform(0, self.seconds if anytime else 1.2 * self.writing)
        began, sent = child.began if anytime else None, False
        while (status := child.ended()) is None:
            if self.old is not None and not self.case.may_step_aside:
                self.counts["looks"] += 1
                if not self.case.output.exists():
                    raise LostError("there was a moment without an output")
            if began is None and self._is_writing():
                began = time.perf_counter()
            if not sent and began is not None and time.perf_counter() - began >= moment:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, number)
                sent = True
            time.sleep(0.0002)  # two cores: the run needs one
        return status

    def _look(self) -> None:
        """What the next run does first."""
        with suppress(FormatError):
            check = check_file if self.case.output.suffix else lambda path: check_output(None, path, False, 0)
            check(self.case.output)


def with_plain_renames(action: Callable[[], object], pause: float = 0.0) -> Callable[[], object]:
    """The same, as on a system that cannot exchange two names, and is slow between two renames. It runs in a fork."""

    def run() -> None:
        def slow(path: Path, target: Path) -> None:
            time.sleep(pause)
            _rename.rename_new(path, target)

        _rename._system_call = lambda: None  # type: ignore[assignment]
        vars(_whole)["rename_new"] = slow
        action()

    return run


def made_cases(model: Path, text: Path, work: Path) -> list[Case]:
    """What is killed. Everything runs once here, for the inputs of the others."""
    magnitude = ("--method", "magnitude", "--sparsity")
    pruned, older = work / "pruned", work / "older"
    for path, sparsity in ((older, 0.5), (pruned, 0.9)):
        if Child(command("prune", model, "--output", path, *magnitude, sparsity), work / "log").wait() != 0:
            raise LostError((work / "log").read_text())
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))
    secateur.prune_(layers, sparsity=0.8, method="magnitude")
    module = torch.nn.Sequential(*(secateur.PackedLinear.from_linear(layer) for layer in layers))

    def copied(target: Path) -> Callable[[], object]:
        return lambda: subprocess.run(["cp", "-r", str(older), str(target)], check=True)

    def prune(output: Path, *more: object) -> Callable[[], object]:
        return command("prune", model, "--output", output, *(more or (*magnitude, 0.9)))

    def place(name: str) -> Path:
        (work / name).mkdir()
        return work / name / ("out.sparse.safetensors" if name == "save" else "out")

    wanda = ("--pattern", "2:4", "--calibration", text, "--samples", "4", "--sequence-length", "32")
    cache = work / "cache.json"
    again = place("overwrite")
    aside = place("plain")
    return [
        Case("prune, new output", prune(new := place("new")), new),
        Case("prune, two plain renames", with_plain_renames(prune(new := place("new plain"))), new),
        Case("prune --overwrite", prune(again, *magnitude, 0.9, "--overwrite"), again, copied(again)),
        Case(
            "prune --overwrite, two plain renames",
            with_plain_renames(prune(aside, *magnitude, 0.9, "--overwrite"), pause=0.1),
            aside,
            copied(aside),
            may_step_aside=True,
        ),
        Case("prune with calibration", prune(new := place("wanda"), *wanda), new),
        Case("pack", command("pack", pruned, "--output", new := place("pack"), "--batch", "1", "--cache", cache), new),
        Case(
            "save over an old file",
            lambda: secateur.save(module, packed_at),
            packed_at := place("save"),
            lambda: packed_at.write_bytes(b"the old one"),
            speaks=False,
        ),
    ]


def kill_caches(work: Path, kills: int, draw: random.Random) -> Counter[str]:
    """Two processes add to one cache again and again; one is killed. Nothing that was saved may be missing."""
    counts: Counter[str] = Counter()
    folder = work / "caches"
    folder.mkdir()
    path = folder / "cache.json"

    def add(worker: str, rounds: int) -> None:
        cache = MeasurementCache(path, {"cpu": "x"}, float, float)
        for number in range(rounds):
            cache.put(f"{worker} {number}", 1.0)
            cache.save()
            print(number, flush=True)

    for number in range(kills):
        path.unlink(missing_ok=True)
        name = draw.choice(list(SIGNALS))
        killed = Child(lambda number=number: add(f"killed {number}", 10_000), work / "killed")  # type: ignore[misc]
        other = Child(lambda number=number: add(f"other {number}", 20), work / "other")  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.3))
        os.kill(killed.pid, SIGNALS[name])
        if killed.wait() == 0 or other.wait() != 0:
            raise LostError((work / "other").read_text())
        counts[name] += 1
        saved = {f"other {number} {index}" for index in range(20)}
        said = [line for line in (work / "killed").read_text().split("\n")[:-1] if line.isdecimal()]
        saved |= {f"killed {number} {index}" for index in map(int, said)}
        (entries,) = json.loads(path.read_text())["machines"].values()
        if missing := saved - entries.keys():
            raise LostError(f"the cache lost {missing}")
        counts["entries"] += len(saved)
        counts["left over"] += bool(leftovers(path))
        Child(lambda number=number: add(f"last {number}", 1), work / "last").wait()  # type: ignore[misc]
        if left := leftovers(path):
            inside = [str(path) for folder in left for path in sorted(folder.rglob("*"))]
            raise LostError(f"{left} are still there, with {inside}")
    return counts


def race(model: Path, work: Path, rounds: int) -> Counter[str]:
    """Two runs to one output: one must say that it wrote, and be right."""
    counts: Counter[str] = Counter()
    (work / "race").mkdir()
    output = work / "race" / "out"
    for index in range(rounds):
        remove(output)
        plain = index % 2
        runs = [
            Child(
                (with_plain_renames if plain else lambda same: same)(
                    command("prune", model, "--output", output, "--method", "magnitude", "--sparsity", sparsity)
                ),
                work / f"race {sparsity}",
            )
            for sparsity in (0.5, 0.75)
        ]
        status = [run.wait() for run in runs]
        said = [f"written to {output}" in run.log.read_text().replace("\n", "") for run in runs]
        kept = json.loads((output / "secateur.json").read_text())["recipe"]["sparsity"]
        if sorted(status) != [0, 2] or said != [code == 0 for code in status] or kept != (0.5, 0.75)[status.index(0)]:
            raise LostError(f"{status}, {said}: {[run.log.read_text() for run in runs]}")
        if leftovers(output):
            raise LostError("leftovers")
        counts["runs"] += 2
    return counts


def fill_disks(model: Path, work: Path, rounds: int, draw: random.Random) -> Counter[str]:
    """The disk is full in the middle of a write: the old output stays, and nothing of the new one."""
    counts: Counter[str] = Counter()
    output = work / "full" / "out"
    needed = sum(entry.stat().st_size for entry in model.rglob("*") if entry.is_file())
    run = command("prune", model, "--output", output, "--method", "magnitude", "--sparsity", "0.9", "--overwrite")

    def unchecked() -> None:
        import shutil

        usage = shutil.disk_usage(work)
        shutil.disk_usage = lambda path: usage  # the check before the work sees another disk
        run()

    def limited(size: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        unchecked()

    for index in range(rounds):
        old = index % 2 == 0
        free = int(needed * draw.uniform(0, 0.98))
        (work / "full").mkdir()
        size = max(free + 20_000, 100_000)  # a tmpfs counts pages and directories, too
        if index % 4 < 2 and mounted(work / "full", size):
            kind, action = "tmpfs", unchecked
        else:
            kind, action = "limit", lambda free=free: limited(min(free, 8_000_000))  # type: ignore[misc]
        if old:
            output.mkdir()
            (output / "config.json").write_text("{}")
        before = digest(output)
        child = Child(action, work / "log")
        status, said = child.wait(), child.log.read_text()
        after, left = digest(output), leftovers(output)
        if kind == "tmpfs":
            subprocess.run(["umount", str(work / "full")], check=True)
        if status != 2 or "could not be written" not in said or "Traceback" in said or ".partial" in said:
            raise LostError(f"a full disk ({kind}, {free}) ended with {status}: {said}")
        if after != before or left:
            raise LostError(f"a full disk left {after}, {left}")
        counts[kind] += 1
        remove(work / "full")
    return counts


def mounted(path: Path, size: int) -> bool:
    """Mount a small disk in memory, if we may."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=False, capture_output=True
    )
    return made.returncode == 0


def row(name: str, counts: Counter[str], keys: Sequence[str]) -> str:
    """One line of the table."""
    return f"{name:38s}" + "".join(f"{counts[key]:>10,}" for key in keys)


KEYS = (*SIGNALS, "absent", "old", "new", "finished before", "left over", "put back", "looks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6, help="of each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", default="", help="run only the cases with this in their names")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    imported = (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.AutoTokenizer)
    assert all(imported)  # transformers imports them only now, and not again in each fork
    draw = random.Random(arguments.seed)
    results: dict[str, Counter[str]] = {}
    print(describe())
    print(f"{'case':38s}" + "".join(f"{key[:9]:>10s}" for key in KEYS))
    with tempfile.TemporaryDirectory() as folder, as_file(files("secateur.demo") / "model") as demo:
        work = Path(folder)
        model = work / "model"
        model.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((demo / name).read_bytes())
        for case in made_cases(model, demo / "calibration.txt", work):
            if arguments.case not in case.name:
                continue
            campaign = Campaign(case, work, draw)
            for index in range(arguments.kills):
                campaign.kill(list(SIGNALS)[index % 3])
            results[case.name] = campaign.counts
            print(row(case.name, campaign.counts, KEYS), flush=True)
        if arguments.case:
            return
        results["two processes with one cache"] = kill_caches(work, arguments.kills, draw)
        print(row("two processes with one cache", results["two processes with one cache"], KEYS))
        results["two runs to one output"] = race(model, work, max(2, arguments.kills // 3))
        results["full disks"] = fill_disks(model, work, max(4, arguments.kills // 2), draw)
    kills = sum(counts[name] for counts in results.values() for name in SIGNALS)
    print(
        f"{kills} kills, {results['two runs to one output']['runs']} runs in pairs to one output, full disks: ", end=""
    )
    print(", ".join(f"{count} ({kind})" for kind, count in results["full disks"].items()) + ". Nothing was lost.")
    print(json.dumps({name: dict(counts) for name, counts in results.items()}))


if __name__ == "__main__":
    main()
