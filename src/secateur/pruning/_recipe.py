"""How to prune a model, as one frozen value: checked when it is made, written to and read from TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from secateur._checks import flag, globs, instance, integer, known_keys, number, one_of, pair
from secateur._errors import PatternError, RecipeError, naming
from secateur.patterns import Remainder, SparsityPattern, Unstructured, with_dense_remainder
from secateur.pruning._allocation import ALLOCATIONS
from secateur.solvers import (
    Importance,
    Select,
    Solver,
    Wanda,
    check_damping,
    check_rounding,
    method_from_dict,
    method_to_dict,
    parse_method,
    rounding_of,
    with_damping,
    with_rounding,
)

_NO_BOUNDS = (0.0, 1.0)
_HELD_OUT = 0.2  # of the batches, where the damping is to be chosen and nobody says how many are held out


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a model is pruned, apart from the model and the calibration batches.

    Text is accepted where it is natural and turned into values at once, so that a recipe that exists is valid:
    ``Recipe(pattern="2:4", method="wanda+refit")`` holds ``NM(2, 4)`` and ``Refit(Select(Wanda()))``.

    Args:
        pattern: a :class:`SparsityPattern` or its text.
        sparsity: fraction of each layer to prune, in [0, 1]; to be left out for a pattern that fixes its own (N:M).
            With another allocation than ``"uniform"`` it is that of all layers together, and below that of N:M some
            layers get the pattern and the others stay dense.
        method: a :class:`Solver`, an :class:`Importance`, or the name of one: ``"magnitude"``, ``"wanda"``, ``"ria"``,
            ``"random"``, ``"sparsegpt"``, ``"admm"``, ``"alps"``, or with a loss ``"taylor"``, ``"fisher"`` or
            ``"movement"``, optionally followed by ``"+swaps"`` or ``"+refit"``.
        allocation: how the target is shared out among layers: ``"uniform"`` gives every layer the same sparsity;
            ``"global"``, ``"erk"``, ``"lamp"``, ``"owl"``, ``"alpha"`` and ``"sensitivity"`` each layer its own, see
            :func:`allocate`. The total is the same, to the weight.
        include: glob patterns on qualified layer names. Given, exactly those layers are pruned; empty, all but
            embeddings, norms, output heads and layers tied to an embedding.
        exclude: glob patterns that win over ``include``.
        sequential: calibrate each block on the outputs of the blocks already pruned; False uses one pass over the
            dense model.
        measure_error: measure each layer's relative output error. It needs the Gram matrix of each layer's inputs,
            which second-order methods gather anyway and which about doubles the cost of calibrating for Wanda.
        strict: refuse what is otherwise left dense or calibrated on more than its own inputs, and reported: before any
            weight changes, layers that no calibration input reaches; and when its layer is calibrated, an expert of a
            stack that fewer than 64 inputs reach.
        remainder: for layers whose size the pattern's groups or tiles do not divide, ``"error"`` raises and ``"dense"``
            leaves the columns and rows beyond the last whole one dense, as a pattern with ``remainder="dense"`` does.
            The report notes how many. It is only a way to set the pattern's own ``remainder``, and shows that.
        rounds: prune in that many rounds, each to the next sparsity of a cubic schedule and on the weights that the
            round before left, with statistics gathered again. What a round prunes stays pruned.
        rounding: ``"int8"`` or ``"int4"``: the weights that are kept are rounded as well, to the grid that
            ``pack_(..., value_dtype=...)`` stores, and others make up for the errors, as :class:`SparseGPT` and
            :class:`Refit` say. With ``sparsity=0`` nothing is pruned, and what is zero already stays zero. Of several
            rounds, the last one rounds. It is only a way to set the method's own ``rounding``, and shows that.
        held_out: share of the batches that nothing is learned from, in [0, 1), spread evenly; at least one batch, and
            one less than all. The report has each layer's error on them beside that on the others. It needs a second
            Gram matrix of each layer's inputs, for one block at a time.
        damping: ``"auto"`` solves each layer with a damping of 0.001, 0.01, 0.1 and 1, keeps the one that loses least
            on the held-out batches, and notes that in the report: four times the time of solving. Without
            ``held_out``, 0.2 of the batches are held out then. A number sets the ``damping`` of the method and of all
            methods inside it; it is only a way to set those, and None after that.
        sparsity_bounds: the lowest and the highest sparsity that an allocation may give a layer, at the end. With a
            highest of 1, ``sensitivity`` still leaves every layer a quarter of the share of the whole.

    Raises:
        RecipeError: an unknown method, allocation or rounding, a method that cannot round or that has no damping to
            set, a share that is none, rounds below 1, or bounds that the sparsity is not within.
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
    # Later than version 0.1.0, whose recipes keep their form.
    strict: bool = field(default=False, repr=False)
    remainder: Remainder = field(default="error", repr=False)
    rounds: int = field(default=1, repr=False)
    rounding: str | None = field(default=None, repr=False)
    held_out: float = field(default=0.0, repr=False)
    damping: float | str | None = field(default=None, repr=False)
    sparsity_bounds: tuple[float, float] = field(default=_NO_BOUNDS, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", SparsityPattern.parse(self.pattern))
        if isinstance(self.method, str):
            object.__setattr__(self, "method", parse_method(self.method))
        elif isinstance(self.method, Importance):
            object.__setattr__(self, "method", Select(self.method))
        instance("pattern", self.pattern, SparsityPattern, "a SparsityPattern or its name")  # type: ignore[type-abstract]
        if one_of("remainder", self.remainder, ("error", "dense")) == "dense":
            object.__setattr__(self, "pattern", with_dense_remainder(self.pattern))
        object.__setattr__(self, "remainder", getattr(self.pattern, "remainder", "error"))
        instance("method", self.method, Solver, "a Solver or its name")  # type: ignore[type-abstract]
        check_rounding(self.rounding)
        if self.rounding is not None:
            object.__setattr__(self, "method", with_rounding(self.method, self.rounding))
        object.__setattr__(self, "rounding", rounding_of(self.method))
        for name in ("include", "exclude"):
            object.__setattr__(self, name, globs(name, getattr(self, name)))
        for name in ("sequential", "measure_error", "strict"):
            flag(name, getattr(self, name))
        one_of("allocation", self.allocation, ALLOCATIONS)
        integer("rounds", self.rounds, 1)
        object.__setattr__(self, "held_out", number("held_out", self.held_out))
        if not 0 <= self.held_out < 1:
            raise RecipeError(
                f"held_out is the share of the batches that nothing is learned from, in [0, 1); got {self.held_out:g}."
            )
        self._set_damping()
        object.__setattr__(self, "sparsity_bounds", _bounds(self.sparsity_bounds))
        self._check_target()

    @property
    def goal(self) -> float:
        """The sparsity of all layers together."""
        goal = self.pattern.sparsity if self.sparsity is None else self.sparsity
        assert goal is not None
        return float(goal)

    def _check_target(self) -> None:
        fixed, low, high = self.pattern.sparsity, *self.sparsity_bounds
        some_layers = fixed is not None and self.sparsity is not None and 0 <= self.sparsity < fixed - 1e-9
        if not some_layers or self.allocation == "uniform":
            try:
                self.pattern.resolve(self.sparsity)
            except PatternError as error:
                way = "\nAn allocation such as 'sensitivity' reaches less: it leaves some layers dense."
                raise PatternError(f"{error}{way * some_layers}") from None
        if not low <= self.goal <= high:
            raise RecipeError(
                f"sparsity_bounds=({low:g}, {high:g}) are those of every layer, so that all of them together have a "
                f"sparsity from {low:g} to {high:g}, and {self.goal:g} was asked for.\nWiden the bounds."
            )
        if some_layers and not (low == 0 and fixed is not None and fixed <= high):
            raise RecipeError(
                f"a layer under {self.pattern} has a sparsity of {fixed:g} or 0, and sparsity_bounds=({low:g}, "
                f"{high:g}) leave out one of them.\nLeave sparsity_bounds out."
            )

    def _set_damping(self) -> None:
        if isinstance(self.damping, str):
            one_of("damping", self.damping, ["auto"])
            check_damping(self.method)
            object.__setattr__(self, "held_out", self.held_out or _HELD_OUT)
        elif self.damping is not None:
            object.__setattr__(self, "method", with_damping(self.method, self.damping))
            object.__setattr__(self, "damping", None)  # the method says it

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as a table of plain values; fields that are None are left out."""
        table = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        del table["remainder"]  # the pattern says it
        table.pop("rounding", None)  # the method says it
        if not self.strict:
            del table["strict"]
        if self.rounds == 1:
            del table["rounds"]
        if self.sparsity_bounds == _NO_BOUNDS:
            del table["sparsity_bounds"]
        else:
            table["sparsity_bounds"] = list(self.sparsity_bounds)
        if not self.held_out:
            del table["held_out"]
        return table | {
            "pattern": str(self.pattern),
            "method": method_to_dict(self.method),
            "include": list(self.include),
            "exclude": list(self.exclude),
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a table describes; the inverse of :meth:`to_dict`.

        Raises:
            RecipeError: an unknown key, named with the nearest valid one.
        """
        if "stage" in table:
            raise RecipeError(
                "this is the recipe of a pipeline, with stages. Run it so: secateur run MODEL_DIR --recipe FILE "
                "--output OUT; in Python: secateur.Pipeline.load(FILE).run(MODEL_DIR, OUT)."
            )
        known_keys("recipe", table, [f.name for f in fields(cls)])
        values = dict(table)
        if isinstance(values.get("method"), Mapping):
            values["method"] = method_from_dict(values["method"])
        return cls(**values)

    def to_toml(self) -> str:
        """Return the recipe as TOML.

        Raises:
            RecipeError: the method is a class of your own, which a file cannot name.
        """
        import tomli_w

        table = self.to_dict()
        method_from_dict(table["method"])
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
            secateur._errors.RecipeError: unknown key 'patern' in the recipe; did you mean 'pattern'? Valid are ...
        """
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"the recipe is not TOML: {error}.") from None

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Return the recipe in a TOML file; overrides are settings that win over the file's, or complete them.

        Raises:
            RecipeError: no such file, not TOML, an unknown key or method, or a value of the wrong type.
            PatternError: an unknown pattern, or a sparsity that is missing, out of range or not the pattern's own.
            The message of either begins with the file's name.
        """
        with naming(path):
            try:
                return cls.from_dict({**tomllib.loads(Path(path).read_text(encoding="utf-8")), **(overrides or {})})
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"cannot read the recipe: {error}") from None
            except tomllib.TOMLDecodeError as error:
                raise RecipeError(f"the recipe is not TOML: {error}.") from None
            except TypeError as error:
                raise RecipeError(str(error)) from None


def _bounds(value: object) -> tuple[float, float]:
    low, high = pair("sparsity_bounds", value)
    if not 0 <= low <= high <= 1:
        raise RecipeError(
            f"sparsity_bounds are the lowest and the highest sparsity of a layer, with 0 <= low <= high <= 1; got "
            f"({low:g}, {high:g})."
        )
    return low, high
