"""Whether a model still has the zeros that a report says it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur._errors import PatternError, RecipeError
from secateur._sharding import full_tensor
from secateur.reports._masks import StoredMasks
from secateur.reports._match import Holder, Wanted, find_tensors
from secateur.reports._records import LayerReport


@dataclass(frozen=True)
class Verification:
    """What :meth:`Report.verify` compared. Where a zero is lost it raises instead.

    Args:
        parameters: that were compared.
        pruned: their weights that a mask prunes, all of them zero.
        by_masks: True if each place was compared; False if only numbers of zeros were, because the report comes from a
            file and has no masks.
    """

    parameters: int
    pruned: int
    by_masks: bool

    def __str__(self) -> str:
        if self.by_masks:
            return f"all {self.pruned:,} pruned weights are zero, in {_parameters(self.parameters)}"
        return (
            f"as many zeros as were pruned, {self.pruned:,} in {_parameters(self.parameters)}; their places were not "
            "compared, because the report was read from a file and has no masks"
        )


def verify_masks(holder: Holder, masks: StoredMasks) -> Verification:
    """Raise unless every weight that a mask prunes is zero; return what was compared."""
    packed = masks.packed()
    lost: list[str] = []
    for mask, tensors in zip(packed, find_tensors(holder, wanted_by(masks), computed=True), strict=True):
        kept = mask.mask()
        for name, tensor in tensors.items():
            values = _values(name, tensor)
            count = int((values.ne(0) & ~kept.to(values.device)).count_nonzero())
            if count:
                lost.append(f"{name}: {count:,} of its {mask.pruned:,} pruned weights are not zero")
    _raise_if(
        lost,
        "Something wrote to the weights after the masks were final, such as an average of weights (SWA, EMA), a merged "
        "adapter or an optimizer step.\nCall secateur.apply_masks_(model, report) to set them to zero again.",
    )
    return Verification(len(packed), sum(mask.pruned for mask in packed), True)


def verify_counts(holder: Holder, layers: Sequence[LayerReport]) -> Verification:
    """Raise unless every parameter has at least as many zeros as were pruned; return what was compared."""
    pruned: dict[tuple[str, ...], int] = {}
    for layer in layers:
        names = layer.parameters or _assumed(layer)
        pruned[names] = pruned.get(names, 0) + layer.pruned
    lost: list[str] = []
    for (_, count), tensors in zip(
        pruned.items(), find_tensors(holder, [Wanted(names, None) for names in pruned], computed=True), strict=True
    ):
        for name, tensor in tensors.items():
            values = _values(name, tensor)
            zeros = values.numel() - int(values.count_nonzero())
            if zeros < count:
                lost.append(f"{name}: it has {zeros:,} zeros, but {count:,} weights were pruned")
    _raise_if(
        lost,
        "Only numbers of zeros were compared, because the report was read from a file and has no masks.\n"
        "Set the zeros again with masks from a copy that has them: secateur.apply_masks_(model, secateur.masks(copy)).",
    )
    return Verification(len(pruned), sum(pruned.values()), False)


def wanted_by(masks: StoredMasks) -> list[Wanted]:
    """Return the parameters that masks are for."""
    return [Wanted(mask.names, mask.shape) for mask in masks.packed()]


def _assumed(layer: LayerReport) -> tuple[str, ...]:
    """The parameter of a layer in a report of 0.1.0, which did not name it."""
    return tuple(f"{name}.weight".lstrip(".") for name in (layer.name, *layer.tied_to))


def _values(name: str, tensor: Tensor) -> Tensor:
    """The whole tensor in a dtype that can be compared with zero."""
    if tensor.is_meta:
        raise RecipeError(f"{name}: it is on the meta device, without values. Load the weights first.")
    whole = full_tensor(tensor.detach())
    is_narrow = whole.is_floating_point() and whole.element_size() == 1  # float8, which PyTorch does not compare
    return whole.to(torch.float32) if is_narrow else whole


def _parameters(count: int) -> str:
    return "1 parameter" if count == 1 else f"{count} parameters"


def _raise_if(lost: Sequence[str], advice: str) -> None:
    if lost:
        lines = "".join(f"\n  {line}" for line in lost[:10]) + (f"\n  and {len(lost) - 10} more" if lost[10:] else "")
        raise PatternError(f"zeros were lost in {_parameters(len(lost))}:{lines}\n{advice}")
