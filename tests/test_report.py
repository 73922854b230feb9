"""A report is data: it survives JSON, and its pages show all of it, escape all of it and load nothing."""

from __future__ import annotations

import html
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from secateur import Choice, PackedLayer, PackReport
from secateur.reports import (
    Comparison,
    Evaluation,
    Histogram,
    LayerReport,
    ModelWeights,
    Report,
    SkippedLayer,
    Table,
    TableColumn,
    bars,
    comparison_page,
    comparison_table,
    evaluation_table,
    packed_table,
    pruned_table,
    skipped_table,
    tables_page,
)

HOSTILE = '<script>alert("1")</script>|&amp;\n$x_$'
HISTOGRAM = Histogram(edges=(-3.0, -2.0, -1.0, 0.0), kept=(0, 3, 5), pruned=(6, 2, 0), cut=-1.75)
LAYER = LayerReport(
    name="blocks.0.mlp.up",
    shape=(4, 4),
    pattern="2:4",
    asked=0.5,
    sparsity=0.5,
    pruned=8,
    zeros=9,
    relative_error=0.125,
    tokens=1024,
    dead_inputs=2,
    seconds=0.25,
    tied_to=("decoder.up",),
    notes=("damping raised from 0.01 to 0.1",),
    histogram=HISTOGRAM,
    thumbnail=((100, 0, 100, 0),) * 4,
)
BARE = LayerReport(
    name="head",
    shape=(2, 3),
    pattern="unstructured",
    asked=0.3,
    sparsity=1 / 3,
    pruned=2,
    zeros=2,
    relative_error=None,
    tokens=None,
    dead_inputs=None,
    seconds=0.0,
)
REPORT = Report(
    layers=(LAYER, BARE),
    skipped=(
        SkippedLayer("embed", "Embedding", "its weight is a table", 1000, 1000),
        SkippedLayer("", "Root", "no weight matrix"),
    ),
    recipe={"pattern": "2:4", "method": {"name": "refit", "inner": {"name": "wanda"}}, "include": []},
    versions={"secateur": "0.1.0", "torch": "2.9.0"},
    seconds=75.0,
    calibration_hash="0123abcd" * 8,
    evaluation=Evaluation("perplexity", 12.5, 15.25, 4096),
    calibration={"file": "calibration.txt", "seed": 7},
)
EMPTY = Report(layers=(), skipped=(), recipe={}, versions={}, seconds=0.0)
RUNS = (
    Comparison("magnitude", "2:4", 0.5, 10.0, 80.0, None, 0.5),
    Comparison("wanda", "2:4", 0.5, 10.0, 20.0, 0.25, 2.0),
    Comparison("magnitude", "unstructured", 0.7, 10.0, math.inf, 0.5, 0.5),
    Comparison("wanda", "unstructured", 0.7, 10.0, 9.5, 0.125, 2.0),
)

PACKED = PackReport(
    layers=(
        PackedLayer(
            name="blocks.0.mlp.up",
            shape=(4, 8),
            pattern="2:4",
            density=0.5,
            format="nm",
            value_dtype="int8",
            error=0.0125,
            dense_bytes=128,
            stored_bytes=32,
            runtime_bytes=16,
            packed=True,
            reason="",
            choices=(Choice(1, "lanes:2:4", 2.0, 1.5, 2.5, 1e-4, 2e-4, None), Choice(8, "rows", 1.25, 1, 2, 1, 1, 1)),
        ),
        PackedLayer("head", (2, 0), "row", 1.0, "row", "float32", 0.0, 0, 0, 9, False, "nothing is faster", ()),
    ),
    skipped=(SkippedLayer("embed", "Embedding", "embedding"),),
    machine={"processor": "Abacus", "threads": "1"},
    memory=1.0,
    seconds=2.5,
)


