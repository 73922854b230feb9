"""Lists of units to remove, written and read; and how large a model is."""

import json

import pytest
import torch
from torch import nn

from secateur import FormatError, RecipeError
from secateur.graph import Dimension, Graph, Removal, check_units
from secateur.shapes import structure_hash
from secateur.shrinking import model_size

MODEL = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
GRAPH = Graph((Dimension("0.ffn", "ffn", 6), Dimension("blocks", "layers", 4), Dimension("h", "query_heads", 8, (), 4)))
REMOVAL = Removal({"0.ffn": (1, 5), "blocks": (0,), "h": (0, 3, 4, 7)}, structure_hash(MODEL), "Sequential")


def test_a_file_brings_back_the_same_removal(tmp_path):
    REMOVAL.save(tmp_path / "removal.json")
    loaded = Removal.load(tmp_path / "removal.json")
    assert loaded == REMOVAL
    loaded.check(MODEL, GRAPH)


def test_a_file_for_another_model_is_refused_by_name():
    with pytest.raises(RecipeError, match=r"another model: Sequential with the hash .* and this is Linear"):
        REMOVAL.check(nn.Linear(4, 6), GRAPH)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"0.fnn": (1,)}, "unknown dimension '0.fnn'; did you mean '0.ffn'"),
        ({"0.ffn": (1, 6)}, "0.ffn has 6 units .* from 0 to 5; got 6"),
        ({"0.ffn": (-1,)}, "got -1"),
        ({"0.ffn": (1, 1)}, "unit 1 is listed twice"),
        ({"blocks": (0, 1, 2, 3)}, "blocks: all 4 units would go"),
        ({"h": (0, 1, 4)}, "each group of 4 .* got 2, 1"),
        ({"h": (0,)}, "each group of 4 .* got 1, 0"),
    ],
)
def test_units_that_cannot_go_are_refused_with_the_reason(units, message):
    with pytest.raises(RecipeError, match=message):
        Removal(units).check(MODEL, GRAPH)


def test_nothing_is_removed_of_a_model_that_has_nothing_to_remove():
    with pytest.raises(RecipeError, match="nothing can be removed"):
        Removal({"0.ffn": (1,)}).check(MODEL, Graph(()))
    Removal({}).check(MODEL, Graph(()))
    check_units(GRAPH["h"], ())


def changed(**values: object) -> str:
    return json.dumps(json.loads(REMOVAL.to_json()) | values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"format": 1, "format": 2}', "twice"),
        ("[]", "lacks .*format"),
        (changed(format="secateur"), "lacks .*format"),
        (changed(version=2), "version 2 of the format, and this secateur reads version 1"),
        (changed(version=True), "version True"),
        (changed(model=None), '"model" should be'),
        (changed(model={"class": "A", "hash": 3}), '"model" should be'),
        (changed(remove=[1]), '"remove" should be'),
        *(
            (changed(remove={"a": units}), "'a': .* ascending")
            for units in (3, "12", [1.0], [True], [-1], [2, 1], [1, 1], [[1]])
        ),
    ],
)
def test_files_that_are_no_removals_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "removal.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=message) as raised:
        Removal.load(path)
    assert str(path) in str(raised.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "binary"):
        with pytest.raises(FormatError, match=r"is no file|not UTF-8"):
            Removal.load(path)


class Attention(nn.Module):
    def forward(self, query, key, value):
        return nn.functional.scaled_dot_product_attention(query, key, value)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 16, 8))

    def forward(self, x):
        return torch._grouped_mm(x, self.weight, torch.tensor([2, 4, 8], dtype=torch.int32))


def of(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("model", "batch", "macs"),
    [
        (nn.Linear(4, 3), of(5, 4), 5 * 4 * 3),
        (nn.Linear(4, 3, bias=False), of(4), 4 * 3),
        (nn.Conv2d(4, 8, 3, groups=2), of(1, 4, 5, 5), 8 * 2 * 9 * 9),
        (nn.ConvTranspose2d(4, 8, 3), of(1, 4, 5, 5), 4 * 8 * 9 * 25),
        (Attention(), (of(1, 2, 3, 8), of(1, 2, 5, 8), of(1, 2, 5, 6)), 2 * 3 * 5 * (8 + 6)),
        (Experts(), of(8, 16), 8 * 16 * 8),
        (nn.LSTM(4, 6), of(3, 2, 4), 3 * 2 * 24 * (4 + 6)),
        (nn.GRU(4, 6), of(3, 2, 4), 3 * 2 * 18 * (4 + 6)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), of(2, 3, 8), 6 * 8 * (4 * 8 + 2 * 16) + 2 * 9 * 8 * 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_multiply_adds_are_counted(model, batch, macs):
    size = model_size(model, batch)
    assert (size.macs, size.uncounted) == (macs, ())
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_products_without_a_formula_are_named():
    size = model_size(nn.Bilinear(3, 3, 2), (of(2, 3), of(2, 3)))
    assert (size.macs, size.uncounted) == (0, ("aten._trilinear",))
    assert model_size(nn.Upsample(scale_factor=2, mode="bilinear"), of(1, 1, 2, 2)).uncounted == ()


def test_shared_tensors_count_once_and_buffers_in_bytes_only():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.append(model[0])
    size = model_size(model)
    assert (size.parameters, size.nbytes, size.macs) == (10, 4 * 10 + 4 * 4 + 8, None)
