"""Run a model on calibration batches, block by block, and gather exactly the statistics that were asked for.

A model is cut into *stages* in the order they run: its repeated blocks, and each prunable layer outside of them. Stage
k is calibrated on the outputs of the stages before it as they are after pruning. For every stage and batch the real
model's forward is called, so that whatever happens between blocks (masks, rotary embeddings, residual streams) is the
model's own code; but only two stages are computed: the stage before, on the inputs kept from the last round, and this
one. Earlier stages return NaN. If NaN reaches the inputs of this stage, the model uses more than the previous stage's
output, and the stage is run again with everything before it computed: slower, never different.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from secateur._errors import StatisticsError
from secateur._layers import Layer, LayerKind
from secateur._statistics import Accumulator, LayerStatistics, Need

Forward: TypeAlias = Callable[[nn.Module, Any], object]
_Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """A part of the model that is calibrated at once.

    Args:
        name: qualified name of the module.
        module: runs the layers; the model itself when everything is calibrated in one pass.
        layers: to prune, all inside the module.
        calls: how often one forward pass runs the module.
    """

    name: str
    module: nn.Module
    layers: tuple[Layer, ...]
    calls: int = 1


def call_model(model: nn.Module, batch: Any) -> object:
    """Call the model as the batch's type suggests: ``model(**mapping)``, ``model(*sequence)`` or ``model(batch)``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def load_batches(batches: Iterable[Any], device: torch.device) -> list[Any]:
    """Read all batches once (a shuffling loader would give others the next time) and move their tensors to the device.

    Raises:
        StatisticsError: there is none.
        TypeError: a single batch instead of an iterable of batches.
    """
    if isinstance(batches, Tensor | Mapping | str):
        raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}; wrap it in a list")
    loaded = []
    for batch in batches:
        tree = dict(batch) if isinstance(batch, Mapping) else batch  # tree_map takes a BatchEncoding for a leaf
        loaded.append(tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree))
    if not loaded:
        raise StatisticsError("batches is empty: there is nothing to calibrate on.")
    return loaded


def hash_batches(batches: Iterable[Any]) -> str:
    """SHA-256 over the dtype, shape and content of every tensor, in order."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(list(batches)):
        if isinstance(leaf, Tensor):
            data = leaf.detach().cpu().contiguous()
            digest.update(f"{data.dtype}{tuple(data.shape)}".encode())
            digest.update(data.view(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b"")
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no key-value caches; all is put back on the way out, however that happens."""
    modes = [(module, module.training) for module in model.modules()]
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    caching = [config for config in configs if getattr(config, "use_cache", False) is True]
    try:
        model.eval()
        for config in caching:  # a cache filled by the first of a block's two runs would spoil the second
            config.use_cache = False
        with torch.no_grad():
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for module, training in modes:
            module.training = training


