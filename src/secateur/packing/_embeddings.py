"""The embeddings of a model that could be stored as rows of int8. Lookups are not timed: they read a few rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from secateur._errors import SparsityError
from secateur._types import Weight, dtype_name
from secateur.formats import DensePacked
from secateur.layers import Replaceability
from secateur.nn import PackedAs, PackedEmbedding, PackedMatrix, why_not_embedding
from secateur.packing._settings import PackSettings
from secateur.reports import PackedLayer, SkippedLayer

SMALLEST = 4096  # numbers of a table; with fewer, all that its rounding saves is some bytes


@dataclass(frozen=True)
class PackedEmbeddings:
    """What became of the embeddings of a model.

    Args:
        swaps: each embedding that is packed, with its replacement.
        rows: an entry of the report for each table that is packed.
        skipped: all modules that are skipped, embeddings among them.
    """

    swaps: list[tuple[nn.Module, nn.Module]]
    rows: list[PackedLayer]
    skipped: list[SkippedLayer]


@dataclass(frozen=True)
class EmbeddingJob:
    """A table of embeddings, dense and in rows of int8.

    Args:
        name: of the first module.
        modules: the embeddings that share the table.
        weight: ``[rows, size]``.
        packed: the same table in int8.
        tied_to: names of the other embeddings.
        heads: the layers that multiply the same table, by name, such as an output layer.
    """

    name: str
    modules: tuple[nn.Embedding, ...]
    weight: Weight
    packed: DensePacked
    tied_to: tuple[str, ...] = ()
    heads: Mapping[str, nn.Module] | None = None

    def why_not(self, new: Mapping[int, nn.Module]) -> str | None:
        """Return the reason why the table must stay dense beside the layers that multiply it, or None.

        Args:
            new: by the id of a module, the packed layer that is to replace it.
        """
        for name, head in (self.heads or {}).items():
            if not isinstance(new.get(id(head)), PackedMatrix):
                return f"shares its weight with {name!r}, which stays dense; include=[{name!r}] packs both, if it pays"
        stored = [packed for packed in self._by_heads(new) if not _is_rows(packed)]
        return (
            f"shares its weight with a layer that is packed as {stored[0].packed.name!r}, without rows"
            if stored
            else None
        )

    def swaps(self, new: Mapping[int, nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
        """Return each embedding with its replacement. They share their rows with one another and with packed heads.

        Args:
            new: as for :meth:`why_not`.
        """
        first = next(iter(self._by_heads(new)), None)
        swaps: list[tuple[nn.Module, nn.Module]] = []
        for module in self.modules:
            packed = self.packed if first is None else first.packed
            made = PackedEmbedding(packed, module.padding_idx, self.weight.dtype)
            if first is not None:
                made.share_(first)
            first = first or made
            swaps.append((module, made.train(module.training)))
        return swaps

    def _by_heads(self, new: Mapping[int, nn.Module]) -> list[PackedMatrix]:
        found = (new.get(id(head)) for head in (self.heads or {}).values())
        return [layer for layer in found if isinstance(layer, PackedMatrix)]

    def report(self, new: Mapping[int, nn.Module]) -> PackedLayer:
        """Return the entry of the table in the report.

        Args:
            new: as for :meth:`why_not`.
        """
        shared = self._by_heads(new)
        packed = shared[0].packed if shared else self.packed
        return PackedLayer(
            name=self.name,
            shape=packed.shape,
            pattern=str(packed.pattern),
            density=1.0,
            format=packed.name,
            value_dtype=dtype_name(packed.value_dtype),
            error=packed.error(self.weight),
            dense_bytes=self.weight.nbytes,
            stored_bytes=packed.nbytes,
            runtime_bytes=0,
            packed=True,
            reason="",
            choices=(),
            tied_to=(*self.tied_to, *(self.heads or {})),
        )


def rounds_embeddings(settings: PackSettings) -> bool:
    """Return whether embeddings are to be stored as rows of int8: where the model computes, or is stored, in 8 bits."""
    return settings.precision == "int8" or (settings.precision == "bfloat16" and settings.value_dtype == torch.int8)


def is_for_embeddings(include: Sequence[str], jobs: Sequence[EmbeddingJob]) -> bool:
    """Return whether each glob of a non-empty ``include`` names an embedding, so that there need not be any layer."""
    names = [name for job in jobs for name in (job.name, *job.tied_to)]
    return bool(include) and all(any(fnmatchcase(name, glob) for name in names) for glob in include)


def _is_rows(layer: PackedMatrix) -> bool:
    return isinstance(layer.packed, DensePacked) and layer.packed.value_dtype == torch.int8


def embedding_jobs(
    model: nn.Module, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> tuple[list[EmbeddingJob], list[SkippedLayer]]:
    """Return the embeddings that can be stored as rows of int8, and those that cannot, each with the reason.

    Args:
        model: any module.
        include: glob patterns on qualified names. If there are any, exactly the embeddings that match one are returned,
            and those whose table is the weight of a layer that does.
        exclude: glob patterns on qualified names.
    """
    replaceability = Replaceability(model, "put it into a module", reads_are_served=True)
    users: dict[int, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), {})[name] = module
    jobs: list[EmbeddingJob] = []
    skipped: list[SkippedLayer] = []
    done: set[int] = set()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Embedding) else None
        if not isinstance(module, nn.Embedding) or (weight is not None and id(weight) in done):
            continue
        done.add(id(weight))
        own = {name: module} if weight is None else users[id(weight)]
        made = _job(own, include, exclude, replaceability)
        if isinstance(made, str):
            skipped += [
                SkippedLayer(key, type(each).__name__, made)
                for key, each in own.items()
                if isinstance(each, nn.Embedding)
            ]
        else:
            jobs.append(made)
    return jobs, skipped


def _job(
    users: Mapping[str, nn.Module], include: tuple[str, ...], exclude: tuple[str, ...], replaceability: Replaceability
) -> EmbeddingJob | str:
    """The job for a table, given all modules that have it; or the reason why it stays dense."""
    names = [name for name, module in users.items() if isinstance(module, nn.Embedding)]
    embeddings = {name: users[name] for name in names}
    if any(fnmatchcase(name, glob) for name in names for glob in exclude):
        return "excluded"
    named = any(fnmatchcase(name, glob) for name in users for glob in include)
    if include and not named:
        return "not included"
    for name, module in embeddings.items():
        assert isinstance(module, nn.Embedding)
        reason = replaceability.why_not(module) or why_not_embedding(module)
        if reason is not None:
            return reason if len(names) == 1 else f"{name}: {reason}"
    heads = {name: module for name, module in users.items() if name not in embeddings}
    for name, module in heads.items():
        packed_as = PackedAs.of(module)
        if packed_as is None or packed_as != PackedAs():
            return f"shares its weight with {name!r}, a {type(module).__name__} that cannot use rows of int8"
    weight = next(iter(embeddings.values())).weight
    assert isinstance(weight, nn.Parameter)
    if weight.is_meta:
        return "its weight is on the meta device, without values"
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}; models are packed on the CPU"
    if weight.numel() < SMALLEST and not named:
        return f"its {weight.numel():,} numbers are so few that int8 would save nothing that matters"
    matrix = weight.detach()
    try:
        packed = DensePacked.from_dense(matrix, value_dtype=torch.int8)
    except SparsityError as error:
        return f"cannot be packed: {str(error).splitlines()[0]}"
    first, *others = names
    modules: tuple[nn.Embedding, ...] = tuple(embeddings.values())  # type: ignore[arg-type]
    return EmbeddingJob(first, modules, matrix, packed, tuple(others), heads)


def pack_embeddings(
    jobs: Sequence[EmbeddingJob],
    left: Sequence[SkippedLayer],
    new: Mapping[int, nn.Module],
    skipped: Sequence[SkippedLayer],
) -> PackedEmbeddings:
    """Return what becomes of the embeddings of a model, given what becomes of its layers.

    Args:
        jobs, left: from :func:`embedding_jobs`.
        new: by the id of a module, the packed layer that is to replace it.
        skipped: modules that are skipped. Entries of embeddings are replaced by those that say more.
    """
    swaps: list[tuple[nn.Module, nn.Module]] = []
    rows: list[PackedLayer] = []
    found = {entry.name: entry for entry in left}
    packed: set[str] = set()
    for job in jobs:
        names = (job.name, *job.tied_to)
        if (reason := job.why_not(new)) is None:
            swaps += job.swaps(new)
            rows.append(job.report(new))
            packed.update(names)
        else:
            found |= {name: SkippedLayer(name, "Embedding", reason) for name in names}
    others = [found.pop(entry.name, entry) for entry in skipped if entry.name not in packed]
    return PackedEmbeddings(swaps, rows, [*others, *found.values()])
