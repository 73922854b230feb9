"""The published ADMM and ALPS: slow, in float64, as their code does it, without the faults that hide the method.

They call no algorithm of the library.
"""

import math

import numpy as np
import reference

from secateur import NM, SparsityPattern


def admm(
    weight: np.ndarray,
    gram: np.ndarray,
    pattern: SparsityPattern,
    sparsity: float,
    iterations: int = 20,
    gradual: int = 15,
    rho: float = 1.0,
    damping: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and mask by arXiv:2401.02938, with the gradual mask that its code leaves out by default."""
    norm = np.sqrt(np.diag(gram)) + 1e-8
    hessian = gram / norm / norm[:, None]
    hessian = hessian + damping * np.diag(hessian).mean() * np.eye(len(gram))
    target = (weight * norm) @ hessian
    inverse = np.linalg.inv(hessian + rho * np.eye(len(gram)))
    solved, dual = weight * norm, np.zeros(weight.shape)
    mask = np.ones(weight.shape, dtype=bool)
    for turn in range(iterations):
        if turn < gradual:
            mask = gradual_mask(pattern, np.abs(solved + dual), sparsity, (turn + 1) / gradual)
        sparse = (solved + dual) * mask
        dual = dual + solved - sparse
        solved = (target + rho * (sparse - dual)) @ inverse
    return (solved + dual) * mask / norm, mask


def gradual_mask(pattern: SparsityPattern, scores: np.ndarray, sparsity: float, progress: float) -> np.ndarray:
    """At ``s - s (1 - progress)^3``. As the code has it for 2:4, N:M prunes the smallest of what it would prune."""
    share = sparsity - sparsity * (1 - progress) ** 3
    if not isinstance(pattern, NM):
        return reference.mask(pattern, scores, share)
    protected = np.where(reference.mask(pattern, scores, sparsity), math.inf, scores)
    order = np.argsort(protected, axis=None, kind="stable")
    kept = np.ones(scores.size, dtype=bool)
    kept[order[: min(int(share * scores.size), int((protected < math.inf).sum()))]] = False
    return kept.reshape(scores.shape) if progress < 1 else reference.mask(pattern, scores, sparsity)


def alps(
    weight: np.ndarray,
    gram: np.ndarray,
    pattern: SparsityPattern,
    sparsity: float,
    damping: float = 0.01,
    rho: float = 0.1,
    iterations: int = 300,
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and mask by arXiv:2406.07831, with the steps of rho and the end of its code."""
    hessian = gram + damping * np.diag(gram).mean() * np.eye(len(gram))
    norm = np.sqrt(np.diag(hessian)) + 1e-8
    hessian = hessian / norm / norm[:, None]
    values, vectors = np.linalg.eigh(hessian)
    dense = weight * norm
    target = dense @ hessian
    first = reference.mask(pattern, np.abs(dense), sparsity)
    support = first
    sparse, dual, solved = dense * first, np.zeros(weight.shape), dense
    changed = False
    for turn in range(1, iterations + 1):
        solved = (target - dual + rho * sparse) @ (vectors / (values + rho)) @ vectors.T
        mask = reference.mask(pattern, np.abs(solved + dual / rho), sparsity)
        sparse = (solved + dual / rho) * mask
        dual = dual + rho * (solved - sparse)
        if turn % 3:
            continue
        moved = int((mask != support).sum())
        support = mask
        share = moved / max(1, int(mask.sum()))
        if share > 0.005:
            changed = True
            rho *= 1.3 if share > 0.1 else 1.2
        elif changed and not moved:
            break
        elif changed:
            rho *= 1.1
        else:
            rho /= 5
            if moved:
                sparse, dual = dense * first, np.zeros(weight.shape)
        rho = min(rho, 1e6)
        if turn > 30 and share < 0.0003:
            break
    mask = reference.mask(pattern, np.abs(solved), sparsity)
    return conjugate_gradients(hessian, target, solved * mask, mask, 10) / norm, mask


def conjugate_gradients(
    hessian: np.ndarray, target: np.ndarray, start: np.ndarray, mask: np.ndarray, iterations: int
) -> np.ndarray:
    """Each row by itself, on its own support."""
    solved = start.copy()
    for i in range(len(start)):
        residual = (target[i] - solved[i] @ hessian) * mask[i]
        direction = residual.copy()
        for _ in range(iterations):
            energy = residual @ residual
            if energy <= 1e-30:
                break
            product = (direction @ hessian) * mask[i]
            step = energy / (direction @ product)
            solved[i] += step * direction
            residual = residual - step * product
            direction = residual + residual @ residual / energy * direction
    return solved
