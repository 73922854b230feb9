"""The patterns, importances, solvers and methods that every law is checked on."""

from secateur import (
    NM,
    RIA,
    Block,
    Column,
    Magnitude,
    Random,
    Refit,
    Row,
    Select,
    SparseGPT,
    Unstructured,
    Wanda,
)

# All fit a weight of 6 x 20.
PATTERNS = [
    Unstructured(),
    Unstructured("layer"),
    Unstructured("row"),
    NM(2, 4),
    NM(1, 4),
    NM(3, 10),
    NM(3, 7, remainder="dense"),
    Block(1, 1),
    Block(2, 4),
    Block(4, 3, remainder="dense"),
    Row(),
    Column(),
    Column(4),
]

IMPORTANCES = [Magnitude(), Wanda(), RIA(), RIA(exponent=1.0), RIA(exponent=0.0), Random(), Random(seed=7)]

SOLVERS = [
    Select(Magnitude()),
    Select(Wanda()),
    Select(RIA()),
    Select(Random()),
    SparseGPT(),
    SparseGPT(block_size=8),
    Refit(Select(Wanda())),
    Refit(SparseGPT(block_size=8)),
]

# By the text that names them: every head, alone and inside every wrapper.
HEADS = {
    "magnitude": Select(Magnitude()),
    "wanda": Select(Wanda()),
    "ria": Select(RIA()),
    "random": Select(Random()),
    "sparsegpt": SparseGPT(),
}
METHODS = HEADS | {f"{name}+refit": Refit(solver) for name, solver in HEADS.items()}
