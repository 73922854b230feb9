import tomllib

import pytest
from cases import METHODS

from secateur import (
    NM,
    RIA,
    Block,
    Column,
    PatternError,
    Recipe,
    RecipeError,
    Refit,
    Row,
    Select,
    Solver,
    SparsityError,
    Unstructured,
    Wanda,
)

FULL = {
    "pattern": "unstructured",
    "sparsity": 0.6,
    "method": {"name": "refit", "inner": {"name": "ria", "exponent": 0.25}, "iterations": 3, "damping": 0.5},
    "allocation": "uniform",
    "include": ["a.*", "b"],
    "exclude": ["*.c"],
    "sequential": False,
    "measure_error": False,
    "strict": True,
    "remainder": "dense",
}


def test_an_importance_is_taken_as_selecting_by_it():
    assert Recipe(method=RIA(0.3), sparsity=0.5).method == Select(RIA(0.3))


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
        Unstructured(),
        0.6,
        Refit(Select(RIA(0.25)), 3, 0.5),
        "uniform",
        ("a.*", "b"),
        ("*.c",),
        False,
        False,
        True,
        "dense",
    )
    assert recipe.to_dict() == FULL
    assert tomllib.loads(recipe.to_toml()) == FULL


def test_globs_with_quotes_backslashes_and_newlines_survive_toml():
    recipe = Recipe(sparsity=0.5, include=['a"b', "c\\d", "e\nf", "é.*"])
    assert Recipe.from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back(method):
    recipe = Recipe(sparsity=0.3, method=method)
    assert recipe.method == METHODS[method]
    again = Recipe.from_toml(recipe.to_toml())
    assert again == Recipe.from_dict(recipe.to_dict()) == recipe
    assert hash(again) == hash(recipe)


def test_a_method_of_ones_own_cannot_be_written_to_a_file():
    class Own(Solver):
        needs = frozenset()

        def solve(self, problem):
            raise NotImplementedError

    recipe = Recipe(sparsity=0.5, method=Own())
    assert recipe.to_dict()["method"]["name"] == "Own"
    with pytest.raises(RecipeError):
        recipe.to_toml()


def test_a_table_is_a_copy():
    table = {"sparsity": 0.5, "method": {"name": "refit", "inner": {"name": "wanda"}}, "include": ["a"]}
    Recipe.from_dict(table)
    assert table == {"sparsity": 0.5, "method": {"name": "refit", "inner": {"name": "wanda"}}, "include": ["a"]}


@pytest.mark.parametrize("where", ["include", "exclude"])
@pytest.mark.parametrize("value", ["blocks.*", ["blocks.*"], ("blocks.*",), {"blocks.*": 1}.keys()], ids=repr)
def test_one_glob_or_several(where, value):
    assert getattr(Recipe(sparsity=0.5, **{where: value}), where) == ("blocks.*",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('patern = "2:4"', ["'patern'", "recipe", "did you mean 'pattern'"]),
        ("sparisty = 0.5", ["'sparisty'", "did you mean 'sparsity'"]),
        ("zzz = 1", ["'zzz'", "Valid are pattern, sparsity, method"]),
        ('sparsity = 0.5\nmethod = "wnada"', ["'wnada'", "did you mean 'wanda'", "sparsegpt"]),
        ('sparsity = 0.5\nmethod = {name = "sparsgpt"}', ["'sparsgpt'", "did you mean 'sparsegpt'"]),
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


def test_settings_that_a_method_refuses_are_refused_in_a_recipe():
    with pytest.raises(RecipeError, match="block_size must be at least 1, got 0"):
        Recipe.from_dict({"sparsity": 0.5, "method": {"name": "sparsegpt", "block_size": 0}})


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


def test_a_recipe_is_read_from_a_file(tmp_path):
    path = tmp_path / "é.toml"
    recipe = Recipe.from_dict(FULL | {"include": ["é"]})
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.load(path) == Recipe.load(str(path)) == recipe


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, RecipeError),
        (b"sparsity = ", RecipeError),
        (b"patern = 1", RecipeError),
        (b"\xff\xfe", RecipeError),
        (b'method = "wnada"', RecipeError),
        (b'sparsity = "half"', RecipeError),
        (b'sparsity = 0.5\nmethod = {name = "sparsegpt", block_size = "big"}', RecipeError),
        (b"sparsity = 50", PatternError),
    ],
)
def test_a_file_that_holds_no_recipe_is_named(tmp_path, content, error):
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error) as raised:
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
