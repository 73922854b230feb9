"""Put the zeros of a pruned model back into a copy that has lost them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from secateur._errors import RecipeError
from secateur._sharding import local_part, sharded_like
from secateur._types import Mask, dtype_name
from secateur.reports import Holder, PackedMask, Report, StoredMasks, find_tensors, wanted_by


class HasMasks(Protocol):
    """A training that knows the masks of its model."""

    @property
    def parameter_masks(self) -> StoredMasks:
        """The masks in use, in the shape of their parameters."""


@torch.no_grad()
def apply_masks_(target: Holder, source: Report | HasMasks | Mapping[str, Mask]) -> dict[str, int]:
    """Set the pruned weights to zero in a model, in a copy of it, or in a ``state_dict``.

    For weights that changed outside of secateur's steps and lost their zeros: averages of weights (SWA, EMA), a merged
    adapter, an optimizer step after ``finalize()``. Parameters are matched by qualified name. One prefix of wrappers
    may differ for all of them: ``module.`` (``AveragedModel``, ``DistributedDataParallel``), ``model.`` (a
    LightningModule); ``_orig_mod`` of ``torch.compile`` does not count. All is checked before the first weight changes.

    Args:
        target: changed in place. A weight that is tied in the model is set under each name that it has here.
        source: a report of :func:`prune_` or of a training, in the process that made it; a :class:`SparseTraining` or
            :class:`LotteryTicket`, also while it runs; or masks by the name of their parameter, as :func:`masks`
            returns them.

    Returns:
        For each parameter, by its name in ``target``, how many weights were not zero and are now.

    Raises:
        RecipeError: a parameter that is not in the target, or in several places; a report that was read from a file,
            which has no masks.
        PatternError: a parameter of another shape.
        TypeError: a source or target of another type, or a mask that is not bool.

    After any of these the target is unchanged.

    Example:
        >>> import torch, secateur
        >>> from torch.optim.swa_utils import AveragedModel
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> average = AveragedModel(model)
        >>> average.update_parameters(model)
        >>> report = secateur.prune_(model, pattern="2:4", method="magnitude")
        >>> average.update_parameters(model)
        >>> secateur.apply_masks_(average, report)
        {'module.0.weight': 16}
        >>> print(report.verify(average))
        all 16 pruned weights are zero, in 1 parameter
    """
    stored = _masks_of(source)
    found = find_tensors(target, wanted_by(stored))
    for tensors in found:
        for name, tensor in tensors.items():
            _check_writable(name, tensor)
    changed: dict[str, int] = {}
    for packed, tensors in zip(stored.packed(), found, strict=True):
        mask = packed.mask()
        for name, tensor in tensors.items():
            part = local_part(tensor.detach())
            pruned = sharded_like(~mask.to(part.device), tensor)
            changed[name] = int((part.ne(0) & pruned).count_nonzero())
            part.masked_fill_(pruned, 0)
    return changed


def _masks_of(source: object) -> StoredMasks:
    if isinstance(source, Report):
        return source.masks
    if isinstance(source, StoredMasks):
        return source
    if isinstance(source, Mapping):
        for name, mask in source.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise TypeError(
                    f"{name}: a mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}"
                )
        return StoredMasks(PackedMask.of((str(name),), mask) for name, mask in source.items())
    if hasattr(type(source), "parameter_masks"):
        masks: StoredMasks = source.parameter_masks  # type: ignore[attr-defined]
        return masks
    raise TypeError(
        f"masks come from a Report, a SparseTraining, a LotteryTicket or a mapping of names to masks, got "
        f"{type(source).__name__}"
    )


def _check_writable(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise RecipeError(f"{name}: it is on the meta device, without values. Load the weights first.")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RecipeError(f"{name}: it was made in inference mode and cannot change outside of it. Clone it first.")
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        raise RecipeError(
            f"{name}: it is {dtype_name(tensor.dtype)}, but zeros can be set only in weights of 16 or more "
            "floating-point bits.\nApply the masks before the model is quantized."
        )
