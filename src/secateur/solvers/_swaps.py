"""Refine any solver's mask by swaps: one weight that is kept goes, and one that went comes back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from secateur._checks import integer, number
from secateur._errors import PatternError, RecipeError
from secateur._types import Mask, Weight
from secateur.calibration import Need
from secateur.patterns import SparsityPattern, Units
from secateur.solvers._gram import damped, gram_for
from secateur.solvers._least_squares import fit
from secateur.solvers._problem import LayerProblem, Solution, Solver

_FIT = 4  # iterations of each fit; later ones hardly change which swap is best
_ROWS = 1 << 22  # elements of the rows whose swaps are found together
_PAIRS = 1 << 22  # elements of what is computed for all pairs of candidates together
_MOST = 1000  # products of one round; it ends by itself long before


@dataclass(frozen=True)
class Swaps(Solver):
    r"""Swap a unit that is kept for one that is pruned, as long as that lowers :math:`\lVert (W - V) X \rVert^2`.

    The kept weights are fitted, then swaps are made, in turn. To swap unit u for unit q changes the error by

    .. math:: 2 v_u c_u^T + v_u H_{uu} v_u^T - \lVert (c_q + v_u H_{uq}) H_{qq}^{-1/2} \rVert^2,
        \qquad c = (W - V) H,

    which is exact: u becomes zero, and q takes the value that is best while all others stay. A unit is a weight, or
    what the pattern keeps or prunes whole; swaps stay within a row of units, and within a group of N:M, so that every
    count stays. Rows are kept whole by their exact cost, which is optimal. The error never rises. Put ``+refit`` after
    it, so that all weights make up for the last swaps too.

    All rows are refined at once. The cheapest units to prune and the best to restore are the candidates of a row; their
    pairs are compared exactly, again after each swap, and many swaps share one update of c. A row is done when no pair
    of its candidates lowers the error. In N:M all pairs are candidates.

    Differs from the paper: a restored weight takes its best value instead of its dense one, and the kept weights are
    fitted before, so that a swap is judged by what it costs once the others have made up for it as far as they can.

    Cost: a fit for each round, and a product of a sparse ``[out, in]`` with ``[in, in]`` for each series of swaps.

    Args:
        inner: the solver whose mask is refined, for example ``Select(Wanda())``.
        rounds: of a fit and all swaps that pay.
        candidates: units to prune, and units to restore, that are compared in each row.
        damping: added to the diagonal of H, as a fraction of its mean.

    Raises:
        RecipeError: rounds or candidates below 1, damping below 0, or an inner solver that rounds.

    Example:
        >>> import torch, secateur
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.5]])  # the first two are the same
        >>> statistics = secateur.LayerStatistics(tokens=3, input_norm=x.norm(dim=0), gram=x.T @ x)
        >>> problem = secateur.LayerProblem(torch.tensor([[2.0, 1.9, 2.0]]), statistics, secateur.Unstructured(), 2 / 3)
        >>> wanda = secateur.Select(secateur.Wanda())
        >>> wanda.solve(problem).mask.tolist()
        [[False, False, True]]
        >>> solution = secateur.Swaps(wanda).solve(problem)  # one of them can stand for both
        >>> solution.mask.tolist(), round(float(solution.weight[0, 0]), 1)
        ([[True, False, False]], 3.9)

    Reference:
        Zimmer et al., "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale", 2025, arXiv:2512.10922.
    """

    inner: Solver
    rounds: int = 2
    candidates: int = 16
    damping: float = 0.01

    def __post_init__(self) -> None:
        integer("rounds", self.rounds, 1)
        integer("candidates", self.candidates, 1)
        number("damping", self.damping, 0)
        inner = getattr(self.inner, "rounding", None)
        if inner is not None:
            raise RecipeError(
                f"the method inside the swaps rounds to {inner}, and swaps would move its weights off that grid.\n"
                f"Add '+refit' after '+swaps', and give it rounding={inner!r}."
            )

    @property
    def needs(self) -> frozenset[Need]:
        return self.inner.needs | {"gram"}

    @torch.no_grad()
    def solve(self, problem: LayerProblem) -> Solution:
        start = self.inner.solve(problem)
        raw = gram_for(problem.weight, problem.statistics)
        gram = damped(raw, self.damping)
        # What multiplies a dead input costs nothing, whatever damping adds to that input's diagonal.
        alive = (raw.diagonal(dim1=1, dim2=2) != 0).repeat_interleave(len(problem.weight) // max(1, len(raw)), 0)
        pattern = start.pattern or problem.pattern
        units = pattern.units(problem.weight.shape)
        if not units.total or not units.size or bool(start.mask.all()) or not start.mask.any():
            return start
        if units.width == units.core[1]:
            return _best_rows(problem, start, pattern, gram)
        weight, mask = start.weight, start.mask
        for _ in range(self.rounds):
            weight = fit(problem.weight, weight, mask, gram, _FIT, units.height)
            swapped = _swapped(problem, weight, mask, alive, units, gram, self.candidates)
            if swapped is None:
                note = f"no swaps: units of {pattern} cross the groups of the layer"
                return replace(start, weight=weight, notes=(*start.notes, note))
            if torch.equal(swapped[1], mask):
                break
            try:
                pattern.check(swapped[1])
            except PatternError:
                note = f"no swaps: a single one would break {pattern}"
                return replace(start, weight=weight, notes=(*start.notes, note))
            weight, mask = swapped
        return replace(start, weight=weight, mask=mask)


def _best_rows(problem: LayerProblem, start: Solution, pattern: SparsityPattern, gram: Tensor) -> Solution:
    """The mask where units span all columns: their errors add up, so that the cheapest to prune are the best."""
    columns = torch.arange(problem.weight.shape[1], device=gram.device)
    dense = problem.weight * (columns < pattern.units(problem.weight.shape).core[1])
    grouped = dense.view(len(gram), -1, len(columns))
    cost = torch.linalg.vecdot(grouped @ gram, grouped).flatten().clamp_min(0).sqrt()
    scores = torch.zeros_like(problem.weight)
    scores[:, 0] = cost
    mask = pattern.mask(problem.ranked(scores), problem.sparsity)
    values = torch.where(start.mask, start.weight, problem.weight)
    return replace(start, weight=values.masked_fill(~mask, 0), mask=mask, scores=scores)


def _swapped(
    problem: LayerProblem,
    weight: Weight,
    mask: Mask,
    alive: Mask,
    units: Units,
    gram: Tensor,
    candidates: int,
) -> tuple[Weight, Mask] | None:
    """Weight and mask after all swaps that pay; None where units have rows in parts of several groups."""
    rows, columns = problem.weight.shape
    share = rows // len(gram)  # rows of a group
    if len(gram) > 1 and share % units.height and units.height % share:
        return None
    weight, mask = weight.clone(), mask.clone()
    parts = max(1, units.height // share)  # groups that a unit spans
    bands = max(1, _ROWS // (units.height * columns))
    for part in range(0, len(gram), parts):
        space = _Space.of(gram[part : part + parts], units)
        first, last = part * share, min((part + parts) * share, units.core[0])
        for begin in range(first, last, bands * units.height):
            here = slice(begin, min(begin + bands * units.height, last))
            barred = None if problem.pruned is None else problem.pruned[here]
            dense, now = problem.weight[here] * alive[here], weight[here] * alive[here]
            search = _Search.of(dense, now, mask[here], barred, space, candidates)
            search.run()
            weight[here], mask[here] = search.result(weight[here], mask[here])
    return weight, mask


@dataclass(frozen=True, eq=False)
class _Space:
    """Coordinates in which every unit has the identity as its block of H: ``T^-1 H T^-T``, with ``H_uu = T T^T``."""

    gram: Tensor  # [parts, in, in]
    roots: Tensor  # T, lower triangular, [parts, units across, width, width]
    inverses: Tensor
    units: Units
    span: int  # adjacent units that may be swapped for one another

    @classmethod
    def of(cls, gram: Tensor, units: Units) -> _Space:
        across, width = units.core[1] // units.width, units.width
        columns = torch.arange(units.core[1], device=gram.device).view(across, width)
        roots = torch.linalg.cholesky(gram[:, columns.unsqueeze(2), columns.unsqueeze(1)])
        inverses = torch.linalg.solve_triangular(roots, torch.eye(width).to(gram), upper=False)
        space = cls(gram, roots, inverses, units, min(units.count, across))
        half = space.turn(gram, inverses.mT)
        return replace(space, gram=space.turn(half.mT, inverses.mT).mT.contiguous())

    def turn(self, values: Tensor, by: Tensor) -> Tensor:
        """Multiply each unit's part of ``[parts, rows, in]`` by its matrix; columns beyond the units stay."""
        stop = self.units.core[1]
        if self.units.width == 1:
            turned = values[..., :stop] * by.view(len(by), 1, stop)
        else:
            core = values[..., :stop].unflatten(2, (-1, self.units.width))
            turned = (core.transpose(1, 2) @ by).transpose(1, 2).flatten(2)
        return turned if stop == values.shape[2] else torch.cat([turned, values[..., stop:]], 2)


