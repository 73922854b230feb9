"""Tiny models with their units written down by hand: what the tracer should find, without the tracer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from secateur.graph import Dimension, Graph, Place, Removal, find_blocks, find_experts

HIDDEN, HEAD, HEADS, FFN, VOCAB = 32, 8, 4, 24, 50


def rows(tensor: str, units: int, width: int = 1, dim: int = 0, start: int = 0, is_input: bool = False) -> Place:
    """Units of neighbouring indices."""
    indices = start + np.arange(units * width, dtype=np.int64).reshape(units, width)
    return Place(tensor, dim, indices, is_input)


def joined(tensor: str, starts: Iterable[int], units: int, widths: Iterable[int], dim: int = 0) -> Place:
    """Units that lie in several parts of one tensor."""
    parts = [rows(tensor, units, width, dim, start).indices for start, width in zip(starts, widths, strict=True)]
    return Place(tensor, dim, np.concatenate(parts, axis=1))


def outputs(model: nn.Module, names: Iterable[str], units: int, width: int = 1) -> list[Place]:
    """Units that linear layers or norms make: rows of their weight and bias."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    found = [f"{name}.{part}" for name in names for part in ("weight", "bias", "running_mean", "running_var")]
    return [rows(name, units, width) for name in found if name in tensors]


def mask_(model: nn.Module, graph: Graph, removal: Removal) -> None:
    """Make the columns that read removed units zero."""
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])
    with torch.no_grad():
        for name, units in removal.units.items():
            for place in graph[name].inputs:
                tensors[place.tensor].index_fill_(place.dim, torch.from_numpy(place.of(list(units))), 0)


@dataclass(frozen=True)
class Case:
    """A model, a batch of its inputs, and its units.

    Args:
        model: fresh, in evaluation mode, float32.
        batch: for `call_model`.
        dimensions: as written by hand, and blocks and experts as found.
    """

    model: nn.Module
    batch: Any
    dimensions: tuple[Dimension, ...]

    @property
    def graph(self) -> Graph:
        return Graph(self.dimensions)


def _case(model: nn.Module, batch: Any, *dimensions: Dimension, blocks: bool = True) -> Case:
    model = model.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and scales that are zero or one hide what is lost
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = [*find_experts(model), *(find_blocks(model, batch) if blocks else [])]
    return Case(model, batch, (*dimensions, *found))


def _tokens() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"input_ids": torch.randint(1, VOCAB, (2, 6))}


def conv() -> Case:
    """Batch norm, a depthwise and a grouped convolution."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.depth = nn.Conv2d(8, 16, 3, padding=1, groups=8)
            self.mix, self.mixed = nn.Conv2d(16, 12, 1), nn.GroupNorm(4, 12)
            self.grouped = nn.Conv2d(12, 8, 3, groups=4)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.depth(torch.relu(self.norm(self.stem(x))))
            x = self.grouped(torch.relu(self.mixed(self.mix(torch.relu(x)))))
            return self.head(torch.relu(x).mean((2, 3)))

    torch.manual_seed(0)
    model = Net()
    chain = Dimension(
        "stem.channels",
        "channels",
        8,
        (
            *outputs(model, ["stem", "norm"], 8),
            *outputs(model, ["depth"], 8, 2),
            rows("mix.weight", 8, 2, dim=1, is_input=True),
        ),
    )
    groups = Dimension(
        "mix.channels",
        "channels",
        4,
        (
            *outputs(model, ["mix", "mixed"], 4, 3),
            *outputs(model, ["grouped"], 4, 2),
            rows("head.weight", 4, 2, dim=1, is_input=True),
        ),
    )
    return _case(model, torch.randn(2, 3, 8, 8), chain, groups)


def transposed() -> Case:
    """A linear layer, reshaped to an image, transposed convolutions, flattened again."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6 * 4),
        nn.Unflatten(1, (6, 2, 2)),
        nn.ConvTranspose2d(6, 8, 3),
        nn.PReLU(8),
        nn.Flatten(),
        nn.Linear(8 * 16, 3),
    )
    second = Dimension(
        "2.channels",
        "channels",
        8,
        (
            rows("2.weight", 8, dim=1),
            rows("2.bias", 8),
            rows("3.weight", 8),
            rows("5.weight", 8, 16, dim=1, is_input=True),
        ),
    )
    return _case(model, torch.randn(2, 4), second)


