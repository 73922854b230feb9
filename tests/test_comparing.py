"""All ways to run a module, compared: which are worth choosing, the report, and its page."""

import copy
import json
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from fake_timing import routes_take
from torch import nn

import secateur
from secateur import ComparisonReport, Figure, FormatError, RecipeError, StatisticsError, engines
from secateur.comparison import WAYS, _memory, _modules, _run
from secateur.comparison._memory import memory_of
from secateur.comparison._subject import Deployed
from secateur.reports import WayResult, WayTiming, frontier
from secateur.reports._label_places import Label, label_places

SHAPES = ((1, 16), (8, 64))
NASTY = 'a <b> & "c" | d'


# Which ways are worth choosing


@pytest.mark.parametrize(
    ("points", "higher", "expected"),
    [
        ([(1, 100), (2, 99), (1.5, 98), (4, 90)], True, (0, 1, 3)),
        ([(1, 10), (2, 11), (1.5, 12), (4, 20)], False, (0, 1, 3)),
        ([(1, 100), (2, 100)], True, (1,)),
        ([(1, 100.0), (2, 99.999)], True, (1,)),  # a table shows the same
        ([(1, 100.0), (2, 99.94)], True, (0, 1)),
        ([(2, 90), (2, 91)], True, (1,)),  # as fast, and better
        ([(2, 90), (2, 90)], True, (0, 1)),
        ([(1, 100), (2, float("nan")), (3, 80)], True, (0, 2)),
        ([(1, 1234.4), (2, 1234.3)], False, (1,)),
        ([], True, ()),
    ],
)
def test_the_frontier_is_what_nothing_beats(points, higher, expected):
    assert frontier(dict(enumerate(points)), higher) == expected


def timing(shape, milliseconds, times, noisy=False):
    return WayTiming(
        shape, tuple(milliseconds * f for f in (0.9, 1, 1.2)), tuple(times * f for f in (0.9, 1, 1.1)), noisy
    )


def way(name, title, model, times, quality, **changes):
    timings = tuple(timing(shape, 10 / times, times) for shape in SHAPES)
    figures = (Figure("rank", quality, 100.0, 20, "sentences", True, "text.txt"),)
    values = {"nbytes": 91_000_000, "memory": 120_000_000, "figures": figures, **changes}
    return WayResult(name, title, model, model == "dense", timings, **values)


def report(**changes):
    ways = (
        way("torch", "PyTorch", "dense", 1.0, 100.0),
        way("onnx-int8", "ONNX Runtime int8", "dense", 2.5, 99.5, nbytes=23_000_000),
        way("torch", "PyTorch", NASTY, 2.0, 99.0, notes=(NASTY,)),
        way("onnx-int8", "ONNX Runtime int8", NASTY, 5.0, 98.5, nbytes=12_345_678),
        WayResult("openvino", "OpenVINO", "dense", True, absence="it is not installed"),
        WayResult("openvino", "OpenVINO", NASTY, False, absence="it is not installed"),
        WayResult("packed", "secateur packed", NASTY, False, absence=f"no layer gains {NASTY}"),
    )
    values = {
        "ways": ways,
        "shapes": SHAPES,
        "reference": 0,
        "model": NASTY,
        "dense": "dense-model",
        "metric": "rank",
        "higher_is_better": True,
        "threads": 2,
        "machine": {"processor": "P"},
        "notes": (f"note {NASTY}",),
        "versions": {"torch": "2"},
    }
    return ComparisonReport(**{**values, **changes})


def with_ways(change):
    return report(ways=tuple(map(change, report().ways)))


def test_the_report_names_the_ends_of_the_frontier():
    made = report()
    assert [found.name for found in made.frontier()] == [
        "PyTorch, dense",
        "ONNX Runtime int8, dense",
        f"ONNX Runtime int8, {NASTY}",
    ]
    assert made.frontier((8, 64)) == made.frontier()
    lines = str(made).splitlines()
    assert lines[0] == (
        f"fastest over all shapes: ONNX Runtime int8, {NASTY}, 5.00 times as fast as PyTorch, dense; rank 98.50"
    )
    assert lines[1] == "best rank: PyTorch, dense, 100.0; 1.00 times as fast"
    assert lines[2:] == ["4 of 7 ways were run, in turn, with 2 threads of P", f"note {NASTY}"]
    assert made["onnx-int8"].model == NASTY
    assert made["onnx-int8"].times_at((1, 16)) == 5.0
    with pytest.raises(KeyError, match="there are torch, onnx-int8, openvino, packed"):
        made["tensorrt"]
    with pytest.raises(KeyError, match="2 x 2; measured: 1 x 16, 8 x 64"):
        made.frontier((2, 2))


