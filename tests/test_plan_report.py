"""The report of a plan: as text, tables, JSON, CSV and a page; and the commands that show it."""

import csv
import io
import json
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.reports import PlannedPart, PlanPoint, PlanReport

DENSE = PlanPoint("dense", "torch", (12.0, 90.0), (1.0, 1.0), 90_000_000, 22_000_000, 0.0, 100.0)
INT8 = PlanPoint("dense", "onnx-int8", (5.0, 40.0), (2.4, 2.25), 23_000_000, 22_000_000, 0.01, 99.8)
CURVE = tuple(
    PlanPoint(f"{count} of 6 layers", "onnx-int8", (9 / s, 80 / s), (s, s * 1.1), 10**7, 10**7, 0.02 * s)
    for count, s in ((5, 2.5), (4, 3.0), (3, 4.2), (2, 6.0))
)
PARTS = (
    PlannedPart("encoder.layer.0", False, {"heads": (6, 12), "ffn": (768, 1536)}, "block:1x4", 0.7, 0.02, 0.1),
    PlannedPart("encoder.layer.1", True),
)


def report(**changes):
    measured = replace(CURVE[2], figure=97.5, times=(4.4, 4.1))
    made = PlanReport(
        "encoder",
        "4x",
        "3%",
        "rank",
        True,
        ((1, 16), (32, 64)),
        DENSE,
        (INT8,),
        CURVE,
        (replace(CURVE[2], figure=96.0), replace(CURVE[1], figure=95.0)),
        CURVE[2],
        measured,
        PARTS,
        (((2.1, 19.0), (2.2, 19.5)),),
        ({"run": "shrink", "remove": {"encoder.layer": [1]}}, {"run": "recover", "minutes": 5.0}),
        {"engines": 40.0, "training": 900.0},
        True,
        2,
    )
    return replace(made, **changes)


def test_json_is_read_back():
    found = report()
    assert PlanReport.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.pop("dense"),
        lambda table: table["dense"].update(times=[1.0]),
        lambda table: table["frontier"][0].update(milliseconds=[0.0, 1.0]),
        lambda table: table.update(rounds=[[[1.0], [1.0, 2.0]]]),
        lambda table: table.update(extra=1),
    ],
)
def test_what_is_no_report_is_refused(change):
    table = json.loads(report().to_json())
    change(table)
    with pytest.raises(ValueError, match="not a report of a plan"):
        PlanReport.from_dict(table)


def test_the_summary_says_what_was_asked_and_what_came_of_it():
    text = str(report())
    assert text.startswith("target 4x reached: 3 of 6 layers in onnx-int8, 4.10 times as fast")
    assert "97.5" in text
    missed = str(report(reached=False))
    assert missed.startswith("target 4x MISSED")
    assert "nothing has to be removed" in str(report(notes=("nothing has to be removed: ...",)))


def test_csv_has_every_point():
    rows = list(csv.reader(io.StringIO(report().to_csv())))
    assert len({len(row) for row in rows}) == 1
    assert len(rows) == 1 + 1 + 1 + len(CURVE) + 2 + 1 + 1
    assert rows[0][:4] == ["kind", "title", "way", "speedup"]


def test_tables_and_markdown():
    found = report()
    titles = [table.title for table in found.tables]
    assert len(set(titles)) == len(titles)
    text = found.to_markdown()
    assert "encoder.layer.1" in text
    assert "onnx-int8" in text


class TestPage:
    def test_it_runs_and_loads_nothing_and_escapes_names(self):
        page = report(model="<b>x</b>", parts=(PlannedPart("<script>", True), *PARTS)).to_html()
        assert "<script" not in page
        assert "<b>x" not in page
        assert not re.search(r'(?:src|href)="(?!#)', page)
        assert "&lt;script&gt;" in page

    def test_measured_and_predicted_have_a_panel_each_for_two_widths(self):
        page = report().to_html()
        assert page.count('<svg class="wide"') == 2
        assert page.count('<svg class="slim"') == 2
        assert "rank over times as fast" in page
        assert "loss, predicted over times as fast" in page
        assert ">target<" in page
        assert ">allowed<" in page

    def test_coordinates_are_within_the_picture(self):
        page = report().to_html()
        for width, height, body in re.findall(r'viewBox="0 0 (\d+) (\d+)".*?>(.*?)</svg>', page, re.DOTALL):
            for x, y in re.findall(r'class="dot" cx="([\d.]+)" cy="([\d.]+)"', body):
                assert 0 <= float(x) <= int(width)
                assert 0 <= float(y) <= int(height)

    def test_what_is_not_known_is_left_out(self):
        bare = report(
            target="",
            max_loss="1%",
            alternatives=(),
            frontier=(),
            candidates=(),
            predicted=None,
            measured=None,
            parts=(),
        )
        page = bare.to_html()
        assert "<svg" not in page
        assert "What stays of each part" not in page

    def test_a_missed_target_is_told_at_the_top(self):
        assert "target missed" not in report().to_html()
        assert "Speed, measured; target missed" in report(reached=False).to_html()

    def test_what_stays_of_each_part(self):
        page = report().to_html()
        assert "768 of 1,536" in page
        assert "30% (block:1x4)" in page
        assert "removed" in page


