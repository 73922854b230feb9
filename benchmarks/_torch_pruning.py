"""Torch-Pruning, for benchmarks/shrink.py: the same units go from a copy of the same model, where it can do that.

It gets more help here than its users have: the layers that must keep their outputs, the numbers of heads, outputs
without caches, a gradient where it wants one, and attributes set afterwards. It chooses what goes.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IMPORTANCES = ("magnitude", "taylor", "hessian")
LIMIT = 120  # seconds, after which it is said to hang


@dataclass(frozen=True)
class Wishes:
    """What to remove.

    Args:
        ratios: which part of the output features of a module goes, by its name.
        everywhere: which part goes from all others.
        heads: by the name of a projection to queries, keys or values, its number of heads.
        head_ratio: which part of the heads goes.
        ignored: names of modules whose outputs must stay.
        importance: one of `IMPORTANCES`.
    """

    ratios: Mapping[str, float]
    everywhere: float = 0.0
    heads: Mapping[str, int] | None = None
    head_ratio: float = 0.0
    ignored: Sequence[str] = ()
    importance: str = "magnitude"


def missing() -> str:
    """Why it cannot be compared with, or ``""``."""
    try:
        importlib.import_module("torch_pruning")
    except ImportError as error:
        return f"Torch-Pruning is not installed ({error}); --torch-pruning DIR says where it is"
    return ""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after some seconds: on language models it compares all pairs of a very large group."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def shrink(
    model: nn.Module,
    example: Any,
    wishes: Wishes,
    outputs: Callable[[Any], list[Tensor]],
    loss: Callable[[nn.Module], Iterator[Tensor]] | None = None,
) -> tuple[nn.Module, dict[str, list[int]]]:
    """Return a smaller copy, and by the name of a module the inputs that went.

    Args:
        model: to copy.
        example: batch.
        wishes: what to remove.
        outputs: returns the tensors that a model gave out; a scalar it cannot take.
        loss: losses of a model, batch by batch, where the importance wants gradients.
    """
    tp = importlib.import_module("torch_pruning")
    model = copy.deepcopy(model).eval()
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    importances = {
        "magnitude": tp.importance.GroupMagnitudeImportance,
        "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
    }
    importance = importances[wishes.importance]()
    heads = {modules[name]: count for name, count in (wishes.heads or {}).items()}
    with limited(LIMIT), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=importance,
            pruning_ratio=wishes.everywhere,
            pruning_ratio_dict={modules[name]: ratio for name, ratio in wishes.ratios.items()},
            num_heads=heads,
            prune_num_heads=bool(wishes.head_ratio),
            prune_head_dims=False,
            head_pruning_ratio=wishes.head_ratio,
            ignored_layers=[modules[name] for name in wishes.ignored],
            output_transform=outputs,
        )
        if wishes.importance != "magnitude":
            assert loss is not None
            model.zero_grad()
            for value in loss(model):
                if wishes.importance == "hessian":
                    model.zero_grad()
                    value.backward()
                    importance.accumulate_grad(model)
                else:
                    value.backward()
            for parameter in model.parameters():  # what the loss does not reach
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        left: dict[str, list[int]] = {}
        gone: dict[str, list[int]] = {}
        for group in pruner.step(interactive=True):
            lost: dict[str, set[int]] = {}
            for dependency, indices in group:
                module = dependency.target.module
                name = names.get(id(module))
                if name is None or not isinstance(module, nn.Linear | nn.Conv2d):
                    continue
                if pruner.DG.is_in_channel_pruning_fn(dependency.handler):
                    lost.setdefault(name, set()).update(indices)
                    left.setdefault(name, list(range(module.weight.shape[1] * getattr(module, "groups", 1))))
            for name, numbers in lost.items():  # counted among those that the groups before left
                gone.setdefault(name, []).extend(left[name][number] for number in sorted(numbers))
                left[name] = [index for number, index in enumerate(left[name]) if number not in numbers]
            group.prune()
    model.zero_grad()
    return model.requires_grad_(True), gone


@torch.no_grad()
def masked(model: nn.Module, gone: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of the model before, with zeros in what reads the units that went."""
    model = copy.deepcopy(model)
    for name, indices in gone.items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear | nn.Conv2d)
        if getattr(module, "groups", 1) == 1:
            module.weight[:, list(indices)] = 0
    return model
