"""A packed weight as a tensor: functions that multiply it run packed, and all others compute on the dense weight."""

from __future__ import annotations

import re
from typing import Any, final

import torch
from torch import Tensor

from secateur._errors import KernelError
from secateur.nn._packed_functions import PRODUCTS
from secateur.nn._packed_tensor import NotServed, PackedTensor, unpacked
from secateur.nn._packed_views import VIEWS, getters


@final
class PackedWeight(PackedTensor):
    """A weight that is stored without its zeros, as a tensor that is read only.

    ``F.linear``, ``@``, ``bmm``, ``einsum`` and other functions that multiply it run the packed kernel. Its shape,
    dtype and device cost nothing. So do transposing it and taking whole matrices out of it. Any other function gets the
    dense weight, which is made anew each time. What would change it in place is refused.

    Args:
        parts: packed matrices, of one shape for a stack.
        stacked: whether it is a stack ``[matrices, out, in]``; else they are side by side in one matrix ``[out, in]``.
        turned: whether the last two dimensions are ``[in, out]``.
        along: 0 if the rows of matrices side by side follow on one another, 1 if their columns do.
        dtype: of the weight; None for that of the matrices.

    Example:
        >>> import torch, secateur
        >>> from torch.nn import functional
        >>> layer = secateur.PackedLinear.from_linear(torch.nn.Linear(8, 4))
        >>> x, weight = torch.randn(2, 8), layer.weight  # nothing is unpacked
        >>> weight.shape, weight.T.shape, isinstance(weight, torch.Tensor)
        (torch.Size([4, 8]), torch.Size([8, 4]), True)
        >>> torch.equal(functional.linear(x, weight, layer.bias), layer(x)), type(weight + 0).__name__
        (True, 'Tensor')
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run what multiplies the weight packed, and anything else on the dense weight."""
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            try:
                return handler(*args, **kwargs)
            except NotServed:
                pass
            except TypeError as error:
                if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                    raise  # not about the arguments of the handler, which takes only those that it can serve
        elif func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if _changes(func, args, kwargs):
            raise KernelError(
                f"{getattr(func, '__name__', func)} would change a packed weight in place, but it is read only. Call "
                "secateur.unpack_(model) first, or take a dense copy with .clone()."
            )
        return func(*unpacked(args), **unpacked(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator that did not come through a function of PyTorch, such as from C++, on the dense weight."""
        return func(*unpacked(args), **unpacked(kwargs or {}))


def _changes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function writes into a packed weight."""
    name = getattr(func, "__name__", "")
    is_own = bool(args) and isinstance(args[0], PackedTensor)
    in_place = re.fullmatch(r"[a-z]\w*[a-z0-9]_|__setitem__|__set__|__i(add|sub|mul|matmul|truediv|floordiv|mod|pow|"
                            r"and|or|xor|lshift|rshift)__", name)  # fmt: skip
    return bool(is_own and in_place) or isinstance(kwargs.get("out"), PackedTensor)


# What a weight tells of itself without its values.
_FREE = frozenset(
    [
        *getters("shape", "dtype", "device", "layout", "ndim", "is_meta", "requires_grad", "is_leaf", "grad"),
        *getters("grad_fn", "is_cuda", "is_sparse", "is_quantized", "is_mkldnn", "itemsize", "nbytes", "is_mps"),
        *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size),
        *(Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device),
        *(Tensor.storage_offset, Tensor.__len__, Tensor.__hash__, Tensor.is_inference, Tensor.is_signed),
        *(torch.is_floating_point, torch.is_complex, torch.numel, torch.is_inference, torch.is_signed),
    ]
)
_HANDLERS = {**PRODUCTS, **VIEWS}