def test_the_mean_is_geometric_and_needs_every_shape():
    both = way("torch", "PyTorch", "dense", 1.0, 100.0)
    both = replace(both, timings=(timing((1, 16), 1, 8.0), timing((8, 64), 1, 2.0)))
    assert both.times_at(None, SHAPES) == pytest.approx(4.0)
    one = replace(both, timings=both.timings[:1])
    assert one.times_at(None, SHAPES) is None
    assert one.times_at((1, 16)) == 8.0
    assert one.times_at((8, 64)) is None


def test_the_tables_have_every_way_once():
    ways, times, further, absent = report().tables
    assert [row[:2] for row in ways.rows] == [row[:2] for row in times.rows]
    assert ways.rows[3][2:5] == ("5.00 x", "5.00 x", "5.00 x")
    assert ways.rows[3][5:9] == ("98.50", "12.3", "120", "everywhere")
    assert ways.rows[2][8:] == ("", NASTY)
    assert ways.sections == (2,)
    assert set(ways.strong) == {(row, column) for row in (0, 1, 3) for column in (2, 3, 4)}
    assert times.rows[1][2:] == ("4 (3.6 to 4.8)", "4 (3.6 to 4.8)")
    assert further.rows == ()  # one figure is in the first table
    assert absent.rows == (
        ("OpenVINO", f"dense, {NASTY}", "it is not installed"),
        ("secateur packed", NASTY, f"no layer gains {NASTY}"),
    )


def test_noise_is_marked():
    def noisy(found):
        return replace(found, timings=tuple(replace(one, noisy=one.shape == (8, 64)) for one in found.timings))

    ways, times, *_ = with_ways(noisy).tables
    assert ways.rows[1][2:5] == ("2.50 x", "2.50 x", "~2.50 x")
    assert times.rows[1][2:] == ("4 (3.6 to 4.8)", "~4 (3.6 to 4.8)")
    for table in (ways, times):
        assert "~ The machine was busy with something else while this was measured." in table.notes
    assert "busy" not in str(report().tables)


def test_further_figures_have_a_table():
    similar = Figure("embedding_similarity", 0.5, 1.0, file="text.txt")
    made = with_ways(lambda found: replace(found, figures=(*found.figures, similar) if found.figures else ()))
    assert made.tables[2].columns[3].heading == "embedding similarity"
    assert made.tables[2].rows[1] == ("ONNX Runtime int8", "dense", "99.50", "0.5000")


@pytest.mark.parametrize(
    "made",
    [
        report(),
        with_ways(lambda found: replace(found, memory=None, nbytes=None)),
        with_ways(lambda found: replace(found, figures=tuple(replace(f, value=float("nan")) for f in found.figures))),
        report(shapes=SHAPES[:1]),
    ],
)
def test_json_gives_the_same_report(made):
    again = ComparisonReport.from_json(made.to_json())
    assert again.to_json() == made.to_json()
    assert str(again) == str(made)
    assert json.loads(report().to_json())["frontier"]["all shapes"] == [0, 1, 3]


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.pop("ways"),
        lambda table: table.update(reference=99),
        lambda table: table.update(threads="two"),
        lambda table: table["ways"][0]["timings"][0].update(times=[1.0]),
        lambda table: table["ways"][0].update(nbytes="many"),
        lambda table: table["ways"][0].update(figures=[{}]),
        lambda table: table.update(further=1),
    ],
)
def test_what_is_no_report_is_refused(change):
    table = report().to_dict()
    change(table)
    with pytest.raises(ValueError, match="not a report of a comparison"):
        ComparisonReport.from_dict(table)


# The page


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    void = ("meta", "br", "wbr", "input", "img")

    def __init__(self, page):
        super().__init__()
        self.open, self.texts, self.tags = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def outlier(found):
    if found.absence or found.way == "torch":
        return found
    return replace(found, figures=tuple(replace(one, value=one.value - 60) for one in found.figures))


