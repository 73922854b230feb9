"""The block before blocks that go takes over from them: its last matrix is fitted to the stream behind them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration import Forward
from secateur.graph import Dimension, stream_out, without
from secateur.layers import Layer, select_layers

_DAMPING = 0.01


@dataclass(frozen=True)
class BlockFit:
    """How well a block takes over from those behind it.

    Args:
        block: qualified name of the block that stays.
        gone: numbers of the blocks that it takes over from.
        without: relative error of the residual stream when they just go.
        with_fit: the same after the fit; None if there was none.
        note: why not.
    """

    block: str
    gone: tuple[int, ...]
    without: float
    with_fit: float | None
    note: str = ""


@torch.no_grad()
def fit_blocks_(
    model: nn.Module,
    dimension: Dimension,
    units: Sequence[int],
    batches: Sequence[Any],
    forward: Forward,
    *,
    tell: Callable[[str], None] = lambda name: None,
) -> list[BlockFit]:
    """Fit the last matrix of each block before a run of blocks that go, so that its output is most like theirs.

    A block adds to the residual stream what its last matrix gives: ``y = r + W h + b``. With the stream ``t`` behind
    the blocks that go, the fit minimises ``|t - r - W' h - b'|^2 + lambda |W' - W|^2``. If a norm ends each block,
    ``t`` is what the last removed block gives to its norm, and that norm's weights are taken over. No module is added.

    Args:
        model: in the state of :func:`secateur.calibration.quiet`; changed in place.
        dimension: of the blocks.
        units: numbers of those that go.
        batches: of inputs.
        forward: how to call the model on a batch.
        tell: called with what is being done.

    Reference:
        Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
        2025, arXiv:2505.02819. Differs from the paper: the last matrix itself is fitted, not one that is multiplied
        with it, and its inputs, not its outputs, are regressed on.
    """
    blocks = list(model.get_submodule(dimension.name).children())
    names = [name for name, _ in model.get_submodule(dimension.name).named_children()]
    layers, _ = select_layers(model, ("*",))
    by_module = {id(module): layer for layer in layers for module in layer.modules}
    found = []
    for run in _runs(units):
        before = run[0] - 1
        earlier = [unit for unit in units if unit < run[0]]
        if before < 0 or before in units:
            found.append(BlockFit("", tuple(run), float("nan"), None, "no block before them stays"))
            continue
        tell(f"fitting block {before} of {dimension.name}")
        name = f"{dimension.name}.{names[before]}".lstrip(".")
        with without(model, [(dimension, earlier)]):
            fit = _Fit(blocks[before], blocks[run[-1]], by_module)
            found.append(fit.run_(model, batches, forward, name, tuple(run)))
    return found


def _runs(units: Sequence[int]) -> Iterator[list[int]]:
    """Runs of consecutive numbers."""
    run: list[int] = []
    for unit in sorted(units):
        if run and unit != run[-1] + 1:
            yield run
            run = []
        run.append(unit)
    if run:
        yield run


@dataclass
class _Seen:
    """What a block did in one forward pass."""

    layers: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)  # input and output of each layer
    norms: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)
    stream: Tensor | None = None


class _Fit:
    """Fits the last matrix of one block."""

    def __init__(self, block: nn.Module, last: nn.Module, by_module: dict[int, Layer]) -> None:
        self._block, self._last, self._by_module = block, last, by_module

    @contextmanager
    def _watching(self, block: nn.Module) -> Iterator[_Seen]:
        seen = _Seen()

        def layer_hook(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen.layers.append((module, args[0], output))

        def norm_hook(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen.norms.append((module, args[0], output))

        def block_hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.stream = stream_out(output)

        hooks = [block.register_forward_hook(block_hook)]
        for module in block.modules():
            if id(module) in self._by_module:
                hooks.append(module.register_forward_hook(layer_hook))
            elif "norm" in type(module).__name__.lower():
                hooks.append(module.register_forward_hook(norm_hook))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def run_(
        self, model: nn.Module, batches: Sequence[Any], forward: Forward, name: str, gone: tuple[int, ...]
    ) -> BlockFit:
        """Gather, solve and write."""
        products: Tensor | None = None
        crossed: Tensor | None = None
        layer: Layer | None = None
        norms: tuple[nn.Module, nn.Module] | None = None
        lost = norm = 0.0
        for batch in batches:
            with self._watching(self._block) as here, self._watching(self._last) as there:
                forward(model, copy.deepcopy(batch))
            if layer is None:
                layer, norms, problem = self._last_layer(here, there)
                if problem:
                    return BlockFit(name, gone, float("nan"), None, problem)
            assert layer is not None
            entry = next(entry for entry in reversed(here.layers) if id(entry[0]) in {id(m) for m in layer.modules})
            own, target = _before_norm(here, norms), _before_norm(there, norms)
            rows = layer.kind.input_rows(entry[0], entry[1]) if layer.kind.input_rows is not None else entry[1]
            h = rows.reshape(-1, rows.shape[-1]).double()
            gap = (target - own).reshape(len(h), -1).double()  # what is still missing behind this block
            h = torch.cat([h, h.new_ones(len(h), 1)], 1)
            products = h.T @ h if products is None else products + h.T @ h
            crossed = gap.T @ h if crossed is None else crossed + gap.T @ h
            lost += float(gap.square().sum())
            norm += float(target.double().square().sum())
        assert layer is not None
        assert products is not None
        assert crossed is not None
        has_bias = isinstance(getattr(layer.modules[0], "bias", None), nn.Parameter)
        if not has_bias:
            products, crossed = products[:-1, :-1], crossed[:, :-1]
        damped = products.clone()
        size = len(products) - has_bias
        damped.diagonal()[:size] += _DAMPING * products.diagonal()[:size].mean().clamp(min=1e-30)
        change = torch.linalg.solve(damped, crossed.T).T
        after = lost - float((change * crossed).sum() * 2) + float(((change @ products) * change).sum())
        layer.write_((layer.matrix().double() + change[:, :size]).to(layer.parameter.dtype))
        if has_bias:
            bias = layer.modules[0].bias
            assert isinstance(bias, nn.Parameter)
            bias.data += change[:, -1].to(bias.dtype)
        if norms is not None:
            for own_p, other in zip(norms[0].parameters(), norms[1].parameters(), strict=True):
                own_p.data.copy_(other.data)
        whole = norm or 1.0
        return BlockFit(name, gone, (lost / whole) ** 0.5, (max(0.0, after) / whole) ** 0.5)

    def _last_layer(self, here: _Seen, there: _Seen) -> tuple[Layer | None, tuple[nn.Module, nn.Module] | None, str]:
        """The layer to fit, the norms that end the blocks, and why there is none to fit."""
        stream = here.stream
        if stream is None or there.stream is None or stream.shape != there.stream.shape:
            return None, None, "its stream was not seen"
        norms = None
        if here.norms and there.norms and _is(here.norms[-1][2], stream) and _is(there.norms[-1][2], there.stream):
            norms = here.norms[-1][0], there.norms[-1][0]
        width = stream.shape[-1]
        found = [entry for entry in here.layers if entry[2].shape == stream.shape]
        if not found:
            return None, None, "no layer of it gives out the stream"
        module, x, z = found[-1]
        layer = self._by_module[id(module)]
        if layer.is_part or len(layer.modules) > 1 or layer.matrix().shape[0] != width or x.shape[:-1] != z.shape[:-1]:
            return None, None, "its last layer is no matrix of its own"
        # Added as it is: what is left of the stream without it is what the block had before.
        rest = _before_norm(here, norms) - z
        others = [entry[2] for entry in here.layers[:-1]] + [side for entry in here.norms for side in entry[1:]]
        scale = float(rest.double().norm()) or 1.0
        is_added = any(
            other.shape == rest.shape and float((other.double() - rest.double()).norm()) <= 1e-3 * scale
            for other in others
        )
        if not is_added:
            return None, None, "its last layer is not simply added to the stream"
        return layer, norms, ""


def _before_norm(seen: _Seen, norms: tuple[nn.Module, nn.Module] | None) -> Tensor:
    """The stream at the end of a block, before the norm that ends it."""
    if norms is not None:
        return seen.norms[-1][1]
    assert seen.stream is not None
    return seen.stream


def _is(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape
