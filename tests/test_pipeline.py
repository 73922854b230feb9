"""Pipelines run: stages, figures, gates, what is done again, what is refused before work."""

import json
import shutil

import pytest
import torch
from fake_timing import routes_take
from pipeline_cases import STAGES, TOP, make_encoder, make_texts, recipe
from safetensors.torch import load_file
from typer.testing import CliRunner

from secateur import FormatError, Pipeline, PipelineReport, RecipeError, SparsityError
from secateur.cli import app
from secateur.pipeline import _figures as figures_module
from secateur.pipeline import _stages as stages_module
from secateur.reports import PRUNING_REPORT, GateResult, Latency, PackReport, PipelineStage, stages_from_json

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def place(tmp_path, model):
    """A folder with the texts and the model, which may be changed."""
    shutil.copytree(model, tmp_path / "model")
    make_texts(tmp_path)
    return tmp_path


def run(place, *stages, top=TOP, output="out", **settings):
    (place / "r.toml").write_text(recipe(*stages, top=top), encoding="utf-8")
    return Pipeline.load(place / "r.toml").run(place / "model", place / output, device="cpu", **settings)


def command(place, *options, output="out"):
    arguments = ["run", place / "model", "--recipe", place / "r.toml", "--device", "cpu", *options]
    return CliRunner().invoke(
        app, [str(entry) for entry in (*arguments, *(["--output", place / output] if output else []))]
    )


@pytest.fixture
def speeds(monkeypatch):
    """Speeds that the test decides, by the number of rows."""
    table = {1: 3.0, 4: 2.0}

    def compare(before, after, batch):
        shape = tuple(batch["input_ids"].shape)
        return Latency(shape, 1.0, 1.0, table[shape[0]], 1.0, 1.0, "float32", {})

    monkeypatch.setattr(figures_module, "compare_latency", compare)
    return table


# What a run gives


def test_the_output_carries_all_stages(place):
    report = run(
        place, "shrink", "prune", 'gates = ["sparsity >= 0.5"]', "recover", "evaluate", 'gates = ["rank <= dense"]'
    )
    assert report.passed
    assert [stage.run for stage in report.stages] == ["shrink", "prune", "recover", "evaluate"]
    made = {path.name for path in (place / "out").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "pipeline.json", "pipeline.toml", "pipeline.html"} <= made
    stored = stages_from_json((place / "out" / PRUNING_REPORT).read_text(encoding="utf-8"))
    assert [type(stage).__name__ for stage in stored] == ["ShrinkReport", "Report", "RecoveryReport"]
    assert PipelineReport.from_json((place / "out" / "pipeline.json").read_text(encoding="utf-8")) == report
    assert (place / "out" / "pipeline.toml").read_text(encoding="utf-8") == (place / "r.toml").read_text(
        encoding="utf-8"
    )
    again = Pipeline.load(place / "out" / "pipeline.toml")
    assert again.stages == ("shrink", "prune", "recover", "evaluate")


def test_figures_are_those_of_the_files(place):
    report = run(place, "shrink", "prune")
    for stage, path in [(None, place / "model"), *((stage, stage.directory) for stage in report.stages)]:
        tensors = load_file(f"{path}/model.safetensors").values()
        figures = report.dense if stage is None else stage.figures
        count, zeros = sum(t.numel() for t in tensors), sum(int((t == 0).sum()) for t in tensors)
        assert figures["parameters"] == count
        assert figures["sparsity_total"] == zeros / count
        assert figures["bytes"] == (place / path / "model.safetensors").stat().st_size
    assert report.stages[1].figures["sparsity"] == 0.5
    assert report.dense["similarity"] == pytest.approx(1, abs=1e-5)
    assert report.stages[1].figures["similarity"] < report.stages[0].figures["similarity"] < 1
    assert "speedup" not in report.dense


def test_sparsity_is_of_the_layers_that_the_last_pruning_considered(place):
    report = run(place, "prune", 'include = ["encoder.layer.0.*"]')
    assert report.stages[0].figures["sparsity"] == 0.5
    assert report.stages[0].figures["sparsity_total"] < 0.2


def test_a_sparsity_that_whole_weights_cannot_reach_is_reached_by_the_nearest_one(place):
    """Rows of 16 and 32 weights lose 80 % of them to within half a weight, which is what prune promises."""
    settings = ("sparsity = 0.8", 'method = "wanda"')
    report = run(place, "[[stage]]", 'run = "prune"', *settings, 'gates = ["sparsity >= 0.8", "sparsity >= 0.85"]')
    assert report.stages[0].figures["sparsity"] != 0.8
    assert [found.passed for found in report.stages[0].gates] == [True, False]


