"""Layers that learn their mask, one of each class, and what their tests share."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from secateur import NM, Block, Column, Row, SparseConv2d, SparseLinear, Unstructured

# With the shape [out, in] to learn them in; 2 of the rows and columns of the last ones are a dense remainder.
PATTERNS = [
    (Unstructured(), 0.7, (6, 12)),
    (Unstructured("row"), 0.5, (6, 12)),
    (NM(2, 4), None, (6, 12)),
    (NM(1, 4), None, (6, 12)),
    (NM(2, 4, remainder="dense"), None, (6, 14)),
    (Block(2, 3), 0.6, (6, 12)),
    (Block(4, 4, remainder="dense"), 0.5, (10, 14)),
    (Row(), 0.5, (6, 12)),
    (Column(), 0.3, (6, 12)),
    (Column(3), 0.5, (6, 12)),
]
EVERY_PATTERN = pytest.mark.parametrize(("pattern", "sparsity", "shape"), PATTERNS, ids=str)
BY_NAME = [("unstructured", 0.7), ("2:4", None), ("block:2x2", 0.6), ("row", 0.5), ("column", 0.5)]
FIVE_PATTERNS = pytest.mark.parametrize(("pattern", "sparsity"), BY_NAME, ids=str)

LAYERS = {
    "structured": lambda **options: SparseLinear(8, 6, threshold=0.1, **options),
    "one a weight": lambda **options: SparseLinear.unstructured(8, 6, threshold=0.1, **options),
    "hard": lambda **options: SparseLinear(8, 6, threshold=0.1, hard=True, **options),
    **{
        name: lambda name=name, sparsity=sparsity, **options: SparseLinear(
            8, 6, pattern=name, sparsity=sparsity, **options
        )
        for name, sparsity in BY_NAME
    },
    "conv": lambda **options: SparseConv2d(4, 6, 3, padding=1, threshold=0.1, **options),
    "conv unstructured": lambda **options: SparseConv2d(4, 6, 3, structured=False, threshold=0.1, **options),
    "conv column": lambda **options: SparseConv2d(4, 6, (2, 3), pattern="column", sparsity=0.5, **options),
}
EVERY_LAYER = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
# One of each class: learned thresholds, single weights and larger units under a budget, and convolutions.
CLASSES = ["structured", "one a weight", "2:4", "row", "conv", "conv column"]
EVERY_CLASS = pytest.mark.parametrize("make", [LAYERS[name] for name in CLASSES], ids=CLASSES)


def an_input(layer, *batch, dtype=None):
    channels = (layer.in_features,) if isinstance(layer, SparseLinear) else (layer.in_channels, 5, 7)
    return torch.randn(*batch, *channels, dtype=dtype or layer.weight.dtype)


def product(layer, x, weight):
    """What the layer should compute with this weight, by torch's own operations."""
    if isinstance(layer, SparseLinear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def train(layer, optimizer, steps, set_to_none=True):
    x = an_input(layer, 16)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
        if layer.pattern is not None and layer.mask is None:
            layer.solve_threshold()


def state_of(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same_state(layer, state):
    now = layer.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
