"""Slow float64 truth, written from the papers with loops and brute force; no algorithm of the library is called."""

from __future__ import annotations

import itertools
import math

import numpy as np

from secateur import NM, Block, Column, Row, SparsityPattern, TransposableNM, Unstructured

Unit = list[tuple[int, int]]  # the (row, column) of each weight that is kept or pruned together


# Scores


def magnitude(weight: np.ndarray) -> np.ndarray:
    scores = np.zeros(weight.shape)
    for i, j in np.ndindex(*weight.shape):
        scores[i, j] = abs(weight[i, j])
    return scores


def input_norms(inputs: np.ndarray) -> np.ndarray:
    """L2 norm of each column of ``[tokens, in]``."""
    return np.array([math.sqrt(math.fsum(float(x) ** 2 for x in inputs[:, j])) for j in range(inputs.shape[1])])


def input_means(inputs: np.ndarray) -> np.ndarray:
    return np.array([math.fsum(float(x) for x in inputs[:, j]) / len(inputs) for j in range(inputs.shape[1])])


def gram(inputs: np.ndarray) -> np.ndarray:
    """Sum over tokens of the outer product of a token's inputs with themselves."""
    total = np.zeros((inputs.shape[1], inputs.shape[1]))
    for token in inputs:
        total += np.outer(token, token)
    return total


def wanda(weight: np.ndarray, norms: np.ndarray) -> np.ndarray:
    scores = np.zeros(weight.shape)
    for i, j in np.ndindex(*weight.shape):
        scores[i, j] = abs(weight[i, j]) * norms[j]
    return scores


