"""How large is a whole model, and how many multiply-adds does it take?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from secateur.calibration import Forward, call_model, quiet
from secateur.reports import ModelSize

# Names of operations that multiply matrices. If one of them has no formula, the result names it.
_PRODUCT = re.compile(r"(mm|mv|dot|matmul|linear|lstm|gru|rnn|cdist|einsum)(_|$)|conv|attention|transformer|rnn_layer")


def model_size(model: nn.Module, batch: Any = None, forward: Forward = call_model) -> ModelSize:
    """Return the parameters, bytes and multiply-adds of a model.

    Multiply-adds are half of the operations that PyTorch's formulas for flops count in one forward pass: of matrix
    products, convolutions, attention, and of experts and LSTMs on a CPU, which they lack. Norms, activations, softmax,
    sums and gathers are not counted. Operations that multiply matrices and have no formula are named in ``uncounted``.
    Of a model whose work depends on data, such as one with experts, what this batch took is counted.

    Args:
        model: any module. Nothing of it changes.
        batch: on the model's device; None to count no multiply-adds.
        forward: how to call the model on the batch.

    Example:
        >>> import torch
        >>> from secateur.shrinking import model_size
        >>> size = model_size(torch.nn.Linear(8, 4), torch.randn(2, 8))
        >>> size.parameters, size.nbytes, size.macs, size.shape
        (36, 144, 64, (2, 8))
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if batch is None:
        return ModelSize(parameters, nbytes)
    count = _Count()
    with quiet(model), count:
        forward(model, batch)
    return ModelSize(parameters, nbytes, count.operations // 2, first_shape(batch), tuple(sorted(count.unknown)))


def first_shape(batch: Any) -> tuple[int, ...]:
    """Return the shape of the first tensor of a batch; empty if it has none."""
    return next((tuple(leaf.shape) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), ())


class _Count(TorchDispatchMode):
    """Counts operations of products, and keeps the names of those that have no formula."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self.unknown: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        formula = _FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.operations += int(formula(*args, **kwargs, out_val=result))
        elif _PRODUCT.search(str(packet)):
            self.unknown.add(str(packet))
        return result


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, rows, width = query
    columns = key[-2]
    return int(2 * batch * heads * rows * columns * (width + value[-1]))


def _grouped(tokens: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * tokens[-2] * tokens[-1] * weights[-1])


def _recurrent(steps: Any, inputs: Any, states: Any, *args: Any, **kwargs: Any) -> int:
    length, batch, _ = steps
    return int(2 * length * batch * (inputs[0] * inputs[1] + states[0] * states[1]))


_FORMULAS: Mapping[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    torch.ops.aten._grouped_mm: shape_wrapper(_grouped),
    torch.ops.aten.mkldnn_rnn_layer: shape_wrapper(_recurrent),
}
