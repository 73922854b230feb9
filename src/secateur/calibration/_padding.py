"""Which rows of a layer's input belong to real tokens, and which to padding?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError, StatisticsError, naming
from secateur.calibration._labels import PADDED, frames_of, together
from secateur.calibration._origins import Origin, Origins
from secateur.calibration._padding_masks import EXAMPLE, Input, Mask, PaddingFunction, find_inputs

PaddingSource: TypeAlias = PaddingFunction | Mapping[str, PaddingFunction]

_ADVICE = f"Say which tokens are real with {EXAMPLE}, or padding={{'glob of layers': function}}; or exclude the layer."


@dataclass(frozen=True)
class Kept:
    """What was found out about the rows of one input of a layer.

    Args:
        real: bool in the shape of the input's positions, True = a real token; None if all of them count.
        why: by which mask, or why all rows count.
    """

    real: Tensor | None
    why: str


class Padding:
    """What is padding in one batch. Make it once for each batch, so that it knows tensors that are kept between passes.

    Args:
        inputs: of the batch, with their masks.
        masks: of the batch.
        named: what the caller said of the layers that match a glob.
        whole: why all rows count, where there is no mask.
    """

    def __init__(
        self,
        inputs: Sequence[Input] = (),
        masks: Sequence[Mask] = (),
        named: Mapping[str, Mask | None] | None = None,
        whole: str = "the batches have no mask",
    ) -> None:
        self._inputs = tuple(inputs)
        self._masks = tuple(masks)
        self._named = dict(named or {})
        everything = [*self._masks, *(entry.mask for entry in self._inputs if entry.mask is not None)]
        self._pads = any(mask.pads for mask in everything)
        names = ", ".join(dict.fromkeys(mask.name for mask in everything))
        self._whole = f"{names} has no zeros" if names else whole
        self._origins = Origins()
        self._last: tuple[Tensor, nn.Module | None, Kept] | None = None
        self.rows: dict[str, dict[str, tuple[int, int]]] = {}  # by layer: by reason: rows removed, of how many
        if self._pads:
            for index, entry in enumerate(self._inputs):
                self._origins.begin(entry.tensor, index, entry.padded())

    @classmethod
    def of(cls, batch: Any, names: Sequence[str] = (), source: PaddingSource | None = None) -> Padding:
        """Return what is padding in a batch.

        Args:
            batch: as it is passed to the model.
            names: what the entries of a sequence are called.
            source: the argument ``padding=`` of :func:`secateur.prune_`.

        Raises:
            StatisticsError: masks that contradict each other, or a function of the caller's that returns no mask.
        """
        if source is None:
            return cls(*find_inputs(batch, names))
        if isinstance(source, Mapping):
            named = {glob: _asked(function, batch, f"padding[{glob!r}]") for glob, function in source.items()}
            return cls(*find_inputs(batch, names, ask=False), named)
        given = _asked(source, batch, "padding=")
        if given is None:
            return cls(whole="padding= says that nothing is padded")
        return cls(*find_inputs(batch, names, given.real))

    @property
    def disagrees(self) -> bool:
        """Whether there are several masks, so that only following says which one counts where."""
        return self._pads and len(_distinct([*self._masks, *(entry.mask for entry in self._inputs)])) > 1

    def fresh(self) -> Padding:
        """Return another one for the same batch, that has counted nothing yet."""
        return Padding(self._inputs, self._masks, self._named, self._whole)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the padding through whatever runs inside. Without padding that costs nothing."""
        try:
            with self._origins if self._pads else nullcontext():
                yield
        finally:
            self._last = None

    def kept(self, layer_name: str, x: Tensor, module: nn.Module | None = None) -> Tensor | None:
        """Return which positions of a layer's input are real: bool, True = real; None if all are.

        Args:
            layer_name: qualified name of the layer.
            x: its input ``[..., features]``, the very tensor, while :meth:`following` is entered.
            module: a convolution; its positions are those of its output, in one dimension.

        Raises:
            StatisticsError: some of the rows are padding, and it is not known which.
        """
        return self.judged(layer_name, x, module).real

    def judged(self, layer_name: str, x: Tensor, module: nn.Module | None = None) -> Kept:
        """As :meth:`kept`, with the reason."""
        module = module if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None
        for glob, mask in self._named.items():
            if fnmatchcase(layer_name, glob):
                return self._by_caller(glob, mask, x)
        if not self._pads:
            return Kept(None, self._whole)
        if self._last is None or self._last[0] is not x or self._last[1] is not module:
            self._last = (x, module, self._judge(x, module))
        return self._last[2]

    def count(self, layer_name: str, kept: Kept, total: int) -> None:
        """Remember how many of a layer's rows were left out, and why."""
        removed = 0 if kept.real is None else int((~kept.real).sum())
        before = self.rows.setdefault(layer_name, {}).get(kept.why, (0, 0))
        self.rows[layer_name][kept.why] = (before[0] + removed, before[1] + total)

    def _by_caller(self, glob: str, mask: Mask | None, x: Tensor) -> Kept:
        if mask is None:
            return Kept(None, f"padding[{glob!r}] says that nothing is padded")
        real = next(iter(_alignments(mask, x.shape[:-1])), None)
        if real is None and x.shape[:-1] != mask.real.shape[:1]:
            raise StatisticsError(
                f"inputs of shape {tuple(x.shape)} cannot be aligned with what padding[{glob!r}] returned, of shape "
                f"{tuple(mask.real.shape)}.\nReturn a bool tensor [batch, length] for the positions of this layer, or "
                "None if it sees no padding."
            )
        return Kept(real, f"padding[{glob!r}]")

    def _judge(self, x: Tensor, module: nn.Module | None) -> Kept:
        origin = self._origins.of(x)
        if origin is None:
            return self._by_shape(x, module)
        sources = [self._inputs[index] for index in sorted(origin.inputs)]
        masks = _distinct(entry.mask for entry in sources)
        if not any(mask.pads for mask in masks):
            return Kept(None, _why_whole(sources))
        names = ", ".join(dict.fromkeys(mask.name for mask in masks if mask.pads))
        traced = self._traced(origin, x, module)
        if module is None and not origin.gathered:
            # The trace is off by a token where a model shifts or convolves its inputs; the mask itself is exact.
            possible = [real for mask in masks for real in _alignments(mask, x.shape[:-1])]
            nearest = _nearest(traced, possible)
            if nearest is not None:
                return Kept(nearest, names)
            if x.shape[:-1] in {mask.real.shape[:1] for mask in masks}:
                return Kept(None, f"one row for each sequence of {names}")
        if traced is None:
            raise self._unknown(x, masks)
        return Kept(traced, names)

    def _traced(self, origin: Origin, x: Tensor, module: nn.Module | None) -> Tensor | None:
        if origin.padded is None:
            return None
        if module is None:
            return together(origin.padded, -1) != PADDED
        label = frames_of(origin.padded, module)
        return None if label is None else label != PADDED

    def _by_shape(self, x: Tensor, module: nn.Module | None) -> Kept:
        """For inputs that come from no input of the batch, or by ways that cannot be followed."""
        masks = _distinct([*self._masks, *(entry.mask for entry in self._inputs)])
        if module is not None:
            return Kept(None, "not computed from padded inputs")
        fitting = [(mask, real) for mask in masks for real in _alignments(mask, x.shape[:-1])[:1]]
        if not fitting:
            return Kept(None, "not computed from padded inputs")
        if len(fitting) > 1:
            raise self._unknown(x, [mask for mask, _ in fitting])
        mask, real = fitting[0]
        return Kept(real if mask.pads else None, f"{mask.name}, by its shape")

    def _unknown(self, x: Tensor, masks: Sequence[Mask]) -> StatisticsError:
        if len(masks) > 1:
            names = " and ".join(mask.name for mask in masks)
            problem = f"{names} may both belong to inputs of shape {tuple(x.shape)}, and they disagree"
        else:
            shape = tuple(masks[0].real.shape)
            problem = f"inputs of shape {tuple(x.shape)} cannot be aligned with {masks[0].name} of shape {shape}"
        return StatisticsError(f"{problem}, so padding cannot be kept out of the statistics.\n{_ADVICE}")


