"""Which blocks can be passed by, which experts there are, and what says how many there are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from secateur.graph import Graph, Removal, find_blocks, find_experts
from secateur.surgery import prove, remove_


class Residual(nn.Module):
    """Adds something to a stream; `way` says how, or what is wrong."""

    def __init__(self, way: str = "add") -> None:
        super().__init__()
        self.inner, self.way = nn.Linear(4, 4), way

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        y = self.inner(x)
        match self.way:
            case "add":
                return x + y
            case "in place":
                return y.add_(x)
            case "after a norm":
                return nn.functional.layer_norm(x + y, (4,))
            case "tuple":
                return x + y, None
            case "no sum":
                return torch.relu(y)
            case "sum of others":
                return y + y.flip(1)
            case "wider":
                return torch.cat([x + y, x], -1)[:, :5]


class Loop(nn.Module):
    """Runs a list of blocks, in one of several ways."""

    def __init__(self, blocks: list[nn.Module], between: str = "") -> None:
        super().__init__()
        self.blocks, self.between = nn.ModuleList(blocks), between

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            out = block(x * 2 if self.between == "scaled" else x)
            x = out[0] if isinstance(out, tuple) else out
            if self.between == "twice":
                x = block(x)
        return x


@pytest.mark.parametrize("way", ["add", "in place", "after a norm", "tuple"])
def test_blocks_with_a_stream_are_found_and_go(way: str) -> None:
    torch.manual_seed(0)
    model, x = Loop([Residual(way) for _ in range(4)]), torch.randn(3, 4)
    (found,) = find_blocks(model, x)
    assert (found.name, found.kind, found.size, found.fixed, found.least) == ("blocks", "layers", 4, (), 1)
    kept = [model.blocks[0], model.blocks[2]]
    undo = remove_(model, Graph((found,)), Removal({"blocks": (1, 3)}), x)
    assert prove(undo, [x]).error == 0
    assert list(model.blocks) == kept


@pytest.mark.parametrize(
    ("blocks", "between", "stay"),
    [
        ([Residual("add")] * 2, "", {}),
        ([Residual("no sum"), Residual("no sum")], "", {}),
        ([Residual("no sum"), Residual()], "", {0: "it does not add to what it is given"}),
        ([Residual(), Residual("sum of others")], "", {1: "it does not add to what it is given"}),
        ([Residual(), Residual()], "twice", {}),
        (
            [Residual(), Residual(), Residual("wider")],
            "",
            {2: "what it returns has another shape than what it is given"},
        ),
        ([Residual(), Residual()], "scaled", {1: "it is not given what the block before it returns"}),
    ],
)
def test_blocks_without_a_stream_stay(blocks: list[nn.Module], between: str, stay: dict[int, str]) -> None:
    found = find_blocks(Loop(blocks, between), torch.randn(3, 4))
    assert [dimension.fixed for dimension in found] == ([tuple(stay)] if stay else [])
    for dimension in found:
        assert dimension.notes == tuple(f"block {index} stays: {reason}" for index, reason in stay.items())


def test_the_larger_list_is_taken_unless_most_of_its_blocks_must_stay() -> None:
    class Nested(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Loop([Residual(), Residual()])

    x = torch.randn(3, 4)
    assert [found.name for found in find_blocks(Loop([Nested(), Nested()]), x)] == ["blocks"]
    stages = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), Residual(), Residual()) for _ in range(3)))
    found = find_blocks(stages, x)
    assert [(one.name, one.size, one.fixed) for one in found] == [("0", 3, (0,)), ("1", 3, (0,)), ("2", 3, (0,))]


def test_named_blocks_of_a_sequence_keep_their_names() -> None:
    model = nn.Sequential()
    for name in ("first", "second", "third"):
        model.add_module(name, Residual())
    x = torch.randn(2, 4)
    undo = remove_(model, Graph(tuple(find_blocks(model, x))), Removal({"": (1,)}), x)
    prove(undo, [x])
    assert list(model._modules) == ["first", "third"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_hidden_layers", 4, 2),
        ("n_layer", 4, 2),
        ("decoder_layers", 4, 2),
        ("num_blocks", 4, 2),
        ("depth", 4, 2),
        ("num_hidden_layers", 5, 5),
        ("num_heads", 4, 4),
        ("global_attn_every_n_layers", 4, 4),
        ("max_window_layers", 4, 4),
        ("layer_types", ["a", "b", "c", "d"], ["a", "d"]),
        ("no_rope_layers", (1, 0, 0, 1), (1, 1)),
        ("cross_attention_layers", [1, 3], [1]),
        ("hidden_sizes", [1, 2, 3, 4], [1, 2, 3, 4]),
        ("encoder_layers", 4, 2),
    ],
)
@pytest.mark.parametrize("where", ["the configuration", "the module"])
def test_counts_and_lists_of_blocks_follow(name: str, value: Any, expected: Any, where: str) -> None:
    model = Loop([Residual() for _ in range(4)])
    holder: Any = model
    if where == "the configuration":
        model.config = holder = SimpleNamespace()
    setattr(holder, name, value)
    x = torch.randn(2, 4)
    undo = remove_(model, Graph(tuple(find_blocks(model, x))), Removal({"blocks": (1, 2)}), x)
    now = model.config if where == "the configuration" else model
    assert getattr(now, name) == expected
    undo.restore()
    assert getattr(holder, name) is value
    assert where == "the module" or model.config is holder


def test_numbers_of_blocks_are_those_that_count_up() -> None:
    model = Loop([Residual() for _ in range(4)])
    for index, block in enumerate(model.blocks):
        block.layer_idx, block.inner.number, block.same, block.rank = index, index + 3, 1, (2, 0, 3, 1)[index]
    x = torch.randn(2, 4)
    remove_(model, Graph(tuple(find_blocks(model, x))), Removal({"blocks": (0, 2)}), x)
    assert [(block.layer_idx, block.inner.number, block.same, block.rank) for block in model.blocks] == [
        (0, 3, 1, 0),
        (1, 4, 1, 1),
    ]


def test_a_module_under_two_names_is_one() -> None:
    torch.manual_seed(0)
    settings = {"vocab_size": 50, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 12}
    config = transformers.AlbertConfig(num_hidden_layers=3, num_attention_heads=2, **settings)
    model = transformers.AlbertModel(config).eval()
    assert find_blocks(model, {"input_ids": torch.ones(1, 4, dtype=torch.int64)}) == []


def deepseek() -> nn.Module:
    config = transformers.DeepseekV3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=12,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_group=3,
        topk_group=2,
        n_shared_experts=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.model.layers[1].mlp.gate.e_score_correction_bias.normal_()
    return model


def test_experts_of_groups_go_in_equal_numbers_with_their_corrections() -> None:
    model, batch = deepseek(), {"input_ids": torch.arange(1, 31)[None]}
    (found,) = find_experts(model)
    assert (found.size, found.group_size, found.least) == (12, 4, 6)
    gate = "model.layers.1.mlp.gate"
    assert found.routers == (gate,)
    assert {place.tensor for place in found.places} == {
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
        f"{gate}.weight",
        f"{gate}.e_score_correction_bias",
    }
    graph = Graph((found,))
    undo = remove_(model, graph, Removal({found.name: (0, 3, 4, 5, 8, 11)}), batch)
    assert prove(undo, [batch]).error <= 1e-5
    assert model.get_submodule(gate).e_score_correction_bias.shape == (6,)
    assert model.get_submodule(gate).num_experts == 6
    undo.restore()
    with pytest.raises(ValueError, match="0 to 2 units of each group of 4"):
        remove_(model, graph, Removal({found.name: (0, 1)}), batch)


def test_gpt_oss_has_biases_for_each_expert() -> None:
    config = transformers.GptOssConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    batch = {"input_ids": torch.arange(1, 31)[None]}
    (found,) = find_experts(model)
    assert len(found.places) == 6
    undo = remove_(model, Graph((found,)), Removal({found.name: (1,)}), batch)
    assert prove(undo, [batch]).error <= 1e-5