PAGES = {
    "usual": report(),
    "one shape": report(shapes=SHAPES[:1]),
    "a way far below": with_ways(outlier),
    "lower is better": report(metric="perplexity", higher_is_better=False),
    "one way": report(ways=report().ways[:1], dense=""),
    "no figures": with_ways(lambda found: replace(found, figures=())),
    "a way at one shape": with_ways(lambda found: replace(found, timings=found.timings[: 2 - found.is_dense])),
    "nothing run": with_ways(lambda found: replace(found, timings=(), figures=(), absence="broken")),
}


@pytest.mark.parametrize("made", PAGES.values(), ids=PAGES.keys())
def test_the_page_is_whole_and_loads_and_runs_nothing(made):
    page = made.to_html()
    parsed = Balanced(page)
    links = {name for _, attributes in parsed.tags for name in attributes} & {"src", "href", "srcset", "data", "action"}
    assert links == set()
    assert {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object", "img", "image", "use"} == set()
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert "url(" not in page
    assert "@import" not in page
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page) == []
    assert "<b>" not in page
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()
    for figure in re.findall(r"<figure.*?</figure>", page, re.DOTALL):
        ElementTree.fromstring(figure)  # as XML, too
    for drawn in re.findall(r' (?:d|x|y|cx|cy|r|width|height)="([^"]*)"', page):
        assert "nan" not in drawn
        assert "inf" not in drawn


def test_the_page_has_every_figure_of_every_way():
    page = report().to_html()
    text = " ".join(Balanced(page).texts)
    for found in report().ways:
        assert found.title in text
        assert found.absence in text
    for expected in ("5.00 x", "98.50", "12.3", "4 (3.6 to 4.8)", "dense-model", NASTY, f"Note {NASTY}"):
        assert expected in text
    # What a pointer shows of a point is in the page for everybody: one group for each way, view and drawing.
    groups = re.findall(r'<g class="way [^>]*aria-label="([^"]*)"', page)
    assert len(groups) == 4 * 3 * 2
    at_one_shape = [group for group in groups if "ONNX Runtime int8; dense" in group and " ms" in group]
    assert at_one_shape[0] == (
        "ONNX Runtime int8; dense; 2.50 times as fast (2.25 to 2.75); 4 (3.6 to 4.8) ms; rank 99.50; "
        "23.0 MB on disk; 120 MB in memory"
    )


def test_each_view_can_be_chosen_without_a_script():
    page = report().to_html()
    inputs = re.findall(r'<input type="radio" name="view" id="(view-\d)"( checked="checked")?/>', page)
    assert inputs == [("view-0", ' checked="checked"'), ("view-1", ""), ("view-2", "")]
    for number, text in enumerate(("all shapes", "1 x 16", "8 x 64")):
        assert f'<label for="view-{number}">{text}</label>' in page
        assert f"#view-{number}:checked ~ #panel-{number}" in page
        assert f'id="panel-{number}"' in page
    assert "<label" not in report(shapes=SHAPES[:1]).to_html()


def test_a_way_far_below_does_not_hide_the_others():
    """It stands at the edge with its figure, and the axis shows the rest."""
    page = with_ways(outlier).to_html()
    ticks = {float(text) for text in re.findall(r'class="tick"[^>]*text-anchor="end">([\d.]+)<', page)}
    assert min(ticks) > 60
    assert re.search(r'class="size"[^>]*>23.0 MB, 39\.50<', page)


def boxes_overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@pytest.mark.parametrize("step", [0, 12, 40])
def test_labels_cover_neither_points_nor_each_other(step):
    points = [(100 + step * number, 200 + 0.2 * number) for number in range(9)]
    labels = [Label(point, (90, 15)) for point in points]
    area = (0, 0, 700, 420)
    places = label_places(labels, [(*point, 6) for point in points], [(0, 200, 700, 200)], area)
    for number, place in enumerate(places):
        left, top, right, bottom = place.box
        assert area[0] <= left
        assert right <= area[2]
        assert area[1] <= top
        assert bottom <= area[3]
        assert not any(boxes_overlap(place.box, other.box) for other in places[:number])
        assert not any(boxes_overlap(place.box, (x - 6, y - 6, x + 6, y + 6)) for x, y in points)