def taylor(weight: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    return abs(_removal(weight, gradient))


def fisher(weight: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """The root of the cost, so that the squares of scores add up to the cost of a unit."""
    scores = np.zeros(weight.shape)
    for place in np.ndindex(*weight.shape):
        scores[place] = math.sqrt(float(weight[place]) ** 2 * float(squares[place]) / 2)
    return scores


def movement(weight: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The root of how much more the loss gains by the weight than by the worst of the layer."""
    change = _removal(weight, gradient)
    return np.vectorize(math.sqrt)(change - change.min())


def _removal(weight: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """How the loss changes when a weight becomes zero, to first order."""
    change = np.zeros(weight.shape)
    for place in np.ndindex(*weight.shape):
        change[place] = (0 - float(weight[place])) * float(gradient[place])
    return change


def ria(weight: np.ndarray, norms: np.ndarray, exponent: float = 0.5) -> np.ndarray:
    scores = np.zeros(weight.shape)
    for i, j in np.ndindex(*weight.shape):
        if weight[i, j] and norms[j]:
            of_its_input = sum(abs(weight[k, j]) for k in range(weight.shape[0]))
            of_its_output = sum(abs(weight[i, k]) for k in range(weight.shape[1]))
            share = abs(weight[i, j]) / of_its_input + abs(weight[i, j]) / of_its_output
            scores[i, j] = share * norms[j] ** exponent
    return scores


# Masks


def competitions(pattern: SparsityPattern, rows: int, columns: int) -> list[list[Unit]]:
    """Which units compete with which; what belongs to no unit stays dense."""
    match pattern:
        case Unstructured(scope="row"):
            return [[[(i, j)] for j in range(columns)] for i in range(rows)]
        case Unstructured():
            return [[[(i, j)] for i in range(rows) for j in range(columns)]]
        case NM(_, m):
            return [[[(i, g * m + j)] for j in range(m)] for i in range(rows) for g in range(columns // m)]
        case Block(height, width):
            corners = itertools.product(range(rows // height), range(columns // width))
            return [[_tile(a * height, b * width, height, width) for a, b in corners]]
        case Row():
            return [[_tile(i, 0, 1, columns) for i in range(rows)]]
        case Column(width):
            return [[_tile(0, j * width, rows, width) for j in range(columns // width)]]
    raise AssertionError(pattern)


def _tile(top: int, left: int, height: int, width: int) -> Unit:
    return [(i, j) for i in range(top, top + height) for j in range(left, left + width)]


def unit_score(scores: np.ndarray, unit: Unit) -> float:
    values = [float(scores[place]) for place in unit]
    return values[0] if len(values) == 1 else math.fsum(value * abs(value) for value in values)


def best(values: list[float], keep: int) -> set[int]:
    """Indices of the ``keep`` largest; of equals, the first."""
    return set(sorted(range(len(values)), key=lambda index: (-values[index], index))[:keep])


def mask(pattern: SparsityPattern, scores: np.ndarray, sparsity: float) -> np.ndarray:
    """True where kept: in each competition ``round(sparsity * units)`` units go."""
    kept = np.ones(scores.shape, dtype=bool)
    if isinstance(pattern, TransposableNM):
        rows, columns = (size - size % pattern.m for size in scores.shape)
        kept[:rows, :columns] = transposable_mask(scores[:rows, :columns], pattern.n, pattern.m)
        return kept
    for units in competitions(pattern, *scores.shape):
        survivors = best([unit_score(scores, unit) for unit in units], len(units) - round(sparsity * len(units)))
        for index, unit in enumerate(units):
            for place in unit:
                kept[place] = index in survivors
    return kept


def nm_mask(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """The best total score among all C(m, n) choices in each group; the first such choice in lexicographic order."""
    kept = np.zeros(scores.shape, dtype=bool)
    for i, start in itertools.product(range(scores.shape[0]), range(0, scores.shape[1], m)):
        choices = itertools.combinations(range(start, start + m), n)
        for j in max(choices, key=lambda choice: math.fsum(scores[i, j] for j in choice)):
            kept[i, j] = True
    return kept


def transposable_mask(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """The best total score among all masks of each m x m tile with n in each row and column; the first such mask."""
    kept = np.zeros(scores.shape, dtype=bool)
    rows = list(itertools.combinations(range(m), n))
    legal = [
        choice
        for choice in itertools.product(rows, repeat=m)
        if all(sum(column in row for row in choice) == n for column in range(m))
    ]
    for top, left in itertools.product(range(0, scores.shape[0], m), range(0, scores.shape[1], m)):
        tile = scores[top : top + m, left : left + m]
        best = max(legal, key=lambda choice: math.fsum(tile[i, j] for i, row in enumerate(choice) for j in row))
        for i, row in enumerate(best):
            for j in row:
                kept[top + i, left + j] = True
    return kept


# Group lasso


def group_penalty(weight: np.ndarray, pattern: SparsityPattern, strength: float) -> float:
    """``strength * sum of sqrt(|g|) * ||w_g||`` over units, with the norm by ``math.hypot``."""
    units = itertools.chain.from_iterable(competitions(pattern, *weight.shape))
    return strength * math.fsum(math.sqrt(len(unit)) * math.hypot(*(weight[place] for place in unit)) for unit in units)


def group_prox(weight: np.ndarray, pattern: SparsityPattern, threshold: float) -> np.ndarray:
    """The proximal step by Moreau's decomposition: each unit less its projection on the dual norm's ball."""
    shrunk = weight.astype(np.float64).copy()
    for unit in itertools.chain.from_iterable(competitions(pattern, *weight.shape)):
        norm = math.hypot(*(weight[place] for place in unit))
        radius = threshold * math.sqrt(len(unit))
        for place in unit:
            projected = weight[place] if norm <= radius else weight[place] * (radius / norm)
            shrunk[place] = weight[place] - projected
    return shrunk


# Gate


def gate_schedule(final: float, begin: int, end: int, step: int) -> float:
    """Zhu and Gupta's cubic, from zero."""
    part = 1.0 if step >= end else max(0.0, (step - begin) / (end - begin))
    return final * (1 - (1 - part) ** 3)


def gate_thresholds(weight: np.ndarray, pattern: SparsityPattern, sparsity: float) -> list[float | None]:
    """Halfway between the last score that goes and the first that stays; None where all go or all stay."""
    cuts: list[float | None] = []
    for units in competitions(pattern, *weight.shape):
        scores = sorted(_root_mean_square(weight, unit) for unit in units)
        prune = round(sparsity * len(scores))
        cuts.append((scores[prune - 1] + scores[prune]) / 2 if 0 < prune < len(scores) else None)
    return cuts


def gate_effective(weight: np.ndarray, pattern: SparsityPattern, sparsity: float, temperature: float) -> np.ndarray:
    """``w * sigmoid((score / threshold - 1) * temperature)``, the threshold solved from these very weights."""
    return weight * _gate_mask(weight, weight, pattern, sparsity, temperature)


def gate_gradient(
    weight: np.ndarray, upstream: np.ndarray, pattern: SparsityPattern, sparsity: float, temperature: float
) -> np.ndarray:
    """The gradient of ``sum(upstream * weight * mask)`` by central differences.

    After each nudge the offset of the sigmoids is found anew, by bisection, so that the masks of a competition keep
    their sum; the slope stays what it was.
    """
    gradient = np.zeros(weight.shape)
    nudge = 1e-5
    for place in np.ndindex(*weight.shape):
        for sign in (1, -1):
            moved = weight.copy()
            moved[place] += sign * nudge
            mask = _gate_mask(moved, weight, pattern, sparsity, temperature)
            gradient[place] += sign * float((upstream * moved * mask).sum()) / (2 * nudge)
    return gradient


def _gate_mask(
    weight: np.ndarray, origin: np.ndarray, pattern: SparsityPattern, sparsity: float, temperature: float
) -> np.ndarray:
    """The mask of ``weight``, with the slopes and the sums of the masks of ``origin``."""
    result = np.ones(weight.shape)
    thresholds = gate_thresholds(origin, pattern, sparsity)
    for units, threshold in zip(competitions(pattern, *weight.shape), thresholds, strict=True):
        if threshold is None:
            value = 0.0 if round(sparsity * len(units)) else 1.0
            for place in itertools.chain.from_iterable(units):
                result[place] = value
            continue
        slope = temperature / threshold
        before = [slope * _root_mean_square(origin, unit) - temperature for unit in units]
        now = [slope * _root_mean_square(weight, unit) - temperature for unit in units]
        total = math.fsum(map(_sigmoid, before))
        low, high = -1.0, 1.0
        for _ in range(80):
            middle = (low + high) / 2
            if math.fsum(_sigmoid(x + middle) for x in now) < total:
                low = middle
            else:
                high = middle
        for unit, x in zip(units, now, strict=True):
            for place in unit:
                result[place] = _sigmoid(x + (low + high) / 2)
    return result


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _root_mean_square(weight: np.ndarray, unit: Unit) -> float:
    return math.sqrt(math.fsum(float(weight[place]) ** 2 for place in unit) / len(unit))


# Second-order methods


def damped(gram: np.ndarray, damping: float) -> np.ndarray:
    """``H + damping * mean(diag(H)) * I``; a never active input gets a unit diagonal, as in the paper's code."""
    dead = np.diag(gram) == 0
    return gram + damping * np.diag(gram).mean() * np.eye(len(gram)) + np.diag(dead.astype(float))


def sparsegpt(
    weight: np.ndarray,
    gram: np.ndarray,
    pattern: SparsityPattern,
    sparsity: float,
    block_size: int = 128,
    damping: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and mask, by algorithm 1 of arXiv:2301.00774.

    Upper Cholesky factor of the inverse Hessian, one column after the other, each error spread over all later columns
    at once. A block is decided when the sweep reaches it; the numbers pruned in the first b columns are, at every block
    boundary b, those that pruning an ``[out, b]`` layer at this sparsity would give.

    A unit of several weights costs the squared error of its removal when all later columns are free. Units that
    have all rows go greedily, with a new fit of all that is left each time.
    """
    units = competitions(pattern, *weight.shape)
    if len(units) == 1 and units[0] and len(units[0][0]) > 1 and {i for i, _ in units[0][0]} == set(range(len(weight))):
        hessian = damped(gram, damping)
        of_units = [sorted({j for _, j in unit}) for unit in units[0]]
        keep = len(of_units) - round(sparsity * len(of_units))
        order, _ = greedy_removal(weight * (np.diag(gram) != 0), hessian, of_units, keep)
        kept = np.ones(weight.shape, dtype=bool)
        kept[:, [j for number in order for j in of_units[number]]] = False
        return masked_least_squares(weight, hessian, kept), kept
    current = weight.astype(np.float64).copy()
    rows, columns = current.shape
    upper = np.linalg.cholesky(np.linalg.inv(damped(gram, damping))).T
    alive = np.diag(gram) != 0
    kept = np.ones(current.shape, dtype=bool)
    first = None  # a mask that says how many units of several weights each block loses
    if len(units) == 1 and units[0] and len(units[0][0]) > 1 and not isinstance(pattern, Row):
        hessian = damped(gram, damping)
        costs = []
        for unit in units[0]:
            here = sorted({j for _, j in unit})
            parts = [weight[i, here] * alive[here] for i in sorted({i for i, _ in unit})]
            swept = math.fsum(float(((w @ np.linalg.inv(upper[np.ix_(here, here)])) ** 2).sum()) for w in parts)
            alone = math.fsum(float(w @ hessian[np.ix_(here, here)] @ w) for w in parts)
            costs.append(math.sqrt(swept * alone))
        survivors = best(costs, len(costs) - round(sparsity * len(costs)))
        first = [(unit, index in survivors) for index, unit in enumerate(units[0])]
    for start, stop in _column_blocks(pattern, columns, block_size):
        scores = np.zeros((rows, stop - start))
        for unit in itertools.chain.from_iterable(competitions(pattern, rows, stop - start)):
            for i in {i for i, _ in unit}:
                columns_of = [j for k, j in unit if k == i]
                here = [start + j for j in columns_of]
                scores[i, columns_of] = np.abs(
                    (current[i, here] * alive[here]) @ np.linalg.inv(upper[np.ix_(here, here)])
                )
        before = competitions(pattern, rows, start)
        after = competitions(pattern, rows, stop)
        if isinstance(pattern, TransposableNM):
            kept[:, start:stop] = mask(pattern, scores, sparsity)
        for number, units in enumerate(competitions(pattern, rows, stop - start)):
            if isinstance(pattern, TransposableNM):
                break
            if isinstance(pattern, NM):
                prune = pattern.m - pattern.n
            else:
                already = round(sparsity * len(before[number])) if start else 0
                prune = round(sparsity * len(after[number])) - already
            if first is not None:
                prune = sum(not stays and start <= unit[0][1] < stop for unit, stays in first)
            survivors = best([unit_score(scores, unit) for unit in units], len(units) - prune)
            for index, unit in enumerate(units):
                for i, j in unit:
                    kept[i, start + j] = index in survivors
        for j in range(start, stop):
            error = np.where(kept[:, j], 0.0, current[:, j]) / upper[j, j]
            current[:, j:] -= np.outer(error, upper[j, j:])
            current[~kept[:, j], j] = 0.0
    return current, kept


def _column_blocks(pattern: SparsityPattern, columns: int, block_size: int) -> list[tuple[int, int]]:
    """Ranges of columns that are decided together: the fewest whole units that fill ``block_size`` columns."""
    match pattern:
        case NM(_, m):
            step = m
        case Row():
            step = columns
        case Block(_, width) | Column(width):
            step = next(size for size in itertools.count(width, width) if size >= block_size)
        case _:
            step = block_size
    return [(start, min(start + step, columns)) for start in range(0, columns, step)]


def optimal_brain_surgeon(weight: np.ndarray, hessian: np.ndarray, index: int) -> np.ndarray:
    """One row after its weight ``index`` was removed and all others moved to make up for it."""
    inverse = np.linalg.inv(hessian)
    return weight - weight[index] / inverse[index, index] * inverse[index]


def masked_least_squares(weight: np.ndarray, hessian: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The V, zero outside the mask, of least ``(w - v) H (w - v)`` in each row, by its normal equations."""
    solved = np.zeros(weight.shape)
    for i in range(len(weight)):
        kept = mask[i]
        right = hessian[kept][:, ~kept] @ weight[i, ~kept]
        solved[i, kept] = weight[i, kept] + np.linalg.solve(hessian[kept][:, kept], right)
    return solved


def objective(weight: np.ndarray, solution: np.ndarray, hessian: np.ndarray) -> float:
    """Sum over rows of ``(w - v) H (w - v)``."""
    return math.fsum((w - v) @ hessian @ (w - v) for w, v in zip(weight, solution, strict=True))


# Units: columns that go together


def unit_magnitude(weight: np.ndarray, unit: list[int]) -> float:
    return math.fsum(float(weight[i, j]) ** 2 for i in range(len(weight)) for j in unit)


def unit_wanda(weight: np.ndarray, inputs: np.ndarray, unit: list[int]) -> float:
    """Sum over columns of the squared error if that column alone were removed."""
    return math.fsum(float(x * w) ** 2 for j in unit for x in inputs[:, j] for w in weight[:, j])


def unit_flap(weight: np.ndarray, inputs: np.ndarray, unit: list[int]) -> float:
    """Sum over columns of the squared error if that column alone were replaced by its mean."""
    means = input_means(inputs)
    return math.fsum(float((x - means[j]) * w) ** 2 for j in unit for x in inputs[:, j] for w in weight[:, j])


def without_columns(weight: np.ndarray, hessian: np.ndarray, columns: list[int]) -> tuple[np.ndarray, float]:
    """The best weight that is zero in some columns, and its error."""
    kept = np.ones(weight.shape, dtype=bool)
    kept[:, columns] = False
    solved = masked_least_squares(weight, hessian, kept)
    return solved, objective(weight, solved, hessian)


def greedy_removal(
    weight: np.ndarray, hessian: np.ndarray, units: list[list[int]], keep: int
) -> tuple[list[int], list[float]]:
    """Remove the unit that leaves the least error, each time by a new fit of all that is left."""
    order: list[int] = []
    costs: list[float] = []
    while len(order) < len(units) - keep:
        tried = {}
        for unit in range(len(units)):
            if unit not in order:
                gone = [j for other in [*order, unit] for j in units[other]]
                tried[unit] = without_columns(weight, hessian, gone)[1]
        order.append(min(tried, key=lambda unit: tried[unit]))
        costs.append(tried[order[-1]])
    return order, costs


def refit_columns(
    weight: np.ndarray, inputs: np.ndarray, kept: np.ndarray, damping: float, *, bias: bool, weights: bool = True
) -> tuple[np.ndarray, np.ndarray, float]:
    """New weight, what the bias gains, and the squared error, by least squares on the inputs themselves.

    The ridge is rows of inputs more, for which the new weight shall give what the dense one gives.
    """
    centred = inputs - inputs.mean(0) if bias else inputs
    ridge = math.sqrt(damping * np.diag(centred.T @ centred).mean())
    extended = np.concatenate([centred, ridge * np.eye(len(kept))])
    solved = np.zeros(weight.shape)
    solved[:, kept] = weight[:, kept]
    if weights:
        lost = extended[:, ~kept] @ weight[:, ~kept].T
        solved[:, kept] += np.linalg.lstsq(extended[:, kept], lost, rcond=None)[0].T
    shift = (weight - solved) @ inputs.mean(0) if bias else np.zeros(len(weight))
    return solved, shift, float((((weight - solved) @ inputs.T - shift[:, None]) ** 2).sum())


def unit_taylor(gradients: np.ndarray, unit: list[int]) -> float:
    return abs(math.fsum(float(batch[j]) for batch in gradients for j in unit))


def unit_fisher(gradients: np.ndarray, unit: list[int]) -> float:
    return math.fsum(math.fsum(float(batch[j]) for j in unit) ** 2 for batch in gradients)


def influence(x: np.ndarray, y: np.ndarray) -> float:
    """Of one token."""
    product = math.fsum(float(a) * float(b) for a, b in zip(x, y, strict=True))
    return 1 - product / math.sqrt(math.fsum(float(a) ** 2 for a in x) * math.fsum(float(b) ** 2 for b in y))


# Rounding


def nearest_multiple(value: float, step: float, limit: int) -> float:
    return max(-limit, min(limit, round(value / step))) * step


def round_by_columns(
    weight: np.ndarray, mask: np.ndarray, hessian: np.ndarray, steps: np.ndarray, limit: int
) -> np.ndarray:
    """GPTQ, arXiv:2210.17323: each column is rounded, and its error is spread over all later columns at once."""
    current = weight.astype(np.float64).copy()
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    for j in range(current.shape[1]):
        for i in range(len(current)):
            goal = nearest_multiple(current[i, j], steps[i, j], limit) if mask[i, j] else 0.0
            current[i, j:] -= (current[i, j] - goal) / upper[j, j] * upper[j, j:]
            current[i, j] = goal
    return current