class TestCommands:
    @pytest.fixture
    def asked(self, monkeypatch, tmp_path):
        """The arguments with which the planning room was called, in place of the work."""
        calls = []

        def stand_in(*given, progress, **arguments):
            calls.append((given, arguments))
            progress("planning", 0, 1)
            return report(reached=arguments["target"] != "9x")

        monkeypatch.setattr("secateur.planning.plan_directory", stand_in)
        monkeypatch.setattr("secateur.planning.optimize_directory", stand_in)
        return calls

    def test_options_reach_the_functions(self, asked, tmp_path):
        words = ["optimize", "model", "--calibration", "text.txt", "--output", str(tmp_path / "out"), "--target", "4x"]
        words += ["--shape", "1x16", "--shape", "32x64", "--allow", "layers,ffn", "--allow", "int8", "--minutes", "5"]
        words += ["--engines", "torch,onnxruntime", "--max-loss", "1%", "--gate", "rank >= 95"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        _, found = asked[0]
        assert found["shapes"] == [(1, 16), (32, 64)]
        assert found["allow"] == ["layers", "ffn", "int8"]
        assert found["engines"] == ["torch", "onnxruntime"]
        assert (found["minutes"], found["max_loss"], list(found["gates"])) == (5.0, "1%", ["rank >= 95"])

    def test_a_dry_run_plans_and_needs_no_output(self, asked):
        words = ["optimize", "model", "--calibration", "text.txt", "--target", "4x", "--dry-run"]
        assert CliRunner().invoke(app, words).exit_code == 0
        given, found = asked[0]
        assert "minutes" not in found
        assert len(given) == 1

    def test_the_other_options_do_so_too(self, asked, tmp_path):
        words = [
            "optimize",
            "model",
            "--calibration",
            "text.txt",
            "--output",
            str(tmp_path / "out"),
            "--max-loss",
            "1%",
        ]
        words += ["--cache", "times.json", "--restart", "--overwrite", "--evaluate", "pairs.csv", "--seed", "3"]
        words += ["--allocation", "uniform", "--threads", "1", "--samples", "9", "--sequence-length", "32"]
        assert CliRunner().invoke(app, words).exit_code == 0
        _, found = asked[0]
        assert found["target"] is None
        assert (found["restart"], found["overwrite"], found["allocation"]) == (True, True, "uniform")
        assert (found["seed"], found["threads"], found["samples"], found["sequence_length"]) == (3, 1, 9, 32)
        assert (str(found["cache"]), str(found["evaluate"])) == ("times.json", "pairs.csv")

    def test_a_plan_without_a_target_decides_nothing_and_misses_nothing(self, asked, monkeypatch):
        undecided = report(target="", predicted=None, measured=None, reached=False)
        monkeypatch.setattr("secateur.planning.plan_directory", lambda *given, **arguments: undecided)
        assert CliRunner().invoke(app, ["plan", "model", "--calibration", "t", "--max-loss", "1%"]).exit_code == 0

    @pytest.mark.parametrize("command", ["plan", "optimize"])
    def test_a_missed_target_is_exit_status_1(self, asked, tmp_path, command):
        words = [command, "model", "--calibration", "text.txt", "--target", "9x"]
        words += ["--output", str(tmp_path / "out")] if command == "optimize" else []
        assert CliRunner().invoke(app, words).exit_code == 1

    def test_mistakes_are_exit_status_2(self, asked):
        for words in (["--shape", "1-16"], []):
            result = CliRunner().invoke(
                app, ["optimize", "model", "--calibration", "text.txt", "--target", "4x", *words]
            )
            assert result.exit_code == 2, result.output

    def test_files_and_json(self, asked, tmp_path):
        page, points = tmp_path / "plan.html", tmp_path / "plan.csv"
        words = ["plan", "model", "--calibration", "text.txt", "--target", "4x", "--json"]
        result = CliRunner().invoke(app, [*words, "--html", str(page), "--csv", str(points)])
        assert result.exit_code == 0, result.output
        assert PlanReport.from_json(result.stdout) == report()
        assert page.read_text().lower().startswith("<!doctype html>")
        assert points.read_text().startswith("kind,")


def test_the_report_is_public():
    assert secateur.PlanReport is PlanReport
