"""Every layer that replaces another one, beside the one that it replaces: a new replacement is one line here."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur import formats, sparsify_
from secateur.nn import Packed, PackedAs, PackedEmbedding
from secateur.patterns import SparsityPattern

# Of each replaced class: the constructor, and inputs of all shapes that it takes, empty ones among them.
LINEAR_INPUTS = [(16,), (5, 16), (2, 3, 16), (2, 3, 2, 16), (0, 16), (2, 0, 16)]
KINDS = {
    "linear": (lambda: nn.Linear(16, 8), LINEAR_INPUTS),
    "no bias": (lambda: nn.Linear(16, 8, bias=False), LINEAR_INPUTS),
    "Conv1D": (lambda: Conv1D(8, 16), LINEAR_INPUTS),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1), [(4, 5, 6), (2, 4, 5, 6), (0, 4, 5, 6)]),
    "conv2d strided": (lambda: nn.Conv2d(4, 8, (2, 3), 2, "valid", bias=False), [(4, 5, 6), (2, 4, 5, 6)]),
    "conv2d reflect": (lambda: nn.Conv2d(4, 8, 3, 1, 1, 1, 2, padding_mode="reflect"), [(4, 5, 6), (2, 4, 5, 6)]),
    "pixels": (lambda: nn.Conv2d(16, 8, 1), [(16, 5, 6), (2, 16, 5, 6), (0, 16, 5, 6)]),
    "pixels strided": (lambda: nn.Conv2d(16, 8, 1, (2, 3), bias=False), [(16, 5, 6), (2, 16, 5, 6)]),
    "positions": (lambda: nn.Conv1d(16, 8, 1), [(16, 7), (2, 16, 7), (0, 16, 7)]),
    "positions strided": (lambda: nn.Conv1d(16, 8, 1, 3, bias=False), [(16, 7), (2, 16, 7)]),
}
LOOKUPS = {
    "embedding": (lambda: nn.Embedding(12, 16), [(), (5,), (2, 3), (0,), (2, 0)]),
    "embedding with padding": (lambda: nn.Embedding(12, 16, padding_idx=-3), [(5,), (2, 3)]),
}
PATTERNS = {
    "unstructured": 0.6,
    "2:4": None,
    "block:4x4": 0.5,
    "block:3x5,remainder=dense": 0.5,
    "row": 0.5,
    "column": 0.5,
}
# Which patterns each kind learns or is packed under, besides the first.
SPARSE_KINDS = {
    "linear": PATTERNS,
    "no bias": ["2:4"],
    "Conv1D": ["unstructured", "2:4", "row"],
    "conv2d": ["unstructured", "column"],
    "conv2d strided": ["unstructured"],
    "conv2d reflect": ["unstructured"],
}
PACKED_KINDS = {
    "linear": PATTERNS,
    "no bias": ["unstructured"],
    "Conv1D": ["unstructured", "row"],
    "pixels": ["unstructured", "2:4"],
    "pixels strided": ["unstructured"],
    "positions": ["unstructured", "2:4"],
    "positions strided": ["unstructured"],
}
STAGES = {
    "soft": lambda layer: None,
    "straight-through": lambda layer: layer.freeze(layer.hard_mask(), straight_through=True),
    "frozen": lambda layer: layer.hard_prune(),
}


@dataclass(frozen=True)
class Case:
    """A replacement, how it is made anew with other numbers, and the inputs that the replaced layer takes."""

    kind: str
    make: Callable[[], tuple[nn.Module, nn.Module]]  # the original and its replacement

    @property
    def shapes(self):
        return KINDS[self.kind][1]

    def pair(self, seed=0):
        torch.manual_seed(seed)
        return self.make()

    def inputs(self, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator) for shape in self.shapes]


@dataclass(frozen=True)
class Lookup(Case):
    """A packed embedding, whose inputs are indices."""

    @property
    def shapes(self):
        return LOOKUPS[self.kind][1]

    def inputs(self, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(12, shape, generator=generator) for shape in self.shapes]


def original_of(kind):
    original = KINDS[kind][0]()
    if getattr(original, "bias", None) is not None:
        nn.init.normal_(original.bias)  # zero at first in Conv1D
    return original


def learning(kind, pattern, stage="soft", **options):
    def make():
        original = original_of(kind)
        model = nn.Sequential(copy.deepcopy(original))
        sparsify_(model, **({"pattern": pattern, "sparsity": PATTERNS[pattern]} if pattern else {}), **options)
        STAGES[stage](model[0])
        return original, model[0]

    return make


def packed(kind, pattern, value_dtype=None):
    def make():
        original = original_of(kind)
        frozen = SparsityPattern.parse(pattern)
        with torch.no_grad():
            weight = original.weight.T if kind == "Conv1D" else original.weight.flatten(1)
            weight.mul_(frozen.mask(weight.abs(), frozen.resolve(PATTERNS[pattern])))
        fits = formats.pack(weight, value_dtype, (frozen,))
        return original, PackedAs.of(original).build(fits, original.bias, None, torch.float32)

    return make


def embedding(kind):
    def make():
        original = LOOKUPS[kind][0]()
        return original, PackedEmbedding.from_embedding(original)

    return make


def packed_whole(kind, value_dtype=None):
    def make():
        original = original_of(kind)
        weight = original.weight.T if kind == "Conv1D" else original.weight.flatten(1)
        fits = formats.DensePacked.from_dense(weight, value_dtype=value_dtype)
        return original, PackedAs.of(original).build(fits, original.bias, None, torch.float32)

    return make


CASES = {
    **{
        f"learning {kind} {pattern} {stage}": Case(kind, learning(kind, pattern, stage))
        for kind, patterns in SPARSE_KINDS.items()
        for pattern in patterns
        for stage in STAGES
    },
    "learning linear by threshold": Case("linear", learning("linear", None, threshold=0.1)),
    "learning linear by thresholds": Case("linear", learning("linear", None, threshold=0.1, structured=False)),
    "learning Conv1D by threshold": Case("Conv1D", learning("Conv1D", None, threshold=0.01)),
    "learning Conv1D by thresholds": Case("Conv1D", learning("Conv1D", None, threshold=0.01, structured=False)),
    "learning linear hard": Case("linear", learning("linear", "unstructured", hard=True)),
    **{
        f"packed {kind} {pattern}": Case(kind, packed(kind, pattern))
        for kind, patterns in PACKED_KINDS.items()
        for pattern in patterns
    },
    **{f"packed {kind} whole": Case(kind, packed_whole(kind)) for kind in PACKED_KINDS},
    "packed linear whole int8": Case("linear", packed_whole("linear", torch.int8)),
    "packed linear int8": Case("linear", packed("linear", "unstructured", torch.int8)),
    "packed pixels int8": Case("pixels", packed("pixels", "unstructured", torch.int8)),
}
# Packed embeddings keep the laws that do not need a gradient of the input.
EMBEDDINGS = {f"packed {kind}": Lookup(kind, embedding(kind)) for kind in LOOKUPS}
LEARNING = {name: case for name, case in CASES.items() if name.startswith("learning")}
PACKED = {name: case for name, case in CASES.items() if name.startswith("packed")}
# One of each class, stage and way to store: for laws that do not depend on the pattern.
FEW = {
    name: case
    for name, case in CASES.items()
    if "linear" not in name or any(word in name for word in ("unstructured", "threshold", "int8", "2:4"))
}


def every(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases)


def dense_of(original, layer):
    """The original with the weight that the replacement uses now."""
    dense = copy.deepcopy(original)
    if isinstance(layer, Packed):
        return layer.to_dense()
    with torch.no_grad():
        dense.weight.copy_(layer._effective())
    return dense
