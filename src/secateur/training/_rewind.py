"""Snapshots of a training, and going back to them bit by bit: parameters, buffers, optimizer and scheduler."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import FormatError, RecipeError
from secateur.layers import Layer
from secateur.training._state import check_keys


@dataclass(frozen=True)
class Rewindable:
    """All that a snapshot remembers and a rewind restores, in place.

    Args:
        model: any module.
        optimizer: of its parameters.
        scheduler: of the learning rate, or None.
        layers: whose parameters must stay the same objects.
        parameters: of those layers, by name.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    layers: Mapping[str, Layer]
    parameters: Mapping[str, nn.Parameter]

    def snapshot(self, step: int) -> dict[str, Any]:
        """Return copies of everything, on their own devices, and the step: plain values and tensors."""
        return {
            "step": step,
            "tensors": {name: tensor.detach().clone() for name, tensor in self._tensors().items()},
            "optimizer": _copied(self.optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else _copied(self.scheduler.state_dict()),
        }

    def restore_model_(self, snapshot: Mapping[str, Any]) -> None:
        """Copy the parameters and buffers of a snapshot into those of the model."""
        now = self._tensors()
        for name, saved in snapshot["tensors"].items():
            now[name].copy_(saved)

    def restore_optimizer_(self, snapshot: Mapping[str, Any]) -> None:
        """Put the optimizer and the scheduler back, and drop the gradients."""
        # Copies, since optimizers and schedulers keep what they load and change it in place.
        self.optimizer.load_state_dict(_copied(snapshot["optimizer"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(_copied(snapshot["scheduler"]))
        self.model.zero_grad()

    def check(self, snapshot: Mapping[str, Any]) -> None:
        """Raise unless the model, the optimizer and the scheduler can take the snapshot.

        Raises:
            RecipeError: tensors, parameter groups or the scheduler are not the same any more.
            FormatError: it is not what :meth:`snapshot` returned.
        """
        tensors, groups = (
            snapshot["tensors"],
            check_keys(snapshot["optimizer"], ("state", "param_groups"))["param_groups"],
        )
        if not all(isinstance(tensor, Tensor) for tensor in check_keys(tensors, ()).values()):
            raise FormatError("the snapshot has tensors that are none. Restore the checkpoint.")
        if not isinstance(groups, list) or not all(
            isinstance(check_keys(g, ("params",))["params"], list) for g in groups
        ):
            raise FormatError("the snapshot has no parameter groups of an optimizer. Restore the checkpoint.")
        if differences := self._differences(snapshot["tensors"]):
            lines = "\n".join(f"  {line}" for line in differences[:10])
            raise RecipeError(
                f"the model is not the one of the snapshot, {len(differences)} tensors differ:\n{lines}\n"
                "Make a new LotteryTicket after changing modules, and take a new snapshot."
            )
        ours = [len(group["params"]) for group in self.optimizer.param_groups]
        theirs = [len(group["params"]) for group in snapshot["optimizer"]["param_groups"]]
        if ours != theirs:
            raise RecipeError(
                f"the optimizer has groups of {ours} parameters, but had {theirs} at the snapshot. Take a new snapshot."
            )
        if (self.scheduler is None) != (snapshot["scheduler"] is None):
            raise RecipeError(
                f"the snapshot was taken {'with' if self.scheduler is None else 'without'} a scheduler, unlike this "
                "ticket's state now. Take a new snapshot."
            )

    def _differences(self, saved: Mapping[str, Tensor]) -> list[str]:
        now = self._tensors()
        return [
            *(f"{name} is gone" for name in saved if name not in now),
            *(f"{name} is new" for name in now if name not in saved),
            *(
                f"{name} was {_form(saved[name])} and is {_form(now[name])}"
                for name in saved
                if name in now and _form(saved[name]) != _form(now[name])
            ),
            *(
                f"{layer.parameter_name} is another object"
                for name, layer in self.layers.items()
                if getattr(layer.modules[0], layer.kind.parameter, None) is not self.parameters[name]
            ),
        ]

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}


def _copied(value: Any) -> Any:
    """A deep copy of an optimizer's or a scheduler's state, sharded tensors included."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        result = copy.copy(value)
        for key, item in value.items():
            result[key] = _copied(item)
        return result
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return copy.deepcopy(value)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