@dataclass(eq=False)
class _Search:
    """Some rows of units and their swaps. Dimensions: parts, rows of units (bands), rows of each, units, width."""

    space: _Space
    values: Tensor  # V, [parts, bands, rows, in]
    slope: Tensor  # (W - V) H, the same
    kept: Tensor  # [bands, units]
    may_return: Tensor  # [bands, units]
    least: Tensor  # [bands], what a swap must gain, above the noise of rounding
    moved: Tensor  # [bands, units]
    candidates: int

    @classmethod
    def of(
        cls, dense: Weight, weight: Weight, mask: Mask, barred: Mask | None, space: _Space, candidates: int
    ) -> _Search:
        units, parts = space.units, len(space.gram)
        bands = len(dense) // units.height
        size = units.height // parts

        def turned(rows: Tensor) -> Tensor:
            # A unit's rows that belong to one group lie together: [bands, parts, size] as [parts, bands, size].
            split = rows.view(bands, parts, size, -1).transpose(0, 1).reshape(parts, bands * size, -1)
            return space.turn(split, space.roots)

        def of_units(flags: Mask) -> Tensor:
            return flags[:: units.height, : units.core[1] : units.width].contiguous()

        values = turned(weight)
        lost = turned(dense) - values
        slope = lost @ space.gram
        energy = torch.linalg.vecdot(lost, slope).view(parts, bands, size).sum((0, 2))
        kept = of_units(mask)
        shape = (parts, bands, size, -1)
        return cls(
            space,
            values.view(shape),
            slope.view(shape),
            kept,
            torch.ones_like(kept) if barred is None else ~of_units(barred),
            energy.abs() * 16 * torch.finfo(energy.dtype).eps,
            torch.zeros_like(kept),
            candidates,
        )

    def result(self, weight: Weight, mask: Mask) -> tuple[Weight, Mask]:
        """The rows after the swaps. What did not move keeps its bits."""
        units, (parts, bands, size, columns) = self.space.units, self.values.shape
        values = self.space.turn(self.values.view(parts, bands * size, columns), self.space.inverses)
        values = values.view(parts, bands, size, columns).transpose(0, 1).reshape(weight.shape)
        weight, mask = weight.clone(), mask.clone()
        moved, kept = (
            flags.repeat_interleave(units.height, 0).repeat_interleave(units.width, 1)
            for flags in (self.moved, self.kept)
        )
        stop = units.core[1]
        weight[:, :stop] = torch.where(moved, values[:, :stop] * kept, weight[:, :stop])
        mask[:, :stop] = kept
        return weight, mask

    def run(self) -> None:
        """Swap until no pair of candidates of any band lowers the error."""
        bands = torch.arange(len(self.kept), device=self.kept.device)
        width = self.space.units.width
        each = self.values.shape[0] * self.values.shape[2] * width * self._count() ** 2
        for _ in range(_MOST):
            busy = [self._series(part) for part in bands.split(max(1, _PAIRS // each))]
            bands = torch.cat(busy)
            if not len(bands):
                return

    def _count(self) -> int:
        """Candidates of each kind."""
        across, span = self.kept.shape[1], self.space.span
        return min(self.candidates, across) if span == across else min(across, span * -(-self.candidates // span))

    def _series(self, bands: Tensor) -> Tensor:
        """Make a series of swaps in some bands, and return the bands in which there was one."""
        width = self.space.units.width
        values = self._by_unit(self.values[:, bands])
        slope = self._by_unit(self.slope[:, bands])
        kept, free = self.kept[bands], ~self.kept[bands] & self.may_return[bands]
        cost = (values * (2 * slope + values)).sum((0, 2, 4)).masked_fill(~kept, torch.inf)
        gain = slope.square().sum((0, 2, 4)).masked_fill(~free, -torch.inf)
        out, back = self._candidates(values, slope, cost, gain)
        pair = kept.gather(1, out).unsqueeze(2) & free.gather(1, back).unsqueeze(1)
        pair &= out.unsqueeze(2) // self.space.span == back.unsqueeze(1) // self.space.span

        both = torch.cat([out, back], 1)
        columns = (both.unsqueeze(2) * width + torch.arange(width, device=both.device)).flatten(1)
        gram = self.space.gram[:, columns.unsqueeze(2), columns.unsqueeze(1)]  # [parts, bands, both, both]
        count, row = out.shape[1], torch.arange(len(bands), device=bands.device)
        leaving = _taken(values, out)  # [parts, bands, rows, count, width]
        ahead = _taken(slope, both)
        joint = gram[:, :, : count * width, count * width :]
        joint = joint.unflatten(3, (count, width)).unflatten(2, (count, width))
        cross = torch.einsum("pbrkw,pbkwqz->pbrkqz", leaving, joint)
        square = cross.square().sum((0, 2, 5))
        removed: list[Tensor] = []
        swapped = torch.zeros(len(bands), dtype=torch.bool, device=bands.device)
        change = torch.zeros_like(ahead)  # of W - V
        for _ in range(count):
            here, there = ahead[:, :, :, :count], ahead[:, :, :, count:]
            delta = (leaving * (2 * here + leaving)).sum((0, 2, 4)).unsqueeze(2) - square
            delta -= there.square().sum((0, 2, 4)).unsqueeze(1)
            delta -= 2 * torch.einsum("pbrkqz,pbrqz->bkq", cross, there)
            best, place = delta.masked_fill_(~pair, torch.inf).flatten(1).min(1)
            good = best < -self.least[bands]
            if not good.any():
                break
            swapped |= good
            u, q = place // count, place % count
            gone = leaving[:, row, :, u] * good.view(-1, 1, 1, 1)  # [bands, parts, rows, width]
            new = (there[:, row, :, q] + cross[:, row, :, u, q]) * good.view(-1, 1, 1, 1)
            step = torch.zeros_like(ahead)
            step[:, row, :, u] += gone
            step[:, row, :, count + q] -= new
            change += step
            ahead = ahead + (step.flatten(3) @ gram).view_as(ahead)
            pair[row[good], u[good]] = False
            pair[row[good], :, q[good]] = False
            removed.append(torch.where(good, place, -1))
        if not removed:
            return bands[swapped]
        self._apply(bands, out, back, change, columns, torch.stack(removed, 1))
        return bands[swapped]

    def _candidates(self, values: Tensor, slope: Tensor, cost: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Units to prune and units to restore, ``[bands, count]`` each."""
        across, span, count = cost.shape[1], self.space.span, self._count()
        if span == across:
            return cost.topk(count, 1, largest=False).indices, gain.topk(count, 1).indices
        # Groups are small: all pairs of each are compared, and the groups with the best pairs are chosen whole.
        width = self.space.units.width
        columns = torch.arange(across * width, device=cost.device).view(-1, span * width)
        blocks = self.space.gram[:, columns.unsqueeze(2), columns.unsqueeze(1)]
        blocks = blocks.unflatten(3, (span, width)).unflatten(2, (span, width))
        grouped = [each.unflatten(3, (-1, span)) for each in (values, slope)]
        ahead = torch.einsum("pbrgkw,pgkwqz->pbrgkqz", grouped[0], blocks) + grouped[1].unsqueeze(4)
        gains = ahead.square().sum((0, 2, 6))
        free = gain.unflatten(1, (-1, span)).unsqueeze(2).isfinite()
        delta = cost.unflatten(1, (-1, span)).unsqueeze(3) - gains.masked_fill(~free, -torch.inf)
        best = delta.nan_to_num(torch.inf, torch.inf).flatten(2).amin(2)
        chosen = best.topk(count // span, 1, largest=False).indices
        members = (chosen.unsqueeze(2) * span + torch.arange(span, device=cost.device)).flatten(1)
        return members, members

    def _by_unit(self, rows: Tensor) -> Tensor:
        split: Tensor = rows[..., : self.space.units.core[1]].unflatten(3, (-1, self.space.units.width))
        return split

    def _apply(self, bands: Tensor, out: Tensor, back: Tensor, change: Tensor, columns: Tensor, places: Tensor) -> None:
        """Write a series of swaps to the state."""
        count, units = out.shape[1], self.space.units
        done = places >= 0
        band = bands.unsqueeze(1).expand_as(places)[done]
        gone = out.gather(1, places.clamp_min(0) // count)[done]
        new = back.gather(1, places.clamp_min(0) % count)[done]
        self.kept[band, gone], self.kept[band, new] = False, True
        self.moved[band, gone] = self.moved[band, new] = True
        parts, size = self.values.shape[0], self.values.shape[2]
        changes = change.flatten(3).reshape(parts, len(bands) * size, -1)
        index = columns.repeat_interleave(size, 0)
        for part in range(parts):
            moved = torch.zeros(len(index), self.values.shape[3]).to(changes)
            moved.scatter_add_(1, index, changes[part])
            self.values[part, bands] -= moved.view(len(bands), size, -1)
            if index.shape[1] * 8 < moved.shape[1]:
                slope = functional.embedding_bag(
                    index, self.space.gram[part], per_sample_weights=changes[part], mode="sum"
                )
            else:
                slope = moved @ self.space.gram[part]
            self.slope[part, bands] += slope.view(len(bands), size, -1)
        # What left is zero exactly.
        stop = units.core[1]
        kept = self.kept[bands].repeat_interleave(units.width, 1).unsqueeze(1)
        for part in range(parts):
            self.values[part, bands, :, :stop] = self.values[part, bands, :, :stop] * kept


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """The values of some units of each band, ``[parts, bands, rows, count, width]``."""
    parts, bands, rows, _, width = values.shape
    taken: Tensor = values.gather(3, index.view(1, bands, 1, -1, 1).expand(parts, -1, rows, -1, width))
    return taken
