"""The patterns, importances, solvers, methods, formats and routes that every law is checked on."""

from secateur import (
    ADMM,
    ALPS,
    NM,
    RIA,
    Block,
    Column,
    Fisher,
    Magnitude,
    Movement,
    Random,
    Refit,
    Row,
    Select,
    SparseGPT,
    Swaps,
    Taylor,
    TransposableNM,
    Unstructured,
    Wanda,
)
from secateur.formats import Bitmask, BlockPacked, ColumnPacked, DensePacked, NMPacked, RowPacked

# All fit a weight of 6 x 20.
PATTERNS = [
    Unstructured(),
    Unstructured("layer"),
    Unstructured("row"),
    NM(2, 4),
    NM(1, 4),
    NM(3, 10),
    NM(3, 7, remainder="dense"),
    TransposableNM(1, 2),
    TransposableNM(2, 4, remainder="dense"),
    Block(1, 1),
    Block(2, 4),
    Block(4, 3, remainder="dense"),
    Row(),
    Column(),
    Column(4),
]

IMPORTANCES = [Magnitude(), Wanda(), RIA(), RIA(exponent=1.0), RIA(exponent=0.0), Random(), Random(seed=7)]
FROM_LOSS = [Taylor(), Fisher(), Movement()]


def loss_of(output, batch):
    """A loss for methods that need one; it is not zero for any output that is not."""
    return output.double().sin().square().sum()


SOLVERS = [
    Select(Magnitude()),
    Select(Wanda()),
    Select(RIA()),
    Select(Random()),
    Select(Taylor()),
    Select(Fisher()),
    Select(Movement()),
    SparseGPT(),
    SparseGPT(block_size=8),
    ADMM(),
    ALPS(),
    Refit(Select(Wanda())),
    Refit(SparseGPT(block_size=8)),
    Swaps(Select(Wanda())),
    Refit(Swaps(SparseGPT(), rounds=1)),
    Refit(Select(Fisher())),
]

ALLOCATIONS = ["uniform", "global", "erk", "lamp", "owl", "alpha", "sensitivity"]

# By the text that names them: every head, alone and inside every wrapper.
HEADS = {
    "magnitude": Select(Magnitude()),
    "wanda": Select(Wanda()),
    "ria": Select(RIA()),
    "random": Select(Random()),
    "taylor": Select(Taylor()),
    "fisher": Select(Fisher()),
    "movement": Select(Movement()),
    "sparsegpt": SparseGPT(),
    "admm": ADMM(),
    "alps": ALPS(),
}
# A format, a pattern that it holds, and a shape that the pattern fits.
FORMATS = [
    (Bitmask, Unstructured(), (5, 19)),
    (Bitmask, NM(2, 4), (3, 8)),
    (DensePacked, Unstructured(), (5, 19)),
    (DensePacked, Unstructured(), (32, 8)),
    (NMPacked, NM(2, 4), (6, 16)),
    (NMPacked, NM(1, 3), (5, 15)),
    (NMPacked, NM(0, 4), (2, 8)),
    (NMPacked, NM(4, 4), (2, 8)),
    (NMPacked, NM(1, 1), (2, 3)),
    (NMPacked, NM(3, 5, "dense"), (4, 13)),
    (NMPacked, NM(7, 16), (3, 32)),
    (NMPacked, NM(16, 16, "dense"), (2, 17)),
    (NMPacked, NM(2, 8, "dense"), (3, 5)),  # no whole group
    (BlockPacked, Block(4, 4), (8, 12)),
    (BlockPacked, Block(1, 16), (3, 32)),
    (BlockPacked, Block(16, 1), (32, 3)),
    (BlockPacked, Block(2, 3, "dense"), (7, 11)),
    (BlockPacked, Block(9, 9, "dense"), (4, 5)),  # no whole tile
    (RowPacked, Row(), (7, 5)),
    (ColumnPacked, Column(), (7, 5)),
    (ColumnPacked, Column(3), (2, 12)),
]

# Each has its own format or route. All but the last one fit a weight of 48 x 80.
PACKED_PATTERNS = ["unstructured", "2:4", "3:8", "block:4x4", "block:16x1", "row", "column"]
PACKED_WITH_REMAINDER = "block:5x3,remainder=dense"

METHODS = (
    HEADS
    | {f"{name}+refit": Refit(solver) for name, solver in HEADS.items()}
    | {f"{name}+swaps": Swaps(solver) for name, solver in HEADS.items()}
)
