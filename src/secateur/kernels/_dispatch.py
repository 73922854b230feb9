"""Whether native code may be reached without PyTorch's dispatcher: only where nobody listens there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd import profiler as _profiler

_C = torch._C
_PLAIN_TYPES = (Tensor, nn.Parameter)
# Of PyTorch's own, without a public name. Where one is missing every call is taken to be intercepted: slower, and the
# same result.
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
    """Return whether something compiles, traces, transforms or intercepts PyTorch's operations here and now."""
    return (
        torch.compiler.is_compiling()  # first: the compiler then sees nothing of the rest
        or not _known
        or _C._len_torch_dispatch_stack() > 0
        or _C._len_torch_function_stack() > 0
        or _C._are_functorch_transforms_active()
        or _C._get_tracing_state() is not None
    )


def may_skip_dispatcher(x: Tensor) -> bool:
    """Return whether nobody intercepts what happens to ``x``, differentiates it forward or profiles.

    Gradients by backward are not asked about. The dispatcher costs a small layer as much as its product does, and four
    times that where its code has left the caches.
    """
    return (
        type(x) in _PLAIN_TYPES
        and not is_intercepted()
        and forward_ad._current_level < 0
        and not _profiler._is_profiler_enabled
    )