def resnet() -> Case:
    """Two stages of basic blocks in lists."""

    class Block(nn.Module):
        def __init__(self, inside: int, outside: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(inside, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.conv2, self.bn2 = nn.Conv2d(6, outside, 3, padding=1), nn.BatchNorm2d(outside)
            self.shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            out += self.shortcut(x)
            return torch.relu(out)

    torch.manual_seed(0)
    layers = [nn.Sequential(Block(3, 4), Block(4, 4), Block(4, 4)), nn.Sequential(Block(4, 8), Block(8, 8))]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    inner = [
        Dimension(
            f"{name}.channels",
            "channels",
            6,
            (
                *outputs(model, [f"{name}.conv1", f"{name}.bn1"], 6),
                rows(f"{name}.conv2.weight", 6, dim=1, is_input=True),
            ),
        )
        for name in ("0.0", "0.1", "1.1")
    ]
    return _case(model, torch.randn(2, 3, 6, 6), *inner)


def _ffn(model: nn.Module, block: str, made: list[str], read: str, dim: int = 1) -> Dimension:
    return Dimension(
        f"{block}.ffn",
        "ffn",
        FFN,
        (
            *outputs(model, [f"{block}.{name}" for name in made], FFN),
            rows(f"{block}.{read}.weight", FFN, dim=dim, is_input=True),
        ),
    )


def _heads(model: nn.Module, block: str, made: list[str], read: str, *more: Place) -> Dimension:
    return Dimension(
        f"{block}.heads",
        "heads",
        HEADS,
        (
            *outputs(model, [f"{block}.{name}" for name in made], HEADS, HEAD),
            rows(f"{block}.{read}.weight", HEADS, HEAD, dim=1, is_input=True),
            *more,
        ),
    )


def bert() -> Case:
    torch.manual_seed(0)
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=3,
            num_attention_heads=HEADS,
            intermediate_size=FFN,
            max_position_embeddings=16,
        )
    )
    dimensions = []
    for index in range(3):
        block = f"encoder.layer.{index}"
        own = [f"attention.self.{name}" for name in ("query", "key", "value")]
        dimensions.append(_heads(model, block, own, "attention.output.dense"))
        dimensions.append(_ffn(model, block, ["intermediate.dense"], "output.dense"))
    return _case(model, {**_tokens(), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}, *dimensions)


def mpnet() -> Case:
    """The heads of all layers share one position table, so they go together."""
    torch.manual_seed(0)
    model = transformers.MPNetModel(
        transformers.MPNetConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            intermediate_size=FFN,
            max_position_embeddings=16,
        )
    )
    blocks = [f"encoder.layer.{index}" for index in range(2)]
    places = [rows("encoder.relative_attention_bias.weight", HEADS, dim=1)]
    for block in blocks:
        places += outputs(model, [f"{block}.attention.attn.{name}" for name in "qkv"], HEADS, HEAD)
        places.append(rows(f"{block}.attention.attn.o.weight", HEADS, HEAD, dim=1, is_input=True))
    heads = Dimension("encoder.heads", "heads", HEADS, tuple(places))
    return _case(model, _tokens(), heads, *(_ffn(model, b, ["intermediate.dense"], "output.dense") for b in blocks))


def gpt2() -> Case:
    """Transposed linear layers, q, k and v in one matrix, a tied output head."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_layer=3,
            n_head=HEADS,
            n_inner=FFN,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    dimensions = []
    for index in range(3):
        block = f"transformer.h.{index}"
        starts, widths = (0, HIDDEN, 2 * HIDDEN), (HEAD,) * 3
        places = (
            joined(f"{block}.attn.c_attn.weight", starts, HEADS, widths, dim=1),
            joined(f"{block}.attn.c_attn.bias", starts, HEADS, widths),
            rows(f"{block}.attn.c_proj.weight", HEADS, HEAD, is_input=True),
        )
        dimensions.append(Dimension(f"{block}.heads", "heads", HEADS, places))
        made = (rows(f"{block}.mlp.c_fc.weight", FFN, dim=1), rows(f"{block}.mlp.c_fc.bias", FFN))
        read = rows(f"{block}.mlp.c_proj.weight", FFN, is_input=True)
        dimensions.append(Dimension(f"{block}.ffn", "ffn", FFN, (*made, read)))
    return _case(model, _tokens(), *dimensions)


def _decoder(model: nn.Module, layers: int, heads: int, kv: int, ffn: bool = True) -> list[Dimension]:
    """Heads and neurons of a decoder with groups of query heads."""
    dimensions = []
    for index in range(layers):
        block = f"model.layers.{index}"
        query = [f"{block}.self_attn.q_proj"]
        keys = [f"{block}.self_attn.{name}" for name in ("k_proj", "v_proj")]
        out, each = f"{block}.self_attn.o_proj.weight", heads // kv
        groups = (
            *outputs(model, query, kv, each * HEAD),
            *outputs(model, keys, kv, HEAD),
            rows(out, kv, each * HEAD, dim=1, is_input=True),
        )
        alone = (*outputs(model, query, heads, HEAD), rows(out, heads, HEAD, dim=1, is_input=True))
        dimensions.append(Dimension(f"{block}.heads", "heads", kv, groups))
        dimensions.append(Dimension(f"{block}.query_heads", "query_heads", heads, alone, group_size=each))
        if ffn:
            dimensions.append(_ffn(model, block, ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"))
    return dimensions


def llama() -> Case:
    """Eight query heads, two key/value heads, with as many channels in a head as there are heads."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=HEAD,
        intermediate_size=FFN,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config)
    return _case(model, _tokens(), *_decoder(model, 3, 8, 2))


