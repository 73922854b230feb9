"""May native code be called without PyTorch's dispatcher? Only where nothing intercepts the dispatcher.

The dispatcher is where PyTorch records gradients, traces, transforms, profiles and counts. A direct call skips all of
this. The dispatcher takes as long as the product of a small layer, and four times as long where its code is no longer
in the caches. So it is skipped where none of its users is active.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd import profiler as _profiler

_C = torch._C
_TYPES = (Tensor, nn.Parameter)  # a subclass of Tensor may have its own __torch_dispatch__
# PyTorch has no public names for these. In a version without one of them, every call goes through the dispatcher, which
# is slower and has the same result.
_NAMES = (
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_get_tracing_state",
    "_are_functorch_transforms_active",
)
_known = (
    all(hasattr(_C, name) for name in _NAMES)
    and hasattr(forward_ad, "_current_level")
    and hasattr(_profiler, "_is_profiler_enabled")
)


def is_intercepted() -> bool:
    """Return whether PyTorch's operations are compiled, traced, transformed or intercepted at this call."""
    return (
        torch.compiler.is_compiling()  # first, so that the compiler does not trace the other calls
        or not _known
        or _C._len_torch_dispatch_stack() > 0
        or _C._len_torch_function_stack() > 0
        or _C._are_functorch_transforms_active()
        or _C._get_tracing_state() is not None
    )


def may_skip_dispatcher(x: Tensor) -> bool:
    """Return whether an operation on ``x`` may skip the dispatcher.

    It may not where operations are intercepted, differentiated in forward mode or profiled. Gradients in backward mode
    are not considered: the caller knows whether it needs them.
    """
    return (
        type(x) in _TYPES
        and not is_intercepted()
        and forward_ad._current_level < 0
        and not _profiler._is_profiler_enabled
    )
