"""Is attention of PyTorch faster with packed weights? With dense ones it may take a path in C++, which they close."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.nn import PackedLinear
from secateur.packing._decide import LOSS
from secateur.reports import PackedLayer
from secateur.timing import Timer, ratios, time_in_turn


def losing_attention(
    model: nn.Module, new: Mapping[int, nn.Module | nn.Parameter], batch_sizes: Sequence[int], timer: Timer
) -> dict[int, str]:
    """Return the parts of ``nn.MultiheadAttention`` that would lose as a whole, though each would gain, by their id.

    Args:
        model: that is to be packed. It is not changed.
        new: by the id of a parameter or module of the model, what is to replace it.
        batch_sizes: tokens of one sequence at which whole modules are measured, with and without scores.
        timer: returns seconds since any fixed time.

    Returns:
        The reasons why the parts should stay dense.
    """
    found: dict[int, str] = {}
    known: dict[tuple[Any, ...], str] = {}
    for module in model.modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        own = {name: part for name, part in (*module._parameters.items(), *module._modules.items()) if id(part) in new}
        if not any(isinstance(part, nn.Parameter | nn.Linear) for part in own.values()):
            continue
        packed = {name: new[id(part)] for name, part in own.items()}
        plans = [str(one.plan) for part in packed.values() for one in part.modules() if isinstance(one, PackedLinear)]  # type: ignore[union-attr]
        key = (module.embed_dim, module.num_heads, module.kdim, module.vdim, module.batch_first, *packed, *plans)
        if key not in known:
            known[key] = _why_slower(module, packed, batch_sizes, timer)
        if known[key]:
            found |= {id(part): known[key] for part in own.values()}
    return found


@torch.no_grad()
def _why_slower(
    module: nn.MultiheadAttention, packed: Mapping[str, Any], batch_sizes: Sequence[int], timer: Timer
) -> str:
    """The reason why a module with packed parts loses against the dense one; empty if it does not."""
    dense = copy.deepcopy(module).eval()
    trial = copy.deepcopy(dense)
    for name, part in packed.items():
        trial._parameters.pop(name, None)
        trial._modules[name] = part
    weight = next(dense.parameters())
    for rows in batch_sizes:
        shape = (1, rows) if module.batch_first else (rows, 1)
        inputs: dict[int, Tensor] = {size: torch.randn(*shape, size).to(weight) for size in _sizes(module)}
        args = [inputs[size] for size in _sizes(module)]
        for need_weights in (False, True):
            calls = {
                name: partial(one, *args, need_weights=need_weights)
                for name, one in (("dense", dense), ("packed", trial))
            }
            _, ratio, _ = ratios(time_in_turn(calls, "dense", timer, keep=("packed",)), "dense", "packed")
            if ratio < LOSS:
                return (
                    f"at {rows} tokens the whole nn.MultiheadAttention would take {1 / ratio:.2f} of its time: only "
                    "with dense weights PyTorch runs it in C++"
                )
    return ""


def _sizes(module: nn.MultiheadAttention) -> tuple[int, int, int]:
    return module.embed_dim, module.kdim or module.embed_dim, module.vdim or module.embed_dim


def as_dense(row: PackedLayer, reason: str) -> PackedLayer:
    """Return the entry of a report for what stays dense after all."""
    return replace(row, packed=False, reason=reason, runtime_bytes=0)
