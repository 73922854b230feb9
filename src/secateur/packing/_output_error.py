"""What fewer bits cost: the error of the outputs of a layer, and of the whole model, on given inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.calibration import Forward, quiet
from secateur.nn import put_in_place_

Pairs: TypeAlias = Sequence[tuple[nn.Module | nn.Parameter, nn.Module | nn.Parameter]]  # what to replace, and by what
Inputs: TypeAlias = Mapping[int, Sequence[Tensor]]  # of modules by their id, one tensor for each call

_MOST_BYTES = 8 << 20  # of inputs that are kept for one layer; what comes later is not


class _Sum:
    """Sums of squares in float64, of differences and of what they are relative to."""

    def __init__(self) -> None:
        self._difference = self._whole = 0.0

    def add(self, dense: Tensor, packed: Tensor) -> None:
        expected, got = dense.double(), packed.double()
        same = (expected == got) | (expected.isnan() & got.isnan())  # equal infinities differ by nothing
        self._difference += float(torch.where(same, 0.0, got - expected).square().sum())
        self._whole += float(expected.where(expected.isfinite(), 0.0).square().sum())

    @property
    def relative(self) -> float:
        """``|packed - dense| / |dense|``; infinite where the packed one is not finite and the dense one is."""
        if self._difference == 0:
            return 0.0
        found = math.sqrt(self._difference / self._whole) if self._whole else math.inf
        return found if math.isfinite(found) else math.inf


def inputs_of(
    model: nn.Module, modules: Mapping[int, Iterable[nn.Module]], batches: Sequence[Any], forward: Forward
) -> dict[int, list[Tensor]]:
    """Return the inputs that layers get while the model runs, up to about 8 MiB for each layer.

    Args:
        model: that has the modules.
        modules: by a key of each layer, those that use its weight.
        batches: inputs of the model.
        forward: how to call the model on one of them.

    Returns:
        The inputs by the key of the layer. Layers that were not called as modules have none.
    """
    found: dict[int, list[Tensor]] = {key: [] for key in modules}
    taken = dict.fromkeys(modules, 0)
    last: list[Any] = [None, -1, None]  # a tensor, its version, and its copy: q, k and v read the same one

    def keep(key: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())), None)
        if not isinstance(x, Tensor) or taken[key] >= _MOST_BYTES:
            return
        version = -1 if x.is_inference() else x._version
        if last[0] is not x or last[1] != version:
            last[:] = x, version, x.detach().clone()  # a later operation may change it in place
        found[key].append(last[2])
        taken[key] += x.nbytes

    with ExitStack() as stack:
        for key, own in modules.items():
            for module in own:
                hook = module.register_forward_pre_hook(
                    lambda _, args, kwargs, key=key: keep(key, args, kwargs), with_kwargs=True
                )
                stack.callback(hook.remove)
        with quiet(model):
            for batch in batches:
                forward(model, batch)
    return {key: inputs for key, inputs in found.items() if inputs}


@torch.no_grad()
def outputs_of(layer: nn.Module, inputs: Iterable[Tensor]) -> list[Tensor]:
    """Return the output of a layer for each input."""
    return [layer(x) for x in inputs]


@torch.no_grad()
def layer_error(packed: nn.Module, inputs: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Return the relative error of the outputs of a packed layer.

    Args:
        packed: the layer.
        inputs: of the layer.
        expected: the output of the dense layer for each input.
    """
    total = _Sum()
    for x, dense in zip(inputs, expected, strict=True):
        total.add(dense, packed(x))
    return total.relative


def model_error(model: nn.Module, pairs: Pairs, batches: Iterable[Any], forward: Forward) -> float:
    """Return the relative error of the outputs of a model with some parts replaced. The model is as it was afterwards.

    All floating-point tensors of the outputs count together.

    Args:
        model: without the replacements.
        pairs: what is to be replaced, and by what.
        batches: inputs of the model.
        forward: how to call the model on one of them.
    """
    total = _Sum()
    for batch in batches:
        expected = _outputs(model, batch, forward)
        with _replaced(model, pairs):
            got = _outputs(model, batch, forward)
        for dense, packed in zip(expected, got, strict=True):
            total.add(dense, packed)
    return total.relative


def _outputs(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any]) -> list[Tensor]:
    with quiet(model):
        outputs = forward(model, batch)
    plain = dict(outputs) if isinstance(outputs, Mapping) else outputs  # such as those of transformers
    return [leaf for leaf in tree_leaves(plain) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def _replaced(model: nn.Module, pairs: Pairs) -> Iterator[None]:
    """Replace parts of a model, and put the model together again as it was on every exit."""
    before = [(module, dict(module._parameters), dict(module._modules)) for module in model.modules()]
    try:
        put_in_place_(model, pairs)
        yield
    finally:
        for module, parameters, modules in before:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._modules.clear()
            module._modules.update(modules)