# Running modules


def models():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    model = copy.deepcopy(dense)
    secateur.prune_(model, sparsity=0.9, method="magnitude", exclude=[])
    return dense, model


def fast(monkeypatch):
    """Every way takes a millisecond, that of number n one nth of it; packed layers win."""
    routes_take(monkeypatch, lambda name, index: {"dense": 1.0, "prepacked": 2.0}.get(name, 1e-3 / (1 + index)))


def compared(monkeypatch, **arguments):
    fast(monkeypatch)
    dense, model = models()
    settings = {"dense": dense, "memory": False, "ways": ["torch-int8", "packed", "packed-int8"], **arguments}
    return secateur.compare(model, [torch.randn(8, 64)], **settings)


def test_modules_are_run_in_every_way_that_was_asked_for(monkeypatch):
    dense, model = models()
    before = [copy.deepcopy(part.state_dict()) for part in (dense, model)]
    fast(monkeypatch)
    asked = ["packed", "torch-int8"]
    made = secateur.compare(model, [torch.randn(8, 64)], dense=dense, ways=asked, memory=False)
    # In the order of the table, with PyTorch for the comparison.
    assert [(found.way, found.model) for found in made.ways] == [
        *((name, "dense") for name in ("torch", "torch-int8", "packed")),
        *((name, "Sequential") for name in ("torch", "torch-int8", "packed")),
    ]
    for part, state in zip((dense, model), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in part.state_dict().items())
    assert made.ways[2].absence == "no layer has zeros, so that nothing was packed"
    run = [found for found in made.ways if not found.absence]
    assert len(run) == 5
    assert made.metric == "similarity"
    assert made.ways[0].quality == pytest.approx(1.0)
    pruned = secateur.evaluate(model, [torch.randn(8, 64)], "similarity", dense)["similarity"]
    assert made["packed"].quality == pytest.approx(made["torch"].quality, abs=1e-5)
    assert made["torch"].quality == pytest.approx(pruned, abs=0.2)
    assert made.shapes == ((1, 64), (8, 64))
    # The n-th way takes one n-th of the time.
    assert [found.times_at((8, 64)) for found in run] == pytest.approx([1, 2, 3, 4, 5])
    assert made["packed"].timings[0].milliseconds == pytest.approx((0.2, 0.2, 0.2))
    sizes = {found.name: found.nbytes for found in run}
    assert sizes["PyTorch, Sequential"] == sizes["PyTorch, dense"]
    assert sizes["PyTorch int8, Sequential"] < sizes["PyTorch, Sequential"]
    assert sizes["secateur packed, Sequential"] < sizes["PyTorch, Sequential"] / 2


def test_a_packed_module_is_run_as_it_is_and_dense(monkeypatch):
    fast(monkeypatch)
    dense, model = models()
    secateur.pack_(model, include=["*"], exclude=[])
    made = secateur.compare(model, [torch.randn(8, 64)], dense=dense, ways=["packed", "packed-int8"], memory=False)
    assert made["packed"].notes == ("as it is",)
    assert [found.absence for found in made.ways[3:]] == ["", "", ""]
    assert made["packed"].quality == pytest.approx(made["torch"].quality, abs=1e-5)
    assert made["packed-int8"].nbytes < made["packed"].nbytes < made["torch"].nbytes


def test_packed_layers_are_run_inside_an_engine(monkeypatch):
    pytest.importorskip("onnxruntime")
    try:
        engines.library("onnxruntime")
    except secateur.KernelError as error:
        pytest.skip(str(error))
    fast(monkeypatch)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))  # wide enough to be worth packing
    model = copy.deepcopy(dense)
    secateur.prune_(model, sparsity=0.9, method="magnitude", exclude=[])
    made = secateur.compare(model, [torch.randn(8, 64)], dense=dense, ways=["onnx-packed"], memory=False)
    assert made["onnx-packed"].quality == pytest.approx(made["torch"].quality, abs=1e-5)
    assert made["onnx-packed"].nbytes < made["torch"].nbytes / 2
    assert "zeros" in made.ways[1].absence  # of the dense model