def test_speed_counts_at_the_shape_where_it_is_least(place, speeds):
    report = run(place, "prune", 'gates = ["speedup >= 2", "speedup > 2.5"]', top=f'shapes = ["1x8", "4x16"]\n{TOP}')
    (stage,) = report.stages
    assert (dict(stage.speeds), stage.figures["speedup"]) == ({"1x8": 3.0, "4x16": 2.0}, 2.0)
    assert [found.passed for found in stage.gates] == [True, False]


def test_inputs_have_the_shape_that_was_asked_for(place):
    from secateur.huggingface import load_model, open_model

    loaded, _ = load_model(open_model(place / "model"), "cpu", torch.float32)
    assert figures_module.input_of(loaded, (3, 40))["input_ids"].shape == (3, 40)
    with pytest.raises(RecipeError, match="the shape 2x65 is longer than the 64 tokens"):
        figures_module.input_of(loaded, (2, 65))


def test_a_packed_model_keeps_the_figures_of_its_zeros(place):
    report = run(place, "prune", "pack", "evaluate")
    assert report.passed
    pruned, packed, evaluated = (stage.figures for stage in report.stages)
    for name in ("sparsity", "sparsity_total", "parameters"):
        assert pruned[name] == packed[name] == evaluated[name]
    stored = sum(path.stat().st_size for path in (place / "out").glob("*.safetensors"))
    assert packed["bytes"] == evaluated["bytes"] == stored
    assert "minutes" not in evaluated


@pytest.mark.parametrize("line", ["precision = 'int8'", "tolerance = 0.2"])
def test_a_model_is_packed_in_fewer_bits_by_the_text_of_the_recipe(place, monkeypatch, line):
    routes_take(monkeypatch, lambda name, index: {"dense": 1.0, "int8-panels": 0.2}.get(name, 5.0))
    report = run(place, "pack", line, "evaluate")
    assert report.passed
    packed = PackReport.from_json((place / "out" / "secateur.pack.json").read_text(encoding="utf-8"))
    layers = [row for row in packed.layers if "embed" not in row.name]
    assert {row.precision for row in layers} == {"int8"}
    assert 0 < packed.output_error < 0.2
    assert all(0 < row.output_error < 0.2 for row in layers)


def test_exact_packing_reads_no_text():
    for line, reads in (("memory = 2", False), ("precision = 'exact'", False), ("precision = 'int8'", True)):
        (stage,) = Pipeline.from_toml(recipe("pack", line)).recipe.stages
        assert (stage.calibration is not None) == reads


def test_a_note_says_where_the_text_to_measure_on_was_learned_from(place):
    top = (
        'schema = 1\ncalibration = { file = "learn.txt", samples = 4, sequence_length = 16 }\nevaluate = "learn.txt"\n'
    )
    report = run(place, "shrink", "evaluate", top=top)
    assert any("measured on learn.txt" in note for note in report.stages[0].notes)
    assert not any("measured on" in note for note in report.stages[1].notes)
    assert not any("measured on" in note for note in run(place, "shrink", output="b").stages[0].notes)


# Gates


def test_a_gate_that_fails_ends_the_run_and_leaves_the_results(place):
    report = run(place, "prune", 'gates = ["similarity >= 2", "sparsity >= 0.1"]', "recover")
    assert not report.passed
    assert len(report.stages) == 1
    assert [found.gate for found in report.failed] == ["similarity >= 2.0"]
    assert not (place / "out").exists()
    assert load_file(f"{report.stages[0].directory}/model.safetensors")
    assert PipelineReport.from_json((place / "out.work" / "pipeline.json").read_text(encoding="utf-8")) == report
    done = command(place)
    assert done.exit_code == 1
    assert "stage 1 (prune): similarity is" in done.stdout
    assert "the gate is similarity >= 2.0: FAILED" in done.stdout
    assert "was not written; its model is" in done.stdout.replace("\n", " ")


def test_other_gates_do_no_work_again(place, monkeypatch):
    assert not run(place, "prune", 'gates = ["similarity >= 2"]', "evaluate").passed
    monkeypatch.setattr(stages_module, "prune_directory", None)
    report = run(place, "prune", 'gates = ["similarity >= 0"]', "evaluate")
    assert report.passed
    assert report.stages[0].reused
    assert (place / "out" / "model.safetensors").is_file()


def test_the_bound_is_of_the_dense_model(place):
    report = run(place, "shrink", 'gates = ["bytes <= 99% * dense", "bytes <= 1% * dense"]')
    size = (place / "model" / "model.safetensors").stat().st_size
    first, second = report.stages[0].gates
    assert (first.dense, first.bound, first.passed) == (size, 0.99 * size, True)
    assert (second.bound, second.passed) == (0.01 * size, False)


