"""Text models of transformers: decoders, mixtures of experts, encoders, encoder-decoders."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from families._family import TOKENS, Family, Inputs, text, text_pairs, transformers_model


def families(group: str, inputs: Inputs, table: dict[str, dict[str, Any]], suffix: str = "") -> list[Family]:
    return [
        Family(name, group, partial(transformers_model, name + suffix, settings), inputs)
        for name, settings in table.items()
    ]


DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {},
    "Gemma3": {},
    "Phi": {},
    "Phi3": {},
    "Falcon": {},
    "GPT2LMHead": {},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]]},
    "GPTNeoX": {},
    "GPTJ": {"rotary_dim": 8},
    "GPTBigCode": {},
    "CodeGen": {"rotary_dim": 8},
    "OPT": {"word_embed_proj_dim": 64},
    "Bloom": {},
    "Mpt": {},
    "StableLm": {},
    "Starcoder2": {},
    "Cohere": {},
    "Cohere2": {},
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": {},
    "Granite": {},
    "Glm": {},
    "Glm4": {},
    "Nemotron": {},
    "Persimmon": {},
    "SmolLM3": {},
    "Helium": {},
    "DiffLlama": {},
    "Exaone4": {},
    "Ernie4_5": {},
    "HunYuanDenseV1": {},
    "Apertus": {},
    "Arcee": {},
    "SeedOss": {},
    "BioGpt": {},
    "XGLM": {},
    "CTRLLMHead": {"dff": 128},
    "OpenAIGPTLMHead": {},
    "Doge": {},
    "MiniCPM3": {"num_key_value_heads": 4},
    "ModernBertDecoder": {"global_attn_every_n_layers": 2, "local_attention": 16},
    "NanoChat": {},
    "BitNet": {},
}
_DECODER_SUFFIX = {"GPT2LMHead": "Model", "CTRLLMHead": "Model", "OpenAIGPTLMHead": "Model"}

EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": {},
    "Qwen2Moe": {},
    "Qwen3Moe": {},
    "GptOss": {},
    "DeepseekV2": {"topk_method": "greedy", "num_key_value_heads": 4},
    "DeepseekV3": {"num_nextn_predict_layers": 0, "num_key_value_heads": 4},
    "Olmoe": {},
    "FlexOlmo": {},
    "Glm4Moe": {},
    "Llama4": {"attention_chunk_size": 16},
    "Phimoe": {},
    "GraniteMoe": {},
    "GraniteMoeShared": {},
    "JetMoe": {"kv_channels": 16},
    "Dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "Ernie4_5_Moe": {},
    "HunYuanMoEV1": {},
    "MiniMax": {},
    "MiniMaxM2": {},
    "Dots1": {},
    "LongcatFlash": {"head_dim": 8, "expert_ffn_hidden_size": 64, "zero_expert_num": 2, "num_key_value_heads": 4},
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Qwen3Next": {"layer_types": ["linear_attention", "full_attention"]},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_chunk_size": 16},
}

ENCODERS: dict[str, dict[str, Any]] = {
    "BertModel": {},
    "RobertaModel": {},
    "XLMRobertaModel": {},
    "DistilBertModel": {"hidden_dim": 128},
    "AlbertModel": {},
    "ElectraModel": {},
    "DebertaModel": {},
    "DebertaV2Model": {},
    "MPNetModel": {},
    "ModernBertModel": {"global_attn_every_n_layers": 2, "local_attention": 16},
    "EuroBertModel": {},
    "NomicBertModel": {},
    "EsmModel": {"mask_token_id": 3},
    "LongformerModel": {"attention_window": 8},
    "BigBirdModel": {"attention_type": "original_full"},
    "RoFormerModel": {},
    "FNetModel": {},
    "MobileBertModel": {"embedding_size": 32, "intra_bottleneck_size": 32},
    "SqueezeBertModel": {},
    "XLNetModel": {},
    "FunnelModel": {"block_sizes": [1, 1]},
    "NystromformerModel": {"num_landmarks": 8, "segment_means_seq_len": 32},
    "MraModel": {"block_per_row": 1},
    "CanineModel": {},
    "RemBertModel": {"input_embedding_size": 32},
    "IBertModel": {},
    "LiltModel": {"hidden_size": 72, "num_attention_heads": 6},
    "LayoutLMModel": {},
    "BertForSequenceClassification": {},
    "Data2VecTextModel": {},
    "ConvBertModel": {},
    "YosoModel": {},
    "ErnieModel": {},
    "BertForMaskedLM": {},
}

PAIRS: dict[str, dict[str, Any]] = {
    "T5ForConditionalGeneration": {},
    "MT5ForConditionalGeneration": {},
    "UMT5ForConditionalGeneration": {},
    "LongT5ForConditionalGeneration": {},
    "SwitchTransformersForConditionalGeneration": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "T5GemmaForConditionalGeneration": {},
    "BartForConditionalGeneration": {},
    "MBartForConditionalGeneration": {},
    "PegasusForConditionalGeneration": {},
    "MarianMTModel": {},
    "BlenderbotForConditionalGeneration": {},
    "M2M100ForConditionalGeneration": {},
    "NllbMoeForConditionalGeneration": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "LEDForConditionalGeneration": {"attention_window": 8},
    "ProphetNetForConditionalGeneration": {},
    "FSMTForConditionalGeneration": {"src_vocab_size": 128, "tgt_vocab_size": 128, "langs": ["en", "de"]},
}


def with_global(inputs: Inputs, name: str) -> Inputs:
    """Let the first token of Longformer and LED attend to all, as their users do: layers of their own serve it."""
    if name not in ("LongformerModel", "LEDForConditionalGeneration"):
        return inputs
    first = torch.zeros(4, TOKENS, dtype=torch.long)
    first[:, 0] = 1
    return lambda: [batch | {"global_attention_mask": first} for batch in inputs()]


TEXT: tuple[Family, ...] = (
    *(
        Family(
            name.removesuffix("LMHead"),
            "decoder",
            partial(transformers_model, name + _DECODER_SUFFIX.get(name, "ForCausalLM"), settings),
            text,
        )
        for name, settings in DECODERS.items()
    ),
    *families("mixture of experts", text, EXPERTS, "ForCausalLM"),
    *(
        Family(name, "encoder", partial(transformers_model, name, settings), with_global(text, name))
        for name, settings in ENCODERS.items()
    ),
    *(
        Family(name, "encoder-decoder", partial(transformers_model, name, settings), with_global(text_pairs, name))
        for name, settings in PAIRS.items()
    ),
)