class Calibration:
    """Gathers statistics stage by stage; between two calls of :meth:`gather` the caller prunes the stage.

    Args:
        model: in the state that :func:`quiet` establishes.
        batches: what :func:`load_batches` returned.
        layers: all layers to prune.
        forward: how to call the model on a batch.
        sequential: False gathers everything in one pass over the model as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        layers: Iterable[Layer],
        forward: Forward = call_model,
        sequential: bool = True,
    ) -> None:
        self._model = model
        self._batches = batches
        self._forward = forward
        layers = tuple(layers)
        self.stages = self._plan(layers) if sequential else (Stage("", model, layers),)
        self._recompute = False  # once NaN has reached a stage, trust no shortcut
        self._inputs: list[_Call | None] = [None] * len(batches)  # of the previous stage
        self._outputs: list[dict[int, Any]] = [{} for _ in batches]  # of the stages before that one, as templates

    def gather(
        self, stage_index: int, needs: Iterable[Need], on_batch: Callable[[int], None] = lambda done: None
    ) -> dict[str, LayerStatistics]:
        """Return the statistics of every layer of a stage, by layer name. Stages must be gathered in order.

        Raises:
            StatisticsError: naming the layer whose inputs are missing, not finite, or not alignable with the mask.
        """
        stage = self.stages[stage_index]
        accumulators = {layer.name: Accumulator(needs) for layer in stage.layers}
        seen: list[_Call | None] = []
        for index in range(len(self._batches)):
            seen.append(self._run(stage_index, index, accumulators))
            on_batch(index + 1)
        self._inputs = seen
        statistics = {}
        for name, accumulator in accumulators.items():
            try:
                statistics[name] = accumulator.result()
            except StatisticsError as error:
                raise StatisticsError(
                    f"{name}: {error}\nExclude it with exclude=[{name!r}], or calibrate on batches that use it."
                ) from None
        return statistics

    def _plan(self, layers: tuple[Layer, ...]) -> tuple[Stage, ...]:
        """Cut the model into stages, in the order in which the first batch runs them."""
        prunable = {id(module) for layer in layers for module in layer.modules}
        blocks = _repeated_blocks(self._model, prunable)
        if not blocks:
            return (Stage("", self._model, layers),)
        owner = {id(inner): block for block in blocks for inner in block.modules()}
        names = {id(module): name for name, module in self._model.named_modules()}
        members: dict[int, list[Layer]] = {}
        modules: dict[int, nn.Module] = {}
        for layer in layers:
            owners = {id(found): found for found in (owner.get(id(module), module) for module in layer.modules)}
            # A weight shared between stages sees inputs in each: it waits for a last pass over the whole model.
            key, module = next(iter(owners.items())) if len(owners) == 1 else (id(self._model), self._model)
            members.setdefault(key, []).append(layer)
            modules[key] = module

        order: dict[int, int] = dict.fromkeys(modules, 0)
        first: list[int] = []
        with ExitStack() as stack:
            for key, module in modules.items():

                def count(module: nn.Module, args: Any, key: int = key) -> None:
                    first.extend([key] if not order[key] else [])
                    order[key] += 1

                stack.callback(module.register_forward_pre_hook(count).remove)
            self._forward(self._model, self._batches[0])
        ran = [key for key in first if key != id(self._model)]
        rest = [key for key in modules if key not in ran]
        return tuple(Stage(names[key], modules[key], tuple(members[key]), order[key]) for key in ran + rest)

    def _run(self, stage_index: int, index: int, accumulators: dict[str, Accumulator]) -> _Call | None:
        """One batch up to and including a stage; return the stage's inputs if they can stand in for all before it."""
        stage = self.stages[stage_index]
        once = stage.calls == 1 and stage.module is not self._model
        can_replay = once and self._inputs[index] is not None and len(self._outputs[index]) == stage_index - 1
        if can_replay and not self._recompute:
            self._observed = False
            try:
                return self._pass(stage_index, index, accumulators, replay=True)
            except _Poisoned:
                pass
            except Exception:
                # Code between blocks may choke on NaN before any layer was observed; a real error repeats below.
                if self._observed:
                    raise
            self._recompute = True
        call = self._pass(stage_index, index, accumulators, replay=False)
        return call if once else None

    def _pass(self, stage_index: int, index: int, accumulators: dict[str, Accumulator], replay: bool) -> _Call | None:
        stage = self.stages[stage_index]
        batch = self._batches[index]
        stops = stage.calls == 1 and stage.module is not self._model
        inputs: list[_Call] = []

        def observe(*args: Any, **kwargs: Any) -> object:
            if replay and _has_nan((args, kwargs)):
                raise _Poisoned
            self._observed = True
            inputs.append((args, kwargs))
            # A copy, because some blocks write to their inputs and they are needed again.
            args, kwargs = copy.deepcopy((args, kwargs)) if stops else (args, kwargs)
            output = run_stage(*args, **kwargs)
            if stops:
                raise _Reached
            return output

        with ExitStack() as stack:
            if replay:
                templates = self._outputs[index]
                for earlier, template in templates.items():
                    poison = partial(_poison, template)
                    stack.enter_context(_forward_as(self.stages[earlier].module, poison))
                previous = self.stages[stage_index - 1].module
                run_previous, kept = previous.forward, self._inputs[index]
                assert kept is not None

                def rerun(*args: Any, **kwargs: Any) -> object:
                    output = run_previous(*kept[0], **kept[1])
                    templates[stage_index - 1] = tree_map(_template, output)
                    return output

                stack.enter_context(_forward_as(previous, rerun))
            for layer in stage.layers:
                for module in layer.modules:
                    hook = _observer(layer, accumulators[layer.name], _padding_masks(batch))
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            run_stage = stage.module.forward
            if stage.module is not self._model:
                stack.enter_context(_forward_as(stage.module, observe))
            with suppress(_Reached):
                self._forward(self._model, batch)
        return inputs[0] if inputs else None


