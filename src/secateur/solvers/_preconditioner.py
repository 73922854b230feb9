"""A stand-in for a Gram matrix that can be inverted for each row's mask: its strongest directions, and a diagonal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur._types import Mask

_SPARE = 8  # directions more than asked, which make the last ones precise
_PASSES = 2  # of subspace iteration; more hardly change how many iterations a fit takes
_FLOOR = 1e-2  # of the diagonal of ones: less would leave the small systems to rounding


@dataclass(frozen=True, eq=False)
class Preconditioner:
    r"""``D + V V^T``, near a matrix with a diagonal of ones: V spans its strongest directions, D is what they leave.

    For the columns K that a row keeps, :math:`(D_K + V_K V_K^T)^{-1}` takes a system of as many unknowns as there are
    directions (Woodbury), exact for the row's own mask, and so positive definite for every mask. One product builds the
    systems of all rows.

    Args:
        root: square root of D, ``[in]``.
        scaled: ``V / root``, ``[in, directions]``.
        pairs: products of two columns of ``scaled``, ``[in, directions * (directions + 1) / 2]``.
        places: which of them each entry of a system is, ``[directions * directions]``.
    """

    root: Tensor
    scaled: Tensor
    pairs: Tensor
    places: Tensor

    @classmethod
    def of(cls, unit: Tensor) -> Preconditioner:
        """Find the root of ``in`` directions: the systems then cost half as much as a product with the matrix.

        Args:
            unit: positive definite, with a diagonal of ones, ``[in, in]``.
        """
        size = len(unit)
        count = math.isqrt(size)
        generator = torch.Generator().manual_seed(0)  # the same fit every time
        # Columns of a matrix of random numbers, made on the CPU so that they are the same on every device.
        basis = torch.randn(size, min(size, count + _SPARE), generator=generator).to(unit)
        for _ in range(_PASSES):
            basis = torch.linalg.qr(unit @ basis).Q
        image = unit @ basis
        values, vectors = torch.linalg.eigh(basis.T @ image)
        values, vectors = values[-count:], vectors[:, -count:]
        strong = values > values[-1] * size * torch.finfo(unit.dtype).eps
        directions = image @ (vectors[:, strong] / values[strong].sqrt())
        root = (1 - directions.square().sum(1)).clamp(min=_FLOOR).sqrt()
        scaled = directions / root.unsqueeze(1)
        first, second = torch.tril_indices(scaled.shape[1], scaled.shape[1], device=unit.device)
        places = torch.empty(scaled.shape[1], scaled.shape[1], dtype=torch.long, device=unit.device)
        places[first, second] = places[second, first] = torch.arange(len(first), device=unit.device)
        return cls(root, scaled, scaled[:, first] * scaled[:, second], places.flatten())

    def within(self, kept: Mask) -> Callable[[Tensor], Tensor]:
        """Return what multiplies residuals ``[rows, in]``, zero outside the rows' masks, by the inverse.

        Args:
            kept: ``[rows, in]``.
        """
        count = self.scaled.shape[1]
        inside = kept.to(self.scaled)
        systems = (inside @ self.pairs)[:, self.places].view(-1, count, count)
        systems.diagonal(dim1=1, dim2=2).add_(1)
        factor = torch.linalg.cholesky(systems)

        def apply(residual: Tensor) -> Tensor:
            result = residual / self.root
            along = torch.cholesky_solve((result @ self.scaled).unsqueeze(2), factor).squeeze(2)
            torch.addmm(result, along, self.scaled.T, alpha=-1, out=result)
            return result.div_(self.root).mul_(inside)

        return apply