class Page(HTMLParser):
    """The tags of a page, its text as read, and whether every tag is closed."""

    VOID = frozenset({"meta", "img", "wbr", "link", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.ids: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.tags if name == tag)


def many(count: int) -> Report:
    bins = range(48)
    histogram = Histogram(
        edges=tuple(round(-4 + index / 12, 4) for index in range(49)),
        kept=tuple(index * index % 991 for index in bins),
        pruned=tuple((47 - index) * 17 for index in bins),
        cut=-1.5,
    )
    thumbnail = tuple(tuple((row * 7 + column * 13) % 101 for column in bins) for row in bins)
    layers = tuple(
        replace(
            LAYER,
            name=f"model.layers.{index // 7}.part{index % 7}",
            relative_error=index / count,
            histogram=histogram,
            thumbnail=thumbnail,
        )
        for index in range(count)
    )
    return replace(REPORT, layers=layers)


# Data


@pytest.mark.parametrize("report", [REPORT, EMPTY], ids=["full", "empty"])
def test_json_gives_the_report_back(report):
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    "text",
    ["", "prune", "[]", "3", "null", "{}", '{"layers": 1}', REPORT.to_json()[:-20], EMPTY.to_json()[:-1] + ', "x": 1}'],
)
def test_from_json_refuses_what_is_no_report(text):
    with pytest.raises(ValueError):  # noqa: PT011  (JSON's own message, or ours)
        Report.from_json(text)


def test_totals_count_the_pruned_layers():
    assert (REPORT.num_weights, REPORT.num_pruned) == (16 + 6, 8 + 2)
    assert REPORT.to_dict()["totals"] == {"weights": 22, "pruned": 10, "sparsity": 10 / 22}
    assert EMPTY.sparsity == 0.0
    assert str(REPORT) == "pruned 10 of 22 weights (45.45%) in 2 layers, skipped 2 modules, 75.0 s"


WHOLE = replace(REPORT, whole=ModelWeights(1030, 103, 4120, 7), calibration_mode="one pass")
LEFT = replace(WHOLE, skipped=(SkippedLayer("a", HOSTILE, "no known kind", 900, 900), *REPORT.skipped))


def test_every_text_begins_with_the_whole_model():
    first = "10.00% of the model's 1,030 weights are zero now; 2.14% were considered"
    first += "; 7 have no values (meta device) and do not count as zero"
    assert str(WHOLE).splitlines() == [first, f"{REPORT}; calibration one pass"]
    assert WHOLE.to_markdown().splitlines()[2] == f"{first}."
    text = Page(WHOLE.to_html()).text
    assert f"{first}." in text
    assert text.index(first) < text.index("Weights pruned")
    assert Report.from_json(WHOLE.to_json()) == WHOLE


def test_every_text_warns_of_what_was_left_alone():
    warning = "97.61% of the weights in matrices were left alone (900 of 922, without embeddings and output heads): "
    assert f"warning: {warning}1,000 in embeddings, 900 in 1 <script>" in str(LEFT)
    assert f"Warning: {warning}" in LEFT.to_markdown()
    assert f"Warning: {warning}" in Page(LEFT.to_html()).text
    assert "<script>" not in LEFT.to_markdown() + LEFT.to_html()
    assert "warning" not in str(replace(LEFT, skipped=(replace(LEFT.skipped[0], weights=2, matrix_weights=2),)))


def test_a_warning_lists_a_few_classes():
    skipped = tuple(SkippedLayer(str(size), f"Kind{size}", "unknown", size, size) for size in range(100, 110))
    (warning,) = replace(REPORT, skipped=skipped).warnings
    assert warning.endswith(
        "109 in 1 Kind109 (unknown), 108 in 1 Kind108 (unknown), 107 in 1 Kind107 (unknown), "
        "106 in 1 Kind106 (unknown), 105 in 1 Kind105 (unknown), 510 in other classes"
    )


def test_a_packing_report_survives_json_and_names_routes():
    assert PackReport.from_json(PACKED.to_json()) == PACKED
    assert '"route": "lanes:2:4"' in PACKED.to_json()
    assert '"way"' not in PACKED.to_json()


