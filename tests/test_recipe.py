import tomllib

import pytest

from secateur import (
    NM,
    RIA,
    Block,
    Column,
    Importance,
    Magnitude,
    PatternError,
    Random,
    Recipe,
    RecipeError,
    Refit,
    Row,
    Select,
    Solver,
    SolverError,
    SparseGPT,
    SparsityError,
    Unstructured,
    Wanda,
)
from secateur.pruning import METHODS, parse_method

SOLVERS = {
    "magnitude": Select(Magnitude()),
    "wanda": Select(Wanda()),
    "ria": Select(RIA()),
    "random": Select(Random()),
    "sparsegpt": SparseGPT(),
}
NESTED = [
    Select(RIA(exponent=0.25)),
    Select(Random(seed=7)),
    SparseGPT(block_size=64, damping=0.1),
    Refit(Select(Magnitude()), iterations=3, damping=0.5),
    Refit(SparseGPT(block_size=32)),
    Refit(Refit(Select(RIA(2.0)))),
]
FULL = {
    "pattern": "unstructured",
    "sparsity": 0.6,
    "method": {"name": "refit", "inner": {"name": "ria", "exponent": 0.25}, "iterations": 3, "damping": 0.5},
    "allocation": "uniform",
    "include": ["a.*", "b"],
    "exclude": ["*.c"],
    "sequential": False,
    "measure_error": False,
}


class OwnSolver(Solver):
    needs = frozenset()

    def solve(self, problem):
        raise NotImplementedError


class OwnImportance(Importance):
    needs = frozenset()
    scope = "layer"

    def scores(self, weight, statistics):
        raise NotImplementedError


class Tuned(SparseGPT):
    """A subclass may behave in another way, so its parent's name must not stand for it."""


class Picky(Select):
    """The same."""


def test_every_method_has_a_case_here():
    assert set(METHODS) == set(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_method_is_known_by_name_and_with_refit(name):
    assert Recipe(method=name, sparsity=0.5).method == SOLVERS[name]
    assert Recipe(method=f"{name}+refit", sparsity=0.5).method == Refit(SOLVERS[name])
    assert parse_method(f"  {name.upper()} ") == SOLVERS[name]


def test_an_importance_is_taken_as_selecting_by_it():
    assert Recipe(method=RIA(0.3), sparsity=0.5).method == Select(RIA(0.3))


@pytest.mark.parametrize("method", [*SOLVERS.values(), *map(Refit, SOLVERS.values()), *NESTED], ids=repr)
def test_toml_and_tables_give_the_same_recipe_back(method):
    recipe = Recipe(sparsity=0.3, method=method)
    again = Recipe.from_toml(recipe.to_toml())
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert type(again.method) is type(method)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [
        (Unstructured(), 0.5),
        (Unstructured("row"), 0),
        (Unstructured("layer"), 1),
        (NM(2, 4), None),
        (NM(2, 4), 0.5),
        (NM(1, 3, remainder="dense"), None),
        (Block(4, 2), 0.125),
        (Row(), 1.0),
        (Column(), 1 / 3),
        (Column(9), 0.1 + 0.2),
    ],
    ids=repr,
)
def test_every_pattern_and_sparsity_comes_back_exactly(pattern, sparsity):
    recipe = Recipe(pattern, sparsity)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe(str(pattern), sparsity) == recipe


def test_every_field_comes_back():
    recipe = Recipe.from_dict(FULL)
    assert recipe == Recipe(
        Unstructured(), 0.6, Refit(Select(RIA(0.25)), 3, 0.5), "uniform", ("a.*", "b"), ("*.c",), False, False
    )
    assert recipe.to_dict() == FULL
    assert tomllib.loads(recipe.to_toml()) == FULL


def test_globs_with_quotes_backslashes_and_newlines_survive_toml():
    recipe = Recipe(sparsity=0.5, include=['a"b', "c\\d", "e\nf", "é.*"])
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_a_table_is_a_copy():
    table = {"sparsity": 0.5, "method": {"name": "refit", "inner": {"name": "wanda"}}, "include": ["a"]}
    Recipe.from_dict(table)
    assert table == {"sparsity": 0.5, "method": {"name": "refit", "inner": {"name": "wanda"}}, "include": ["a"]}


@pytest.mark.parametrize("inner", ['"sparsegpt"', '{name = "sparsegpt", block_size = 128}'], ids=["name", "table"])
def test_the_inner_method_may_be_a_name_or_a_table(inner):
    recipe = Recipe.from_toml(f'sparsity = 0.5\n[method]\nname = "refit"\ninner = {inner}\n')
    assert recipe.method == Refit(SparseGPT())


