"""What earlier versions wrote is still read: packed files, recipes, states of trainings, reports, measurements.

The files in ``fixtures/v0.1.0`` were written by secateur 0.1.0 before its modules moved into rooms.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import secateur
from secateur.integrations import read_state
from secateur.nn import PackedConv2d
from secateur.packing import cache_at
from secateur.reports import PackReport

FILES = Path(__file__).parent / "fixtures" / "v0.1.0"


class Model(nn.Module):
    """Every format, a shared weight, a convolution, and a sparse weight that runs dense."""

    def __init__(self):
        super().__init__()
        self.unstructured = nn.Linear(64, 32)
        self.nm = nn.Linear(32, 32, bias=False)
        self.block = nn.Linear(32, 32)
        self.row = nn.Linear(32, 32)
        self.column = nn.Linear(32, 16)
        self.pixels = nn.Conv2d(4, 8, 1, stride=2)
        self.twin = nn.Linear(32, 16)
        self.twin.weight = self.column.weight
        self.dense = nn.Linear(16, 8)

    def forward(self, x, picture):
        y = self.row(self.block(self.nm(self.unstructured(x).relu())).relu()).relu()
        return self.dense(self.column(y) + self.twin(y)), self.pixels(picture)


def expected():
    return load_file(FILES / "expected.safetensors")


@pytest.mark.parametrize("values", ["float32", "bfloat16", "int8"])
def test_packed_files(values):
    found = expected()
    model = secateur.load(FILES / f"packed.{values}.sparse.safetensors", into=Model().eval())
    assert isinstance(model.nm, secateur.PackedLinear)
    assert isinstance(model.pixels, PackedConv2d)
    assert model.pixels.stride == (2, 2)
    assert model.twin.values is model.column.values
    assert isinstance(model.dense, nn.Linear)
    with torch.no_grad():
        y, pixels = model(found["x"], found["picture"])
    # Another processor may add in another order, and run another kernel.
    torch.testing.assert_close(y, found[f"{values}.y"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pixels, found[f"{values}.pixels"], rtol=1e-4, atol=1e-4)


def test_the_state_of_a_packed_model():
    model = secateur.load(FILES / "packed.float32.sparse.safetensors", into=Model().eval())
    state = load_file(FILES / "packed_state_dict.safetensors")
    assert state.keys() == model.state_dict().keys()
    for tensor in model.state_dict().values():
        tensor.zero_()
    model.load_state_dict(state)
    found = expected()
    with torch.no_grad():
        y, _ = model(found["x"], found["picture"])
    torch.testing.assert_close(y, found["float32.y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wanda", "refit", "settings", "random", "column"])
def test_recipes(name):
    text = (FILES / f"recipe_{name}.toml").read_text(encoding="utf-8")
    recipe = secateur.Recipe.from_toml(text)
    assert repr(recipe) == json.loads((FILES / "recipes.json").read_text(encoding="utf-8"))[name]
    assert recipe.to_toml() == text


def small():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def train(model, optimizer, steps, after):
    for step in steps:
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(100 + step))
        optimizer.zero_grad()
        (model(x) - x[:, :8]).square().mean().backward()
        optimizer.step()
        after()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", ["gate", "magnitude", "sr-ste", "set", "rigl", "static"])
def test_states_of_sparse_trainings(method, pattern):
    name = f"{method}_{pattern.replace(':', '')}.safetensors"
    saved = load_file(FILES / f"trained_{name}")
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsity = 0.75 if pattern == "unstructured" else None
    training = secateur.SparseTraining(
        model, optimizer, method=method, pattern=pattern, sparsity=sparsity, steps=20, update_every=2, seed=5
    )
    training.load_state_dict(read_state(FILES / f"training_{name}"))
    model.load_state_dict({key.removeprefix("model."): t for key, t in saved.items() if key.startswith("model.")})
    for index, parameter in enumerate(model.parameters()):
        optimizer.state[parameter]["momentum_buffer"] = saved[f"momentum.{index}"].clone()
    train(model, optimizer, range(12, 20), training.step)
    training.finalize()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, saved[f"final.{key}"], rtol=1e-4, atol=1e-5)
        assert torch.equal(tensor == 0, saved[f"final.{key}"] == 0)


def test_the_state_of_a_lottery_ticket():
    saved = read_state(FILES / "ticket.safetensors")
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ticket = secateur.LotteryTicket(model, optimizer, pattern="block:2x2")
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    momenta = {int(index): {"momentum_buffer": tensor} for index, tensor in saved.pop("momenta").items()}
    saved["snapshot"] = {
        "step": saved.pop("step"),
        "tensors": saved.pop("tensors"),
        "optimizer": {"state": momenta, "param_groups": [{**group, "params": [0, 1, 2, 3]}]},
        "scheduler": None,
    }
    ticket.load_state_dict(saved)
    assert ticket.sparsity == 0.5
    assert ticket.rewind_with_mask() == 0
    for key, tensor in load_file(FILES / "ticket_rewound.safetensors").items():
        assert torch.equal(model.state_dict()[key], tensor)


def test_sparse_layers():
    model = nn.Sequential(
        secateur.SparseLinear(8, 4),
        secateur.SparseLinear.unstructured(4, 4),
        secateur.SparseLinear(4, 8, pattern="2:4"),
        secateur.SparseLinear(8, 4, pattern="block:2x2", sparsity=0.5),
    )
    model.load_state_dict(load_file(FILES / "sparse_layers.safetensors"))
    found = expected()
    torch.testing.assert_close(model(found["sparse.x"]), found["sparse.y"])


def test_reports():
    report = secateur.Report.from_json((FILES / "report.json").read_text(encoding="utf-8"))
    assert (report.num_pruned, report.num_weights) == (4176, 4608)
    assert "wanda" in report.to_json()
    assert (report.whole, report.first_line, report.warnings, report.calibration_mode) == (None, "", (), "")
    assert str(report).startswith("pruned 4,176 of 4,608 weights")
    with torch.no_grad():
        model = nn.Sequential(*(nn.Linear(*reversed(layer.shape)) for layer in report.layers))
        for module in model:
            module.weight.zero_()
    named = replace(report, layers=tuple(replace(layer, name=str(i)) for i, layer in enumerate(report.layers)))
    assert named.verify(model).pruned == 4176  # it does not name its parameters
    packed = PackReport.from_json((FILES / "pack_report.json").read_text(encoding="utf-8"))
    assert [layer.name for layer in packed.layers] == ["0"]
    assert packed.layers[0].packed
    assert [choice.rows for choice in packed.layers[0].choices] == [1, 8]
    assert all(choice.route for choice in packed.layers[0].choices)
    assert (packed.whole, packed.first_line) == (None, "")


def test_measurements():
    """A file of measurements is read and added to, and those of another machine stay in it."""
    table = json.loads((FILES / "autotune.json").read_text(encoding="utf-8"))
    cache = cache_at(FILES / "autotune.json")
    assert next(iter(table["machines"])) in (cache._machine, *cache._others)
