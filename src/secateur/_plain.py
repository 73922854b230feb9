"""Whether a call is nothing but a call, so that native code may be reached without PyTorch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd import profiler as _profiler

_C = torch._C
_KINDS = (Tensor, nn.Parameter)
# Of PyTorch's own, without a public name. Where one is missing no call is plain: slower, and the same result.
_NAMES = ("_len_torch_dispatch_stack", "_is_torch_function_mode_enabled", "_get_tracing_state", "_functorch")
_known = all(hasattr(_C, name) for name in _NAMES) and hasattr(_C._functorch, "peek_interpreter_stack")


def is_plain(x: Tensor) -> bool:
    """Whether nothing compiles, traces, transforms, differentiates forward, watches or profiles what happens to ``x``.

    Gradients by backward are not asked about. The dispatcher costs a small layer as much as its product does, four
    times that where its code has left the caches.
    """
    return (
        _known
        and type(x) in _KINDS
        and not torch.compiler.is_compiling()
        and not _C._len_torch_dispatch_stack()
        and not _C._is_torch_function_mode_enabled()
        and _C._functorch.peek_interpreter_stack() is None
        and _C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and not _profiler._is_profiler_enabled
    )
