"""What a run needs to go on after it was killed: one safetensors file, which appears whole or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur._errors import FormatError, RecipeError
from secateur.files import open_safetensors, parse_json, write_safetensors

_KEY = "secateur.recovery"
_SHORT = 40  # letters of a value that a message can name
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

    @property
    def path(self) -> Path | None:
        """The file; None if nothing is kept."""
        return self._path

    def identify(self, more: Mapping[str, str]) -> None:
        """Add to what the run is."""
        self._identity.update(more)

    def is_due(self, always: bool = False) -> bool:
        """Whether to write: not if the last time was so short ago that it would take long beside the work.

        Args:
            always: write, however short ago that was.
        """
        if self._path is None or not self._writes:
            return False
        return always or time.perf_counter() - self._last >= _PATIENCE * self._cost

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Write the state."""
        began = time.perf_counter()
        assert self._path is not None
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
            table = _table_of(self._path, file)
            _check_same_run(self._path, table.pop("identity"), self._identity)
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, table


def check_folder(folder: Path, identity: Mapping[str, str]) -> None:
    """Raise if a folder has the state of another run, be it of another method, under another name.

    Raises:
        FormatError: a file is not a state of a recovery.
        RecipeError: it is of another run: it names what differs.
    """
    for path in sorted([*folder.glob("recovery.safetensors"), *folder.glob("block.*.safetensors")]):
        with open_safetensors(path) as file:
            before = _table_of(path, file)["identity"]
        _check_same_run(path, {name: before.get(name) for name in identity}, identity)


def _table_of(path: Path, file: Any) -> dict[str, Any]:
    try:
        table = parse_json((file.metadata() or {}).get(_KEY, ""))
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or not isinstance(table.get("identity"), dict):
        raise FormatError(f"{path} is not the state of a recovery. Remove it to begin anew.")
    return table


def _check_same_run(path: Path, before: Mapping[str, Any], now: Mapping[str, str]) -> None:
    changed = [_difference(name, before.get(name), now.get(name)) for name in {**now, **before}]
    found = [text for text in changed if text]
    if found:
        raise RecipeError(
            f"{path} is the state of another run; what differs: {', '.join(found)}.\nGive another folder as "
            "checkpoint=, or remove the file to begin anew."
        )


def _difference(name: str, before: Any, now: Any) -> str:
    if before == now:
        return ""
    short = all(value is None or (isinstance(value, str) and len(value) < _SHORT) for value in (before, now))
    return f"{name} ({before}, now {now})" if short else name


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
def copy_into_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Give tensors other values."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
