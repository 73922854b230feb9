"""Every error a user can cause, as one small tree under ``ValueError``.

A message has three clauses: where and what, with the numbers; what was expected and why; what to do. Inner code raises
the bare fact; the boundary that knows the layer's name adds it once, with :func:`naming`.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class SparsityError(ValueError):
    """Base of all errors that secateur raises on purpose."""


class PatternError(SparsityError):
    """A pattern that cannot exist, does not fit a shape, or is broken by a mask."""


class StatisticsError(SparsityError):
    """Calibration inputs that are missing, empty, not finite or not alignable with their attention mask."""


class SolverError(SparsityError):
    """A layer's problem that a solver cannot solve, or a solution that breaks its contract."""


class FormatError(SparsityError):
    """A file or directory that is not what it should be, or could not be written."""


class RecipeError(SparsityError):
    """A recipe, method name or layer selection that cannot be carried out."""


class KernelError(SparsityError):
    """A weight no kernel layout fits, or a backend that does not exist or cannot run here."""


@contextmanager
def naming(title: object, advice: str = "") -> Iterator[None]:
    """Put the name of a layer or file in front of the errors that are raised inside, and advice behind them.

    Args:
        title: what the message begins with.
        advice: a further line of the message.
    """
    try:
        yield
    except SparsityError as error:
        raise type(error)(f"{title}: {error}{advice and chr(10)}{advice}") from None