@pytest.mark.parametrize("where", ["include", "exclude"])
@pytest.mark.parametrize("value", ["blocks.*", ["blocks.*"], ("blocks.*",), {"blocks.*": 1}.keys()], ids=repr)
def test_one_glob_or_several(where, value):
    assert getattr(Recipe(sparsity=0.5, **{where: value}), where) == ("blocks.*",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('patern = "2:4"', ["'patern'", "recipe", "did you mean 'pattern'"]),
        ("sparisty = 0.5", ["'sparisty'", "did you mean 'sparsity'"]),
        ("zzz = 1", ["'zzz'", "valid keys are pattern, sparsity, method"]),
        ('sparsity = 0.5\nmethod = "wnada"', ["'wnada'", "did you mean 'wanda'", "sparsegpt"]),
        ('sparsity = 0.5\nmethod = "sparse-gpt"', ["did you mean 'sparsegpt'"]),
        ('sparsity = 0.5\nmethod = "wanda+refitt"', ["'+refitt'", "did you mean '+refit'"]),
        ('sparsity = 0.5\nmethod = "wanda+"', ["unknown method suffix '+'", "+refit"]),
        ('sparsity = 0.5\nmethod = "refit"', ["unknown method 'refit'"]),
        ('sparsity = 0.5\nmethod = ""', ["unknown method ''"]),
        ('sparsity = 0.5\nmethod = {name = "sparsgpt"}', ["'sparsgpt'", "did you mean 'sparsegpt'"]),
        ("sparsity = 0.5\nmethod = {}", ["unknown method"]),
        ('sparsity = 0.5\nmethod = {name = ["wanda"]}', ["unknown method"]),
        ('sparsity = 0.5\nmethod = {name = "sparsegpt", blocksize = 3}', ["'blocksize'", "did you mean 'block_size'"]),
        ('sparsity = 0.5\nmethod = {name = "wanda", damping = 3}', ["unknown key 'damping'", "wanda"]),
        ('sparsity = 0.5\nmethod = {name = "refit"}', ["refit", "inner"]),
        ('sparsity = 0.5\nmethod = {name = "refit", inner = {name = "wnada"}}', ["did you mean 'wanda'"]),
        ('sparsity = 0.5\nallocation = "unifrom"', ["'unifrom'", "did you mean 'uniform'"]),
        ('sparsity = 0.5\nallocation = ["uniform"]', ["unknown allocation"]),
        ("sparsity = ", ["not TOML"]),
        ("sparsity = 0.5\nsparsity = 0.6", ["not TOML"]),
    ],
)
def test_what_is_not_a_recipe_is_an_error_that_helps(text, words):
    with pytest.raises(RecipeError) as raised:
        Recipe.from_toml(text)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('pattern = "2:5:4"', ["'2:5:4' names no pattern", "'block:16x16'"]),
        ('pattern = "unstructred"', ["'unstructred'", "unstructured"]),
        ('pattern = "5:4"', ["n=5, m=4"]),
        ("", ["sparsity=0.5"]),
        ('pattern = "row"', ["row", "sparsity=0.5"]),
        ("sparsity = 50", ["between 0 and 1, got 50", "Did you mean 0.5?"]),
        ("sparsity = 1.5", ["got 1.5"]),
        ("sparsity = -0.1", ["got -0.1"]),
        ("sparsity = nan", ["got nan"]),
        ("sparsity = inf", ["got inf"]),
        ('pattern = "2:4"\nsparsity = 0.6', ["2:4 fixes the sparsity at 0.5, but 0.6 was asked"]),
    ],
)
def test_what_no_pattern_allows_is_an_error_that_helps(text, words):
    with pytest.raises(PatternError) as raised:
        Recipe.from_toml(text)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize("settings", [{"block_size": 0}, {"damping": -1.0}], ids=str)
def test_settings_that_a_method_refuses_are_refused_in_a_recipe(settings):
    with pytest.raises(SolverError):
        Recipe.from_dict({"sparsity": 0.5, "method": {"name": "sparsegpt"} | settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": "0.5"},
        {"sparsity": True},
        {"sparsity": 0.5, "pattern": 24},
        {"sparsity": 0.5, "method": 3},
        {"sparsity": 0.5, "method": Wanda},
        {"sparsity": 0.5, "include": 3},
        {"sparsity": 0.5, "exclude": ["a", 3]},
        {"sparsity": 0.5, "include": None},
        {"sparsity": 0.5, "sequential": 1},
        {"sparsity": 0.5, "measure_error": "no"},
    ],
    ids=str,
)
def test_values_of_the_wrong_type_are_type_errors_that_name_the_field(settings):
    name = list(settings)[-1]
    with pytest.raises(TypeError, match=name):
        Recipe(**settings)


@pytest.mark.parametrize(
    "method", [OwnSolver(), OwnImportance(), Tuned(), Picky(Wanda()), Refit(OwnSolver()), Select(OwnImportance())]
)
def test_a_method_of_ones_own_is_shown_in_a_table_but_cannot_be_written_to_a_file(method):
    recipe = Recipe(sparsity=0.5, method=method)
    table = recipe.to_dict()["method"]
    assert any(type(own).__name__ in str(table) for own in (OwnSolver(), OwnImportance(), Tuned(), Picky(Wanda())))
    with pytest.raises(RecipeError):
        recipe.to_toml()


def test_a_recipe_is_read_from_a_file(tmp_path):
    path = tmp_path / "é.toml"
    recipe = Recipe.from_dict(FULL | {"include": ["é"]})
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.load(path) == Recipe.load(str(path)) == recipe


@pytest.mark.parametrize(
    "content",
    [None, b"sparsity = ", b"sparsity = 50", b"patern = 1", b"\xff\xfe", b'method = "wnada"', b'sparsity = "half"',
     b"sparsity = 0.5\nsequential = 1", b'sparsity = 0.5\nmethod = {name = "sparsegpt", block_size = "big"}'],
)  # fmt: skip
def test_a_file_that_holds_no_recipe_is_named(tmp_path, content):
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as raised:
        Recipe.load(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="cannot read"):
        Recipe.load(tmp_path)


def test_every_error_of_a_recipe_is_a_value_error():
    assert issubclass(RecipeError, SparsityError)
    assert issubclass(SparsityError, ValueError)


def test_a_recipe_cannot_be_changed():
    recipe = Recipe(sparsity=0.5)
    with pytest.raises(AttributeError):
        recipe.sparsity = 0.6
