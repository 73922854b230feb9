"""One forward pass of a model: what it returned, and what its blocks did, for a loss to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secateur.calibration import Padding, PaddingSource, forward_as
from secateur.graph import stream_out


@dataclass(frozen=True)
class Seen:
    """A forward pass.

    Args:
        output: of the model.
        batch: that it was called with.
        states: the residual stream behind each of some blocks, ``[batch, length, hidden]`` each.
        padding: which tokens are real, as the caller said.
        names: of the model's positional arguments.
    """

    output: Any
    batch: Any
    states: tuple[Tensor, ...] = ()
    padding: PaddingSource | None = None
    names: tuple[str, ...] = ()

    def real(self, tensor: Tensor) -> Tensor:
        """Return which positions of a tensor ``[..., features]`` are real tokens: bool, in its shape but the last.

        Raises:
            StatisticsError: some are padding, and it is not known which.
        """
        found = Padding.of(self.batch, self.names, self.padding).kept("", tensor.detach())
        if found is None:
            return torch.ones(tensor.shape[:-1], dtype=torch.bool, device=tensor.device)
        return found.to(tensor.device).expand(tensor.shape[:-1])


@contextmanager
def recording(blocks: Sequence[nn.Module]) -> Iterator[Callable[[], tuple[Tensor, ...]]]:
    """Yield a function that returns what each block returned last: its residual stream. No hook stays behind."""
    found: dict[int, Tensor] = {}

    def hook(place: int) -> Callable[..., None]:
        def note(module: nn.Module, args: object, output: object) -> None:
            stream = stream_out(output)
            if stream is not None:
                found[place] = stream

        return note

    hooks = [block.register_forward_hook(hook(place)) for place, block in enumerate(blocks)]
    try:
        yield lambda: tuple(found[place] for place in range(len(blocks)))
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let blocks keep only their inputs for the backward pass, and compute the rest again."""

    def around(run: Callable[..., object]) -> Callable[..., object]:
        def call(*args: Any, **kwargs: Any) -> object:
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return call

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(forward_as(block, around(block.forward)))
        yield
