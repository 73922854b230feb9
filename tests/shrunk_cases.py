"""Models that are shrunk by hand, with the facts of it, for the tests of what is stored of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from secateur.shapes import Facts, resize_, structure_hash


def by_hand(
    model: nn.Module,
    cuts: Mapping[str, tuple[int, Sequence[int]]],
    *,
    blocks: Mapping[str, tuple[int, ...]] | None = None,
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
    config: Mapping[str, tuple[Any, Any]] | None = None,
) -> tuple[nn.Module, Facts]:
    """Return a smaller copy of a model, and what was done to it.

    Args:
        cuts: by a regular expression that whole names of tensors match, a dimension and the indices of it that stay.
        blocks: by the name of a list of blocks, the indices of those that stay.
        attributes: by a regular expression that whole names of modules match, attributes to set.
    """
    named = Facts(blocks=blocks or {})
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    values = {named.new_name(name): tensor.detach() for name, tensor in state.items()}
    values.pop(None, None)
    original = {name: tuple(value.shape) for name, value in values.items()}
    saved = {named.new_name(name) for name in model.state_dict()}
    buffers: dict[str, dict[int, tuple[int, ...]]] = {}
    for pattern, (dim, kept) in cuts.items():
        matching = [name for name in values if re.fullmatch(pattern, name)]
        assert matching, pattern
        for name in matching:
            values[name] = values[name].index_select(dim, torch.tensor(kept))
            if name not in saved:
                buffers.setdefault(name, {})[dim] = tuple(kept)
    paths = [named.new_name(name) for name, _ in model.named_modules(remove_duplicate=False)]
    set_to: dict[str, dict[str, Any]] = {}
    for pattern, table in (attributes or {}).items():
        for path in paths:
            if path is not None and re.fullmatch(pattern, path):
                set_to.setdefault(path, {}).update(table)
    changed = [name for name, value in values.items() if tuple(value.shape) != original[name]]
    facts = Facts(
        shapes={name: tuple(values[name].shape) for name in changed},
        original_shapes={name: original[name] for name in changed},
        blocks=blocks or {},
        original_blocks={name: len(model.get_submodule(name)) for name in blocks or {}},
        attributes=set_to,
        config=config or {},
        kept=buffers,
        model_hash=structure_hash(model),
    )
    small = copy.deepcopy(model)
    resize_(small, facts)
    with torch.no_grad():
        for name, tensor in (*small.named_parameters(), *small.named_buffers()):
            tensor.copy_(values[name])
    return small.eval(), facts


TEXT = torch.tensor([[5, 9, 17, 3, 42, 8], [1, 2, 3, 4, 5, 6]])


@dataclass(frozen=True)
class Case:
    """A family, and a way to shrink it."""

    make: Callable[[], nn.Module]
    cuts: Mapping[str, tuple[int, Sequence[int]]] = field(default_factory=dict)
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    inputs: Mapping[str, torch.Tensor] = field(default_factory=lambda: {"input_ids": TEXT})
    expressible: bool = True

    def shrunk(self) -> tuple[nn.Module, Facts]:
        """The smaller model and its facts."""
        torch.manual_seed(0)
        return by_hand(
            self.make().eval(), self.cuts, blocks=self.blocks, attributes=self.attributes, config=self.config
        )


def rows(heads: Sequence[int], size: int) -> list[int]:
    """The rows of some heads of a size."""
    return [head * size + row for head in heads for row in range(size)]


_BERT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def bert(head: type = transformers.BertModel, **changes: Any) -> nn.Module:
    return head(transformers.BertConfig(**{**_BERT, **changes}))


def mpnet() -> nn.Module:
    return transformers.MPNetModel(transformers.MPNetConfig(**_BERT))


def llama(**changes: Any) -> nn.Module:
    config = {**_BERT, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def gemma() -> nn.Module:
    config = {**_BERT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 3}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**config, pad_token_id=0))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=32)
    )


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=3, num_heads=4
    )
    return transformers.T5Model(config)


def vit() -> nn.Module:
    config = {**_BERT, "image_size": 16, "patch_size": 8}
    del config["vocab_size"]
    return transformers.ViTModel(transformers.ViTConfig(**config))


def modernbert() -> nn.Module:
    config = {**_BERT, "num_hidden_layers": 4, "max_position_embeddings": 64, "local_attention": 4}
    return transformers.ModernBertModel(
        transformers.ModernBertConfig(
            **config, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        )
    )


IMAGE = {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}
PAIR = {"input_ids": TEXT, "decoder_input_ids": TEXT[:, :4]}
FEW = list(range(0, 48, 2))
LAST = {"out_features": 24}, {"in_features": 24}  # of the two linear layers of a feed-forward that keeps FEW

CASES = {
    "bert ffn": Case(
        bert,
        {r".*intermediate\.dense\.(weight|bias)": (0, FEW), r".*\d\.output\.dense\.weight": (1, FEW)},
        attributes={r".*intermediate\.dense": LAST[0], r".*\d\.output\.dense": LAST[1]},
    ),
    "bert layers": Case(
        bert,
        blocks={"encoder.layer": (0, 2)},
        attributes={r"encoder\.layer\.1\.attention\.self": {"layer_idx": 1}},
        config={"num_hidden_layers": (3, 2)},
    ),
    "bert heads": Case(
        bert,
        {
            r".*self\.(query|key|value)\.(weight|bias)": (0, rows((0, 3), 8)),
            r".*attention\.output\.dense\.weight": (1, rows((0, 3), 8)),
        },
        attributes={
            r".*self\.(query|key|value)": {"out_features": 16},
            r".*attention\.output\.dense": {"in_features": 16},
        },
        expressible=False,
    ),
    "bert one layer's ffn": Case(
        bert,
        {r".*1\.intermediate\.dense\.(weight|bias)": (0, FEW), r".*1\.output\.dense\.weight": (1, FEW)},
        attributes={r".*1\.intermediate\.dense": LAST[0], r".*1\.output\.dense": LAST[1]},
        expressible=False,
    ),
    "mpnet ffn and layers": Case(
        mpnet,
        {r".*intermediate\.dense\.(weight|bias)": (0, FEW), r".*\d\.output\.dense\.weight": (1, FEW)},
        blocks={"encoder.layer": (1, 2)},
        attributes={r".*intermediate\.dense": LAST[0], r".*\d\.output\.dense": LAST[1]},
        config={"num_hidden_layers": (3, 2)},
    ),
    "mpnet heads": Case(
        mpnet,
        {
            r".*attn\.[qkv]\.(weight|bias)": (0, rows((1, 2), 8)),
            r".*attn\.o\.weight": (1, rows((1, 2), 8)),
            r".*relative_attention_bias\.weight": (1, (1, 2)),
        },
        attributes={
            r".*attn\.[qkv]": {"out_features": 16},
            r".*attn\.o": {"in_features": 16},
            r".*relative_attention_bias": {"embedding_dim": 2},
            r".*attn": {"all_head_size": 16, "num_attention_heads": 2},
        },
        expressible=False,
    ),
    "llama groups, ffn and layers": Case(
        llama,
        {
            r".*(gate|up)_proj\.weight": (0, FEW),
            r".*down_proj\.weight": (1, FEW),
            r".*q_proj\.weight": (0, rows(range(4), 8)),
            r".*o_proj\.weight": (1, rows(range(4), 8)),
            r".*[kv]_proj\.weight": (0, rows((0,), 8)),
        },
        blocks={"model.layers": (0, 2)},
        attributes={
            r".*(gate|up)_proj": LAST[0],
            r".*down_proj": LAST[1],
            r".*q_proj": {"out_features": 32},
            r".*o_proj": {"in_features": 32},
            r".*[kv]_proj": {"out_features": 8},
            r".*1\.self_attn": {"layer_idx": 1},
        },
        config={"num_hidden_layers": (3, 2)},
    ),
    "llama query heads": Case(
        llama,
        {r".*q_proj\.weight": (0, rows((0, 1, 4, 5), 8)), r".*o_proj\.weight": (1, rows((0, 1, 4, 5), 8))},
        attributes={
            r".*q_proj": {"out_features": 32},
            r".*o_proj": {"in_features": 32},
            r".*self_attn": {"num_key_value_groups": 2},
        },
    ),
    "llama one layer's groups": Case(
        llama,
        {
            r".*1\.self_attn\.q_proj\.weight": (0, rows(range(4), 8)),
            r".*1\.self_attn\.o_proj\.weight": (1, rows(range(4), 8)),
            r".*1\.self_attn\.[kv]_proj\.weight": (0, rows((0,), 8)),
        },
        blocks={"model.layers": (1, 2)},
        attributes={
            r".*1\.self_attn\.q_proj": {"out_features": 32},
            r".*1\.self_attn\.o_proj": {"in_features": 32},
            r".*1\.self_attn\.[kv]_proj": {"out_features": 8},
            r".*0\.self_attn": {"layer_idx": 0},
            r".*1\.self_attn": {"layer_idx": 1},
        },
        config={"num_hidden_layers": (3, 2)},
        expressible=False,
    ),
    "gemma 3 layers": Case(
        gemma,
        blocks={"model.layers": (1, 2)},
        attributes={
            r"model\.layers\.0(\.self_attn)?": {"layer_idx": 0},
            r"model\.layers\.1(\.self_attn)?": {"layer_idx": 1},
        },
        config={
            "num_hidden_layers": (3, 2),
            "layer_types": (
                ("sliding_attention", "sliding_attention", "full_attention"),
                ("sliding_attention", "full_attention"),
            ),
        },
    ),
    "gpt-2 ffn and layers": Case(
        gpt2,
        {
            r".*c_fc\.weight": (1, range(100)),
            r".*c_fc\.bias": (0, range(100)),
            r".*mlp\.c_proj\.weight": (0, range(100)),
        },
        blocks={"transformer.h": (0, 1)},
        attributes={r".*c_fc": {"nf": 100}, r".*mlp\.c_proj": {"nx": 100}},
        config={"n_layer": (3, 2)},
    ),
    "gpt-2 heads": Case(
        gpt2,
        {
            r".*c_attn\.weight": (1, [32 * part + row for part in range(3) for row in rows((0, 2), 8)]),
            r".*c_attn\.bias": (0, [32 * part + row for part in range(3) for row in rows((0, 2), 8)]),
            r".*attn\.c_proj\.weight": (0, rows((0, 2), 8)),
        },
        attributes={
            r".*c_attn": {"nf": 48},
            r".*attn\.c_proj": {"nx": 16},
            r".*\.attn": {"split_size": 16, "num_heads": 2},
        },
        expressible=False,
    ),
    "t5 heads, ffn and encoder layers": Case(
        t5,
        {
            r".*(Self|EncDec)Attention\.[qkv]\.weight": (0, rows((0, 2), 8)),
            r".*(Self|EncDec)Attention\.o\.weight": (1, rows((0, 2), 8)),
            r".*relative_attention_bias\.weight": (1, (0, 2)),
            r".*wi\.weight": (0, FEW),
            r".*wo\.weight": (1, FEW),
        },
        blocks={"encoder.block": (0, 2)},
        attributes={
            r".*(Self|EncDec)Attention\.[qkv]": {"out_features": 16},
            r".*(Self|EncDec)Attention\.o": {"in_features": 16},
            r".*(Self|EncDec)Attention": {"n_heads": 2, "inner_dim": 16},
            r".*relative_attention_bias": {"embedding_dim": 2},
            r".*wi": LAST[0],
            r".*wo": LAST[1],
            r"encoder\.block\.1\.layer\.0\.SelfAttention": {"layer_idx": 1},
        },
        inputs=PAIR,
    ),
    "vit heads and ffn": Case(
        vit,
        {
            r".*[qkv]_proj\.(weight|bias)": (0, rows((1, 3), 8)),
            r".*o_proj\.weight": (1, rows((1, 3), 8)),
            r".*fc1\.(weight|bias)": (0, FEW),
            r".*fc2\.weight": (1, FEW),
        },
        attributes={
            r".*[qkv]_proj": {"out_features": 16},
            r".*o_proj": {"in_features": 16},
            r".*fc1": LAST[0],
            r".*fc2": LAST[1],
        },
        inputs=IMAGE,
    ),
    "modernbert ffn": Case(
        modernbert,
        {r".*mlp\.Wi\.weight": (0, [*FEW, *(48 + row for row in FEW)]), r".*mlp\.Wo\.weight": (1, FEW)},
        attributes={r".*mlp\.Wi": {"out_features": 48}, r".*mlp\.Wo": LAST[1]},
    ),
    "modernbert later layers": Case(
        modernbert,
        blocks={"layers": (0, 1, 3)},
        attributes={r"layers\.2(\.attn)?": {"layer_idx": 2}},
        config={
            "num_hidden_layers": (4, 3),
            "layer_types": (
                ("full_attention", "sliding_attention", "sliding_attention", "full_attention"),
                ("full_attention", "sliding_attention", "full_attention"),
            ),
        },
    ),
    "modernbert heads": Case(
        modernbert,
        {
            r".*Wqkv\.weight": (0, [32 * part + row for part in range(3) for row in rows((0, 3), 8)]),
            r".*attn\.Wo\.weight": (1, rows((0, 3), 8)),
        },
        attributes={r".*Wqkv": {"out_features": 48}, r".*attn\.Wo": {"in_features": 16}},
        expressible=False,
    ),
}
