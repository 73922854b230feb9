"""What a run reached of a model and what it left, in words. Every report begins with it."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.reports._match import listed
from secateur.reports._records import LayerReport, ModelWeights, SkippedLayer

_LEFT = 0.1  # part of the weights in matrices from which on those that were left alone are worth a warning
_FEW = "calibrated on fewer tokens"
_CLASSES = 5  # that a warning lists


def pruning_line(whole: ModelWeights | None, considered: int) -> str:
    """Return the shares of the whole model that are zero and that were considered; empty if its size is unknown."""
    if whole is None:
        return ""
    text = (
        f"{_share(whole.zeros, whole.weights)} of the model's {whole.weights:,} weights are zero now; "
        f"{_share(considered, whole.weights)} were considered"
    )
    return text + _unread(whole)


def packing_line(whole: ModelWeights | None, packed: int, considered: int) -> str:
    """Return the shares of the whole model's dense bytes that are packed, and that have zeros."""
    if whole is None:
        return ""
    return (
        f"{_share(packed, whole.nbytes)} of the model's {whole.nbytes:,} dense bytes are packed now; "
        f"{_share(considered, whole.nbytes)} were considered"
    )


def left_alone(layers: Sequence[LayerReport], skipped: Sequence[SkippedLayer]) -> str:
    """Return a warning if many of the weights in matrices were left alone, by class and reason; else empty.

    Embeddings and output heads do not count, because they are left alone by what they are, nor do modules that the user
    left out. But the warning lists them.
    """
    others = [entry for entry in skipped if entry.matrix_weights and not entry.role]
    total = sum(layer.num_weights for layer in layers) + sum(entry.matrix_weights for entry in others)
    left = sum(entry.matrix_weights for entry in others if not entry.is_chosen)
    if left <= _LEFT * total:
        return ""
    classes: dict[str, list[SkippedLayer]] = {}
    for entry in skipped:
        if entry.matrix_weights:
            classes.setdefault(entry.role or f"{entry.kind} ({entry.reason})", []).append(entry)
    sizes = {title: sum(entry.matrix_weights for entry in entries) for title, entries in classes.items()}
    ranked = sorted(sizes, key=lambda title: -sizes[title])
    lines = []
    for title in ranked[:_CLASSES]:
        entries = classes[title]
        lines.append(f"{sizes[title]:,} in {title if entries[0].role else f'{len(entries)} {title}'}")
    if len(ranked) > _CLASSES:
        lines.append(f"{sum(sizes[title] for title in ranked[_CLASSES:]):,} in other classes")
    return (
        f"{_share(left, total)} of the weights in matrices were left alone ({left:,} of {total:,}, without embeddings "
        f"and output heads): {', '.join(lines)}"
    )


def emptied(layers: Sequence[LayerReport]) -> str:
    """Return a warning if whole layers ended empty without being asked for; else empty."""
    empty = [layer.name or "(the model itself)" for layer in layers if layer.is_empty and layer.asked < 1]
    if not empty:
        return ""
    are = "1 layer is" if len(empty) == 1 else f"{len(empty)} layers are"
    return f"{are} entirely zero, so nothing of the input passes: {listed(empty)}"


def held_out_line(layers: Sequence[LayerReport]) -> str:
    """Return the mean error of the layers on held-out tokens, and on those learned from; empty if none were held out.

    Of layers that have both, so that the two means can be compared.
    """
    pairs = [(layer.held_out_error, layer.relative_error) for layer in layers if layer.held_out_error is not None]
    both = [(held_out, learned) for held_out, learned in pairs if learned is not None]
    if not pairs:
        return ""
    if not both:
        return f"; mean layer error {sum(held_out for held_out, _ in pairs) / len(pairs):.4f} on held-out tokens"
    means = [sum(errors) / len(both) for errors in zip(*both, strict=True)]
    return f"; mean layer error {means[1]:.4f}, on held-out tokens {means[0]:.4f}"


def few_tokens_note(tokens: int, inputs: int) -> str:
    """Return the note on a layer that learned from the Gram matrix of fewer tokens than it has inputs."""
    return f"{_FEW} ({tokens:,}) than it has inputs ({inputs:,}), so that it may fit them and no others"


def few_tokens(layers: Sequence[LayerReport]) -> str:
    """Return a warning if layers have that note; else empty."""
    few = [layer.name or "(the model itself)" for layer in layers if any(_FEW in note for note in layer.notes)]
    if not few:
        return ""
    are = "1 layer was" if len(few) == 1 else f"{len(few)} layers were"
    return (
        f"{are} {_FEW} than inputs, and may fit them and no others: {listed(few)}. Calibrate on more, or see by how "
        "much the error grows on others with held_out=0.2"
    )


def _unread(whole: ModelWeights) -> str:
    if not whole.without_values:
        return ""
    return f"; {whole.without_values:,} have no values (meta device) and do not count as zero"


def _share(part: int, whole: int) -> str:
    return f"{part / whole if whole else 0.0:.2%}"
