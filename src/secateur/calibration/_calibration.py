"""Run a model on calibration batches, block by block, and gather exactly the statistics that were asked for.

A model is cut into *stages* in the order they run: its repeated blocks, and each prunable layer outside of them. Stage
k is calibrated on the outputs of the stages before it as they are after pruning. For every stage and batch the real
model's forward is called, so that whatever happens between blocks (masks, rotary embeddings, residual streams) is the
model's own code; but only two stages are computed: the one before, on its inputs kept from the last round, and this
one. Earlier stages return NaN.

That is right for a model whose stages hand on everything through what they return to the next. Whether this model is
one is found out beforehand: in a rehearsal on the dense model, every stage must produce the same output when it is
replayed so as in a plain forward pass. If one does not, every pass computes everything: slower, never different.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from secateur._errors import StatisticsError
from secateur.calibration._statistics import Accumulator, LayerStatistics, Need
from secateur.layers import Layer

Forward: TypeAlias = Callable[[nn.Module, Any], object]
_Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """A part of the model that is calibrated at once.

    Args:
        name: qualified name of the module.
        module: runs the layers; the model itself when everything is calibrated in one pass.
        layers: to prune, all inside the module.
        once: whether one forward pass runs the module exactly once, so that the pass can end there.
    """

    name: str
    module: nn.Module
    layers: tuple[Layer, ...]
    once: bool = False


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
        loaded.append(tree_map(lambda leaf: leaf.detach().to(device) if isinstance(leaf, Tensor) else leaf, tree))
    if not loaded:
        raise StatisticsError("batches is empty: there is nothing to calibrate on.")
    return loaded


def hash_batches(batches: Iterable[Any]) -> str:
    """SHA-256 over the containers and keys, and the dtype, shape and content of every tensor, in order."""
    leaves, structure = tree_flatten(list(batches))
    digest = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
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
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # it runs layers without calling them, on nested tensors
        for config in caching:  # a cache filled by the first of a block's two runs would spoil the second
            config.use_cache = False
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        for config in caching:
            config.use_cache = True
        for module, training in modes:
            module.training = training


class Calibration:
    """Gathers statistics stage by stage; between two calls of :meth:`gather` the caller prunes the stage.

    Args:
        model: in the state that :func:`quiet` establishes.
        batches: what :func:`load_batches` returned; never changed.
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
        self.stages: tuple[Stage, ...] = (Stage("", model, layers),)
        self._replays = False
        if sequential:
            self._plan(layers)
        self._trails = [_Trail() for _ in batches]

    def gather(
        self, stage_index: int, needs: Iterable[Need], on_batch: Callable[[int], None] = lambda done: None
    ) -> dict[str, LayerStatistics]:
        """Return the statistics of every layer of a stage, by layer name. Stages must be gathered in order.

        Raises:
            StatisticsError: naming the layer whose inputs are missing, not finite, or not alignable with the mask.
        """
        gathered = _Gathered(self.stages[stage_index].layers, needs)
        for index, (batch, trail) in enumerate(zip(self._batches, self._trails, strict=True)):
            with gathered.observing(batch):
                self._pass(stage_index, batch, trail)
            on_batch(index + 1)
        return gathered.results()

    def _plan(self, layers: tuple[Layer, ...]) -> None:
        """Cut the model into stages, in the order in which they run, and find out whether replaying them is right."""
        prunable = {id(module) for layer in layers for module in layer.modules}
        owner: dict[int, nn.Module] = {}
        for block in _repeated_blocks(self._model, prunable):
            for inner in block.modules():
                # Shared by several blocks, it sees inputs in each: it waits for a last pass over the whole model.
                owner[id(inner)] = self._model if id(inner) in owner else block
        if not owner:
            return
        modules: dict[int, nn.Module] = {}
        members: dict[int, list[Layer]] = {}
        for layer in layers:
            owners = {id(found): found for found in (owner.get(id(module), module) for module in layer.modules)}
            module = next(iter(owners.values())) if len(owners) == 1 else self._model
            modules[id(module)] = module
            members.setdefault(id(module), []).append(layer)

        # Batches of one structure run the same code: one of each shows which stages run, how often, in what order.
        examples = list({_structure(batch): batch for batch in reversed(self._batches)}.values())[::-1]
        parts = [module for module in modules.values() if module is not self._model]
        runs = [self._record(parts, batch) for batch in examples]
        order = list(dict.fromkeys(id(module) for run in runs for module, _ in run))
        often = {id(module) for run in runs for module, _ in run if sum(module is other for other, _ in run) > 1}
        names = {id(module): name for name, module in self._model.named_modules()}
        self.stages = tuple(
            Stage(names[key], modules[key], tuple(members[key]), once=key in order and key not in often)
            for key in order + [key for key in modules if key not in order]
        )
        self._replays = not often and all(self._rehearse(run, batch) for run, batch in zip(runs, examples, strict=True))

    def _record(self, modules: list[nn.Module], batch: Any) -> list[tuple[nn.Module, list[Any]]]:
        """Run the whole model; return which of the modules ran, in order, with a fingerprint of what each returned."""
        ran: list[tuple[nn.Module, list[Any]]] = []
        with ExitStack() as stack:
            for module in modules:

                def recorded(
                    *args: Any, module: nn.Module = module, run: Callable[..., Any] = module.forward, **kwargs: Any
                ) -> object:
                    output = run(*args, **kwargs)
                    ran.append((module, _fingerprint(output)))
                    return output

                stack.enter_context(_forward_as(module, recorded))
            self._forward(self._model, copy.deepcopy(batch))
        return ran

    def _rehearse(self, run: list[tuple[nn.Module, list[Any]]], batch: Any) -> bool:
        """Whether replaying the dense model stage by stage gives what a plain forward pass gave."""
        if [module for module, _ in run] != [stage.module for stage in self.stages if stage.once]:
            return False  # this batch skips a stage that others run
        self._replays = True
        trail = _Trail()
        for index, (_, expected) in enumerate(run):
            try:
                output = self._pass(index, batch, trail)
            except Exception:  # code between stages choked on NaN: the model needs what was not computed
                return False
            if not _same(_fingerprint(output), expected):
                return False
        return True

    def _pass(self, stage_index: int, batch: Any, trail: _Trail) -> object:
        """Run one batch up to and including a stage, and return the stage's output."""
        stage = self.stages[stage_index]
        output: object = None

        def observe(*args: Any, **kwargs: Any) -> object:
            nonlocal output
            # A copy, because some stages write to their inputs, and these are needed again.
            trail.call = (args, kwargs) if self._replays else None
            args, kwargs = copy.deepcopy((args, kwargs))
            output = run_stage(*args, **kwargs)
            raise _Reached

        with ExitStack() as stack:
            if self._replays and stage.once and stage_index > 0:
                for earlier, template in trail.outputs.items():
                    stack.enter_context(_forward_as(self.stages[earlier].module, partial(_poison, template)))
                previous = self.stages[stage_index - 1].module
                run_previous, call = previous.forward, trail.call
                assert call is not None

                def rerun(*args: Any, **kwargs: Any) -> object:
                    returned = run_previous(*call[0], **call[1])
                    trail.outputs[stage_index - 1] = tree_map(_template, returned)
                    return returned

                stack.enter_context(_forward_as(previous, rerun))
            if stage.once:
                run_stage = stage.module.forward
                stack.enter_context(_forward_as(stage.module, observe))
            with suppress(_Reached):
                self._forward(self._model, copy.deepcopy(batch))
        return output