def test_a_packing_report_says_what_fewer_bits_cost():
    up = replace(PACKED.layers[0], format="dense", precision="int8", output_error=0.0123)
    report = replace(PACKED, layers=(up, *PACKED.layers[1:]), output_error=0.0045)
    assert PackReport.from_json(report.to_json()) == report
    assert str(report).splitlines()[-1] == "the relative error of the model's outputs is 0.0045"
    assert "packed 1 of 2 layers, skipped" in str(report)
    assert "packed 1 of 2 layers with zeros, skipped" in str(PACKED)
    text = report.to_markdown()
    assert "| dense | int8 | int8 | 0.013 | 0.012 | 0.25 |" in text
    assert "The relative error of the model's outputs is 0.0045." in Page(report.to_html()).text
    assert "outputs:" not in PACKED.to_markdown()


def test_a_packing_report_of_0_1_0_is_read():
    """Until 0.1.0 the route of a choice was called its way."""
    table = json.loads(PACKED.to_json())
    for layer in table["layers"]:
        for choice in layer["choices"]:
            choice["way"] = choice.pop("route")
    assert PackReport.from_json(json.dumps(table)) == PACKED
    table["layers"][0]["choices"][0]["route"] = "rows"
    with pytest.raises(ValueError, match="not a report of pack_"):
        PackReport.from_json(json.dumps(table))


def test_the_former_name_of_a_route_still_works_and_warns():
    with pytest.warns(DeprecationWarning, match=r"Choice\.way is now called Choice\.route"):
        assert PACKED.layers[0].choices[0].way == "lanes:2:4"


# Tables


TABLES = {
    "pruned": pruned_table(REPORT.layers),
    "skipped": skipped_table(REPORT.skipped),
    "evaluation": evaluation_table(REPORT.evaluation),
    "packed": packed_table(PACKED.layers),
    "comparison": comparison_table(RUNS),
}


def cells(table):
    return [cell for row in table.rows for cell in row if cell]


@pytest.mark.parametrize("name", TABLES)
def test_markdown_and_the_page_show_the_same_rows(name):
    table = TABLES[name]
    assert all(len(row) == len(table.columns) for row in table.rows)
    lines = [line for line in table.to_markdown().splitlines() if line.startswith("|")]
    assert [line.replace("*", "")[2:-2].split(" | ") for line in lines[2:]] == [list(row) for row in table.rows]
    text = Page(tables_page("Title", ("Lead",), (), (table,))).text
    assert [cell for cell in (table.title, *cells(table), *table.notes) if cell not in text] == []


def test_a_table_as_markdown():
    columns = TableColumn("a|b"), TableColumn("n", is_number=True), TableColumn("x", is_note=True)
    table = Table("Title", columns, (("one\ntwo", "1", ""), ("<i>", "2", "y")), ("A note.",), strong=((1, 1),))
    assert table.to_markdown().splitlines() == [
        "| a\\|b | n | x |",
        "|---|---:|---|",
        "| one two | 1 |  |",
        "| &lt;i> | **2** | y |",
        "",
        "A note.",
    ]


def test_a_table_on_a_page():
    columns = TableColumn("a"), TableColumn("n", is_number=True, bars=(0.5, 1.0)), TableColumn("empty")
    rows = (("x.y", "1", ""), ("z", "2\nrows", ""), ("w", "", ""))
    columns = (columns[0], replace(columns[1], bars=(0.5, 1.0, 0.0)), columns[2])
    page = tables_page("Title", (), (), (Table("T", columns, rows, sections=(1,), strong=((0, 1),)),))
    assert "empty" not in page
    assert '<th scope="row" class="name">x.<wbr>y</th>' in page
    assert '<td class="n"><strong>1</strong><span class="meter"><i style="width:50.0%"></i></span></td>' in page
    assert '<tr class="first"><th scope="row" class="name">z</th><td class="n">2<br>rows' in page
    assert page.count('class="meter"') == 2  # none where there is no figure
    assert page.count('<tr class="first">') == 1


def test_bars_are_parts_of_the_longest():
    assert bars([1.0, 4.0, None, math.nan, math.inf]) == (0.25, 1.0, 0.0, 0.0, 0.0)
    assert bars([0.5, 3.0], longest=2.0) == (0.25, 1.0)
    assert bars([0.0]) == (0.0,)
    assert bars([]) == ()


def test_layers_are_in_sections_by_block():
    names = ["embed", "layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b", "head"]
    assert pruned_table([replace(LAYER, name=name) for name in names]).sections == (1, 3)