REFUSED = {
    "perplexity of an encoder": (
        ["prune", 'gates = ["perplexity <= 3"]'],
        r"stage 1 \(prune\): nobody measures.*perplexity",
    ),
    "labels that are not there": (
        ["shrink", "recover", 'gates = ["accuracy >= 0.5"]'],
        r"stage 2 \(recover\): nobody measures",
    ),
    "no text to learn from": (
        ["prune", "recover", 'calibration = "empty.txt"'],
        r"stage 2 \(recover\): .*empty\.txt holds no text",
    ),
    "no such file": (["prune", "[[stage]]", 'run = "evaluate"', 'data = "none.txt"'], "none.txt"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_measured_is_refused_before_work(place, monkeypatch, what):
    stages, message = REFUSED[what]
    (place / "empty.txt").write_text("", encoding="utf-8")
    for name in ("prune_directory", "shrink_directory", "recover_directory"):
        monkeypatch.setattr(stages_module, name, None)
    with pytest.raises(SparsityError, match=f"(?s){message}"):
        run(place, *stages)
    assert not (place / "out.work").exists()


def test_an_output_that_is_there_is_refused_before_work(place):
    run(place, "prune")
    with pytest.raises(FormatError, match="already exists"):
        run(place, "prune")
    assert run(place, "prune", overwrite=True).stages[0].reused


def test_errors_of_a_stage_name_it(place):
    with pytest.raises(SparsityError, match=r"stage 2 \(prune\): "):
        run(place, "shrink", "prune", 'include = ["nothing.*"]')
    done = command(place)
    assert done.exit_code == 2
    assert "stage 2 (prune)" in done.stderr


# What is done again


def changed(report):
    return [set(stage.changed) for stage in report.stages]


def test_only_what_follows_a_change_is_done_again(place):
    first = run(place, "shrink", "prune", "recover")
    shutil.rmtree(place / "out")
    second = run(place, "shrink", "prune", 'exclude = ["pooler.dense"]', "recover")
    assert [stage.reused for stage in second.stages] == [True, False, False]
    assert changed(second) == [set(), {"settings"}, {"model"}]
    assert "stage 2 (prune): done again, because this differs from the earlier run: settings" in str(second)
    assert all((place / stage.directory).is_dir() for stage in first.stages)  # earlier results stay
    shutil.rmtree(place / "out")
    assert all(stage.reused for stage in run(place, "shrink", "prune", "recover").stages)


@pytest.mark.parametrize(
    ("name", "facts"),
    [("learn.txt", [{"text"}, {"model", "text"}]), ("model/config.json", [{"model"}, {"model", "dense model"}])],
)
def test_a_change_of_a_file_is_named(place, name, facts):
    run(place, "shrink", "recover")
    shutil.rmtree(place / "out")
    text = (place / name).read_text(encoding="utf-8")
    (place / name).write_text(f"{text}\n" if name.endswith("json") else text.replace("line", "page"), encoding="utf-8")
    report = run(place, "shrink", "recover")
    assert not any(stage.reused for stage in report.stages)
    for found, expected in zip(changed(report), facts, strict=True):
        assert found <= expected
        assert found


def test_a_result_that_somebody_changed_is_not_built_upon(place):
    first = run(place, "shrink", "prune")
    shutil.rmtree(place / "out")
    config = place / first.stages[0].directory / "config.json"
    config.write_text(config.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert [stage.reused for stage in run(place, "shrink", "prune").stages] == [True, False]


def test_restart_does_everything_again(place):
    run(place, "shrink", "prune")
    again = run(place, "shrink", "prune", overwrite=True, restart=True)
    assert [stage.reused for stage in again.stages] == [False, False]


def test_working_time_is_kept_over_runs(place, monkeypatch):
    pruned = stages_module.prune_directory

    def fail(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages_module, "prune_directory", fail)
    with pytest.raises(KeyboardInterrupt):
        run(place, "prune")
    (noted,) = place.glob("out.work/*/seconds.json")
    noted.write_text("600", encoding="utf-8")
    monkeypatch.setattr(stages_module, "prune_directory", pruned)
    assert 10 <= run(place, "prune").stages[0].figures["minutes"] < 12


# A look before


def test_a_dry_run_writes_nothing_and_says_what_would_be(place):
    (place / "r.toml").write_text(recipe("shrink", "prune", "pack", 'gates = ["bytes <= 1e6"]'), encoding="utf-8")
    before = sorted(place.rglob("*"))
    done = command(place, "--dry-run", output=None)
    assert done.exit_code == 0, done.stderr
    assert sorted(place.rglob("*")) == before
    table = json.loads(command(place, "--dry-run", "--json", output=None).stdout)
    assert table["can_run"]
    assert [stage["run"] for stage in table["stages"]] == ["shrink", "prune", "pack"]
    forecast = Pipeline.load(place / "r.toml").dry_run(place / "model")
    report = run(place, "shrink", "prune")
    assert forecast.can_run
    assert forecast.stages[0].parameters == report.stages[0].figures["parameters"]
    assert forecast.stages[1].parameters == report.stages[1].figures["parameters"]
    assert forecast.stages[0].layers == ("encoder.layer.0.ffn 32 -> 16", "encoder.layer.1.ffn 32 -> 16")
    assert "encoder.layer.0.intermediate.dense 16 x 16" in forecast.stages[1].layers
    assert "gate: bytes <= 1000000.0" in done.stdout


@pytest.mark.parametrize(
    ("stages", "top", "message"),
    [
        (["prune", 'gates = ["accuracy >= 1"]'], TOP, "nobody measures"),
        (["prune"], f'shapes = ["1x65"]\n{TOP}', "longer than the 64 tokens"),
        (["prune", 'include = ["nothing.*"]'], TOP, "nothing.*"),
        (["shrink"], TOP.replace("learn.txt", "none.txt"), "none.txt"),
    ],
)
def test_a_dry_run_says_what_would_be_refused(place, stages, top, message):
    (place / "r.toml").write_text(recipe(*stages, top=top), encoding="utf-8")
    done = command(place, "--dry-run", output=None)
    assert done.exit_code == 2
    assert message in done.stdout.replace("\n", " ")


def test_the_command_asks_for_an_output(place):
    (place / "r.toml").write_text(recipe("prune"), encoding="utf-8")
    done = command(place, output=None)
    assert done.exit_code == 2
    assert "--output says where the model goes" in done.stderr


def test_the_command_prints_json_and_writes_a_page(place):
    (place / "r.toml").write_text(recipe("prune"), encoding="utf-8")
    done = command(place, "--json", "--html", place / "page.html")
    assert done.exit_code == 0, done.stderr
    report = PipelineReport.from_json(done.stdout)
    assert report.passed
    assert "Pipeline report" in (place / "page.html").read_text(encoding="utf-8")


# Rounds with recovery in between


def test_pruning_in_rounds_recovers_in_between(place, monkeypatch):
    from secateur.pipeline import _between

    seen = []
    recovered = _between.recover_

    def recover(model, teacher, batches, **settings):
        seen.append((settings["steps"], settings["seed"]))
        return recovered(model, teacher, batches, **settings)

    monkeypatch.setattr(_between, "recover_", recover)
    report = run(place, "prune", "rounds = 3", "[stage.recover]", "steps = 5")
    assert report.passed
    assert seen == [(2, 1), (3, 2)]
    assert report.stages[0].figures["sparsity"] == 0.5


# The report


REPORT = PipelineReport(
    model="bert",
    output="out",
    stages=(
        PipelineStage(
            1,
            "shrink",
            {"keep": {"ffn": 0.5}},
            "out.work/1",
            ("half is left",),
            {"bytes": 50.0, "rank": 90.0},
            {"1x8": 2.0},
        ),
        PipelineStage(
            2,
            "prune",
            {},
            "out.work/2",
            figures={"bytes": 50.0, "rank": float("nan")},
            gates=(GateResult("rank >= 0.9 * dense", "rank", float("nan"), 100.0, 90.0, passed=False),),
            changed=("settings",),
            notes=("a <b> note",),
        ),
    ),
    planned=3,
    dense={"bytes": 100.0, "rank": 100.0},
    recipe="schema = 1",
    versions={"torch": "2"},
    work="out.work",
)


def test_a_report_goes_through_json():
    again = PipelineReport.from_json(REPORT.to_json())
    assert again.to_json() == REPORT.to_json()
    assert "NaN" not in REPORT.to_json()
    assert again.stages[0] == REPORT.stages[0]
    assert not again.passed


@pytest.mark.parametrize("text", ["[]", "{}", '{"stages": 3}', '{"stages": [{}]}'])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match="not a report of a pipeline"):
        PipelineReport.from_json(text)


def test_the_report_names_the_gate_that_failed():
    said = str(REPORT)
    assert "stage 2 (prune): rank is nan (dense model 100.0), the gate is rank >= 0.9 * dense: FAILED" in said
    assert "out was not written; its model is out.work/2" in said
    assert "done again, because this differs from the earlier run: settings" in said


@pytest.mark.parametrize("render", [PipelineReport.to_markdown, PipelineReport.to_html])
def test_pages_have_all_figures_and_no_markup_of_others(render):
    page = render(REPORT)
    for text in ("dense model", "1. shrink", "2. prune", "FAILED", "1x8"):
        assert text in page
    assert "<b>" not in page.replace("<body>", "")
    assert render(REPORT) == page


def test_bars_are_as_long_as_figures():
    page = REPORT.to_html()
    assert page.count('width="320.0"') == 2  # the dense model's bytes and rank
    assert 'width="160.0"' in page
    assert "://" not in page  # nothing is loaded


def test_stages_of_the_shared_cases_are_all_there_are():
    assert set(STAGES) == set(stages_module.KINDS)