def test_one_model_is_compared_with_itself(monkeypatch):
    made = compared(monkeypatch, dense=None, ways=["packed"])
    assert [found.name for found in made.ways] == ["PyTorch, Sequential", "secateur packed, Sequential"]
    assert (made.dense, made.reference) == ("", 0)
    assert made["packed"].quality == pytest.approx(1.0)


def test_labels_and_functions_give_the_figure(monkeypatch):
    fast(monkeypatch)
    dense, model = models()
    data = [(torch.randn(8, 64), torch.randint(8, (8,)))]
    ways = ["packed"]
    made = secateur.compare(model, data, dense=dense, ways=ways, metric="accuracy", memory=False)
    assert made["packed"].quality == secateur.evaluate(model, data, "accuracy")["accuracy"]
    made = secateur.compare(model, data, dense=dense, ways=ways, memory=False)  # without the labels
    assert made.metric == "similarity"

    def width(model, data):
        return float(model(data[0][0]).shape[1])

    made = secateur.compare(model, data, dense=dense, ways=ways, metric=width, memory=False)
    assert (made.metric, made["packed"].quality, made.higher_is_better) == ("width", 8.0, True)


def test_inputs_to_time_can_be_given(monkeypatch):
    made = compared(monkeypatch, batches=[torch.randn(3, 64), torch.randn(5, 64)], ways=["packed"])
    assert made.shapes == ((3, 64), (5, 64))


def test_what_is_not_installed_has_a_row(monkeypatch):
    monkeypatch.setattr("secateur.engines._engine.find_spec", lambda name: None)
    made = compared(monkeypatch, ways=list(WAYS)[3:8])
    engines = [found for found in made.ways if found.way != "torch"]
    assert len(engines) == 10
    for found in engines:
        assert "is not installed; install it with: pip install" in found.absence
    assert len(made.tables[-1].rows) == 5


def test_what_does_not_work_has_a_row_with_the_reason(monkeypatch):
    def broken(*_, **__):
        raise FormatError("no operator Foo\nadvice")

    monkeypatch.setattr(_modules, "export", broken)
    monkeypatch.setattr("secateur.engines._engine.find_spec", lambda name: name)
    made = compared(monkeypatch, ways=["onnx", "packed"])
    assert [found.absence for found in made.ways if found.way == "onnx"] == ["no operator Foo"] * 2
    assert made["packed"].timings


def test_a_model_without_linear_layers_has_no_int8_of_pytorch(monkeypatch):
    fast(monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    made = secateur.compare(model, [torch.randn(2, 3, 8, 8)], ways=["torch-int8"], memory=False)
    assert made["torch-int8"].absence == "PyTorch rounds Linear layers, and the model has none"
    assert made.shapes == ((1, 3, 8, 8), (2, 3, 8, 8))


def test_a_shape_that_a_way_does_not_take_is_a_note(monkeypatch):
    class OnlyTwo(nn.Module):
        def forward(self, x):
            if len(x) != 2:
                raise ValueError("two rows\nplease")
            return x

    monkeypatch.setitem(WAYS, "picky", replace(WAYS["torch"], name="picky", title="P", wrap=lambda module: OnlyTwo()))
    made = compared(
        monkeypatch, ways=["picky"], metric=lambda model, data: 1.0, batches=[torch.ones(2, 64), torch.ones(3, 64)]
    )
    assert [one.shape for one in made["picky"].timings] == [(2, 64)]
    assert made["picky"].notes == ("not at 3 x 64: two rows",)
    assert made["picky"].times_at(None, made.shapes) is None
    made = compared(monkeypatch, ways=["picky"], metric=lambda model, data: 1.0)
    assert made["picky"].absence == "two rows"


def test_what_hinders_the_reference_is_an_error():
    dense, model = models()
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        secateur.compare(model, [torch.randn(8, 3)], dense=dense, ways=["torch"], memory=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ways": ["onxx"]}, RecipeError, "unknown way 'onxx'; did you mean 'onnx'"),
        ({"ways": "onnx"}, TypeError, r"wrap it in a list: \['onnx'\]"),
        ({"shapes": [(1, 16)]}, RecipeError, "shapes are for directories"),
        ({"dense": "somewhere"}, TypeError, "dense must be a module, as the model is, got str"),
        ({"threads": 0}, RecipeError, "threads must be at least 1"),
        ({"memory": 1}, TypeError, "memory must be a bool"),
        ({"batches": []}, StatisticsError, "batches is empty"),
        ({"batches": [3]}, StatisticsError, "batch 0 has no tensor"),
        ({"metric": "rankk"}, RecipeError, "unknown metric 'rankk'"),
    ],
)
def test_mistakes_in_the_call(monkeypatch, arguments, error, message):
    with pytest.raises(error, match=message):
        compared(monkeypatch, **arguments)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], StatisticsError, "batches is empty"),
        ("text.txt", RecipeError, "a module is measured on batches, and data is a file"),
        (torch.ones(2, 64), TypeError, "got one Tensor"),
    ],
)
def test_mistakes_in_the_data(data, error, message):
    with pytest.raises(error, match=message):
        secateur.compare(models()[1], data)