# Markdown


def test_markdown_has_a_row_for_each_layer_and_skipped_module():
    text = REPORT.to_markdown()
    assert (
        "| blocks.0.mlp.up | 4 x 4 | 2:4 | 0.5 | 50.00% | 0.1250 | 2 | 0.25 | shared with decoder.up; damping" in text
    )
    assert "| head | 2 x 3 | unstructured | 0.3 | 33.33% |  |  | 0.00 |  |" in text
    assert "| embed | Embedding | 1,000 | its weight is a table |\n| (root) | Root |  | no weight matrix |" in text
    assert "| perplexity | 4,096 | 12.50 | 15.25 | 1.220 |" in text


def test_markdown_cells_hold_what_would_break_them():
    report = replace(REPORT, layers=(replace(LAYER, name=HOSTILE, notes=("a|b\nc",)),))
    rows = [line for line in report.to_markdown().splitlines() if "alert" in line]
    assert len(rows) == 1
    assert rows[0].replace("\\|", "").count("|") == 10
    assert "<script>" not in rows[0]


def test_markdown_of_a_packing_report():
    lines = PACKED.to_markdown().splitlines()
    assert lines[0] == "# Packing report"
    assert "Measured on: processor Abacus, threads 1." in lines
    wanted = "50.0% | nm | int8 | exact | 0.013 | 0.25 | 0.38 | 1: 2.00 (1.50-2.50) 0.1000 ms lanes:2:4, "
    assert f"| blocks.0.mlp.up | 4 x 8 | 2:4 | {wanted}8: 1.25 (1.00-2.00) 1,000 ms rows |" in lines
    assert "| head | 2 x 0 | row | 100.0% | dense |  |  |  |  |  | nothing is faster |" in lines
    assert "| embed | Embedding |  | embedding |" in lines


# HTML


@pytest.fixture(scope="module")
def page() -> str:
    return REPORT.to_html()


@pytest.fixture(scope="module")
def comparison() -> str:
    return comparison_page("Runs", "Some.", RUNS, REPORT)


@pytest.fixture(scope="module")
def packing() -> str:
    return PACKED.to_html()


def test_page_shows_the_whole_packing_report(packing):
    text = Page(packing).text
    facts = ["Packing report", "processor Abacus, threads 1", "1", "of 2 with zeros", "32", "of 128 dense", "2.5 s"]
    assert [fact for fact in [*facts, *cells(packed_table(PACKED.layers)), "embedding"] if fact not in text] == []


def test_page_shows_the_whole_report(page):
    text = Page(page).text
    facts = ["45.45", "1 min 15 s", "12.50", "15.25", "1.220", "4,096", "Method wanda+refit"]
    facts += ["blocks.0.mlp.up", "head", "0.1250", "shared with decoder.up", "damping raised from 0.01 to 0.1"]
    facts += ["embed", "its weight is a table", "(root)", "no weight matrix"]
    facts += ['pattern = "2:4"', "torch", "2.9.0", "calibration.txt", "0123abcd" * 8, "model, batches, recipe=recipe"]
    assert [fact for fact in facts if fact not in text] == []


@pytest.mark.parametrize("name", ["page", "comparison", "packing"])
def test_page_loads_and_runs_nothing(name, request):
    page = request.getfixturevalue(name)
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert "url(" not in page.replace("url(#", "")
    for tag, attributes in Page(page).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for attribute, value in attributes.items():
            assert not attribute.startswith("on")
            if attribute in {"src", "href", "xlink:href", "srcset", "action"}:
                assert (value or "").startswith(("#", "data:image/png;base64,"))


