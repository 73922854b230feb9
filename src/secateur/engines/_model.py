"""A model in another engine, to be called like a PyTorch one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import StatisticsError
from secateur.engines._engine import Session


class Outputs(dict[str, Tensor]):
    """Outputs by name, as items and as attributes, as models of transformers return them."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class EngineModel(nn.Module):
    """A model in another engine, called like the PyTorch model that it was made from.

    It has no parameters and cannot be trained. Inputs that the exported model does not have, such as
    ``token_type_ids`` for some, are refused by name.

    Args:
        session: that computes.
        defaults: inputs that a caller may leave out, and what they are then filled with, in the shape of the first
            input, such as ``{"token_type_ids": 0}``.
    """

    def __init__(self, session: Session, defaults: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self._session = session
        self._defaults = dict(defaults or {})

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of its inputs, in order."""
        return self._session.inputs

    def forward(self, *args: Tensor, **inputs: Tensor | None) -> Any:
        """Return all outputs by name, for inputs by position or by name."""
        given = {**dict(zip(self.inputs, args, strict=False)), **{k: v for k, v in inputs.items() if v is not None}}
        first = next(iter(given.values()), None)
        for name, value in self._defaults.items():
            if name in self.inputs and name not in given and first is not None:
                given[name] = torch.full_like(first, value)
        if set(given) != set(self.inputs) or len(args) > len(self.inputs):
            raise StatisticsError(
                f"the exported model takes {', '.join(self.inputs)}; got {', '.join(given) or 'nothing'}"
                + (f" from {len(args)} positions" if args else "")
                + ". Give each of its inputs once."
            )
        found = self._session({name: value.detach().cpu().numpy() for name, value in given.items()})
        return Outputs({name: torch.from_numpy(value) for name, value in found.items()})
