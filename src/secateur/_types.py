"""Names for tensors by role, all plain ``torch.Tensor``; the comment gives the shape. And the name of a dtype."""

from typing import TypeAlias

import torch
from torch import Tensor

Weight: TypeAlias = Tensor  # [out, in], floating point
Mask: TypeAlias = Tensor  # [out, in], bool, True = kept
Scores: TypeAlias = Tensor  # [out, in], floating point, higher = keep


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without its library: ``float32``."""
    return str(dtype).removeprefix("torch.")
