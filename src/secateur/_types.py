"""Names for tensors by role, and for callbacks. Tensors are plain ``torch.Tensor``; the comment gives the shape."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Weight: TypeAlias = Tensor  # [out, in], floating point
Mask: TypeAlias = Tensor  # [out, in], bool, True = kept
Scores: TypeAlias = Tensor  # [out, in], floating point, higher = keep

Progress: TypeAlias = Callable[[str, float, float], None]  # a description, what is done, and of how much
