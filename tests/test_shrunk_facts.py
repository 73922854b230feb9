"""What a shrunk model differs by: read with suspicion, joined, and given to models of the original sizes."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from shrunk_cases import by_hand
from torch import nn

from secateur import FormatError
from secateur.shapes import (
    Facts,
    facts_of,
    forget_facts,
    has_sizes,
    known_facts,
    remember_facts,
    resize_,
    structure_hash,
)


class Block(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.register_buffer("gain", torch.arange(8.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu() * self.gain)


class Model(nn.Module):
    """Stages of blocks, tied weights at both ends, and sizes that the code reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*(Block(i) for i in range(3))) for _ in range(2))
        self.embedding = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.window = (6, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


KEPT = (0, 2, 3, 7)
IDS = torch.tensor([[1, 2, 3]])


def shrunk():
    torch.manual_seed(0)
    model = Model()
    small, facts = by_hand(
        model,
        {
            r"stages\.1\.1\.up\.(weight|bias)": (0, KEPT),
            r"stages\.1\.1\.gain": (0, KEPT),
            r"stages\.1\.1\.down\.weight": (1, KEPT),
            r"(embedding|head)\.weight": (0, range(5)),
        },
        blocks={"stages.1": (0, 2)},
        attributes={
            r"stages\.1\.1": {"number": 1},
            r"stages\.1\.1\.up": {"out_features": 4},
            r"stages\.1\.1\.down": {"in_features": 4},
            "embedding": {"num_embeddings": 5},
            "head": {"out_features": 5},
            "": {"window": (6, 5)},
        },
    )
    return model, small, facts


def state(model):
    """All that resizing may change."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    attributes = {(p, k): v for p, m in model.named_modules() for k, v in vars(m).items() if type(v) in (int, tuple)}
    return [(name, id(tensor), tuple(tensor.shape)) for name, tensor in tensors], attributes


def test_a_model_of_the_original_sizes_gets_those_of_the_shrunk_one():
    _model, small, facts = shrunk()
    other = Model()
    assert not has_sizes(other, facts)
    resize_(other, Facts.from_dict(json.loads(json.dumps(facts.to_dict()))))
    assert has_sizes(other, facts)
    assert [e[::2] for e in state(other)[0]] == [e[::2] for e in state(small)[0]]
    assert state(other)[1] == state(small)[1]
    assert other.head.weight is other.embedding.weight  # tied as before
    assert torch.equal(other.stages[1][1].gain, torch.tensor(KEPT, dtype=torch.float32))  # which no file has
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(IDS), small(IDS))


def test_a_resized_model_can_be_put_back():
    model, _, facts = shrunk()
    before, expected = state(model), model(IDS)
    undo = resize_(model, facts)
    assert state(model) != before
    undo()
    assert state(model) == before
    assert torch.equal(model(IDS), expected)


def test_what_stays_stays():
    model, _, facts = shrunk()
    model.stages[1][2].up.weight.requires_grad = False
    model.stages[1][2].up.half()
    resize_(model, facts)
    weight = model.stages[1][1].up.weight
    assert (weight.shape, weight.dtype, weight.requires_grad) == ((4, 6), torch.float16, False)
    with torch.device("meta"):
        skeleton = Model()
    assert structure_hash(skeleton) == facts.model_hash
    resize_(skeleton, facts)
    assert skeleton.stages[1][1].up.weight.is_meta


def other_model(change):
    def make():
        model = Model()
        change(model)
        return model

    return make


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.stages[1].append(Block(3)), "stages.1 has 4 blocks"),
        (lambda model: setattr(model, "stages", nn.Module()), "no module of the model"),
        (
            lambda model: setattr(model.stages[1][2], "up", nn.Linear(6, 7)),
            r"shape \[7, 6\] in the model, but \[8, 6\]",
        ),
        (
            lambda model: setattr(model.stages[1][2], "up", nn.Linear(6, 8, bias=False)),
            "neither a parameter nor a buffer",
        ),
        (lambda model: setattr(model.stages[1][2], "up", nn.Identity()), "out_features"),
        (lambda model: setattr(model.stages[0][0], "up", nn.Linear(6, 9)), "hash"),
        (lambda model: setattr(model, "window", (6, 10, 2)), "window = .* cannot stand"),
        (lambda model: setattr(model, "window", 6), "window = 6"),
        (lambda model: setattr(model.stages[1][2], "number", 0), "cannot become 1: larger"),
        (lambda model: setattr(model.stages[1][2], "number", True), "number = True"),
    ],
)
def test_a_model_that_does_not_fit_stays_as_it_is(change, message):
    _, _, facts = shrunk()
    model = other_model(change)()
    before = state(model)
    with pytest.raises(FormatError, match=message):
        resize_(model, facts)
    assert state(model) == before
    assert not has_sizes(model, facts)


def test_tied_tensors_cannot_get_two_shapes():
    model, _small, facts = shrunk()
    shapes = {**facts.shapes, "head.weight": (6, 6)}
    with pytest.raises(FormatError, match="one tensor with"):
        resize_(model, Facts.from_dict({**facts.to_dict(), "shapes": shapes}))


def test_a_config_is_changed_in_a_copy():
    class Config:
        def __init__(self):
            self.layers, self.kinds = 3, ["a", "b", "a"]

    model, config = nn.Sequential(nn.Linear(2, 2)), Config()
    model.config = model[0].config = config
    facts = Facts(config={"layers": (3, 2), "kinds": (("a", "b", "a"), ("a", "a"))})
    undo = resize_(model, Facts.from_dict(facts.to_dict()))
    assert (model.config.layers, model.config.kinds) == (2, ["a", "a"])
    assert model[0].config is model.config
    assert (config.layers, config.kinds) == (3, ["a", "b", "a"])
    undo()
    assert model.config is model[0].config is config
    with pytest.raises(FormatError, match="layers = 3, but had 4"):
        resize_(model, Facts(config={"layers": (4, 2)}))
    with pytest.raises(FormatError, match="no setting heads"):
        resize_(model, Facts(config={"heads": (4, 2)}))
    with pytest.raises(FormatError, match="no setting layers"):
        resize_(nn.Linear(2, 2), Facts(config={"layers": (4, 2)}))


def test_names_before_and_after():
    facts = Facts(blocks={"stages": (1, 2), "stages.2": (0, 3)}, original_blocks={"stages": 3, "stages.2": 4})
    for old, new in (("stages.1.0.up", "stages.0.0.up"), ("stages.2.3", "stages.1.1"), ("stages", "stages")):
        assert facts.new_name(old) == new
        assert facts.original_name(new) == old
    assert facts.new_name("stages.0.up") is None
    assert facts.new_name("stages.2.1.up") is None
    assert facts.new_name("stages.1.1.up") == "stages.0.1.up"  # the other list lost blocks
    with pytest.raises(FormatError, match="only 2 stayed"):
        facts.original_name("stages.2.up")


def test_facts_of_a_model_that_was_shrunk_twice():
    _model, small, first = shrunk()
    smaller, second = by_hand(
        small,
        {
            r"stages\.0\.0\.up\.(weight|bias)": (0, (1, 2)),
            r"stages\.0\.0\.gain": (0, (1, 2)),
            r"stages\.0\.0\.down\.weight": (1, (1, 2)),
        },
        blocks={"stages": (1,), "stages.1": (1,)},
        attributes={r"stages\.0\.0": {"number": 0}, r"stages\.0\.0\.up": {"out_features": 2}},
    )
    both = first.then(second)
    assert both.blocks == {"stages": (1,), "stages.1": (2,)}
    assert both.kept["stages.0.0.gain"] == {0: (2, 3)}
    other = Model()
    resize_(other, Facts.from_dict(both.to_dict()))
    other.load_state_dict(smaller.state_dict())
    assert state(other)[1] == state(smaller)[1]
    assert torch.equal(other(IDS), smaller(IDS))
    assert first.then(Facts()) == first
    assert Facts().then(first).shapes == first.shapes


def test_facts_of_a_part_and_of_a_whole():
    model, _, facts = shrunk()
    inside = facts.within("stages")
    assert inside.blocks == {"1": (0, 2)}
    assert "embedding.weight" not in inside.shapes
    resize_(model.stages, inside)
    assert inside.under("stages").blocks == facts.blocks
    assert facts.under("model").within("model") == replace(facts, model_hash="")


def test_facts_are_remembered_without_a_trace_on_the_model():
    _, small, facts = shrunk()
    before = set(vars(small))
    assert not facts_of(small)
    remember_facts(small, facts)
    assert set(vars(small)) == before
    assert facts_of(small) == known_facts(small) == facts
    assert not facts_of(copy.deepcopy(small))
    remember_facts(small, Facts(attributes={"head": {"out_features": 4}}))
    assert facts_of(small).attributes["head"] == {"out_features": 4}
    assert facts_of(small).blocks == facts.blocks
    forget_facts(small)
    assert not facts_of(small)


SIZES = {"shapes": {"w": [3, 4]}, "original_shapes": {"w": [5, 4]}}
BLOCKS = {"blocks": {"l": [0, 2]}, "original_blocks": {"l": 3}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": {}}, "unknown entry 'more'"),
        ({1: {}}, "unknown entry 1"),
        ({"version": 2}, "version 2, but this secateur reads up to 1"),
        ({"version": "1"}, "version '1'"),
        ({"version": True}, "version True"),
        ({"shapes": []}, "shapes should be a table"),
        ({"shapes": {"w": [3, 4]}}, "in both"),
        ({**SIZES, "original_shapes": {"w": [2, 4]}}, "none larger than before"),
        ({**SIZES, "original_shapes": {"w": [5, 4, 1]}}, "as many dimensions"),
        ({**SIZES, "shapes": {"w": [3, 0]}}, "integer from 1"),
        ({**SIZES, "shapes": {"w": [3, True]}}, "integer from 1"),
        ({**SIZES, "shapes": {"w": [3, 2.0]}}, "integer from 1"),
        ({**SIZES, "shapes": {"w": 3}}, "list of 1 to 64 sizes"),
        ({**SIZES, "shapes": {"w": []}}, "list of 1 to 64 sizes"),
        ({"shapes": {"w": [2**30] * 2}, "original_shapes": {"w": [2**30] * 2}}, "elements"),
        ({"shapes": {"w": [2**31]}, "original_shapes": {"w": [2**31]}}, "integer from 1"),
        ({"shapes": {"a..b": [3]}, "original_shapes": {"a..b": [3]}}, "no name of a part"),
        ({"shapes": {"": [3]}, "original_shapes": {"": [3]}}, "no name of a part"),
        ({"shapes": {"w" * 1001: [3]}, "original_shapes": {}}, "no name of a part"),
        ({**BLOCKS, "blocks": {"l": [2, 0]}}, "should ascend"),
        ({**BLOCKS, "blocks": {"l": [0, 0]}}, "should ascend"),
        ({**BLOCKS, "blocks": {"l": []}}, "list of indices"),
        ({**BLOCKS, "blocks": {"l": [0, 3]}}, "keeps block 3, but had only 3"),
        ({**BLOCKS, "blocks": {"l": [-1, 2]}}, "integer from 0"),
        ({"blocks": {"l": [0]}}, "in both"),
        ({"attributes": {"m": {"__class__": 1}}}, "no name of an attribute"),
        ({"attributes": {"m": {"a.b": 1}}}, "no name of an attribute"),
        ({"attributes": {"m": {"a": "1"}}}, "integer from 0"),
        ({"attributes": {"m": {"a": -1}}}, "integer from 0"),
        ({"attributes": {"m": {"a": []}}}, "1 to 64 integers"),
        ({"attributes": {"m": 3}}, "should be a table"),
        ({"config": {"a": [1]}}, "before and after"),
        ({"config": {"_private": [1, 2]}}, "may be changed"),
        ({"config": {"a-b": [1, 2]}}, "no name of a setting"),
        ({"config": {"a": [1, {}]}}, "config 'a'"),
        ({"kept": {"w": {"0": [0, 1, 2]}}}, "with another shape"),
        ({**SIZES, "kept": {"w": {"0": [0, 1]}}}, "expected 3 of 5"),
        ({**SIZES, "kept": {"w": {"0": [0, 1, 5]}}}, "expected 3 of 5"),
        ({**SIZES, "kept": {"w": {"2": [0, 1, 2]}}}, "one of its 2 dimensions"),
        ({**SIZES, "kept": {"w": {"1": [0, 1, 2, 3]}}}, "lacks a dimension"),
        ({"model_hash": "xyz"}, "hexadecimal"),
        ({"model_hash": None}, "hexadecimal"),
    ],
)
def test_facts_in_a_file_are_checked(change, message):
    with pytest.raises(FormatError, match=message):
        Facts.from_dict({**Facts().to_dict(), **change})


def test_facts_that_are_none():
    for table in (None, [], "facts"):
        with pytest.raises(FormatError, match="should be a table"):
            Facts.from_dict(table)
    table = Facts().to_dict()
    del table["kept"]
    with pytest.raises(FormatError, match="lack the entry 'kept'"):
        Facts.from_dict(table)