def _asked(function: PaddingFunction, batch: Any, title: str) -> Mask | None:
    with naming(title):
        real = function(batch)
        if real is None:
            return None
        if not isinstance(real, Tensor):
            raise TypeError(f"{title} must return a bool tensor [batch, length] or None, got {type(real).__name__}")
        if real.ndim != 2 or real.dtype != torch.bool:
            raise StatisticsError(
                f"the function returned {real.dtype} of shape {tuple(real.shape)}; it must return a bool tensor "
                "[batch, length], True for real tokens.\nReturn batch['attention_mask'] != 0, for example."
            )
        return Mask(title, real)


def check_padding(source: PaddingSource | None, layer_names: Iterable[str]) -> None:
    """Check the argument ``padding=`` of :func:`secateur.prune_`.

    Raises:
        RecipeError: a glob matches no layer.
        TypeError: neither a function nor functions by glob.
    """
    if source is None or (callable(source) and not isinstance(source, Mapping)):
        return
    if not isinstance(source, Mapping) or not all(isinstance(glob, str) and callable(f) for glob, f in source.items()):
        raise TypeError("padding must be a function of a batch, or a dict of such functions by glob of layer names")
    names = list(layer_names)
    for glob in source:
        if not any(fnmatchcase(name, glob) for name in names):
            raise RecipeError(
                f"padding: {glob!r} matches none of the {len(names)} layers to prune.\n"
                f"A glob must match a whole qualified name, such as {names[0]!r}."
            )


