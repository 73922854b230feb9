"""Reports of shrinking: as data, JSON, Markdown and a page."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from secateur.graph import Dimension, Graph, Place
from secateur.reports import (
    Boundary,
    Evaluation,
    Latency,
    ModelSize,
    ShrinkProof,
    ShrinkReport,
    ShrunkDimension,
)
from secateur.reports._shrink_rows import blocked_table
from secateur.shrinking import describe

REPORT = ShrinkReport(
    dimensions=(
        ShrunkDimension("encoder.layer", "layers", 3, 2, (1,), 0.1, 0.3, 0.2, ("one scale",)),
        ShrunkDimension("encoder.layer.0.ffn", "ffn", 8, 6, (0, 5), 0.05, 0.02, 0.0123),
        ShrunkDimension("encoder.layer.1.ffn", "ffn", 8, 8),
        ShrunkDimension("encoder.layer.2.ffn", "ffn", 8, 6, (2, 3), 0.05, 0.02, 0.01, ("a <b> & | note",)),
    ),
    boundaries=(
        *(
            Boundary(f"encoder.layer.{block}.norm.weight", 0, 16, "aten.native_layer_norm", "it mixes channels")
            for block in range(3)
        ),
        Boundary("pooler.weight", 0, 16, "", "it is an output of the model"),
    ),
    before=ModelSize(1000, 4000, 500, (1, 16), ("aten.gru",)),
    after=ModelSize(600, 2400, 250, (1, 16), ("aten.gru",)),
    asked={"keep": {"layers": 0.67, "ffn": 0.75}},
    method="obs+refit",
    allocation="uniform",
    round_to=2,
    uniform=True,
    uniform_reason="",
    versions={"secateur": "1"},
    seconds=1.5,
    proof=ShrinkProof(3e-7, 1e-5, "float32", "block by block"),
    kept_blocks={"encoder.layer": (0, 2)},
    original_sizes={"encoder.layer": 3, "encoder.layer.0.ffn": 8},
    model_hash="ab",
    facts={"blocks": {"encoder.layer": [0, 2]}},
    calibration_hash="cd",
    calibration={"file": "text.txt"},
    evaluation=Evaluation("perplexity", 10.0, 12.0, 500),
    latency=Latency((1, 16), 0.004, 0.002, 2.0, 1.9, 2.1, "float32", {"processor": "x"}),
    notes=("a note",),
)
BARE = replace(REPORT, proof=None, evaluation=None, latency=None, calibration_hash=None, notes=())


@pytest.mark.parametrize("report", [REPORT, BARE], ids=["full", "bare"])
def test_json_and_dicts_bring_back_the_same_report(report):
    assert ShrinkReport.from_json(report.to_json()) == report
    assert ShrinkReport.from_dict(report.to_dict()) == report
    assert report.to_dict() == json.loads(report.to_json())


@pytest.mark.parametrize("text", ["[]", "{}", "nothing", '{"dimensions": 3}', '{"layers": []}', '{"dimensions": [{}]}'])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match=r"shrink_|Expecting"):
        ShrinkReport.from_json(text)
    with pytest.raises(ValueError, match="surplus"):
        ShrinkReport.from_dict({**REPORT.to_dict(), "surplus": 1})


def test_history_says_which_units_and_blocks_are_left():
    assert REPORT.removed == {"encoder.layer": (1,), "encoder.layer.0.ffn": (0, 5), "encoder.layer.2.ffn": (2, 3)}
    assert REPORT.dimensions[1].kept == (1, 2, 3, 4, 6, 7)
    assert REPORT.kept_blocks["encoder.layer"] == (0, 2)


def test_markdown_has_figures_of_the_whole_model_and_short_tables():
    text = REPORT.to_markdown()
    assert "60.00% of the model's 1,000 parameters are left, and 50.00% of its multiply-adds." in text
    assert "| milliseconds | 4 | 2 | 0.500 | 1 x 16, float32: 2.00 times as fast (1.90-2.10) |" in text
    assert "aten.gru" in text
    assert "| encoder.layer.*.norm.weight[0] | 3 | 16 | aten.native_layer_norm | it mixes channels |" in text
    assert "| encoder.layer.0.ffn | ffn | 8 | 6 | 75.0% | 5.00% | 0.0200 | 0.0123 |" in text
    assert "encoder.layer.1.ffn" not in text  # its block went
    assert "a &lt;b> & \\| note" in text


def test_figures_that_were_not_measured_are_left_out():
    text = replace(BARE, before=ModelSize(1000, 4000), after=ModelSize(600, 2400)).to_markdown()
    assert not [word for word in ("multiply-adds", "milliseconds", "masked one", "perplexity") if word in text]


def test_the_page_has_a_bar_for_each_layer_and_loads_nothing():
    page = REPORT.to_html()
    assert page.count('class="meter split"') == 3  # two blocks that stayed, and one that went
    assert 'class="soft">gone<span class="meter split"><i style="width:0.0%">' in page
    assert '6 of 8<span class="meter split"><i style="width:75.0%">' in page
    assert "<b>" not in page.replace("<body>", "")
    assert "http" not in page.replace("http-equiv", "")
    assert page == REPORT.to_html()


def test_a_model_that_lost_only_blocks_has_a_bar_for_each():
    page = replace(REPORT, dimensions=REPORT.dimensions[:1]).to_html()
    assert page.count(">kept<span") == 2
    assert page.count(">gone<span") == 1


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def units(count, width=1):
    return np.arange(count * width).reshape(count, width)


def test_an_analysis_has_a_row_for_what_is_alike_in_all_blocks():
    neurons = [
        Dimension(
            f"blocks.{block}.ffn",
            "ffn",
            6,
            (
                Place(f"blocks.{block}.0.weight", 0, units(6)),
                Place(f"blocks.{block}.0.bias", 0, units(6)),
                Place(f"blocks.{block}.2.weight", 1, units(6), is_input=True),
            ),
        )
        for block in range(3)
    ]
    heads = Dimension("heads", "query_heads", 2, (Place("blocks.0.2.weight", 0, units(2, 2)),), 2, notes=("a note",))
    boundary = Boundary("blocks.0.2.bias", 0, 4, "aten.add", "it is the residual stream")
    graph = Graph((Dimension("blocks", "layers", 3), *neurons, heads), (boundary,), 0.5)
    analysis = describe(Tower(), graph, torch.randn(2, 4))
    assert [found.parameters for found in analysis.dimensions] == [58, 9, 9, 9, 12]
    assert analysis.size.macs == 3 * 2 * 2 * 24
    text = analysis.to_markdown()
    assert "| blocks.*.ffn | ffn | 3 | 6 | 9 | 93.1% |  |" in text
    assert "| heads | query_heads | 1 | 2 | 12 | 13.8% | the same number from each 2 in a row; a note |" in text
    assert "| blocks.0.2.bias[0] | 1 | 4 | aten.add | it is the residual stream |" in text
    assert json.loads(analysis.to_json())["dimensions"][1]["name"] == "blocks.0.ffn"
    assert "blocks" in analysis.to_html()


def test_names_that_differ_in_numbers_become_one():
    rows = blocked_table([Boundary(f"a.{i}.b.3.c", 1, 8 * i, "", "r") for i in range(1, 5)]).rows
    assert rows == (("a.*.b.3.c[1]", "4", "8, 16 and 2 more", "", "r"),)


def test_an_analysis_of_a_model_with_nothing_to_remove_says_so():
    assert "nothing can be removed" in str(describe(nn.Linear(2, 2), Graph(())))
