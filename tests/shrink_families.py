"""Tiny models of families of transformers, and an LSTM, as cases of shrinking: see shrink_cases.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from shrink_cases import Case, images, vectors
from torch import Tensor, nn

VOCABULARY = 40


def tokens(length: int = 7, **others: Any) -> Callable[[], Mapping[str, Tensor]]:
    """Two sentences; ids that every family takes for words."""

    def make() -> Mapping[str, Tensor]:
        ids = torch.randint(5, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(3))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **dict.fromkeys(others, ids)}

    return make


def pixels(size: int) -> Callable[[], Mapping[str, Tensor]]:
    return lambda: {"pixel_values": images(3, size)()}


def of(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """Makes a model of transformers from the names of its class and its configuration's."""

    def build() -> nn.Module:
        import transformers

        found: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return found

    return build


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lstm, self.fc2, self.fc3 = nn.Linear(5, 6), nn.LSTM(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.fc1(x))
        return self.fc3(torch.relu(self.fc2(hidden)))


_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
_BERT = {**_TEXT, "num_attention_heads": 4, "max_position_embeddings": 32}
_GQA = {**_TEXT, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32}
_GQA |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MOE = {**_GQA, "num_experts_per_tok": 2}

FAMILIES = (
    Case(
        "ResNet",
        of(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[3, 3],
            layer_type="bottleneck",
            num_labels=3,
        ),
        pixels(16),
        # Of each block two bottlenecks of a quarter of its channels, and the streams of both stages.
        {"channels": (2,) * 6 + (4,) * 6 + (8, 16), "layers": (3, 3)},
        fixed=("classifier.1.weight 0", "resnet.embedder.embedder.convolution.weight 1"),
    ),
    Case(
        "MobileNet",
        of(
            "MobileNetV2ForImageClassification",
            "MobileNetV2Config",
            depth_multiplier=0.25,
            expand_ratio=2,
            finegrained_output=False,
            num_labels=3,
        ),
        pixels(40),
        # Inner channels of the stem and of 16 blocks, a stream wherever the width or the resolution changes, the last.
        {
            "channels": (8,) * 4 + (16,) * 7 + (24,) + (32,) * 4 + (40,) + (48,) * 3 + (80,) * 4 + (320,),
            "layers": (16,),
        },
        fixed=("classifier.weight 0",),
    ),
    Case(
        "ConvNeXt",
        of(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[8, 12],
            depths=[2, 2],
            num_stages=2,
            num_labels=3,
            layer_scale_init_value=0.5,
        ),
        pixels(32),
        {"ffn": (32, 32, 48, 48), "layers": (2, 2)},
        fixed=("classifier.weight 0", "convnext.encoder.stages.0.layers.0.layer_scale_parameter 0"),
    ),
    Case(
        "ViT",
        of(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            num_labels=3,
        ),
        pixels(16),
        {"heads": (4, 4), "ffn": (32, 32), "layers": (2,)},
        fixed=("classifier.weight 0", "vit.embeddings.position_embeddings 1", "vit.embeddings.cls_token 2"),
    ),
    Case(
        "Swin",
        of(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            num_labels=3,
        ),
        pixels(32),
        {"heads": (2, 2, 4, 4), "ffn": (32, 32, 64, 64), "layers": (2, 2)},
        fixed=("classifier.weight 0", "swin.encoder.layers.0.downsample.reduction.weight 0"),
    ),
    Case(
        "BERT",
        of("BertModel", "BertConfig", **_BERT),
        tokens(),
        {"heads": (4, 4), "ffn": (32, 32), "layers": (2,)},
        fixed=(
            "embeddings.word_embeddings.weight 0",
            "embeddings.word_embeddings.weight 1",
            "embeddings.LayerNorm.weight 0",
            "pooler.dense.weight 0",
        ),
    ),
    Case(
        "MPNet",
        of("MPNetModel", "MPNetConfig", **_BERT),
        tokens(),
        # One table of biases serves the heads of all layers: they go together.
        {"heads": (4,), "ffn": (32, 32), "layers": (2,)},
        fixed=("encoder.relative_attention_bias.weight 0",),
        plain=False,
    ),
    Case(
        "DistilBERT",
        of(
            "DistilBertModel",
            "DistilBertConfig",
            vocab_size=VOCABULARY,
            dim=16,
            hidden_dim=32,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=32,
        ),
        tokens(),
        {"heads": (4, 4), "ffn": (32, 32), "layers": (2,)},
    ),
    Case(
        "ModernBERT",
        of(
            "ModernBertModel",
            "ModernBertConfig",
            **{**_BERT, "num_hidden_layers": 3},
            global_attn_every_n_layers=2,
            local_attention=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        tokens(),
        {"heads": (4, 4, 4), "ffn": (32, 32, 32), "layers": (3,)},
        fixed=("layers.0.attn.Wqkv.weight 1", "final_norm.weight 0"),
    ),
    Case(
        "T5",
        of(
            "T5Model",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=4,
            d_ff=32,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
        ),
        tokens(decoder_input_ids=True),
        # The self-attention of each stack shares a table of biases; cross-attention of all layers, a tensor of zeros.
        {"heads": (4, 4, 4), "ffn": (32, 32, 32, 32), "layers": (2, 2)},
        fixed=("shared.weight 0", "shared.weight 1"),
        plain=False,
    ),
    Case(
        "GPT-2",
        of(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
        ),
        tokens(),
        {"ffn": (64, 64), "layers": (2,)},
        trial={"heads": (4, 4)},  # `split_size` says where queries end
        fixed=("transformer.wte.weight 0", "transformer.wte.weight 1", "transformer.h.0.attn.c_attn.weight 0"),
        plain=False,
    ),
    Case(
        "Llama",
        of("LlamaForCausalLM", "LlamaConfig", **_GQA),
        tokens(),
        # Whole groups, and as many query heads of each.
        {"heads": (2, 2), "query_heads": (8, 8), "ffn": (32, 32), "layers": (2,)},
        fixed=("lm_head.weight 0", "lm_head.weight 1", "model.norm.weight 0"),
    ),
    Case(
        "Qwen3",
        of("Qwen3ForCausalLM", "Qwen3Config", **_GQA),
        tokens(),
        {"heads": (2, 2), "query_heads": (8, 8), "ffn": (32, 32), "layers": (2,)},
        fixed=("model.layers.0.self_attn.q_norm.weight 0", "lm_head.weight 0"),
    ),
    Case(
        "Gemma 3",
        of(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **_GQA,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=4,
        ),
        tokens(),
        {"heads": (2, 2), "query_heads": (8, 8), "ffn": (32, 32), "layers": (2,)},
        fixed=("model.embed_tokens.weight 0", "model.layers.1.self_attn.k_norm.weight 0"),
    ),
    Case(
        "Mixtral",
        of("MixtralForCausalLM", "MixtralConfig", **_MOE, num_local_experts=4),
        tokens(),
        # Neurons of all experts of a layer together.
        {"heads": (2, 2), "query_heads": (8, 8), "ffn": (32, 32), "experts": (4, 4), "layers": (2,)},
        fixed=("lm_head.weight 0",),
        plain=False,
    ),
    Case(
        "Qwen3-MoE",
        of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_MOE, num_experts=4, moe_intermediate_size=24),
        tokens(),
        {"heads": (2, 2), "query_heads": (8, 8), "ffn": (24, 24), "experts": (4, 4), "layers": (2,)},
        fixed=("lm_head.weight 0",),
        plain=False,
    ),
    Case(
        "Mamba",
        of(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=VOCABULARY,
            hidden_size=8,
            state_size=4,
            num_hidden_layers=2,
            time_step_rank=2,
            use_mambapy=False,
        ),
        tokens(),
        # The inner channels go as those of a convolution do; the rank of the time step is a range of one product.
        {"channels": (16, 16), "layers": (2,)},
        trial={"channels": (2, 2)},
        fixed=("backbone.embeddings.weight 0", "backbone.layers.0.norm.weight 0"),
        plain=False,
    ),
    Case(
        "LSTM",
        Recurrent,
        vectors(4, 2, 5),
        {"channels": (10,)},
        fixed=("lstm.weight_ih_l0 0", "lstm.weight_hh_l0 1", "fc1.weight 0", "fc2.weight 1"),
    ),
)
