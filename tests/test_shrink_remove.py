"""Units are cut out of a model: the function stays, the numbers of the code follow, and a failure leaves no trace."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import shrink_cases
import shrink_models
import torch
import transformers
from shrink_families import FAMILIES
from shrink_models import CASES, Case, mask_, outputs, rows
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_map

from secateur import RecipeError, SolverError
from secateur.calibration import call_model
from secateur.graph import Dimension, Graph, Place, Removal, find_blocks, find_experts, find_units
from secateur.shapes import Facts, resize_
from secateur.shrinking import analyze
from secateur.surgery import Undo, prove, remove_
from secateur.surgery._calls import Looks, difference

# Heads of all kinds together, and everything at once.
KINDS = ("layers", "heads", "query_heads", "ffn", "channels", "experts", "all")


def some_units(dimension: Dimension) -> tuple[int, ...]:
    """A few units that can go, not the first ones, and as many of each group."""
    if dimension.group_size:
        return tuple(range(1, dimension.size, dimension.group_size))
    free = [unit for unit in range(dimension.size) if unit not in dimension.fixed]
    return tuple(free[1:] if len(free) == 2 else free[1 : 1 + min(dimension.size - dimension.least, len(free) // 2)])


def removal_of(case: Case, kind: str) -> Removal:
    chosen = [d for d in case.dimensions if kind in ("all", d.kind)]
    return Removal({dimension.name: some_units(dimension) for dimension in chosen})


def shrunk(case: Case, removal: Removal) -> Undo:
    mask_(case.model, case.graph, removal)
    return remove_(case.model, case.graph, removal, case.batch)


def widened(case: Case, dtype: torch.dtype) -> Case:
    batch = tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, case.batch)
    return Case(case.model.to(dtype), batch, case.dimensions)


WIDTHS = {"heads", "ffn"}
KINDS_OF = {
    "conv": {"channels"},
    "transposed": {"channels"},
    "resnet": {"channels", "layers"},
    **{name: WIDTHS | {"layers"} for name in ("bert", "mpnet", "gpt2", "modernbert", "t5", "vit")},
    "llama": WIDTHS | {"query_heads", "layers"},
    **{name: {"heads", "query_heads", "experts", "layers"} for name in ("mixtral", "qwen3-moe")},
}
PAIRS = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name, kinds in KINDS_OF.items()
    for kind in KINDS
    if kind in kinds | {"all"}
]


def test_all_models_and_kinds_are_tested() -> None:
    assert {name: set(make().graph.kinds) for name, make in CASES.items()} == KINDS_OF


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a module has: its attributes, and its tensors with their values."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            if key == "_modules":
                found[f"{name}:{key}"] = {child: id(inner) for child, inner in value.items()}
            elif key in ("_parameters", "_buffers"):
                found |= {f"{name}:{key}.{k}": (id(v), None if v is None else v.clone()) for k, v in value.items()}
            elif not key.startswith("_"):
                found[f"{name}:{key}"] = (id(value), copy.deepcopy(vars(value))) if key == "config" else value
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Tensor):
            assert value[0] == after[key][0], key
            assert torch.equal(value[1], after[key][1]), key
        elif ":config" in key:
            assert value[0] == after[key][0], key
            assert str(value[1]) == str(after[key][1]), key
        else:
            assert value == after[key] or value is after[key], key


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_function_stays_in_float64_and_comes_back(name: str, kind: str) -> None:
    case = widened(CASES[name](), torch.float64)
    removal = removal_of(case, kind)
    mask_(case.model, case.graph, removal)
    before, size = snapshot(case.model), sum(p.numel() for p in case.model.parameters())
    undo = remove_(case.model, case.graph, removal, case.batch)
    proof = prove(undo, [case.batch])
    assert proof.error <= 1e-10
    assert not proof.by_blocks
    assert sum(p.numel() for p in case.model.parameters()) < size
    with undo.reference():
        assert sum(p.numel() for p in case.model.parameters()) == size
    undo.restore()
    assert_same(before, snapshot(case.model))


@pytest.mark.parametrize("name", CASES)
def test_the_function_stays_in_float32(name: str) -> None:
    case = CASES[name]()
    assert prove(shrunk(case, removal_of(case, "all")), [case.batch]).error <= 1e-5


@pytest.mark.parametrize("name", [name for name in CASES if name != "transposed"])
def test_half_precision_is_proved_part_by_part_in_float32(name: str) -> None:
    case = widened(CASES[name](), torch.bfloat16)
    proof = prove(shrunk(case, removal_of(case, "all")), [case.batch, case.batch])
    assert proof.by_blocks
    assert proof.error <= 1e-5
    parts = {"conv": 1, "resnet": 4}.get(name, 2)
    assert proof.compared >= 2 * parts, "parts of both batches"
    assert all(tensor.dtype == torch.bfloat16 for tensor in case.model.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("kind", ["layers", "all"])
def test_text_is_generated_with_and_without_a_cache(name: str, kind: str, attention: str) -> None:
    case = CASES[name]()
    case.model.set_attn_implementation(attention)
    undo = shrunk(case, removal_of(case, kind))

    def tokens(use_cache: bool) -> Tensor:
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return case.model.generate(case.batch["input_ids"], use_cache=use_cache, **settings)

    with_cache = tokens(True)
    assert torch.equal(with_cache, tokens(False))
    with undo.reference():
        assert torch.equal(with_cache, tokens(False))


def test_blocks_are_compared_with_all_else_as_it_is_now() -> None:
    """A count of experts outside of the blocks is not put back with the blocks."""
    case = CASES["mixtral"]()
    undo = shrunk(case, removal_of(case, "all"))
    with undo.reference_of_blocks():
        assert (len(case.model.model.layers), case.model.num_experts) == (2, 3)
    assert (len(case.model.model.layers), case.model.num_experts) == (1, 3)
    undo.restore()
    assert (len(case.model.model.layers), case.model.num_experts) == (2, 6)


# What the code keeps as numbers, where half of the units have gone: by case and kind, module and attribute.
NUMBERS: dict[tuple[str, str], dict[str, dict[str, int]]] = {
    ("conv", "channels"): {
        "stem": {"out_channels": 4, "in_channels": 3},
        "norm": {"num_features": 4},
        "depth": {"in_channels": 4, "out_channels": 8, "groups": 4},
        "mix": {"in_channels": 8, "out_channels": 6},
        "mixed": {"num_channels": 6, "num_groups": 2},
        "grouped": {"in_channels": 6, "out_channels": 4, "groups": 2},
        "head": {"in_features": 4, "out_features": 5},
    },
    ("transposed", "channels"): {"2": {"in_channels": 6, "out_channels": 4}, "3": {"num_parameters": 4}},
    ("bert", "heads"): {
        "encoder.layer.0.attention.self": {"num_attention_heads": 2, "all_head_size": 16, "attention_head_size": 8},
        "encoder.layer.0.attention.self.query": {"out_features": 16, "in_features": 32},
    },
    ("bert", "layers"): {"config": {"num_hidden_layers": 2}},
    ("mpnet", "heads"): {
        "encoder": {"n_heads": 2},
        "encoder.layer.1.attention.attn": {"num_attention_heads": 2, "all_head_size": 16, "attention_head_size": 8},
        "encoder.relative_attention_bias": {"embedding_dim": 2},
    },
    ("gpt2", "heads"): {
        "transformer.h.0.attn": {"num_heads": 2, "split_size": 16, "head_dim": 8, "embed_dim": 32},
        "transformer.h.0.attn.c_attn": {"nf": 48, "nx": 32},
        "transformer.h.0.attn.c_proj": {"nf": 32, "nx": 16},
    },
    ("gpt2", "layers"): {
        "transformer.h.0.attn": {"layer_idx": 0},
        "transformer.h.1.attn": {"layer_idx": 1},
        "config": {"n_layer": 2},
        "transformer.config": {"n_layer": 2},
    },
    ("llama", "heads"): {"model.layers.1.self_attn": {"num_key_value_groups": 4, "head_dim": 8}},
    ("llama", "query_heads"): {"model.layers.1.self_attn": {"num_key_value_groups": 3, "head_dim": 8}},
    ("llama", "layers"): {"model.layers.1.self_attn": {"layer_idx": 1}, "model.config": {"num_hidden_layers": 2}},
    ("modernbert", "layers"): {"layers.1.attn": {"layer_idx": 1}, "config": {"num_hidden_layers": 2}},
    ("t5", "heads"): {
        "encoder.block.0.layer.0.SelfAttention": {"n_heads": 2, "inner_dim": 16, "key_value_proj_dim": 8},
        "decoder.block.2.layer.1.EncDecAttention": {"n_heads": 2, "inner_dim": 16, "d_model": 32},
    },
    ("t5", "layers"): {
        "config": {"num_layers": 2, "num_decoder_layers": 2},
        "encoder.config": {"num_layers": 2},
        "decoder.config": {"num_layers": 2},
        "decoder.block.1.layer.1.EncDecAttention": {"layer_idx": 1},
    },
    ("mixtral", "experts"): {
        "": {"num_experts": 3, "num_experts_per_tok": 2},
        "model.layers.0.mlp.gate": {"num_experts": 3, "top_k": 2},
        "model.layers.1.mlp.experts": {"num_experts": 3, "hidden_dim": 32},
    },
}


@pytest.mark.parametrize(("name", "kind"), NUMBERS)
def test_the_numbers_of_the_code_follow(name: str, kind: str) -> None:
    case = CASES[name]()
    shrunk(case, removal_of(case, kind))
    for path, numbers in NUMBERS[name, kind].items():
        module, _, last = path.rpartition(".")
        holder = getattr(case.model.get_submodule(module), last) if last == "config" else case.model.get_submodule(path)
        assert {key: getattr(holder, key) for key in numbers} == numbers, path


def test_lists_with_an_entry_for_each_layer_lose_those_of_the_removed_ones() -> None:
    case = CASES["modernbert"]()
    assert case.model.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    shrunk(case, Removal({"layers": (1,)}))
    assert case.model.config.layer_types == ["full_attention", "full_attention"]


def test_another_model_with_the_same_configuration_keeps_its_layers() -> None:
    case = CASES["llama"]()
    config = case.model.config
    other = transformers.LlamaForCausalLM(config)
    shrunk(case, removal_of(case, "layers"))
    assert config.num_hidden_layers == other.config.num_hidden_layers == 3
    assert case.model.model.config is case.model.config
    assert len(other.model.layers) == 3


def chain() -> tuple[nn.Sequential, Graph, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    places = (*outputs(model, ["0"], 6), rows("2.weight", 6, dim=1, is_input=True))
    return model, Graph((Dimension("0.ffn", "ffn", 6, places),)), torch.randn(5, 4)


def test_what_a_parameter_has_beside_its_values_stays() -> None:
    model, graph, x = chain()
    model[0].bias.requires_grad_(False)
    model[0].weight.is_special = True
    model(x).sum().backward()
    gradient = model[0].weight.grad.clone()
    remove_(model, graph, Removal({"0.ffn": (0, 4)}), x)
    assert not model[0].bias.requires_grad
    assert model[0].weight.requires_grad
    assert model[0].weight.is_special
    assert torch.equal(model[0].weight.grad, gradient[[1, 2, 3, 5]])
    assert model[0].bias.grad is None


def test_the_layout_in_memory_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)).to(memory_format=torch.channels_last)
    places = (*outputs(model, ["0"], 6), rows("1.weight", 6, dim=1, is_input=True))
    remove_(model, Graph((Dimension("c", "channels", 6, places),)), Removal({"c": (5,)}), torch.ones(1, 3, 8, 8))
    assert all(model[i].weight.is_contiguous(memory_format=torch.channels_last) for i in (0, 1))


class Tied(nn.Module):
    """One matrix that two layers have, and one whose memory two parameters have."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.one, self.other, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        if way == "object":
            self.other.weight = self.one.weight
        elif way == "memory":
            self.other.weight = nn.Parameter(self.one.weight.detach())
        else:
            self.other.weight = nn.Parameter(self.one.weight.detach()[1:])
            self.other.bias = nn.Parameter(self.other.bias.detach()[1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.one(x)) + self.other(x))