@dataclass
class _Trail:
    """What one batch leaves behind for the replay of the next stage."""

    call: _Call | None = None  # arguments of the stage that ran last
    outputs: dict[int, Any] = field(default_factory=dict)  # of the stages before that one, as templates


class _Gathered:
    """Statistics of the layers of one stage. Layers that read the same tensors in every batch share one accumulator."""

    def __init__(self, layers: Iterable[Layer], needs: Iterable[Need]) -> None:
        self._layers = tuple(layers)
        self._needs = frozenset(needs)
        # All start alike, and part when a batch gives them different inputs.
        self._accumulators = dict.fromkeys((layer.name for layer in self._layers), Accumulator(self._needs))

    @contextmanager
    def observing(self, batch: Any) -> Iterator[None]:
        """Add what the layers read while one batch runs."""
        masks = _padding_masks(batch)
        # By input, with the tensor itself, so that no other takes its place in memory.
        parts: dict[Hashable, tuple[Tensor, Accumulator]] = {}
        read: dict[str, list[Accumulator]] = {layer.name: [] for layer in self._layers}

        def observe(layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            try:
                rows = layer.kind.input_rows(module, x)
                # Where rows are not the input itself, or changes to it leave no trace, nothing is known to be alike.
                view = not x.is_inference() and rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
                key = (rows.data_ptr(), rows.shape, rows.stride(), x.shape, x._version) if view else object()
                if key not in parts:
                    part = Accumulator(self._needs)
                    part.add(_without_padding(rows, x, masks))
                    parts[key] = (x if view else rows.new_empty(0), part)
                read[layer.name].append(parts[key][1])
            except StatisticsError as error:
                raise StatisticsError(f"{layer.title}: {error}") from None

        with ExitStack() as stack:
            for layer in self._layers:
                for module in layer.modules:
                    hook = module.register_forward_pre_hook(partial(observe, layer), with_kwargs=True)
                    stack.callback(hook.remove)
            yield
        self._absorb(read)

    def _absorb(self, read: dict[str, list[Accumulator]]) -> None:
        alike: dict[tuple[int, ...], list[str]] = {}
        for name, accumulator in self._accumulators.items():
            alike.setdefault((id(accumulator), *map(id, read[name])), []).append(name)
        users = Counter(key[0] for key in alike)
        for key, names in alike.items():
            accumulator = self._accumulators[names[0]]
            if users[key[0]] > 1:
                accumulator = accumulator.copy()
            for part in read[names[0]]:
                accumulator.merge(part)
            self._accumulators.update(dict.fromkeys(names, accumulator))

    def results(self) -> dict[str, LayerStatistics]:
        """Return the statistics by layer name.

        Raises:
            StatisticsError: naming a layer that no input reached.
        """
        found = {}
        for layer in self._layers:
            try:
                found[layer.name] = self._accumulators[layer.name].result()
            except StatisticsError as error:
                raise StatisticsError(
                    f"{layer.title}: {error}\n"
                    f"Exclude it with exclude=[{layer.name!r}], or calibrate on batches that use it."
                ) from None
        return found


class _Reached(BaseException):
    """Ends a forward pass once the stage has run. Not an Exception, so that no model's own handler catches it."""


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


def _fingerprint(output: Any) -> list[Any]:
    """Enough of an output to tell it from another: at most 4096 values of each tensor. Other leaves count by type."""
    leaves = tree_leaves(output)
    return [
        leaf.detach().flatten()[:: math.ceil(leaf.numel() / 4096) or 1].clone()
        if isinstance(leaf, Tensor)
        else type(leaf)
        for leaf in leaves
    ]


def _same(left: list[Any], right: list[Any]) -> bool:
    """Whether two fingerprints agree up to the order in which a device adds."""

    def agree(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
            return not isinstance(a, Tensor) and bool(a == b)
        tolerance = 1e-5 if a.dtype in (torch.float32, torch.float64) else 1e-2
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance * 0.1, equal_nan=True)

    return len(left) == len(right) and all(agree(a, b) for a, b in zip(left, right, strict=True))


def _structure(batch: Any) -> str:
    """What decides which code a batch runs, as far as can be seen: containers, keys, ranks, and values but tensors'."""
    leaves, spec = tree_flatten(batch)
    return repr((str(spec), [leaf.ndim if isinstance(leaf, Tensor) else leaf for leaf in leaves]))


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
    """The batch's two-dimensional masks, True = a real token; others say who attends to whom, not what is padding.

    None at all if nothing is padded.

    Raises:
        StatisticsError: the tokens of an encoder and of a decoder are as many, but padded differently.
    """
    if not isinstance(batch, Mapping):
        return []
    masks = [batch.get("attention_mask"), batch.get("decoder_attention_mask")]
    if masks[1] is None and isinstance(decoded := batch.get("decoder_input_ids"), Tensor):
        masks[1] = torch.ones_like(decoded)
    found = [mask != 0 for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2]
    if all(bool(mask.all()) for mask in found):
        return []
    if len(found) == 2 and found[0].shape == found[1].shape and not torch.equal(found[0], found[1]):
        raise StatisticsError(
            f"attention_mask and decoder_attention_mask are both of shape {tuple(found[0].shape)} but differ, so it "
            "cannot be told which one a layer's inputs belong to.\nUse batches without padding."
        )
    return found


def _without_padding(rows: Tensor, x: Tensor, masks: list[Tensor]) -> Tensor:
    """The rows ``[groups, tokens, in]`` of ``x`` that belong to real tokens."""
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
