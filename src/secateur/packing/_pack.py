"""Pack the layers of a model that gain by it, and unpack them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError, SparsityError
from secateur._types import Weight
from secateur.formats import VALUE_DTYPES, Format
from secateur.kernels import Plan, stored_share
from secateur.layers import Layer, Replaceability, is_transposed_linear, select_layers, swap_modules_
from secateur.nn import PackedConv2d, PackedLinear, pack_weight
from secateur.packing import _autotune
from secateur.packing._autotune import Cache, Decision, decide, key_of
from secateur.patterns import SparsityPattern, satisfied
from secateur.reports import PackedLayer, PackReport, SkippedLayer

PIXELS = (49, 196, 784, 3136)  # of 7 x 7 to 56 x 56 feature maps, at which convolutions are measured
_COLD = 32 << 20  # bytes of weights beyond which a model's layers do not stay in a cache from call to call

Progress = Callable[[str, float, float], None]


def pack_(
    model: nn.Module,
    *,
    batch_sizes: Sequence[int] = (1, 8, 32, 128),
    value_dtype: torch.dtype | str | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    memory: float = 1.0,
    cache: str | Path | None = None,
    timer: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda description, done, total: None,
) -> PackReport:
    """Replace the layers of a pruned model, in place, by packed ones that are smaller and faster on this machine.

    Each kind of layer (shape, pattern, density, value dtype) is measured with every kernel that can run it, against the
    dense layer as it is, at every batch size. A layer is packed only if it gets faster somewhere and slower nowhere,
    beyond noise; else it stays dense, and the report says why. Patterns are found from the zeros. Output heads and
    layers that share their weight with an embedding are left alone unless ``include`` names them. Packed layers in the
    model are measured again, and packed anew where ``value_dtype`` differs.

    It takes about a second for each kind of layer. Values are exact unless ``value_dtype`` asks for fewer bits.

    Args:
        model: any module but a bare layer; on the CPU.
        batch_sizes: input rows (tokens, samples) at which to measure; what lies between takes the nearest.
        value_dtype: float32, bfloat16, float16 or int8 (one scale for each output row); None for the weights' own.
        include: glob patterns on qualified names; given, exactly these layers are considered.
        exclude: glob patterns that win over ``include``.
        memory: how many times its dense bytes the layouts that a layer's kernels keep may take together, besides the
            stored weight. 2 or more also admits dense weights in oneDNN's own order, faster at large batches.
        cache: a JSON file of measurements, by machine, to read and to add to; None measures anew in each process.
        timer: seconds from any origin.
        progress: called with a description, and how much of how much is done.

    Returns:
        A frozen report: for each layer the winners, ratios with their spread, bytes, errors, and reasons.

    Raises:
        RecipeError: no layer to pack, batch sizes that are none, or a glob that matches nothing.
        FormatError: no such value dtype, or a cache that is none.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
        >>> _ = secateur.prune_(model, pattern="block:16x16", sparsity=0.9, method="magnitude", include=["0"])
        >>> report = secateur.pack_(model, batch_sizes=[1])
        >>> [(layer.name, layer.pattern, layer.format) for layer in report.layers]
        [('0', 'block:16x16', 'block')]
        >>> [(skip.name, skip.reason) for skip in report.skipped]
        [('2', 'no zeros')]
    """
    began = time.perf_counter()
    batches = sorted({*batch_sizes})
    if not batches or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in batches):
        raise RecipeError(f"batch_sizes should be whole numbers from 1 on, got {list(batch_sizes)}.")
    if not memory > 0:
        raise RecipeError(f"memory is a multiple of the dense bytes, above 0, got {memory:g}.")
    dtype = value_dtype_of(value_dtype)
    known = Cache(cache)
    jobs, skipped = _jobs(model, include, exclude, dtype)
    cold = sum(job.dense_bytes for job in jobs) > _COLD
    rows: list[PackedLayer] = []
    swaps: list[tuple[nn.Module, nn.Module]] = []
    for number, job in enumerate(jobs):
        progress(f"packing {job.layer.title}", number, len(jobs))
        decision = job.decide(batches, memory, cold, known, timer)
        if decision.plan is not None:
            swaps += job.packed_modules(decision.plan)
        elif isinstance(job.layer.modules[0], PackedLinear | PackedConv2d):
            swaps += [(module, job.dense) for module in job.layer.modules]
        rows.append(job.report(decision))
    swap_modules_(model, swaps)
    known.write()
    return PackReport(
        layers=tuple(rows),
        skipped=tuple(skipped),
        machine=_autotune.machine(),
        memory=memory,
        seconds=time.perf_counter() - began,
    )


def unpack_(model: nn.Module) -> list[str]:
    """Replace a model's packed layers, in place, by plain ones with the same weight, zeros included.

    Exact, but for int8 values, which are multiplied by their scales and stay rounded.

    Returns:
        The qualified names of the layers that were replaced.

    Raises:
        RecipeError: the model is itself a packed layer; use its ``to_linear``.

    Example:
        >>> import torch, secateur
        >>> linear = torch.nn.Linear(8, 4)
        >>> model = torch.nn.Sequential(secateur.PackedLinear.from_linear(linear))
        >>> secateur.unpack_(model), torch.equal(model[0].weight, linear.weight)
        (['0'], True)
    """
    if isinstance(model, PackedLinear | PackedConv2d):
        raise RecipeError("a bare layer cannot be replaced in place; use its to_linear or to_conv2d.")
    found = packed_layers(model)
    plain: dict[int, nn.Module] = {}
    weights: dict[tuple[int, torch.dtype], nn.Parameter] = {}
    for module in found.values():
        if id(module) in plain:
            continue
        made: Any = module.to_dense()
        inner = module.linear if isinstance(module, PackedConv2d) else module
        key = id(inner.values), inner.weight_dtype
        made.weight = weights.setdefault(key, made.weight)  # tied ones stay tied
        plain[id(module)] = made
    swap_modules_(model, [(module, plain[id(module)]) for module in found.values()])
    return list(found)


def packed_layers(model: nn.Module) -> dict[str, PackedLinear | PackedConv2d]:
    """The model's packed layers by qualified name, every name of those that hang in several places."""
    found: dict[str, PackedLinear | PackedConv2d] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = name.rpartition(".")[0]
        if isinstance(module, PackedLinear | PackedConv2d) and not isinstance(found.get(inside), PackedConv2d):
            found[name] = module
    return found