@pytest.mark.parametrize("name", ["page", "comparison", "packing"])
def test_page_is_well_formed_and_accessible(name, request):
    parsed = Page(request.getfixturevalue(name))
    assert [attributes["lang"] for attributes in parsed.all("html")] == ["en"]
    assert any(attributes.get("name") == "viewport" for attributes in parsed.all("meta"))
    assert len(list(parsed.all("title"))) == 1
    assert len(list(parsed.all("caption"))) == len(list(parsed.all("table")))
    assert all(attributes.get("scope") in {"col", "row"} for attributes in parsed.all("th"))
    assert all(attributes.get("alt") for attributes in parsed.all("img"))
    assert all(attributes.get("role") == "img" for attributes in parsed.all("svg"))
    assert len(parsed.ids) == len(set(parsed.ids))
    links = [
        attributes.get("href") or attributes["xlink:href"] for tag, attributes in parsed.tags if tag in {"a", "use"}
    ]
    links += [attributes["aria-labelledby"] for attributes in parsed.all("section") if attributes]
    assert {(link or "").removeprefix("#") for link in links} <= set(parsed.ids)


def test_page_escapes_everything_a_report_holds():
    layer = replace(LAYER, name=HOSTILE, pattern=HOSTILE, notes=(HOSTILE,), tied_to=(HOSTILE,))
    report = replace(
        REPORT,
        layers=(layer,),
        skipped=(SkippedLayer(HOSTILE, HOSTILE, HOSTILE),),
        recipe={"pattern": HOSTILE, HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        calibration={HOSTILE: HOSTILE},
        calibration_hash=HOSTILE,
        evaluation=Evaluation(HOSTILE, 1.0, 2.0, 3),
    )
    rows = [replace(row, method=HOSTILE, target=HOSTILE + "\N{SNOWMAN}\N{CJK UNIFIED IDEOGRAPH-526A}") for row in RUNS]
    layers = (replace(PACKED.layers[0], name=HOSTILE, pattern=HOSTILE, format=HOSTILE, value_dtype=HOSTILE),)
    layers += (replace(PACKED.layers[1], name=HOSTILE, reason=HOSTILE),)
    packed = replace(PACKED, layers=layers, skipped=report.skipped, machine={HOSTILE: HOSTILE})
    comparison = comparison_page(HOSTILE, HOSTILE, rows, report, {HOSTILE: HOSTILE})
    for text in (report.to_html(), comparison, packed.to_html()):
        assert "<script" not in text
        assert html.escape("<script>", quote=False) in text
        assert 'alert("1")' in Page(text).text


def test_page_is_deterministic(page, comparison):
    assert REPORT.to_html() == page
    assert comparison_page("Runs", "Some.", RUNS, REPORT) == comparison


def test_page_follows_neither_nor_changes_matplotlib_settings(page):
    import matplotlib

    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 40, "axes.grid": False}):
        names = matplotlib.rcParams.keys() - {"backend"}  # asking for the backend would choose one
        before = {name: matplotlib.rcParams[name] for name in names}
        assert REPORT.to_html() == page
        assert {name: matplotlib.rcParams[name] for name in names} == before


def test_page_does_not_load_pyplot():
    """In a process of its own: other libraries load it too."""
    code = "import sys, secateur; secateur.Report.from_json(sys.stdin.read()).to_html(); print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], input=REPORT.to_json(), capture_output=True, text=True, check=True
    )
    assert "matplotlib.figure" in run.stdout.split()
    assert "matplotlib.pyplot" not in run.stdout.split()


def test_charts_take_their_colours_from_the_theme(page):
    start = page.index('<svg class="chart"')
    chart = page[start : page.index("</svg>", start)]
    assert "var(--accent)" in chart
    assert "#01" not in chart


def test_each_picture_is_there_only_if_its_data_is(page):
    parsed = Page(page)
    assert len(list(parsed.all("img"))) == 1
    assert sum(attributes.get("class") == "histogram" for attributes in parsed.all("svg")) == 1
    assert "No scores to show." in parsed.text


def test_histogram_draws_each_bin_and_the_cut(page):
    """190 wide over three decades: bins of 63.3, the cut at 1.25 decades; the highest bin, 6, spans y from 94 to 4."""
    assert '<path class="pruned" d="M0.0 94.0V4.0H63.3V94.0M63.3 94.0V64.0H126.7V94.0"/>' in page
    assert '<path class="kept" d="M63.3 64.0V19.0H126.7V64.0M126.7 94.0V19.0H190.0V94.0"/>' in page
    assert '<path class="cut" d="M79.2 0V94"/>' in page