@pytest.mark.parametrize("way", ["object", "memory"])
def test_tied_parameters_stay_tied(way: str) -> None:
    model, x = Tied(way), torch.randn(3, 4)
    places = (
        rows("one.weight", 6),
        rows("one.bias", 6),
        rows("other.bias", 6),
        rows("out.weight", 6, dim=1, is_input=True),
    )
    graph, removal = Graph((Dimension("ffn", "ffn", 6, places),)), Removal({"ffn": (2, 3)})
    mask_(model, graph, removal)
    prove(remove_(model, graph, removal, x), [x])
    assert model.one.weight.shape == (4, 4)
    assert model.other.weight.data_ptr() == model.one.weight.data_ptr()
    assert (model.other.weight is model.one.weight) == (way == "object")
    assert model.other.out_features == 4


class Secret(nn.Module):
    """A module with a size in its code, where nobody can change it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.width = nn.Linear(4, 6), nn.Linear(6, 4), 6

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).view(-1, 6))


def wrong_requests() -> Iterator[Any]:
    conv, llama, mixtral, t5 = CASES["conv"], CASES["llama"], CASES["mixtral"], CASES["t5"]
    experts = "model.layers.0.mlp.experts"
    yield pytest.param(conv, {"nothing": (0,)}, "no units 'nothing'.* It has stem.channels", id="unknown name")
    yield pytest.param(conv, {"stem.channels": (8,)}, "stem.channels: unit 8 does not exist; there are 8", id="range")
    yield pytest.param(conv, {"stem.channels": tuple(range(8))}, "8 of 8 units .* at least 1 must stay", id="all")
    yield pytest.param(llama, {"model.layers": (0, 1, 2)}, "model.layers: 3 of 3 units", id="all layers")
    query = "model.layers.0.query_heads"
    yield pytest.param(llama, {query: (0,)}, f"{query}: 0 to 1 units of each group of 4", id="groups")
    both = {query: (0, 1, 2, 4, 5, 6), "model.layers.0.heads": (1,), "model.layers.0.ffn": tuple(range(23))}
    yield pytest.param(llama, both | {"model.layers": (0, 1, 2)}, "at least 1 must stay", id="the last one is wrong")
    yield pytest.param(mixtral, {experts: (0, 1, 2, 3, 4)}, "at least 2 must stay because a router chooses", id="top k")
    yield pytest.param(t5, {"encoder.block": (0,)}, "unit 0 cannot go: block 0 stays: it also computes", id="fixed")


@pytest.mark.parametrize(("make", "units", "message"), list(wrong_requests()))
def test_a_wrong_request_changes_nothing(make: Any, units: dict[str, tuple[int, ...]], message: str) -> None:
    case = make()
    before = snapshot(case.model)
    with pytest.raises(RecipeError, match=message):
        remove_(case.model, case.graph, Removal(units), case.batch)
    assert_same(before, snapshot(case.model))


def impossible() -> Iterator[Any]:
    def named(tensor: str, size: int = 6, dim: int = 0) -> tuple[Place, ...]:
        return (rows("up.weight", 6), rows("up.bias", 6), rows(tensor, size, dim=dim))

    secret = (*named("down.weight", dim=1),)
    yield pytest.param(Secret(), secret, "the model does not work with 4 of 6 units .*Secret.width", id="secret")
    yield pytest.param(Secret(), named("down.wait"), "down.wait: the model has no tensor", id="no tensor")
    yield pytest.param(Secret(), named("down.weight", 9), "9 of 6 units|has 9", id="another model's")
    yield pytest.param(
        Secret(), named("down.weight"), "units between 0 and 5 of its dimension 0, which has 4", id="range"
    )
    yield pytest.param(Secret(), named("down.weight", dim=2), "units of its dimension 2, but it has 2", id="dimension")
    computed = Secret()
    parametrizations.weight_norm(computed.down)
    yield pytest.param(
        computed, named("down.weight", dim=1), "it is computed by _WeightNorm.*remove_para", id="computed"
    )
    grouped = nn.Sequential()
    grouped.up, grouped.down = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 6, 1, groups=3)
    uneven = (*named("down.weight"),)
    yield pytest.param(grouped, uneven, "down: a layer with 3 groups would have between 1 and 2", id="uneven groups")


@pytest.mark.parametrize(("model", "places", "message"), list(impossible()))
def test_what_cannot_be_cut_is_named_and_nothing_changes(
    model: nn.Module, places: tuple[Place, ...], message: str
) -> None:
    graph = Graph((Dimension("ffn", "ffn", 6, places),))
    before = snapshot(model)
    with pytest.raises(RecipeError, match=f"(?s)ffn: .*({message})"):
        remove_(model, graph, Removal({"ffn": (0, 4)}), torch.ones(1, 4))
    assert_same(before, snapshot(model))


def test_memory_that_tensors_share_in_part_is_refused() -> None:
    model = Tied("part")
    places = (rows("one.weight", 6), rows("one.bias", 6))
    with pytest.raises(RecipeError, match=r"one\.weight: it shares a part of its memory with other\.weight"):
        remove_(model, Graph((Dimension("ffn", "ffn", 6, places),)), Removal({"ffn": (0,)}), torch.ones(1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["ffn", "heads"])
def test_another_function_is_found_named_and_taken_back(kind: str, dtype: torch.dtype) -> None:
    """Here the columns that read the units are not zero."""
    case = widened(CASES["bert"](), dtype)
    wrong = f"encoder.layer.2.{kind}"
    removal = removal_of(case, "all")
    mask_(case.model, case.graph, Removal({name: units for name, units in removal.units.items() if name != wrong}))
    before = snapshot(case.model)
    undo = remove_(case.model, case.graph, removal, case.batch)
    with pytest.raises(SolverError, match=rf"^(?!.*encoder\.layer\.0\.).*{wrong}.*another function"):
        prove(undo, [case.batch])
    assert_same(before, snapshot(case.model))


def test_a_wrong_order_of_layers_is_found() -> None:
    case = widened(CASES["llama"](), torch.bfloat16)
    undo = remove_(case.model, case.graph, Removal({"model.layers": (1,)}), case.batch)
    layers = case.model.model.layers
    layers._modules["0"], layers._modules["1"] = layers._modules["1"], layers._modules["0"]
    with pytest.raises(SolverError, match=r"model\.layers: without the removed units the model is another function"):
        prove(undo, [case.batch])
    assert len(case.model.model.layers) == 3


class Attending(nn.Module):
    """Returns its attention weights, as some models do, and has another dimension as large as its number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size_of_head, self.classes = 4, 4, 4
        self.qkv, self.out, self.head = nn.Linear(8, 48), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).view(len(x), -1, 3, self.heads, self.size_of_head).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        x = self.out((weights @ v).transpose(1, 2).flatten(2))
        return self.head(x).view(-1, self.classes), weights


