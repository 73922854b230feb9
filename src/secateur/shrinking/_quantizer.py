"""Lets transformers load models that were shrunk to sizes that no config can say.

transformers asks a "quantizer" to change a model that it has built without memory for values, before it reads the
weights. The one that is registered here gives that model the sizes of the shrunk one. ``import secateur`` does not
import transformers: the quantizer is registered when something else does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from torch import nn

from secateur._errors import FormatError, RecipeError, naming
from secateur.files import SHRUNK, SHRUNK_METHOD
from secateur.shrinking._facts import Facts
from secateur.shrinking._resize import remember_facts, resize_, structure_hash

_REGISTRY = "transformers.quantizers.auto"


def settings_for(model: nn.Module, facts: Facts) -> dict[str, Any]:
    """Return what ``config.json`` says of a model that no config can describe, as its ``quantization_config``.

    Args:
        model: of transformers, shrunk.
        facts: how it differs from the original.
    """
    return {"quant_method": SHRUNK_METHOD, "prefix": _prefix(model), "shrunk": facts.to_dict()}


def _prefix(model: Any) -> str:
    """The name of the base model in a model with a head; empty for a base model."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _resize_any(model: nn.Module, facts: Facts, prefix: object) -> Facts:
    """Resize the skeleton of the saved class, or of one with another head or none. Return the facts of it."""
    if not isinstance(prefix, str):
        raise FormatError(f"the prefix of the shrunk model is {prefix!r:.40}; expected a name.")
    if structure_hash(model) != facts.model_hash:
        base = facts.within(prefix) if prefix else replace(facts, model_hash="")
        here = _prefix(model)
        facts = base.under(here) if here else base
    resize_(model, facts)
    return facts


def register() -> None:
    """Register the quantizer, unless it is, or the transformers library is one that has no quantizers of others."""
    auto = importlib.import_module(_REGISTRY)
    if not hasattr(auto, "register_quantizer") or SHRUNK_METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    base = importlib.import_module("transformers.quantizers.base").HfQuantizer
    mixin = importlib.import_module("transformers.utils.quantization_config").QuantizationConfigMixin

    class ShrunkConfig(mixin):  # type: ignore[misc, valid-type]
        """The sizes of a shrunk model, as its ``quantization_config`` has them."""

        def __init__(self, shrunk: Any = None, prefix: Any = "", **others: Any) -> None:
            self.quant_method = SHRUNK_METHOD
            self.shrunk, self.prefix = shrunk, prefix
            self.dequantize = True  # transformers takes the loaded model for one that is not quantized, as it is

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": SHRUNK_METHOD, "prefix": self.prefix, "shrunk": self.shrunk}

    class ShrunkLoader(base):  # type: ignore[misc, valid-type]
        """Gives the skeleton of a model the sizes of the shrunk one before its weights are read."""

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            with naming("quantization_config of config.json"):
                self._facts = Facts.from_dict(quantization_config.shrunk)

        def update_attn_implementation(self, config: Any) -> Any:
            config.transformers_weights = SHRUNK  # asked for before the weights are looked for
            return config

        def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
            self._facts = _resize_any(model, self._facts, self.quantization_config.prefix)
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            if hasattr(model.config, "transformers_weights"):
                del model.config.transformers_weights
            model.hf_quantizer = self  # so that save_pretrained asks whether it may
            remember_facts(model, self._facts)
            return model

        def is_serializable(self) -> NoReturn:
            raise RecipeError(
                "save_pretrained would write weights that do not fit to any config, because the model was shrunk to "
                "sizes that no config can say.\nUse secateur.save(model, DIRECTORY)."
            )

        @property
        def is_trainable(self) -> bool:
            return True

    auto.register_quantization_config(SHRUNK_METHOD)(ShrunkConfig)
    auto.register_quantizer(SHRUNK_METHOD)(ShrunkLoader)


class _Watch(MetaPathFinder):
    """Sees when the module with transformers' quantizers is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Loads the module as it would be, and then registers our quantizer in it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        register()


if _REGISTRY in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _Watch())