def _distinct(masks: Iterable[Mask | None]) -> list[Mask]:
    """Masks without those that say the same as an earlier one."""
    found: list[Mask] = []
    for mask in masks:
        if mask is not None and not any(
            other is mask or (other.real.shape == mask.real.shape and bool((other.real == mask.real).all()))
            for other in found
        ):
            found.append(mask)
    return found


def _why_whole(sources: Sequence[Input]) -> str:
    without = [entry.name for entry in sources if entry.mask is None]
    if without:
        return f"{', '.join(without)}: no mask"
    return f"{', '.join(dict.fromkeys(entry.mask.name for entry in sources if entry.mask))} has no zeros"


def _alignments(mask: Mask, positions: Sequence[int]) -> list[Tensor]:
    """The mask in the shape of an input's positions, in every way in which it fits, the usual one first."""
    real, (batch, length), positions = mask.real, mask.real.shape, tuple(positions)
    found = []
    if positions[:2] == (batch, length):
        found.append(real.view(batch, length, *[1] * (len(positions) - 2)).expand(positions))
    if positions == (length, batch):
        found.append(real.T)
    if len(positions) == 3 and (positions[0], positions[2]) == (batch, length):
        found.append(real.unsqueeze(1).expand(positions))  # heads before tokens
    if positions == (batch * length,):
        found += [real.reshape(-1), real.T.reshape(-1)]
    return found


def _nearest(traced: Tensor | None, possible: Sequence[Tensor]) -> Tensor | None:
    """The one of several alignments that the trace speaks for; None if it does not say."""
    distinct: list[Tensor] = []
    for real in possible:
        if not any(torch.equal(real, other) for other in distinct):
            distinct.append(real)
    if len(distinct) < 2 or traced is None:
        return distinct[0] if len(distinct) == 1 else None
    distances = [int((real.to(traced.device) != traced).sum()) for real in distinct]
    best = min(distances)
    return distinct[distances.index(best)] if distances.count(best) == 1 else None


def padding_by_stage(stages: Iterable[tuple[str, Sequence[str]]], paddings: Sequence[Padding]) -> dict[str, str]:
    """By the name of a stage, which padding was left out of its statistics, and why not.

    Args:
        stages: names of the stages, each with the names of its layers.
        paddings: of all batches.
    """
    found = {}
    for stage, layers in stages:
        totals: dict[str, tuple[int, int]] = {}
        for layer in layers:
            sums: dict[str, tuple[int, int]] = {}
            for padding in paddings:
                for why, (removed, total) in padding.rows.get(layer, {}).items():
                    before = sums.get(why, (0, 0))
                    sums[why] = (before[0] + removed, before[1] + total)
            for why, entry in sums.items():
                totals[why] = max(totals.get(why, (0, 0)), entry)
        if totals:
            found[stage] = "; ".join(_sentence(why, *rows) for why, rows in totals.items())
    return found


def _sentence(why: str, removed: int, total: int) -> str:
    return f"{removed:,} of {total:,} rows left out by {why}" if removed else f"nothing left out: {why}"


def left_out(rows: Tensor, kept: Kept) -> Tensor:
    """The rows ``[groups, tokens, in]`` of real tokens.

    Raises:
        StatisticsError: there are more or fewer rows than positions that are known to be padding or not.
    """
    if kept.real is None:
        return rows
    real = kept.real.reshape(-1).to(rows.device)
    if len(real) != rows.shape[1]:
        raise StatisticsError(
            f"it reads {rows.shape[1]} rows, but {kept.why} speaks of {len(real)} positions, so padding cannot be kept "
            f"out of the statistics.\n{_ADVICE}"
        )
    return rows[:, real]
