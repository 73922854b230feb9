"""Choose windows of text that hold many different words, rare ones above all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def most_diverse(windows: Sequence[Tensor], count: int) -> list[int]:
    r"""Return the places of windows that together hold much of the vocabulary of all, in ascending order.

    Greedily: each time the window is taken that gains most, :math:`\sum_t 1 / n_t` over its tokens t that no window
    taken before it has, where :math:`n_t` is how often t occurs in all windows. By Zipf's law few tokens are frequent
    and most are rare, so that rare ones decide. Where every token is covered, covering begins anew. Of equal windows
    the first is taken: nothing is random.

    Cost: each pair of a window and one of its tokens is looked at twice, each time that covering begins.

    Differs from the paper: its public code scores each window by itself, so that two windows with the same rare words
    are both taken; and it counts words in small letters, which have to be told apart by rules of one language.

    Args:
        windows: of token ids, ``[length]`` each.
        count: how many to take, at most all.

    Reference:
        Monaco et al., "Frequency Matters: Fast Model-Agnostic Data Curation for Pruning and Quantization", 2026,
        arXiv:2603.16105.
    """
    found = [np.unique(window.numpy(), return_counts=True) for window in windows]
    owners = np.repeat(np.arange(len(found)), [len(tokens) for tokens, _ in found])
    _, tokens = np.unique(np.concatenate([tokens for tokens, _ in found]), return_inverse=True)
    worth = 1.0 / np.bincount(tokens, np.concatenate([counts for _, counts in found]))
    of_window = np.split(tokens, np.flatnonzero(np.diff(owners)) + 1)
    by_token = np.argsort(tokens, kind="stable")
    of_token = np.split(owners[by_token], np.cumsum(np.bincount(tokens))[:-1])

    chosen: list[int] = []
    is_free = np.ones(len(found), dtype=bool)
    while len(chosen) < count:
        covered = np.zeros(len(worth), dtype=bool)
        gains = np.bincount(owners, worth[tokens], len(found))
        new = np.bincount(owners, minlength=len(found))  # tokens that are not covered: the gains are rounded
        while len(chosen) < count and new[is_free].any():
            # Rounded, so that equal windows tie whatever was subtracted first: the first one is taken.
            best = int(np.where(is_free & (new > 0), gains.round(9), -1.0).argmax())
            chosen.append(best)
            is_free[best] = False
            for token in of_window[best][~covered[of_window[best]]]:
                covered[token] = True
                gains[of_token[token]] -= worth[token]
                new[of_token[token]] -= 1
    return sorted(chosen)