def test_models_elsewhere_are_refused():
    with pytest.raises(RecipeError, match=r"Move it first: model.cpu\(\)"):
        secateur.compare(nn.Linear(4, 4, device="meta"), [torch.ones(1, 4)])
    with pytest.raises(TypeError, match="model must be a module or a directory, got int"):
        secateur.compare(3, [torch.ones(1, 4)])


# Memory


def deployed(module, folder):
    torch.save(module, folder / "module.pt")
    return Deployed(folder / "module.pt", 0)


def measured(found, folder):
    settings = {"with_head": False, "threads": 1, "is_directory": False}
    return memory_of(found, WAYS["torch"], [torch.ones(1, 2048)], folder, **settings)


def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    if _memory.resident() is None:
        pytest.skip("this system does not tell it")
    found = measured(deployed(nn.Linear(2048, 2048, bias=False), tmp_path), tmp_path)
    assert found.reason == ""
    assert 15e6 < found.nbytes < 60e6  # its weights have 16.8 MB


def test_memory_that_cannot_be_measured_says_why(tmp_path, monkeypatch):
    assert measured(Deployed(None, 0), tmp_path).reason.startswith("memory was not measured: the module cannot")

    def process(returncode, stdout="", stderr=""):
        done = SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
        monkeypatch.setattr(_memory, "resident", lambda: 1)
        return measured(Deployed(tmp_path, 0), tmp_path)

    assert process(0, 'hello\n{"nbytes": 7}\n').nbytes == 7
    assert process(1, "", "Traceback\nValueError: no\n").reason.endswith(
        "the process that ran it failed: ValueError: no"
    )
    crashed = process(-11)
    assert crashed.crashed
    assert crashed.reason == "a process that ran it was ended by signal 11"
    monkeypatch.setattr(_memory, "resident", lambda: None)
    assert "this system does not tell it" in measured(Deployed(tmp_path, 0), tmp_path).reason


@pytest.mark.parametrize(
    ("memory", "left", "absence"),
    [
        (_memory.Memory(None, "a process that ran it was ended by signal 11", True), 1 << 40, "ended by signal 11"),
        (_memory.Memory(10**9), 10**8, "it takes 1,000 MB of memory, and beside the other ways 100 MB are left"),
    ],
)
def test_what_would_break_this_process_is_not_tried(monkeypatch, memory, left, absence):
    monkeypatch.setattr(
        _run, "memory_of", lambda found, way, *_, **__: memory if way.name == "packed" else _memory.Memory(5)
    )
    monkeypatch.setattr(_run, "available", lambda: left)
    made = compared(monkeypatch, ways=["packed"], memory=True)
    assert absence in made["packed"].absence
    assert made["torch"].memory == 5


def test_modules_that_cannot_be_pickled_are_run_here(monkeypatch):
    class Local(nn.Linear):
        pass

    fast(monkeypatch)
    made = secateur.compare(nn.Sequential(Local(8, 8), nn.ReLU()), [torch.ones(2, 8)], ways=["torch"])
    assert made["torch"].memory is None
    assert made["torch"].notes == ("memory was not measured: the module cannot be written for another process",)
    assert made["torch"].timings


def test_the_page_of_the_documents_describes_every_way():
    text = (Path(__file__).parents[1] / "docs" / "comparing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \|", text, re.MULTILINE)
    assert rows == [(name, way.title) for name, way in WAYS.items()]
    assert all(name == way.name for name, way in WAYS.items())
