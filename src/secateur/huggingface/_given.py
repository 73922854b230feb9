"""Lets transformers go through its loading of weights with values that we have read and checked.

transformers keeps account of what is missing, initialises it, ties weights, and reports. So it must see each value
arrive. What it cannot hold, a packed layer, is hidden from it meanwhile.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.layers import swap_modules_


@dataclass(frozen=True)
class Taken:
    """What :func:`give_` changed in a model.

    Args:
        converter: of transformers. It gives the values for what is stored.
        hidden: pairs of a module that stands for another one, and the other one.
        unexpected: what transformers does not report, as it was.
    """

    converter: Any
    hidden: Sequence[tuple[nn.Module, nn.Module]]
    unexpected: Any


class _Hidden(nn.Module):
    """Stands for a module that is complete. It has no weights, and initialisers of weights leave it alone."""

    _is_hf_initialized = True

    def __init__(self, module: Any) -> None:
        super().__init__()
        for name in ("weight", "bias"):  # initialisers of the module around it may ask for them
            held = getattr(module, name, None)
            if isinstance(held, Tensor):
                held = torch.empty(held.shape, device="meta")
                held._is_hf_initialized = True  # type: ignore[attr-defined]
            setattr(self, name, held)


def give_(
    model: Any, values: Mapping[str, Mapping[str, Tensor]], replaced: Sequence[nn.Module], left_out: Sequence[str]
) -> Taken:
    """Prepare a model for transformers' loading of weights, and return how :func:`take_back_` undoes it.

    Args:
        model: of transformers, in which every tensor of ``values`` is in its place already.
        values: by the name of a stored tensor, the tensors of the model that come from it, by name.
        replaced: modules of the model that are complete.
        left_out: names of stored tensors for which the model has no place. Of those transformers tells the user.
    """
    hidden = [(_Hidden(module), module) for module in replaced]
    swap_modules_(model, [(module, stand_in) for stand_in, module in hidden])
    names = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, _Hidden))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in list(tied.items()):
        if target.startswith(names) or source.startswith(names):
            del tied[target]  # a packed weight has a name of its own
    taken = Taken(_converter(values), hidden, model._keys_to_ignore_on_load_unexpected)
    told = "|".join(re.escape(name) for name in left_out)
    model._keys_to_ignore_on_load_unexpected = {rf"^(?!(?:{told})$)" if told else ""}
    return taken


def take_back_(model: Any, taken: Taken) -> None:
    """Put a model back as it was before :func:`give_`, after transformers has gone through its loading."""
    swap_modules_(model, taken.hidden)
    model._keys_to_ignore_on_load_unexpected = taken.unexpected
    vars(model).pop("_weight_conversions", None)  # they hold the values


def _converter(values: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """What transformers asks for the name and the values of the model's tensors, instead of reading them."""
    core = importlib.import_module("transformers.core_model_loading")
    sources = {next(iter(given)): given for given in values.values()}

    class Nothing(core.ConversionOps):  # type: ignore[misc, name-defined]
        """A converter needs at least one operation."""

        def convert(self, input_dict: Any, **kwargs: Any) -> Any:
            return input_dict

    class Given(core.WeightConverter):  # type: ignore[misc, name-defined]
        """Says which tensor of the model comes from a stored one, and gives it."""

        def __init__(self) -> None:
            super().__init__("secateur", "secateur", [Nothing()])

        def __deepcopy__(self, memo: Any) -> Given:
            return Given()  # transformers makes one for each tensor

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            given = values.get(source_key)
            return (source_key, None) if given is None else (next(iter(given)), self.source_patterns[0])

        def convert(self, layer_name: str, **kwargs: Any) -> dict[str, Tensor]:
            self.collected_tensors.clear()
            return dict(sources[layer_name])

    return Given()