def modernbert() -> Case:
    """q, k and v in one matrix of three equal parts; gate and input of the neurons in another; alternating windows."""
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=32,
        local_attention=4,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    model = transformers.ModernBertModel(config)
    dimensions = []
    for index in range(3):
        block = f"layers.{index}"
        qkv = joined(f"{block}.attn.Wqkv.weight", (0, HIDDEN, 2 * HIDDEN), HEADS, (HEAD,) * 3)
        out = rows(f"{block}.attn.Wo.weight", HEADS, HEAD, dim=1, is_input=True)
        dimensions.append(Dimension(f"{block}.heads", "heads", HEADS, (qkv, out)))
        made = joined(f"{block}.mlp.Wi.weight", (0, FFN), FFN, (1, 1))
        read = rows(f"{block}.mlp.Wo.weight", FFN, dim=1, is_input=True)
        dimensions.append(Dimension(f"{block}.ffn", "ffn", FFN, (made, read)))
    return _case(model, _tokens(), *dimensions)


def t5() -> Case:
    """Encoder and decoder; the first block of each has the position table of all."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=HEAD,
        d_ff=FFN,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=HEADS,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = transformers.T5ForConditionalGeneration(config)
    dimensions = []
    for half, last in (("encoder", 1), ("decoder", 2)):
        name = f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        places = [rows(name, HEADS, dim=1)]
        for index in range(3):
            block = f"{half}.block.{index}.layer"
            own = f"{block}.0.SelfAttention"
            places += outputs(model, [f"{own}.{part}" for part in "qkv"], HEADS, HEAD)
            places.append(rows(f"{own}.o.weight", HEADS, HEAD, dim=1, is_input=True))
            dimensions.append(_ffn(model, f"{block}.{last}", ["DenseReluDense.wi"], "DenseReluDense.wo"))
            if half == "decoder":
                dimensions.append(_heads(model, f"{block}.1.EncDecAttention", list("qkv"), "o"))
        dimensions.append(Dimension(f"{half}.heads", "heads", HEADS, tuple(places)))
    return _case(model, {**_tokens(), "decoder_input_ids": torch.tensor([[0, 3, 4], [0, 5, 6]])}, *dimensions)


def vit() -> Case:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        image_size=8,
        patch_size=4,
    )
    model = transformers.ViTModel(config)
    dimensions = []
    names = dict(model.named_modules())
    for index in range(3):
        block = next(name for name in names if re.fullmatch(rf".*layers?\.{index}", name))
        inner = {name.removeprefix(f"{block}."): m for name, m in names.items() if name.startswith(f"{block}.")}
        linear = [name for name, module in inner.items() if isinstance(module, nn.Linear)]
        q, k, v, o, up, down = linear
        dimensions += [_heads(model, block, [q, k, v], o), _ffn(model, block, [up], down)]
    return _case(model, torch.randn(2, 3, 8, 8), *dimensions)


def _mixture(name: str, **settings: Any) -> Case:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD,
        intermediate_size=FFN,
        max_position_embeddings=32,
        **settings,
    )
    config._experts_implementation = "eager"  # the other ways have no float64
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    return _case(model, _tokens(), *_decoder(model, 2, HEADS, 2, ffn=False))


def mixtral() -> Case:
    return _mixture("Mixtral", num_local_experts=6, num_experts_per_tok=2)


def qwen3_moe() -> Case:
    return _mixture("Qwen3Moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=FFN, norm_topk_prob=False)


CASES: dict[str, Callable[[], Case]] = {
    "conv": conv,
    "transposed": transposed,
    "resnet": resnet,
    "bert": bert,
    "mpnet": mpnet,
    "gpt2": gpt2,
    "llama": llama,
    "modernbert": modernbert,
    "t5": t5,
    "vit": vit,
    "mixtral": mixtral,
    "qwen3-moe": qwen3_moe,
}
