"""The report of a recovery: text, tables, page and JSON, and its place among the stages of a model."""

import json
import re
import xml.etree.ElementTree
from dataclasses import replace

import pytest
import torch
from torch import nn

import secateur
from secateur.packing._history import patterns_in
from secateur.reports import CurvePoint, Evaluation, RecoveryReport, stages_from_json, stages_to_json


def curve(count=4):
    """The loss falls, and rises at the end: the best point is the last but one."""
    held_out = [0.8 * 0.5**number for number in range(count - 1)] + [0.7]
    return tuple(
        CurvePoint(10 * number, 60.0 * number, None if number == 0 else 0.3, loss, 1e-4)
        for number, loss in enumerate(held_out)
    )


def report(**changes):
    values = {
        "method": "full",
        "loss": "token states + pooled cosine",
        "steps": 30,
        "seconds": 190.0,
        "asked": {"minutes": 5.0},
        "start": 0.8,
        "best": 0.2,
        "best_step": 20,
        "stopped": "the budget is used",
        "curve": curve(),
        "trained": 900,
        "weights": 1000,
        "zeros": (480, 480),
        "samples": 64,
        "held_out_samples": 8,
        "epochs": 3.0,
        "blocks": {"layers.0": "layers.1"},
        "settings": {"seed": 0, "learning_rate": 1e-4},
        "versions": {"torch": "2"},
        "model_name": "Model",
        "teacher_name": "Teacher",
        "batches_hash": "ab",
        "calibration": {"file": "text.txt"},
        "evaluation": Evaluation("similarity", 0.9, 0.98, 300),
        "notes": ("a <note> | more",),
    }
    return RecoveryReport(**{**values, **changes})


def test_the_text_says_what_was_gained_first():
    lines = str(report()).splitlines()
    assert lines[0] == report().first_line == "75.0% of the held-out loss went: 0.8000 before, 0.2000 after"
    assert lines[1] == (
        "method full, 30 steps in 3 min 10 s (5 minutes asked); the best state is that after step 20; "
        "training ended because the budget is used"
    )
    assert lines[2:] == [
        "loss: token states + pooled cosine",
        "900 of 1,000 weights could move; 64 samples, gone through 3 times, and 8 held out",
        "480 weights are zero, as before",
        "a <note> | more",
    ]
    assert report().gain == pytest.approx(0.75)


def test_nothing_gained_and_interrupted():
    made = report(best=0.8, best_step=0, stopped="interrupted")
    assert made.first_line == "nothing was gained: the held-out loss is 0.8000, and the model is as it was"
    assert "best state" not in str(made)
    assert "training ended because somebody interrupted it" in str(made)
    assert made.gain == 0.0
    assert report(start=0.0, best=0.0).gain == 0.0
    assert "481 weights are zero, and 480 were before" in str(report(zeros=(480, 481)))


def test_tables():
    quality, points, blocks = report().tables
    assert quality.rows[0][:2] == ("similarity", "300")
    assert points.rows[0] == ("0", "0.0 s", "0.8000", "", "0.0001", "")
    assert points.rows[2] == ("20", "2 min 0 s", "0.2000", "0.3000", "0.0001", "")
    assert points.strong == ((2, 2),)
    assert blocks.rows == (("layers.0", "layers.1"),)


def test_a_long_curve_is_shortened_but_for_its_first_best_and_last_point():
    points = report(curve=curve(500), best_step=4980).tables[1]
    assert len(points.rows) <= 24
    assert [points.rows[0][0], points.rows[-1][0]] == ["0", "4,990"]
    assert points.rows[points.strong[0][0]][0] == "4,980"
    assert points.notes == (f"{500 - len(points.rows)} of 500 points are left out.",)


def test_markdown_has_the_lines_and_the_tables():
    text = report().to_markdown()
    assert text.startswith("# Recovery report\n\n75.0% of the held-out loss went: 0.8000 before, 0.2000 after.\n")
    assert "A &lt;note> \\| more." in text
    assert "| layers.0 | layers.1 |" in text
    assert "| 20 | 2 min 0 s | **0.2000** | 0.3000 |" in text


