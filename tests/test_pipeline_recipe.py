"""Recipes of pipelines: every mistake is found before any work, and said with the number of its stage."""

from pathlib import Path

import pytest
from pipeline_cases import STAGES, TOP, recipe
from typer.testing import CliRunner

from secateur import Pipeline, Recipe, RecipeError
from secateur.cli import app
from secateur.pipeline._recipe import PipelineRecipe
from secateur.pipeline._stages import KINDS


def test_a_recipe_is_stages_in_order():
    made = PipelineRecipe.from_toml(
        recipe("shrink", "recover", "prune", 'gates = ["sparsity >= 50%"]', "recover", "pack"), Path()
    )
    assert [stage.run for stage in made.stages] == ["shrink", "recover", "prune", "recover", "pack"]
    assert [stage.number for stage in made.stages] == [1, 2, 3, 4, 5]
    assert [str(gate) for gate in made.stages[2].gates] == ["sparsity >= 0.5"]
    assert made.stages[0].settings == {"keep": {"ffn": 0.5}}
    assert made.stages[1].settings["seed"] == 0
    assert made.stages[0].calibration.samples == 4
    assert not made.stages[1].is_sampled  # recover learns from all of the text, unless the stage itself says otherwise
    assert made.stages[4].calibration is None


def test_files_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "r.toml").write_text(recipe("recover"), encoding="utf-8")
    (stage,) = Pipeline.load(tmp_path / "r.toml").recipe.stages
    assert (stage.calibration.path, stage.data) == (tmp_path / "learn.txt", (tmp_path / "test.txt",))
    (stage,) = Pipeline.from_toml(recipe("recover")).recipe.stages
    assert str(stage.calibration.path) == "learn.txt"


def test_a_stage_may_have_a_text_of_its_own():
    own = recipe(
        "recover", 'calibration = { file = "own.txt", samples = 9, seed = 3 }', "prune", top=f"seed = 7\n{TOP}"
    )
    first, second = PipelineRecipe.from_toml(own, Path()).stages
    assert (first.calibration.samples, first.calibration.seed, first.is_sampled) == (9, 3, True)
    assert (second.calibration.seed, first.settings["seed"]) == (7, 7)


def test_a_stage_may_choose_windows_and_hold_some_out():
    chosen = 'calibration = { file = "own.txt", select = "diverse" }'
    text = recipe("[[stage]]", 'run = "prune"', "sparsity = 0.5", 'method = "sparsegpt"', 'damping = "auto"', chosen)
    (stage,) = PipelineRecipe.from_toml(text, Path()).stages
    assert stage.calibration.select == "diverse"
    assert stage.settings["damping"] == "auto"


