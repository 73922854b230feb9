"""Lets transformers load models of sizes that no config can say.

transformers asks a "quantizer" to change a model that it has built without memory for values, before it reads the
weights. The one here quantizes nothing. ``import secateur`` does not import transformers: the quantizer is registered
when something else does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn, TypeAlias

from torch import nn

from secateur._errors import RecipeError
from secateur.files import SHRUNK, SHRUNK_METHOD

# Changes the skeleton of a model as the settings in its config say, and returns what to do once its weights are there.
ChangeSkeleton: TypeAlias = Callable[[nn.Module, Mapping[str, Any]], Callable[[], None]]

_REGISTRY = "transformers.quantizers.auto"


def change_skeletons(change: ChangeSkeleton) -> None:
    """Have ``from_pretrained`` change models whose config says that they were shrunk, before it reads their weights.

    Args:
        change: is given the model, without memory for values, and the ``quantization_config`` of its config.
    """
    if _REGISTRY in sys.modules:
        _register(change)
    else:
        sys.meta_path.insert(0, _Watch(change))


def _register(change: ChangeSkeleton) -> None:
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

        def update_attn_implementation(self, config: Any) -> Any:
            config.transformers_weights = SHRUNK  # asked for before the weights are looked for
            return config

        def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
            self._loaded = change(model, self.quantization_config.to_dict())
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            if hasattr(model.config, "transformers_weights"):
                del model.config.transformers_weights
            model.hf_quantizer = self  # so that save_pretrained asks whether it may
            self._loaded()
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

    def __init__(self, change: ChangeSkeleton) -> None:
        self._change = change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self._change)
        return spec


class _Registering(Loader):
    """Loads the module as it would be, and then registers our quantizer in it."""

    def __init__(self, loader: Loader, change: ChangeSkeleton) -> None:
        self._loader, self._change = loader, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(self._change)
