"""An embedding whose rows are stored in int8, each with a scale: half of the bytes of a small encoder are such rows."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name that PyTorch's own documentation uses

from secateur._checks import instance
from secateur._errors import KernelError, RecipeError
from secateur._types import dtype_name
from secateur.formats import UNSCALED_DTYPES, DensePacked, Format
from secateur.nn._packed_matrix import PackedMatrix

_DTYPES = (*UNSCALED_DTYPES, torch.float64)
# What a subclass may define to look up, or to store, something else than nn.Embedding does.
_TELLING = ("forward", "weight", "__call__", "_call_impl", "__getattr__", "__getattribute__")


class PackedEmbedding(PackedMatrix):
    """An embedding whose rows are int8 codes with one float32 scale for each row: ``row = code * scale``.

    A lookup returns exactly the rows of what :meth:`matrix` returns, in the dtype of the dense weight. A row of zeros,
    such as that of padding, stays zero. The rows are frozen. ``deepcopy``, ``state_dict``, ``.to``, ``torch.compile``
    and ``torch.export`` work as for any module. Code that multiplies the weight, as an output layer does, can read it.

    Args:
        packed: the rows, ``[num_embeddings, embedding_dim]``.
        padding_idx: the row of padding, as ``nn.Embedding`` has it; only :meth:`to_dense` needs it.
        dtype: dtype of the dense weight that this module replaces; None for float32.

    Raises:
        KernelError: rows that are not whole or not int8, or a padding row that is not there.
        TypeError: ``packed`` is not a storage format.

    Example:
        >>> import torch, secateur
        >>> from secateur.nn import PackedEmbedding
        >>> layer = PackedEmbedding.from_embedding(torch.nn.Embedding(100, 16, padding_idx=0))
        >>> layer
        PackedEmbedding(100, 16, padding_idx=0, values='int8', bytes=2,000)
        >>> ids = torch.tensor([[3, 7, 0]])
        >>> torch.equal(layer(ids), layer.to_dense()(ids)), layer(ids)[0, 2].any().item()
        (True, False)
    """

    # What dense embeddings have besides, and a packed one never does.
    max_norm, norm_type, scale_grad_by_freq, sparse = None, 2.0, False, False

    def __init__(self, packed: Format, padding_idx: int | None = None, dtype: torch.dtype | None = None) -> None:
        instance("packed", packed, Format, "a storage format such as DensePacked")  # type: ignore[type-abstract]
        if not isinstance(packed, DensePacked) or packed.value_dtype != torch.int8:
            raise KernelError(
                f"an embedding of {packed!r}: its rows should be whole and int8, because a lookup reads whole rows. "
                "Pack it with PackedEmbedding.from_embedding."
            )
        rows = packed.shape[0]
        if padding_idx is not None and not -rows <= padding_idx < rows:
            raise KernelError(
                f"an embedding of {rows} rows has the padding row {padding_idx}; it should be {-rows} to {rows - 1}. "
                "Check that it belongs to this weight."
            )
        super().__init__(packed, None, "dense", dtype)  # the route for code that multiplies the weight
        self.padding_idx = padding_idx if padding_idx is None or padding_idx >= 0 else rows + padding_idx

    @classmethod
    def from_embedding(cls, embedding: nn.Module) -> Self:
        """Return the packed module for an ``nn.Embedding``, which is not changed.

        Raises:
            RecipeError: an embedding that does more than to look up rows; see :func:`why_not_embedding`.
            FormatError: a weight that is not finite, or without values.
            TypeError: ``embedding`` is not an ``nn.Embedding``.
        """
        instance("embedding", embedding, nn.Embedding, "an nn.Embedding")
        assert isinstance(embedding, nn.Embedding)
        if (reason := why_not_embedding(embedding)) is not None:
            raise RecipeError(f"{reason}.\nKeep this embedding dense.")
        weight = embedding.weight.detach()
        return cls(DensePacked.from_dense(weight, value_dtype=torch.int8), embedding.padding_idx, weight.dtype)

    @property
    def num_embeddings(self) -> int:
        """How many rows there are."""
        return self._shape[0]

    @property
    def embedding_dim(self) -> int:
        """Size of each row."""
        return self._shape[1]

    @property
    def weight(self) -> Tensor:
        """The weight, ``[num_embeddings, embedding_dim]``, for code that reads it: see :class:`PackedWeight`."""
        return self._read()

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows ``[..., embedding_dim]`` for indices ``[...]``, in the dtype of the dense weight."""
        scales: Tensor = self._buffers["scales"]  # type: ignore[assignment]
        codes = F.embedding(input, self.values).float()
        return codes.mul_(F.embedding(input, scales.unsqueeze(1))).to(self._like.dtype)

    def to_dense(self) -> nn.Embedding:
        """Return an ``nn.Embedding`` with the same rows, in a new tensor."""
        rows, size = self._shape
        made = nn.Embedding(rows, size, self.padding_idx, device="meta")
        made.weight = nn.Parameter(self.matrix())
        return made.train(self.training)

    def extra_repr(self) -> str:
        """Describe the module as ``nn.Embedding`` does, and what is stored."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        stored = f"values={dtype_name(self.values.dtype)!r}, bytes={self.nbytes:,}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {stored}"


def why_not_embedding(module: nn.Embedding) -> str | None:
    """Return the reason why a packed embedding cannot replace an embedding, or None."""
    kind = type(module)
    own = {name for owner in kind.__mro__[: kind.__mro__.index(nn.Embedding)] for name in vars(owner)}
    if names := [name for name in _TELLING if name in own]:
        return f"{kind.__name__} has its own {names[0]}, unlike Embedding, which a replacement would lose"
    if extra := [name for name in (*module._parameters, *module._buffers, *module._modules) if name != "weight"]:
        return f"it has {extra[0]!r} besides its weight, which a replacement would lose"
    if not isinstance(weight := module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed"
    if weight.dtype not in _DTYPES:
        return f"its weight is {dtype_name(weight.dtype)}, and not of 16 or more floating-point bits"
    if module.max_norm is not None:
        return f"max_norm={module.max_norm:g} changes rows while they are looked up, and packed rows are frozen"
    for name, what in (("sparse", "gradients are sparse"), ("scale_grad_by_freq", "gradients are divided by counts")):
        if getattr(module, name):
            return f"with {name}=True its {what}, and packed rows are frozen and get none"
    return None