def test_the_page_draws_the_curve_and_loads_nothing():
    page = report().to_html()
    assert page == report().to_html()
    svg = xml.etree.ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    dots = [shape for shape in svg.iter() if shape.tag.endswith("circle")]
    assert [float(dot.get("r")) for dot in dots] == [2.5, 2.5, 5, 2.5]
    across, down = ([float(dot.get(name)) for dot in dots] for name in ("cx", "cy"))
    assert across == sorted(across)
    assert down[0] < down[1] < down[2] > down[3]  # a lower loss is further down
    width, height = map(float, svg.get("viewBox").split()[2:])
    assert max(across) <= width
    assert max(down) <= height
    assert "A &lt;note&gt; | more." in page
    assert not re.search(r"(src|href)=.(?!#)|@import|<script", page)


@pytest.mark.parametrize(
    "points",
    [(), curve(2)[:1], (CurvePoint(0, 0.0, None, 0.5), CurvePoint(1, 0.0, 0.1, 0.5))],
    ids=["none", "one", "equal"],
)
def test_the_page_of_a_curve_without_extent(points):
    assert ("<svg" in report(curve=points).to_html()) == (len(points) > 1)


def test_a_loss_that_is_not_finite_is_left_out_of_the_picture():
    page = report(curve=(*curve(), CurvePoint(40, 200.0, None, float("nan")))).to_html()
    picture = page[page.index("<svg") : page.index("</svg>")]
    assert picture.count("<circle") == 4
    assert "nan" not in picture


def test_parts_are_lines_of_their_own():
    points = tuple(replace(point, part=name) for name in ("block <0>", "block 1") for point in curve())
    page = report(curve=points).to_html()
    assert page.count("<polyline") == 2
    assert "block &lt;0&gt;" in page


@pytest.mark.parametrize("changes", [{}, {"evaluation": None, "curve": (), "notes": ()}])
def test_json_there_and_back(changes):
    made = report(**changes)
    assert RecoveryReport.from_json(made.to_json()) == made
    assert RecoveryReport.from_dict(made.to_dict()) == made
    assert json.loads(made.to_json()) == made.to_dict()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": "many"}, "steps must be int, got 'many'"),
        ({"steps": True}, "steps must be int"),
        ({"start": None}, "start must be float"),
        ({"zeros": [1]}, r"zeros must be tuple\[int, int\]"),
        ({"curve": [{"step": 1}]}, "missing"),
        ({"curve": [{"step": 0, "seconds": "0", "train_loss": None, "held_out": 1.0}]}, "seconds must be float"),
        ({"curve": 5}, "not iterable"),
        ({"blocks": {"a": 1}}, "blocks must be Mapping"),
        ({"notes": [3]}, "notes must be"),
        ({"evaluation": [1]}, "must be a mapping|argument after"),
        ({"more": 1}, "unexpected keyword"),
        ({"method": ...}, "method"),
    ],
)
def test_what_is_no_report_is_refused(change, said):
    table = {**report().to_dict(), **change}
    for name in [name for name, value in change.items() if value is ...]:
        del table[name]
    with pytest.raises(ValueError, match=f"not a report of recover_: .*({said})"):
        RecoveryReport.from_dict(table)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", "{"])
def test_json_of_something_else_is_refused(text):
    with pytest.raises(ValueError, match=r"not a report of recover_|Expecting"):
        RecoveryReport.from_json(text)


def test_a_recovery_is_a_stage_of_a_model():
    model = nn.Sequential(nn.Linear(8, 8))
    pruned = secateur.prune_(model, pattern="2:4", method="magnitude")
    text = stages_to_json([pruned, report()])
    assert [entry["stage"] for entry in json.loads(text)["stages"]] == ["prune", "recover"]
    assert stages_from_json(text) == (pruned, report())
    assert stages_from_json(stages_to_json([report()])) == (report(),)
    broken = text.replace('"steps": 30', '"steps": "x"')
    with pytest.raises(ValueError, match="steps must be int"):
        stages_from_json(broken)


@pytest.mark.parametrize("alone", [True, False])
def test_packing_and_shrinking_take_it_in_their_history(alone):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    pruned = secateur.prune_(model, pattern="4:8", method="magnitude")
    history = report() if alone else [pruned, report()]
    assert {str(pattern) for pattern in patterns_in(history).values()} == (set() if alone else {"4:8"})
    secateur.pack_(model, batch_sizes=[1], history=history)
    other = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    shrunk = secateur.shrink_(other, [torch.randn(20, 16)], keep={"channels": 0.5}, history=history)
    assert shrunk.after.parameters < shrunk.before.parameters