class _Reached(BaseException):
    """Ends a forward pass once the stage has run. Not an Exception, so that no model's own handler catches it."""


class _Poisoned(BaseException):
    """NaN from a stage that was not computed has reached the stage of interest."""


_ABSENT = object()


@contextmanager
def _forward_as(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    own = module.__dict__.get("forward", _ABSENT)
    module.forward = forward
    try:
        yield
    finally:
        if own is _ABSENT:
            del module.forward
        else:
            module.forward = own


@dataclass(frozen=True)
class _Template:
    """What is remembered of a tensor that a stage returned."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _template(leaf: Any) -> Any:
    return _Template(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _poison(template: Any, *args: Any, **kwargs: Any) -> Any:
    """A forward function that computes nothing: tensors like the real ones, full of NaN (zero where there is none)."""

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, _Template):
            return leaf
        value = math.nan if leaf.dtype.is_floating_point else 0
        return torch.full(leaf.shape, value, dtype=leaf.dtype, device=leaf.device)

    return tree_map(fill, template)


def _has_nan(tree: Any) -> bool:
    return any(
        bool(leaf.isnan().any()) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )


def _repeated_blocks(module: nn.Module, prunable: set[int]) -> list[nn.Module]:
    """The outermost modules that are repeated, of one class, side by side, each with layers to prune.

    In a list of modules (ModuleList, Sequential, ModuleDict) two of a class are enough. Elsewhere what lies deeper
    comes first, so that an encoder and a decoder of one class are not taken for two blocks.
    """
    by_class: dict[type, list[nn.Module]] = {}
    for child in module.children():
        if id(child) not in prunable and any(id(inner) in prunable for inner in child.modules()):
            by_class.setdefault(type(child), []).append(child)
    repeated = {id(block): block for blocks in by_class.values() if len(blocks) > 1 for block in blocks}
    if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        rest = [child for child in module.children() if id(child) not in repeated]
        return [*repeated.values(), *(block for child in rest for block in _repeated_blocks(child, prunable))]
    deeper = [block for child in module.children() for block in _repeated_blocks(child, prunable)]
    return deeper or list(repeated.values())


def _padding_masks(batch: Any) -> list[Tensor]:
    """The batch's two-dimensional masks, True = a real token; others say who attends to whom, not what is padding."""
    if not isinstance(batch, Mapping):
        return []
    masks = (batch.get(key) for key in ("attention_mask", "decoder_attention_mask"))
    return [mask != 0 for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2]


def _observer(layer: Layer, accumulator: Accumulator, masks: list[Tensor]) -> Callable[..., None]:
    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        rows = layer.kind.input_rows(module, x)
        try:
            accumulator.add(_without_padding(rows, x, layer.kind, masks))
        except StatisticsError as error:
            raise StatisticsError(f"{layer.name}: {error}") from None

    return observe


def _without_padding(rows: Tensor, x: Tensor, kind: LayerKind, masks: list[Tensor]) -> Tensor:
    """The rows ``[groups, tokens, in]`` of ``x`` that belong to real tokens."""
    masks = [mask for mask in masks if not mask.all()]
    if not masks:
        return rows
    positions = tuple(x.shape[:-1]) if math.prod(x.shape[:-1]) == rows.shape[1] else (rows.shape[1],)
    for mask in masks:
        batch, length = mask.shape
        if positions[:2] == (batch, length):
            keep = mask.view(batch, length, *[1] * (len(positions) - 2)).expand(positions)
        elif positions == (length, batch):
            keep = mask.T
        elif len(positions) == 3 and (positions[0], positions[2]) == (batch, length):
            keep = mask.unsqueeze(1).expand(positions)  # heads before tokens
        elif positions == (batch * length,):
            keep = mask
        else:
            continue
        return rows[:, keep.reshape(-1).to(rows.device)]
    if positions == (masks[0].shape[0],):
        return rows  # one row a sequence, such as a pooled or first token
    raise StatisticsError(
        f"inputs of shape {tuple(x.shape)} cannot be aligned with an attention mask of shape {tuple(masks[0].shape)}, "
        "so padding cannot be kept out of the statistics.\nUse batches without padding, or exclude the layer."
    )
