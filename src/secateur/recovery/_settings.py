"""Everything that decides a recovery beside the model, the teacher and the batches: checked once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from secateur._checks import flag, integer, number, one_of
from secateur._errors import RecipeError
from secateur._types import dtype_name
from secateur.kernels import multiplies_bfloat16
from secateur.layers import select_layers

Loss: TypeAlias = Callable[[Any, Any, Any], Tensor]  # loss(student_output, teacher_output, batch)
MakeOptimizer: TypeAlias = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

METHODS = ("full", "norms", "lora", "blocks", "batchnorm")
LOSSES = ("auto", "logits", "embeddings", "outputs")
MINUTES = 10.0  # where neither minutes nor steps are given

# Learning rates that need no search, of sparse models and of others: measured on the encoder and the language model of
# our benchmarks, see docs/log.md. What lost most of its weights has further to go.
_RATES = {
    "full": (1e-3, 5e-4),
    "norms": (1e-2, 5e-3),
    "lora": (3e-3, 2e-3),
    "blocks": (3e-4, 3e-4),
    "batchnorm": (0.0, 0.0),
}
_SPARSE = 0.3  # of the weights that pruning considers
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB)?\s*", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Settings:
    """How a model recovers; see :func:`secateur.recover_` for the meaning of each field."""

    method: str = "full"
    loss: str | Loss = "auto"
    minutes: float | None = None
    steps: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    optimizer: MakeOptimizer | None = None
    accumulate: int = 1
    clip: float = 1.0
    temperature: float = 1.0
    top_k: int = 512
    rank: int = 16
    held_out: float = 0.1
    autocast: torch.dtype | str | None = "auto"
    gradient_checkpointing: bool = False
    max_memory: int | str = "1GB"
    keep_teacher_outputs: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        if not callable(self.loss):
            one_of("loss", self.loss, LOSSES)
        if self.minutes is not None and self.steps is not None:
            raise RecipeError(
                f"minutes and steps exclude each other; got minutes={self.minutes:g} and steps={self.steps}. Give one."
            )
        if self.steps is not None:
            integer("steps", self.steps, 1)
        elif self.minutes is None:
            object.__setattr__(self, "minutes", MINUTES)
        else:
            object.__setattr__(self, "minutes", number("minutes", self.minutes, above=0.0, finite=True))
        if self.learning_rate is not None:
            number("learning_rate", self.learning_rate, above=0.0, finite=True)
        number("weight_decay", self.weight_decay, least=0.0, finite=True)
        if self.optimizer is not None:
            self._check_optimizer()
        number("clip", self.clip, above=0.0)
        number("temperature", self.temperature, above=0.0, finite=True)
        if not 0 < number("held_out", self.held_out) <= 0.5:
            raise RecipeError(
                f"held_out is the part of the batches that is not trained on, in (0, 0.5]; got {self.held_out:g}."
            )
        for name in ("accumulate", "top_k", "rank"):
            integer(name, getattr(self, name), 1)
        integer("seed", self.seed, 0)
        flag("gradient_checkpointing", self.gradient_checkpointing)
        flag("keep_teacher_outputs", self.keep_teacher_outputs)
        if self.autocast not in (None, "auto", torch.bfloat16, torch.float16):
            raise RecipeError(f"autocast must be torch.bfloat16, torch.float16, 'auto' or None, got {self.autocast!r}.")
        object.__setattr__(self, "max_memory", size_in_bytes("max_memory", self.max_memory))

    def _check_optimizer(self) -> None:
        if not callable(self.optimizer):
            raise TypeError(
                "optimizer must be a function of parameters, such as torch.optim.SGD with its settings bound"
            )
        for name, given in (("learning_rate", self.learning_rate), ("weight_decay", self.weight_decay or None)):
            if given is not None:
                raise RecipeError(
                    f"{name}={given:g} is a setting of AdamW, but an optimizer of your own was given. Give it there: "
                    f"optimizer=lambda parameters: ..."
                )

    @property
    def rate(self) -> float:
        """The highest learning rate of AdamW, after :meth:`on` has decided it."""
        return _RATES[self.method][1] if self.learning_rate is None else self.learning_rate

    @property
    def precision(self) -> torch.dtype | None:
        """The half precision to train in, or None."""
        return self.autocast if isinstance(self.autocast, torch.dtype) else None

    def on(self, model: nn.Module) -> Settings:
        """Return the settings with all that is automatic decided for a model."""
        decided = self
        if self.autocast == "auto":
            first = next((p for p in model.parameters() if p.is_floating_point()), None)
            native = first is not None and first.dtype != torch.float64 and multiplies_bfloat16(first.device)
            decided = replace(decided, autocast=torch.bfloat16 if native else None)
        if self.learning_rate is None and self.optimizer is None:
            is_sparse = _zeros(model) > _SPARSE
            decided = replace(decided, learning_rate=_RATES[self.method][0 if is_sparse else 1] or None)
        return decided

    @property
    def budget(self) -> dict[str, float]:
        """The budget under its name."""
        return {"steps": self.steps} if self.steps is not None else {"minutes": self.minutes or MINUTES}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values. Functions are there by name."""
        return {
            "method": self.method,
            "loss": self.loss if isinstance(self.loss, str) else _name(self.loss),
            **self.budget,
            **({"learning_rate": self.rate, "weight_decay": self.weight_decay} if self.optimizer is None else {}),
            "optimizer": "AdamW" if self.optimizer is None else _name(self.optimizer),
            "accumulate": self.accumulate,
            "clip": self.clip,
            "temperature": self.temperature,
            "top_k": self.top_k,
            **({"rank": self.rank} if self.method == "lora" else {}),
            "held_out": self.held_out,
            "autocast": dtype_name(self.autocast) if isinstance(self.autocast, torch.dtype) else self.autocast,
            "gradient_checkpointing": self.gradient_checkpointing,
            "seed": self.seed,
        }


def _zeros(model: nn.Module) -> float:
    """The part of the weights that pruning considers that is zero."""
    weights = zeros = 0
    for layer in select_layers(model)[0]:
        matrix = layer.matrix()
        weights, zeros = weights + matrix.numel(), zeros + matrix.numel() - int(matrix.count_nonzero())
    return zeros / max(1, weights)


def _name(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def size_in_bytes(name: str, value: int | str) -> int:
    """Return a size as a number of bytes.

    Args:
        name: of the argument.
        value: bytes, or text such as ``"16GB"``.

    Raises:
        RecipeError: it is no size.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return integer(name, value, 0)
    matched = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if matched is None:
        raise RecipeError(f"{name} should be a number of bytes or a size such as '16GB', got {value!r}.")
    return int(float(matched[1]) * _UNITS[(matched[2] or "B").lower()])


RecoverySettings = Settings  # what other rooms call it