ODD_LAYERS = [
    {"histogram": replace(HISTOGRAM, edges=(1.0,) * 4)},
    {"histogram": replace(HISTOGRAM, cut=None)},
    {"histogram": replace(HISTOGRAM, kept=(0,) * 3, pruned=(0,) * 3)},
    {"histogram": replace(HISTOGRAM, edges=(-45.0, -16.0, 12.0, 38.0))},
    {"relative_error": math.nan},
    {"relative_error": math.inf},
    {"relative_error": 1e-12},
    {"shape": (0, 4), "thumbnail": (), "pruned": 0},
    {"shape": (1, 100_000), "thumbnail": ((50,) * 48,)},
    {"name": ""},
]


@pytest.mark.parametrize(
    "changes",
    [ODD_LAYERS, [{"relative_error": math.nan}], [{"relative_error": 0.0}], [{"relative_error": None}]],
    ids=["all", "error is nan", "error is zero", "no error"],
)
def test_odd_layers_have_a_page(changes):
    report = replace(REPORT, layers=tuple(replace(LAYER, **change) for change in changes))
    assert Page(report.to_html()).text.count("damping raised") == len(changes)


def test_empty_report_has_a_page():
    text = Page(EMPTY.to_html()).text
    assert "No layer was pruned." in text
    assert "No module was skipped." in text
    assert "The report holds no recipe." in text


def test_method_that_a_file_cannot_name_is_said_to_be_one():
    report = replace(REPORT, recipe={"method": {"name": "Mine", "repr": "Mine(strength=2)"}, "sparsity": None})
    text = Page(report.to_html()).text
    assert "Mine(strength=2)" in text
    assert "a file cannot name" in text
    assert "Recipe.load" not in text


def test_training_is_not_repeated_by_pruning():
    recipe = {"method": {"name": "gate", "freeze": 0.8}, "pattern": "2:4", "steps": 400, "seed": 3}
    text = Page(replace(REPORT, recipe=recipe).to_html()).text
    assert "the settings of secateur.SparseTraining" in text
    assert "steps = 400" in text
    assert "freeze = 0.8" in text
    assert "Recipe.load" not in text
    assert "prune_" not in text
    assert "Recipe.load" in Page(REPORT.to_html()).text


def test_large_model_has_a_small_page():
    report = many(300)
    page = report.to_html()
    assert len(page.encode()) < 4e6
    text = Page(page).text
    assert all(layer.name in text for layer in report.layers)
    assert sum("open" in attributes for attributes in Page(page).all("details")) == 1


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_missing_library_names_the_extra(missing, monkeypatch):
    for name in [name for name in sys.modules if name == missing or name.startswith(missing + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    message = r'^Report\.to_html needs matplotlib and jinja2; install them with: pip install "secateur\[report\]"$'
    with pytest.raises(ImportError, match=message):
        REPORT.to_html()
    assert "Packing report" in PACKED.to_html()  # has no pictures, and needs neither


# Comparisons


def test_comparison_shows_each_run_and_marks_the_best_of_each_pattern():
    page = comparison_page(
        "Four runs", "First paragraph.\n\nSecond\nparagraph.", RUNS, samples={"Before": "Once\nupon"}
    )
    text = Page(page).text
    for fact in ("Four runs", "First paragraph.", "Second paragraph.", "magnitude", "unstructured", "80.00", "inf"):
        assert fact in text
    assert "Once\nupon" in text
    assert "<strong>20.00</strong>" in page
    assert "<strong>9.500</strong>" in page
    assert page.count("<strong>") == 2
    assert "To repeat this run" not in text


def test_comparison_holds_the_report_of_one_run(comparison):
    text = Page(comparison).text
    assert "One run in full" in text
    assert "blocks.0.mlp.up" in text


@pytest.mark.parametrize(
    "rows",
    [(), RUNS[:1], RUNS[2:3], (replace(RUNS[0], after=10.0),), (replace(RUNS[0], before=0.0, after=0.0),)],
    ids=["none", "one", "not finite", "no change", "zero"],
)
def test_odd_comparisons_have_a_page(rows):
    assert "Methods and patterns" in Page(comparison_page("Runs", "", rows)).text