WRONG = {
    "schema": ("[[stage]]\nrun = 'prune'", "it has no schema; this version of secateur reads schema 1"),
    "another schema": ("schema = 2\n[[stage]]\nrun = 'prune'", "its schema is 2"),
    "no schema at all": ("schema = true\n[[stage]]\nrun = 'prune'", "its schema is True"),
    "stages": ("schema = 1", "it has no stages"),
    "a stage that is no table": ("schema = 1\nstage = 3", "it has no stages"),
    "TOML": ("schema = ", "the recipe is not TOML"),
    "a flat recipe": ('sparsity = 0.5\nmethod = "wanda"', "secateur prune MODEL_DIR --recipe FILE"),
    "a key at the top": (
        f"evalute = 'a.txt'\n{TOP}{STAGES['prune']}",
        "unknown key 'evalute'.*did you mean 'evaluate'",
    ),
    "run": ("schema = 1\n[[stage]]\nsparsity = 0.5", r"stage 1: it has no run"),
    "a kind": (recipe("prune", "[[stage]]", "run = 'srink'"), r"stage 2: unknown stage 'srink'; did you mean 'shrink'"),
    "run of a wrong type": (recipe("[[stage]]", "run = 3"), r"stage 1: unknown stage 3"),
    "a key": (recipe("recover", "minuts = 3"), r"stage 1 \(recover\): unknown key 'minuts'.*did you mean 'minutes'"),
    "a key of another stage": (recipe("prune", "steps = 3"), r"stage 1 \(prune\): unknown key 'steps'"),
    "a text for a number": (
        recipe("shrink", "recover", "learning_rate = '1e-3'"),
        r"stage 2 \(recover\): learning_rate must be a number, got a text",
    ),
    "a fraction for a whole number": (
        recipe("recover", "batch_size = 8.5").replace("batch_size = 8\n", ""),
        "batch_size must be a whole number, got a number",
    ),
    "a bool for a number": (
        recipe("prune", "measure_error = 1"),
        "measure_error must be true or false, got a whole number",
    ),
    "a number for a flag": (
        recipe("pack", "memory = true"),
        r"stage 1 \(pack\): memory must be a number, got true or false",
    ),
    "a bad value": (recipe("pack", "memory = -1"), r"stage 1 \(pack\): memory must be above 0"),
    "a bad table": (recipe("shrink").replace("ffn", "fnn"), r"stage 1 \(shrink\): unknown kind in keep 'fnn'"),
    "two budgets": (recipe("recover", "minutes = 3"), r"stage 1 \(recover\): minutes and steps exclude each other"),
    "a method": (recipe("prune").replace("magnitude", "magnitud"), r"stage 1 \(prune\): .*did you mean 'magnitude'"),
    "no text to learn from": ("schema = 1" + STAGES["recover"], r"stage 1 \(recover\): .* learns from text"),
    "no text to prune with": (
        "schema = 1" + STAGES["prune"].replace("magnitude", "wanda"),
        r"stage 1 \(prune\): this method learns from text",
    ),
    "no text to shrink with": ("schema = 1" + STAGES["shrink"], r"stage 1 \(shrink\): .*learns from text"),
    "a text for what learns nothing": (recipe("evaluate", "calibration = 'a.txt'"), "unknown key 'calibration'"),
    "a text for ranges that are not in the file": (
        recipe("export", "calibration = 'a.txt'"),
        r"stage 1 \(export\): calibration sets the ranges of 8 bits in OpenVINO",
    ),
    "a tolerance without a text": ("schema = 1" + STAGES["pack"] + "tolerance = 0.1", "measured on text: give some"),
    "a tolerance and a precision": (recipe("pack", "tolerance = 0.1", "precision = 'int8'"), "Leave one of them out"),
    "calibration": (f"schema = 1\ncalibration = 3{STAGES['prune']}", "the recipe: calibration must be a table"),
    "calibration without a file": (f"schema = 1\ncalibration = {{ samples = 3 }}{STAGES['prune']}", "has no file"),
    "a key of calibration": (recipe("prune", "calibration = { file = 'a', sample = 3 }"), "did you mean 'samples'"),
    "samples": (recipe("prune", "calibration = { file = 'a', samples = 0 }"), "samples must be at least 1"),
    "a shape": (f"shapes = ['8by64']\n{TOP}{STAGES['prune']}", "a shape is how many texts.*got '8by64'"),
    "shapes": (f"shapes = [8]\n{TOP}{STAGES['prune']}", "shapes must be a text or a list of texts"),
    "nothing to measure on": (
        "schema = 1" + STAGES["evaluate"],
        r"stage 1 \(evaluate\): there is nothing to measure on",
    ),
    "a gate": (
        recipe("prune", "gates = ['sparsity => 1']"),
        r"stage 1 \(prune\): the gate 'sparsity => 1' cannot be read",
    ),
    "gates": (recipe("prune", "gates = [1]"), r"stage 1 \(prune\): gates must be a text or a list of texts"),
    "a gate on speed": (recipe("prune", "gates = ['speedup >= 2']"), r"nobody measures the figure.*\n.*Give shapes"),
    "a gate on quality": ("schema = 1" + STAGES["prune"] + "gates = ['similarity >= 0.9']", "evaluate = FILE"),
    "a gate on no work": (recipe("evaluate", "gates = ['minutes <= 9']"), "has no working time"),
    "a change of packed weights": (
        recipe("pack", "evaluate", "prune"),
        r"stage 3 \(prune\): it comes after stage 1 \(pack\)",
    ),
    "recovery in one round": (recipe("prune", "[stage.recover]", "minutes = 1"), "there is one round"),
    "a key of recovery": (
        recipe("prune", "rounds = 3", "[stage.recover]", "minuts = 1"),
        "table recover; did you mean 'minutes'",
    ),
    "rounds": (recipe("prune", "rounds = 0"), r"stage 1 \(prune\): rounds must be at least 1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_said_with_its_stage(what):
    text, message = WRONG[what]
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        Pipeline.from_toml(text)


@pytest.mark.parametrize("run", KINDS)
def test_the_keys_of_every_kind_are_checked_for_their_type(run):
    for key in KINDS[run].keys:
        with pytest.raises(RecipeError, match=rf"stage 1 \({run}\): {key} must be"):
            Pipeline.from_toml(f"{TOP}[[stage]]\nrun = '{run}'\n{key} = 2026-11-26\n")


def test_the_name_of_the_file_is_said(tmp_path):
    (tmp_path / "r.toml").write_text("schema = 3", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"r\.toml: the recipe: its schema is 3"):
        Pipeline.load(tmp_path / "r.toml")
    with pytest.raises(RecipeError, match=r"none\.toml: cannot read the recipe"):
        Pipeline.load(tmp_path / "none.toml")


def test_recipes_of_both_kinds_are_told_apart(tmp_path):
    with pytest.raises(RecipeError, match="secateur run MODEL_DIR --recipe FILE"):
        Recipe.from_toml(recipe("prune"))
    flat = Recipe(sparsity=0.5, method="magnitude").to_toml()
    assert Recipe.from_toml(flat).sparsity == 0.5
    (tmp_path / "flat.toml").write_text(flat, encoding="utf-8")
    done = CliRunner().invoke(app, ["run", str(tmp_path), "--recipe", str(tmp_path / "flat.toml"), "--output", "x"])
    assert done.exit_code == 2
    assert "secateur prune MODEL_DIR --recipe FILE" in done.stderr


def test_every_setting_of_prune_is_a_key():
    table = Recipe(pattern="2:4", method="magnitude").to_dict()
    assert set(table) - set(KINDS["prune"].keys) == set()
