"""How to prune a model, as one frozen value: checked when it is made, written to and read from TOML."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from secateur._errors import RecipeError
from secateur.patterns import SparsityPattern, Unstructured
from secateur.solvers import RIA, Importance, Magnitude, Random, Refit, Select, Solver, SparseGPT, Wanda

# The one table of method names. An importance's name means Select(importance).
_IMPORTANCES: dict[str, type[Importance]] = {"magnitude": Magnitude, "wanda": Wanda, "ria": RIA, "random": Random}
_SOLVERS: dict[str, type[Solver]] = {"sparsegpt": SparseGPT, "refit": Refit}
METHODS = (*_IMPORTANCES, "sparsegpt")
ALLOCATIONS = ("uniform",)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a model is pruned, apart from the model and the calibration batches.

    Text is accepted where it is natural and turned into values at once, so that a recipe that exists is valid:
    ``Recipe(pattern="2:4", method="wanda+refit")`` holds ``NM(2, 4)`` and ``Refit(Select(Wanda()))``.

    Args:
        pattern: a :class:`SparsityPattern` or its text.
        sparsity: fraction of each layer to prune, in [0, 1]; to be left out for a pattern that fixes its own (N:M).
        method: a :class:`Solver`, or ``"magnitude"``, ``"wanda"``, ``"ria"``, ``"random"`` or ``"sparsegpt"``,
            optionally followed by ``"+refit"``.
        allocation: how the target is shared out among layers; ``"uniform"`` gives every layer the same sparsity.
        include: glob patterns on qualified layer names. Given, exactly those layers are pruned; empty, all but
            embeddings, norms, output heads and layers tied to an embedding.
        exclude: glob patterns that win over ``include``.
        sequential: calibrate each block on the outputs of the blocks already pruned; False uses one pass over the
            dense model.
        measure_error: measure each layer's relative output error. It needs the Gram matrix of each layer's inputs,
            which second-order methods gather anyway and which about doubles the cost of calibrating for Wanda.

    Raises:
        RecipeError: an unknown method or allocation.
        PatternError: an unknown pattern, or a sparsity that is missing, out of range or not the pattern's own.

    Example:
        >>> import secateur
        >>> recipe = secateur.Recipe(pattern="2:4", method="sparsegpt")
        >>> recipe.method
        SparseGPT(block_size=128, damping=0.01)
        >>> secateur.Recipe.from_toml(recipe.to_toml()) == recipe
        True
    """

    pattern: SparsityPattern = field(default_factory=Unstructured)
    sparsity: float | None = None
    method: Solver = field(default_factory=lambda: Select(Wanda()))
    allocation: str = "uniform"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    sequential: bool = True
    measure_error: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", SparsityPattern.parse(self.pattern))
        if isinstance(self.method, str):
            object.__setattr__(self, "method", parse_method(self.method))
        elif isinstance(self.method, Importance):
            object.__setattr__(self, "method", Select(self.method))
        for name, kind in (("pattern", SparsityPattern), ("method", Solver)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(
                    f"{name} must be a {kind.__name__} or its name, got {type(getattr(self, name)).__name__}"
                )
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _globs(name, getattr(self, name)))
        for name in ("sequential", "measure_error"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {type(getattr(self, name)).__name__}")
        if self.allocation not in ALLOCATIONS:
            raise RecipeError(_unknown("allocation", str(self.allocation), ALLOCATIONS))
        self.pattern.resolve(self.sparsity)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as a table of plain values; fields that are None are left out."""
        table = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return table | {
            "pattern": str(self.pattern),
            "method": _method_to_dict(self.method),
            "include": list(self.include),
            "exclude": list(self.exclude),
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a table describes; the inverse of :meth:`to_dict`.

        Raises:
            RecipeError: an unknown key, named with the nearest valid one.
        """
        _check_keys("recipe", table, [f.name for f in fields(cls)])
        values = dict(table)
        if isinstance(values.get("method"), Mapping):
            values["method"] = _method_from_dict(values["method"])
        return cls(**values)

    def to_toml(self) -> str:
        """Return the recipe as TOML.

        Raises:
            RecipeError: the method is a class of your own, which a file cannot name.
        """
        import tomli_w

        table = self.to_dict()
        _method_from_dict(table["method"])
        return tomli_w.dumps(table)

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        """Return the recipe that TOML text describes.

        Raises:
            RecipeError: not TOML, or an unknown key, named with the nearest valid one.

        Example:
            >>> import secateur
            >>> secateur.Recipe.from_toml('patern = "2:4"')
            Traceback (most recent call last):
            secateur._errors.RecipeError: unknown key 'patern' in the recipe; did you mean 'pattern'?
        """
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"the recipe is not TOML: {error}.") from None

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Return the recipe in a TOML file; overrides are settings that win over the file's, or complete them.

        Raises:
            RecipeError: no such file, or not a recipe; the file is named.
        """
        try:
            return cls.from_dict({**tomllib.loads(Path(path).read_text(encoding="utf-8")), **(overrides or {})})
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot read the recipe: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{path}: the recipe is not TOML: {error}.") from None
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{path}: {error}") from None


def parse_method(text: str) -> Solver:
    """Return the solver that ``"wanda"``, ``"sparsegpt+refit"`` and the like name.

    Raises:
        RecipeError: no such method.
    """
    name, plus, suffix = text.strip().lower().partition("+")
    if plus and suffix != "refit":
        raise RecipeError(_unknown("method suffix", f"+{suffix}", ["+refit"]))
    if name not in METHODS:
        raise RecipeError(_unknown("method", name, METHODS))
    solver = Select(_IMPORTANCES[name]()) if name in _IMPORTANCES else _SOLVERS[name]()
    return Refit(solver) if plus else solver


def method_name(solver: Solver) -> str:
    """Return the text that :func:`parse_method` takes for a solver, or its repr if its settings are not the default."""
    names = [f"{name}{suffix}" for suffix in ("", "+refit") for name in METHODS]
    return next((name for name in names if parse_method(name) == solver), repr(solver))


def _method_to_dict(solver: Solver) -> dict[str, Any]:
    value: Solver | Importance = solver.importance if type(solver) is Select else solver
    names: dict[type, str] = {kind: name for name, kind in (*_IMPORTANCES.items(), *_SOLVERS.items())}
    if type(value) not in names or not is_dataclass(value):
        return {"name": type(value).__name__, "repr": repr(solver)}
    settings = {f.name: getattr(value, f.name) for f in fields(value)}
    return {"name": names[type(value)]} | {
        key: _method_to_dict(inner) if isinstance(inner, Solver) else inner for key, inner in settings.items()
    }


def _method_from_dict(table: Mapping[str, Any]) -> Solver:
    settings = dict(table)
    name = settings.pop("name", None)
    kinds: dict[str, type[Importance] | type[Solver]] = {**_IMPORTANCES, **_SOLVERS}
    if not isinstance(name, str) or name not in kinds:
        raise RecipeError(_unknown("method", str(name), kinds))
    kind = kinds[name]
    _check_keys(f"method {name!r}", settings, [f.name for f in fields(kind)])  # type: ignore[arg-type]
    if isinstance(settings.get("inner"), Mapping):
        settings["inner"] = _method_from_dict(settings["inner"])
    elif isinstance(settings.get("inner"), str):
        settings["inner"] = parse_method(settings["inner"])
    elif name == "refit":
        raise RecipeError("method 'refit' needs the method whose mask it refits: inner = \"wanda\", for example.")
    made = kind(**settings)
    return Select(made) if isinstance(made, Importance) else made


def _globs(name: str, value: object) -> tuple[str, ...]:
    """A tuple of globs; a lone string is taken as one glob, not as its letters."""
    globs = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"{name} must be glob patterns (str), got {value!r}")
    return globs


def _check_keys(where: str, table: Mapping[str, Any], valid: Iterable[str]) -> None:
    valid = list(valid)
    for key in table:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys are {', '.join(valid)}."
            raise RecipeError(f"unknown key {key!r} in the {where}; {hint}")


def _unknown(what: str, name: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, 1, 0.5)
    return f"unknown {what} {name!r}{f'; did you mean {near[0]!r}?' if near else '.'} Valid are {', '.join(valid)}."