def value_dtype_of(given: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype for stored values, from its name or itself.

    Raises:
        RecipeError: values cannot be stored so.
    """
    names = {str(dtype).removeprefix("torch."): dtype for dtype in VALUE_DTYPES}
    if given is None or given in VALUE_DTYPES:
        return given
    if isinstance(given, str) and given in names:
        return names[given]
    raise RecipeError(f"value_dtype should be one of {', '.join(names)}, got {given!r}.")


@dataclass(frozen=True)
class _Job:
    """One weight with zeros, and what it would be packed.

    Args:
        layer: with its modules; packed ones where the model has some already.
        dense: the first of them, dense.
        weight: ``[out, in]``.
        packed: the same, packed.
        patterns: that its zeros satisfy.
    """

    layer: Layer
    dense: nn.Module
    weight: Weight
    packed: Format
    patterns: tuple[SparsityPattern, ...]

    @property
    def dense_bytes(self) -> int:
        return self.weight.nbytes

    def decide(
        self, batches: Sequence[int], memory: float, cold: bool, known: Cache, timer: Callable[[], float]
    ) -> Decision:
        convolution = isinstance(self.dense, nn.Conv2d)
        rows = PIXELS if convolution else batches
        key = key_of(self.weight, self.packed, type(self.dense).__name__, rows, cold)
        measured = known.get(key)
        if measured is None:
            inputs = [(n, self._input(n)) for n in rows]
            patterns = (*self.patterns, self.packed.pattern)
            measured = _autotune.measure(
                self.dense, lambda plan: self._module(self.dense, plan), self.packed, inputs, patterns, cold, timer
            )
            known.put(key, measured)
        return decide(measured, self.dense_bytes, memory)

    def _input(self, rows: int) -> Tensor:
        x = torch.randn(rows, self.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(self.weight.dtype)
        if not isinstance(self.dense, nn.Conv2d):
            return x
        side = int(rows**0.5)
        down, across = (side * stride for stride in self.dense.stride)
        return (
            x.T.reshape(1, -1, side, side)
            .repeat_interleave(self.dense.stride[0], 2)
            .repeat_interleave(self.dense.stride[1], 3)[:, :, :down, :across]
            .contiguous()
        )

    def _module(self, dense: nn.Module, plan: Plan, like: PackedLinear | None = None) -> nn.Module:
        bias = dense.bias
        made = PackedLinear(self.packed, bias, plan, self.weight.dtype)  # type: ignore[arg-type]
        made.transposed = not isinstance(dense, nn.Linear | nn.Conv2d)
        if like is not None:
            made.share_(like)
        return (PackedConv2d(made, (dense.stride[0], dense.stride[1])) if isinstance(dense, nn.Conv2d) else made).train(
            dense.training
        )

    def packed_modules(self, plan: Plan) -> list[tuple[nn.Module, nn.Module]]:
        """Each module with its replacement; those that share the weight share its tensors, and those that share the
        bias too are one module.
        """
        made: dict[int, nn.Module] = {}
        swaps: list[tuple[nn.Module, nn.Module]] = []
        first: PackedLinear | None = None
        for module in self.layer.modules:
            inside = module.linear if isinstance(module, PackedConv2d) else module
            if isinstance(inside, PackedLinear) and inside.values is self.packed.values:
                inside.plan = plan
                continue
            key = id(module.bias if inside is module else inside.bias)
            if key not in made:
                made[key] = self._module(self.dense if isinstance(inside, PackedLinear) else module, plan, first)
                inner = made[key]
                first = first or (inner.linear if isinstance(inner, PackedConv2d) else inner)  # type: ignore[assignment]
            swaps.append((module, made[key]))
        return swaps

    def report(self, decision: Decision) -> PackedLayer:
        return PackedLayer(
            name=self.layer.name,
            shape=self.packed.shape,
            pattern=str(self.packed.pattern),
            density=stored_share(self.packed),
            format=self.packed.name,
            value_dtype=str(self.packed.value_dtype).removeprefix("torch."),
            error=self.packed.error(self.weight),
            dense_bytes=self.dense_bytes,
            stored_bytes=self.packed.nbytes,
            runtime_bytes=decision.nbytes,
            packed=decision.plan is not None,
            reason=decision.reason,
            choices=decision.choices,
            tied_to=self.layer.tied_to,
        )


def _jobs(
    model: nn.Module, include: Iterable[str], exclude: Iterable[str], dtype: torch.dtype | None
) -> tuple[list[_Job], list[SkippedLayer]]:
    """What to measure, and what to leave alone and why."""
    include, exclude = tuple(include), tuple(exclude)
    jobs = []
    if not include:
        jobs += _packed_jobs(model, exclude, dtype)
    try:
        layers, skipped = select_layers(model, include, exclude)
    except RecipeError:
        if not jobs or exclude:
            raise
        return jobs, []
    for layer in layers:
        module = layer.modules[0]
        weight = layer.matrix()
        reason = _why_not(model, layer, weight)
        packed: Format | None = None
        patterns: tuple[SparsityPattern, ...] = ()
        if reason is None:
            try:
                patterns = satisfied(weight == 0)
                packed = pack_weight(weight, dtype, patterns)
            except SparsityError as error:
                reason = f"cannot be packed: {str(error).splitlines()[0]}"
        if packed is None:
            skipped.append(SkippedLayer(layer.name, type(module).__name__, reason or ""))
        else:
            jobs.append(_Job(layer, module, weight, packed, patterns))
    return jobs, skipped


def _packed_jobs(model: nn.Module, exclude: Iterable[str], dtype: torch.dtype | None) -> list[_Job]:
    """Layers that are packed already, to be measured again as they are."""
    if isinstance(model, PackedLinear | PackedConv2d):
        raise RecipeError("a bare layer cannot be replaced in place; put it into a module.")
    jobs: dict[int, _Job] = {}
    for name, module in packed_layers(model).items():
        if id(module) in jobs or any(fnmatchcase(name, glob) for glob in exclude):
            continue
        inner = module.linear if isinstance(module, PackedConv2d) else module
        weight = inner.weight
        layer = Layer(name, (module,), kind=None)  # type: ignore[arg-type]  # not read: the matrix is here
        packed = inner.packed if dtype in (None, inner.values.dtype) else pack_weight(weight, dtype)
        jobs[id(module)] = _Job(layer, module.to_dense(), weight, packed, satisfied(weight == 0))
    return list(jobs.values())


def _why_not(model: nn.Module, layer: Layer, weight: Weight) -> str | None:
    """The reason that a layer cannot be packed, or None."""
    replaceability = Replaceability(model, "use PackedLinear.from_linear")
    for module in layer.modules:
        if (reason := replaceability.why_not(module)) is not None:
            return reason
        pointwise = type(module) is nn.Conv2d and PackedConv2d.fits(module)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not pointwise:
            return "a convolution with kernel, padding or groups: unfolding its input costs what the zeros save"
        if type(module) is not nn.Linear and not pointwise and not is_transposed_linear(module):
            return f"only nn.Linear and 1x1 convolutions have a packed counterpart, not {type(module).__name__}"
    if weight.is_meta:
        return "its weight is on the meta device, without values"
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}; kernels run on the processor"
    if not bool((weight == 0).any()):
        return "no zeros"
    return None
