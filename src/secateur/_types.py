"""Names for tensors by role. All are plain ``torch.Tensor``; the comment gives the shape."""

from typing import TypeAlias

from torch import Tensor

Weight: TypeAlias = Tensor  # [out, in], floating point
Mask: TypeAlias = Tensor  # [out, in], bool, True = kept
Scores: TypeAlias = Tensor  # [out, in], floating point, higher = keep
