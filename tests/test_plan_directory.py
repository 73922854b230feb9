"""``plan_directory`` and ``optimize_directory``: what they write, refuse, and find again."""

import json

import pytest
from pipeline_cases import make_encoder, sentences
from plan_cases import times_by_size

import secateur
from secateur.planning import optimize_directory, plan_directory
from secateur.reports import PlanReport

MEANS = {"engines": ["torch"], "allow": ["ffn", "layers"], "samples": 8, "sequence_length": 16, "shapes": [(1, 16)]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def text(tmp_path):
    """Documents with blank lines between them."""
    file = tmp_path / "text.txt"
    file.write_text("\n".join(sentences(10 * number, 5) for number in range(80)), encoding="utf-8")
    return file


@pytest.mark.slow
def test_the_result_is_ready_to_load_and_its_recipe_to_run(encoder, text, tmp_path, monkeypatch):
    times_by_size(monkeypatch)
    out = tmp_path / "out"
    arguments = {"calibration": text, "target": "params=0.97", "minutes": 0.3, **MEANS}
    own = tmp_path / "config.json"  # as a file of the model is called
    own.write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in sentences(900, 50).splitlines()), encoding="utf-8"
    )
    arguments["evaluate"] = own
    report = optimize_directory(encoder, out, **arguments)
    assert report.reached
    assert len(report.candidates) > 1
    assert all(point.figure is not None for point in report.candidates)
    assert json.loads((out / "config.json").read_text())["model_type"] == "bert"
    assert (out / "reporting.json").read_bytes() == own.read_bytes()
    assert report.metric == "rank"
    assert report.measured.parameters <= 0.97 * report.dense.parameters
    assert PlanReport.from_json((out / "plan.json").read_text()) == report
    assert "<svg" in (out / "plan.html").read_text()
    assert "secateur.load" in (out / "README.md").read_text()
    model = secateur.load(out)
    assert sum(parameter.numel() for parameter in model.parameters()) == report.measured.parameters
    pipeline = secateur.Pipeline.load(out / "pipeline.toml")
    assert pipeline.stages[0] == "shrink"
    assert pipeline.stages[-1] == "evaluate"
    assert pipeline.dry_run(encoder).can_run
    folders = sorted(path.name for path in (tmp_path / "out.work").iterdir() if path.is_dir())
    (weights,) = (path.name for path in out.glob("*.safetensors"))
    before = (out / weights).read_bytes()
    again = optimize_directory(encoder, out, **arguments, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out.work").iterdir() if path.is_dir()) == folders
    assert (out / weights).read_bytes() == before
    assert again.measured.figure == report.measured.figure


@pytest.mark.slow
def test_a_plan_writes_nothing(encoder, text, tmp_path, monkeypatch):
    times_by_size(monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    report = plan_directory(encoder, calibration=text, target="params=0.97", **MEANS)
    assert sorted(tmp_path.rglob("*")) == before
    assert report.measured is None
    assert report.reached
    assert report.predicted.parameters <= 0.97 * report.dense.parameters
    json.loads(report.to_json())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to reach"),
        ({"target": "params=0.97", "allocation": "some"}, "uniform"),
        ({"target": "params=0.97", "shapes": []}, "shapes is empty"),
        ({"target": "quick"}, "target"),
        ({"target": "2x", "gates": ["rank => 9"]}, "gate"),
        ({"target": "2x", "evaluate": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_mistakes_are_found_before_any_work(encoder, text, tmp_path, arguments, message):
    with pytest.raises(secateur.SparsityError, match=message):
        optimize_directory(encoder, tmp_path / "out", calibration=text, **{**MEANS, **arguments})
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def test_a_short_text_is_refused(encoder, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(sentences(0, 20), encoding="utf-8")
    with pytest.raises(secateur.RecipeError, match="too short"):
        plan_directory(encoder, calibration=file, target="2x", **MEANS)