def test_attention_weights_may_have_fewer_heads() -> None:
    torch.manual_seed(0)
    model, x = Attending(), torch.randn(2, 3, 8)
    joint = shrink_models.joined("qkv.weight", (0, 16, 32), 4, (4, 4, 4))
    bias = Place("qkv.bias", 0, joint.indices)
    heads = Dimension("heads", "heads", 4, (joint, bias, rows("out.weight", 4, 4, dim=1, is_input=True)))
    graph, removal = Graph((heads,)), Removal({"heads": (3,)})
    mask_(model, graph, removal)
    prove(remove_(model, graph, removal, x), [x])
    assert (model.heads, model.size_of_head, model.classes) == (3, 4, 4)
    assert model(x)[1].shape == (2, 3, 3, 3)


@pytest.mark.parametrize("name", CASES)
def test_facts_make_another_model_as_small(name: str) -> None:
    case, fresh = CASES[name](), CASES[name]().model
    undo = shrunk(case, removal_of(case, "all"))
    facts = Facts.from_dict(json.loads(json.dumps(undo.facts.to_dict())))
    assert facts == undo.facts
    resize_(fresh, facts)
    fresh.load_state_dict(case.model.state_dict())
    expected, found = (call_model(model.eval(), case.batch) for model in (case.model, fresh))
    assert difference(found, expected, Looks()).error == 0
    numbers = [
        {(path, key): value for path, module in model.named_modules() for key, value in vars(module).items()}
        for model in (case.model, fresh)
    ]
    for key, value in numbers[0].items():
        assert type(value) not in (int, tuple) or value == numbers[1][key], key


