"""Lets transformers load models of sizes that no config can say, and models with packed weights.

transformers asks a "quantizer" to change a model that it has built without memory for values, before it reads the
weights. The one here quantizes nothing. ``import secateur`` does not import transformers: the quantizer is registered
when something else does.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError
from secateur._types import dtype_name
from secateur.files import PACKED, SHRUNK, SHRUNK_METHOD, is_packed_claim
from secateur.huggingface._given import give_, take_back_

_REGISTRY = "transformers.quantizers.auto"
_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_WHY = {
    PACKED: "save_pretrained would write packed weights that no other library reads, under a name that they look for.",
    SHRUNK: "save_pretrained would write weights that do not fit to any config, because the model was shrunk to sizes "
    "that no config can say.",
}


@dataclass(frozen=True)
class Changed:
    """What became of the skeleton of a model.

    Args:
        finish: is called once the weights are there.
        refused: why the model must not be saved by ``save_pretrained``, as the name of a file that tells the kind of
            model: ``PACKED`` or ``SHRUNK``; None if it may be.
        values: by the name of a stored tensor, the tensors of the model that come from it, by name. None for a file
            that transformers reads by itself.
        replaced: modules that are complete. transformers must not look for weights of theirs.
        left_out: names of stored tensors for which the model has no place.
    """

    finish: Callable[[], None]
    refused: Callable[[], str | None]
    values: Mapping[str, Mapping[str, Tensor]] | None = None
    replaced: Sequence[nn.Module] = ()
    left_out: Sequence[str] = ()


# Changes the skeleton of a model as the settings in its config say. Gets the file of weights, None if there is none,
# and the dtype of the model.
ChangeSkeleton: TypeAlias = Callable[[nn.Module, Mapping[str, Any], Path | None, torch.dtype], Changed]
_changes: dict[str, ChangeSkeleton] = {}


def change_skeletons(file: str, change: ChangeSkeleton) -> None:
    """Have ``from_pretrained`` change models whose config has a claim of ours, before it reads their weights.

    Args:
        file: name of the file with the weights of such models, ``PACKED`` or ``SHRUNK``.
        change: is given the model, without memory for values, the ``quantization_config`` of its config, the file of
            weights, and the dtype that the model gets.
    """
    _changes[file] = change
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def guard_(model: Any, claim: Mapping[str, Any], refused: Callable[[], str | None]) -> None:
    """Have ``save_pretrained`` of a model that :func:`secateur.load` returns refuse, as if transformers had loaded it.

    Args:
        model: of transformers.
        claim: the ``quantization_config`` of its directory.
        refused: see :class:`Changed`.
    """
    model.hf_quantizer = _loader(dict(claim))
    model.hf_quantizer.refused = refused


def _loader(claim: Mapping[str, Any]) -> Any:
    """A quantizer for a claim, as transformers makes it. Copies of a model have one that is made anew."""
    auto: Any = importlib.import_module(_REGISTRY)
    return auto.AUTO_QUANTIZER_MAPPING[SHRUNK_METHOD](auto.AUTO_QUANTIZATION_CONFIG_MAPPING[SHRUNK_METHOD](**claim))


def _register() -> None:
    """Register the quantizer, unless it is, or the transformers library is one that has no quantizers of others."""
    auto = importlib.import_module(_REGISTRY)
    if not hasattr(auto, "register_quantizer") or SHRUNK_METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    base = importlib.import_module("transformers.quantizers.base").HfQuantizer
    mixin = importlib.import_module("transformers.utils.quantization_config").QuantizationConfigMixin

    class SecateurConfig(mixin):  # type: ignore[misc, valid-type]
        """The ``quantization_config`` of a shrunk or packed model. Its entries are checked when they are used."""

        def __init__(self, **claim: Any) -> None:
            self.quant_method = SHRUNK_METHOD
            self.claim = {**claim, "quant_method": SHRUNK_METHOD}
            self.dequantize = True  # transformers takes the loaded model for one that is not quantized, as it is

        def to_dict(self) -> dict[str, Any]:
            return dict(self.claim)

    class SecateurLoader(base):  # type: ignore[misc, valid-type]
        """Gives the skeleton of a model what no config can say before its weights are read."""

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            self.file = PACKED if is_packed_claim(quantization_config.to_dict()) else SHRUNK
            self.refused: Callable[[], str | None] = lambda: self.file
            self._device: Any = None
            self._dtype = torch.float32

        def __reduce__(self) -> Any:
            return _loader, (self.quantization_config.to_dict(),)

        def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
            if self.file != PACKED or not isinstance(device_map, Mapping):
                return
            devices = sorted({str(device) for device in device_map.values()})
            if len(devices) > 1 or "disk" in devices:
                raise RecipeError(
                    f"device_map places the model on {', '.join(devices)}, but a packed model is loaded onto one "
                    'device.\nPass device_map="cpu", or the name of one GPU.'
                )
            self._device = next(iter(device_map.values()), None)

        def update_attn_implementation(self, config: Any) -> Any:
            if self.file == PACKED and getattr(config, "distributed_config", None) is not None:
                raise RecipeError(
                    "distributed_config would cut the weights of the model into parts, and packed weights are whole.\n"
                    "Load the model without distributed_config and tp_plan."
                )
            config.transformers_weights = self.file  # asked for before the weights are looked for
            return config

        def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
            if self.file == PACKED and dtype not in _FLOATS:
                known = ", ".join(sorted(map(dtype_name, _FLOATS)))
                raise RecipeError(f"dtype={dtype_name(dtype)} was asked for; a packed model computes in {known}.")
            self._dtype = dtype
            return dtype

        def _process_model_before_weight_loading(
            self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
        ) -> nn.Module:
            path = Path(checkpoint_files[0]) if checkpoint_files else None
            with _as_usual() if self.file == PACKED else contextlib.nullcontext():
                self._changed = _changes[self.file](model, self.quantization_config.to_dict(), path, self._dtype)
            if self._changed.values is not None:
                self._taken = give_(model, self._changed.values, self._changed.replaced, self._changed.left_out)
            return model

        def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
            if self.file != PACKED:
                return super().update_weight_conversions(weight_conversions, model)  # type: ignore[no-any-return]
            return [self._taken.converter]  # the names are those of the model, and no values are to be converted

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            if hasattr(model.config, "transformers_weights"):
                del model.config.transformers_weights
            if self._changed.values is not None:
                take_back_(model, self._taken)
                del self._taken
                if self._device is not None:
                    model.to(self._device)
            self._changed.finish()
            self.refused = self._changed.refused
            del self._changed
            model.hf_quantizer = self  # so that save_pretrained asks whether it may
            return model

        def is_serializable(self) -> bool:
            if (why := self.refused()) is None:
                return True
            raise RecipeError(f"{_WHY[why]}\nUse secateur.save(model, DIRECTORY).")

        @property
        def is_trainable(self) -> bool:
            return True

    auto.register_quantization_config(SHRUNK_METHOD)(SecateurConfig)
    auto.register_quantizer(SHRUNK_METHOD)(SecateurLoader)


@contextlib.contextmanager
def _as_usual() -> Iterator[None]:
    """Make tensors as anywhere else, while transformers makes all of them on no device and in the model's dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


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
        _register()
