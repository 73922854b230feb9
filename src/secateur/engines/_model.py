"""A model in another engine, to be called like a PyTorch one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur._checks import instance
from secateur._errors import StatisticsError
from secateur.engines._engine import Session

Default = Callable[[Mapping[str, Tensor]], Tensor]  # from the inputs that were given to one that was not


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
    ``token_type_ids`` for some, are refused by name. Outputs are on the CPU.

    Args:
        session: that computes.
        defaults: inputs that a caller may leave out, each with a function that makes it from the given ones.
        config: settings of the model as attributes, such as ``id2label``; None if there are none.
    """

    def __init__(self, session: Session, defaults: Mapping[str, Default] | None = None, config: Any = None) -> None:
        super().__init__()
        self._session = session
        self._defaults = dict(defaults or {})
        self.config = config
        # Whoever asks which inputs the model has looks at the signature, as of any other module.
        names = [name for name in session.inputs if name.isidentifier()]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind, default=None) for name in names])
        self.forward = _Forward(self._run, signature)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of its inputs, in order."""
        return self._session.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of its outputs, in order."""
        return self._session.outputs

    def _run(self, *args: Tensor, **inputs: Tensor | None) -> Outputs:
        """Return all outputs by name, for inputs by position or by name."""
        positions = dict(zip(self.inputs, args, strict=False))
        named = {name: value for name, value in inputs.items() if value is not None}
        given = {**positions, **named}
        missing = [name for name in self.inputs if name not in given]
        unknown = [name for name in named if name not in self.inputs]
        twice = [name for name in named if name in positions]
        lacking = [name for name in missing if name not in self._defaults]
        if unknown or twice or lacking or not given or len(args) > len(self.inputs):
            raise StatisticsError(
                f"the exported model takes {', '.join(self.inputs)}; got {', '.join(given) or 'nothing'}"
                + (f" from {len(args)} positions" if args else "")
                + ". Give each of its inputs once."
            )
        for name, value in given.items():
            instance(name, value, Tensor, "a tensor")
        whole = {**given, **{name: self._defaults[name](given) for name in missing}}
        feeds = {name: _array(whole[name]) for name in self.inputs}
        try:
            found = self._session(feeds)
        except Exception as error:  # classes of its own for each kind of failure
            shapes = ", ".join(f"{name} {list(value.shape)} {value.dtype}" for name, value in feeds.items())
            reason = str(error).strip().partition("\n")[0]
            raise StatisticsError(
                f"the exported model fails on {shapes}: {reason}\nGive inputs of the sizes and dtypes that it was "
                "exported with."
            ) from None
        return Outputs({name: torch.from_numpy(value) for name, value in found.items()})


class _Forward:
    """A method with a signature of its own."""

    def __init__(self, call: Callable[..., Outputs], signature: inspect.Signature) -> None:
        self._call, self.__signature__ = call, signature

    def __call__(self, *args: Tensor, **inputs: Tensor | None) -> Outputs:
        return self._call(*args, **inputs)


def _array(value: Tensor) -> Any:
    if value.dtype == torch.bfloat16:
        value = value.float()  # numpy has no such numbers
    return value.detach().cpu().numpy()