@pytest.mark.parametrize("case", [*shrink_cases.CASES, *FAMILIES], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_units_that_a_trace_finds_go_and_leave_the_function(case: shrink_cases.Case) -> None:
    model, batch = shrink_cases.double(case.make()), shrink_cases.double(case.batch())
    found = Case(model, batch, analyze(model, [batch]).dimensions)
    removal = removal_of(found, "all")
    undo = shrunk(found, removal)
    assert bool(undo.facts) == any(removal.units.values())
    assert prove(undo, [batch]).error <= 1e-10


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_channels_of_the_stream_of_any_family_are_removed(case: shrink_cases.Case) -> None:
    model, batch = case.make(), case.batch()
    graph = find_units(model, batch, with_hidden=True)
    for dimension in graph.of_kind("hidden"):
        removal = Removal({dimension.name: tuple(range(dimension.size // 4))})
        mask_(model, graph, removal)
        undo = remove_(model, graph, removal, batch)
        assert not prove(undo, [batch]).is_exact
        undo.restore()


def test_channels_of_the_stream_are_removed_without_a_claim() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    x = torch.randn(5, 4)
    places = (*outputs(model, ["0", "1"], 6), rows("2.weight", 6, dim=1, is_input=True))
    graph, removal = Graph((Dimension("hidden", "hidden", 6, places),)), Removal({"hidden": (0,)})
    mask_(model, graph, removal)
    proof = prove(remove_(model, graph, removal, x), [x])
    assert not proof.is_exact
    assert proof.error > 1e-5
    assert model[1].normalized_shape == (5,)


class Sliced(nn.Module):
    """Reads a range of channels, and how many these are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x))[:, 4:])


def test_of_several_removals_the_wrong_one_is_named() -> None:
    model, x = Sliced(), torch.randn(5, 4)
    good = (*outputs(model, ["first"], 8), rows("second.weight", 8, dim=1, is_input=True))
    bad = (rows("second.weight", 4), rows("second.bias", 4))
    graph = Graph((Dimension("good", "channels", 8, good), Dimension("bad", "channels", 4, bad)))
    removal = Removal({"good": (0, 1), "bad": (2,)})
    mask_(model, graph, removal)
    before = snapshot(model)
    with pytest.raises(SolverError, match=r"^bad: .* it fails with RuntimeError: mat1 and mat2 shapes"):
        prove(remove_(model, graph, removal, x), [x])
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_inputs_of_a_recurrent_layer_go_but_not_its_state(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), kind(6, 4, num_layers=2, bidirectional=True))
    x = torch.randn(2, 5, 3)
    reads = [rows(f"1.weight_ih_l0{way}", 6, dim=1, is_input=True) for way in ("", "_reverse")]
    state = (rows("1.weight_hh_l0", 4, dim=1),)
    graph = Graph(
        (Dimension("in", "channels", 6, (*outputs(model, ["0"], 6), *reads)), Dimension("h", "hidden", 4, state))
    )
    mask_(model, graph, Removal({"in": (1, 2)}))
    undo = remove_(model, graph, Removal({"in": (1, 2)}), x)
    prove(undo, [x])
    assert model[1].input_size == 4
    assert model[1]._flat_weights[0] is model[1].weight_ih_l0
    other = nn.Sequential(nn.Linear(3, 6), kind(6, 4, num_layers=2, bidirectional=True))
    resize_(other, undo.facts)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x)[0], model(x)[0])
    with pytest.raises(RecipeError, match=rf"h: 1: weight_hh_l0 of a {kind.__name__} would lose .* only inputs can go"):
        remove_(model, graph, Removal({"h": (0,)}), x)


def test_experts_in_a_list_go_with_the_rows_of_their_router() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.num_experts, self.top_k = nn.Linear(8, 5), 5, 2
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            values, chosen = self.router(x).softmax(-1).topk(self.top_k)
            gates = torch.zeros(len(x), self.num_experts).scatter(1, chosen, values)
            return sum(gates[:, [i]] * self.experts[i](x) for i in range(self.num_experts))

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), Mixture()), torch.randn(16, 4)
    graph = Graph(tuple(find_experts(model)))
    undo = remove_(model, graph, Removal({"1.experts": (0, 3)}), x)
    assert prove(undo, [x]).error < 1e-6
    assert [len(model[1].experts), model[1].num_experts, model[1].router.out_features] == [3, 3, 3]
    assert undo.facts.blocks == {"1.experts": (1, 2, 4)}
    assert np.array_equal(find_blocks(model, x), [])
