"""Every error a user can cause, as one small tree under ``ValueError``.

A message has three clauses: where and what, with the numbers; what was expected and why; what to do. Inner code raises
the bare fact and the boundary that knows the layer's name adds it once.
"""


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
