"""Names for tensors by role, all plain ``torch.Tensor`` with the shape in the comment, and for callbacks and dtypes."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Weight: TypeAlias = Tensor  # [out, in], floating point
Mask: TypeAlias = Tensor  # [out, in], bool, True = kept
Scores: TypeAlias = Tensor  # [out, in], floating point, higher = keep

Progress: TypeAlias = Callable[[str, float, float], None]  # a description, what is done, and of how much


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without its library: ``float32``."""
    return str(dtype).removeprefix("torch.")
