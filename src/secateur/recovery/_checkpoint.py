"""What a run needs to go on after it was killed: one safetensors file, which appears whole or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import FormatError, RecipeError
from secateur.files import open_safetensors, parse_json, write_safetensors

_KEY = "secateur.recovery"
_PATIENCE = 20  # writing may take this part of the time between two checkpoints


class Checkpoint:
    """A file with the state of a run.

    Args:
        folder: for the file; None keeps nothing.
        identity: what the run is: model, teacher, batches and settings, as named hashes.
        writes: whether this process is the one that writes.
        name: of the file.
    """

    def __init__(
        self, folder: Path | None, identity: Mapping[str, str], writes: bool = True, name: str = "recovery"
    ) -> None:
        self._path = None if folder is None else folder / f"{name}.safetensors"
        self._identity, self._writes = dict(identity), writes
        self._cost, self._last = 0.0, -float("inf")

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], always: bool = False) -> None:
        """Write the state, unless the last time was so short ago that this would take long beside the work."""
        began = time.perf_counter()
        if self._path is None or not self._writes or (not always and began - self._last < _PATIENCE * self._cost):
            return
        table = json.dumps({"identity": self._identity, **numbers})
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_safetensors(self._path, held, {_KEY: table})
        self._last = time.perf_counter()
        self._cost = self._last - began

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the state that was saved, or None if there is none.

        Raises:
            FormatError: the file is not a state of a recovery.
            RecipeError: it is of another run: it names what differs.
        """
        if self._path is None or not self._path.exists():
            return None
        with open_safetensors(self._path) as file:
            text = (file.metadata() or {}).get(_KEY, "")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        table = parse_json(text) if text else None
        if not isinstance(table, dict) or not isinstance(table.get("identity"), dict):
            raise FormatError(f"{self._path} is not the state of a recovery. Remove it to begin anew.")
        before = table.pop("identity")
        changed = [name for name in self._identity if before.get(name) != self._identity[name]]
        if changed:
            raise RecipeError(
                f"{self._path} is the state of another run: {', '.join(changed)} differ.\nGive another folder as "
                "checkpoint=, or remove the file to begin anew."
            )
        return tensors, table


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of an optimizer as tensors by name, and as plain numbers.

    Raises:
        RecipeError: it keeps something else.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            elif value is None or isinstance(value, int | float | bool):
                numbers[f"{index}.{name}"] = value
            else:
                raise RecipeError(
                    f"the optimizer {type(optimizer).__name__} keeps a {type(value).__name__} ({name}), which a "
                    "checkpoint cannot hold. Use another optimizer, or no checkpoint."
                )
    return tensors, numbers


def restore_optimizer_(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Give an optimizer the state that :func:`optimizer_state` returned."""
    table = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers.items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**table, "state": state})


@torch.no_grad()
def copy_into_(leaves: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> None:
    """Give parameters other values."""
    for leaf, tensor in zip(leaves, tensors, strict=True):
        leaf.copy_(tensor)
