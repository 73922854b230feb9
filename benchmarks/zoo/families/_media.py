"""Vision, audio, time series and several modalities, of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from families._family import TOKENS, VOCABULARY, Family, Inputs, ids, pixels, transformers_model

VISION: dict[str, dict[str, Any]] = {
    "ViTModel": {},
    "ViTForImageClassification": {},
    "DeiTModel": {},
    "BeitModel": {},
    "Dinov2Model": {},
    "Dinov2WithRegistersModel": {},
    "DINOv3ViTModel": {},
    "IJepaModel": {},
    "ViTMSNModel": {},
    "ViTMAEModel": {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 2, "decoder_intermediate_size": 128},
    "SwinModel": {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    "Swinv2Model": {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    "ConvNextModel": {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]},
    "ConvNextV2Model": {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]},
    "ResNetModel": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2]},
    "ResNetForImageClassification": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2]},
    "RegNetModel": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "groups_width": 16},
    "BitModel": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 4},
    "MobileNetV1Model": {"depth_multiplier": 0.25},
    "MobileNetV2Model": {"depth_multiplier": 0.25},
    "EfficientNetModel": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "MobileViTModel": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 64]},
    "SegformerModel": {
        "hidden_sizes": [16, 32],
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "num_attention_heads": [1, 2],
        "sr_ratios": [2, 1],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
    },
    "PoolFormerModel": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    "PvtV2Model": {
        "hidden_sizes": [16, 32, 32, 64],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "mlp_ratios": [2, 2, 2, 2],
    },
    "LevitModel": {
        "hidden_sizes": [32, 48, 64],
        "depths": [1, 1, 1],
        "num_attention_heads": [2, 3, 4],
        "image_size": 64,
        "patch_size": 16,
    },
    "CvtModel": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "FocalNetModel": {"embed_dim": 32, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]},
    "HieraModel": {
        "image_size": [64, 64],
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 4, 4],
        "patch_size": [7, 7],
    },
    "VitDetModel": {},
    "YolosModel": {"image_size": [32, 32], "num_detection_tokens": 4},
    "DPTForDepthEstimation": {
        "num_hidden_layers": 4,
        "neck_hidden_sizes": [16, 16, 32, 32],
        "fusion_hidden_size": 32,
        "backbone_out_indices": [0, 1, 2, 3],
    },
    "SwiftFormerModel": {"embed_dims": [16, 24, 32, 64], "depths": [1, 1, 1, 1]},
    "GLPNModel": {
        "hidden_sizes": [16, 32, 32, 64],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "mlp_ratios": [2, 2, 2, 2],
    },
    "DINOv3ConvNextModel": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    "Aimv2VisionModel": {},
    "PixioModel": {},
    "MLCDVisionModel": {},
}
# Those that halve an image more often than 32 pixels allow.
_LARGER = ("ConvNextModel", "ConvNextV2Model", "LevitModel", "HieraModel", "GLPNModel", "MobileViTModel")


def waves() -> list[Any]:
    return [{"input_values": torch.randn(4, 1600)} for _ in range(2)]


def spectrum(length: int = 64, mels: int = 16) -> list[Any]:
    return [{"input_features": torch.randn(4, length, mels)} for _ in range(2)]


def seq2seq_spectrum(length: int, mels: int = 16, transposed: bool = False) -> list[Any]:
    return [
        {
            "input_features": torch.randn(4, mels, length) if transposed else torch.randn(4, length, mels),
            "decoder_input_ids": ids(4, 16),
        }
        for _ in range(2)
    ]


_WAVE = {
    "conv_dim": [32, 32],
    "conv_kernel": [10, 8],
    "conv_stride": [5, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}
AUDIO: dict[str, tuple[dict[str, Any], Inputs]] = {
    "Wav2Vec2Model": (_WAVE, waves),
    "HubertModel": (_WAVE, waves),
    "WavLMModel": (_WAVE, waves),
    "UniSpeechModel": (_WAVE, waves),
    "Data2VecAudioModel": (_WAVE | {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 9}, waves),
    "SEWModel": (_WAVE | {"squeeze_factor": 1}, waves),
    "Wav2Vec2ConformerModel": (_WAVE, waves),
    "Wav2Vec2BertModel": ({"feature_projection_input_dim": 16, "apply_spec_augment": False}, spectrum),
    "WhisperForConditionalGeneration": (
        {"max_source_positions": 32, "max_target_positions": 32},
        partial(seq2seq_spectrum, 64, transposed=True),
    ),
    "Speech2TextForConditionalGeneration": (
        {"input_feat_per_channel": 16, "conv_channels": 64, "num_conv_layers": 2},
        partial(seq2seq_spectrum, 64),
    ),
    "ASTModel": ({"max_length": 64, "patch_size": 8}, lambda: [{"input_values": torch.randn(4, 64, 16)} for _ in "ab"]),
    "MoonshineForConditionalGeneration": (
        {},
        lambda: [{"input_values": torch.randn(2, 4096), "decoder_input_ids": ids(2, 16)} for _ in "ab"],
    ),
    "EncodecModel": (
        {"num_filters": 8, "hidden_size": 32, "codebook_size": 32, "upsampling_ratios": [4, 2], "codebook_dim": 32},
        lambda: [{"input_values": torch.randn(2, 1, 960)} for _ in "ab"],
    ),
    "VitsModel": (
        {
            **{"flow_size": 32, "spectrogram_bins": 33, "upsample_initial_channel": 32, "upsample_rates": [4, 4]},
            **{"upsample_kernel_sizes": [8, 8], "duration_predictor_filter_channels": 32},
            **{"posterior_encoder_num_wavenet_layers": 2, "prior_encoder_num_wavenet_layers": 2},
            **{"prior_encoder_num_flows": 2, "duration_predictor_num_flows": 2, "hidden_size": 32},
            **{"noise_scale": 0.0, "noise_scale_duration": 0.0, "use_stochastic_duration_prediction": False},
        },
        lambda: [{"input_ids": ids(2, 16)} for _ in "ab"],
    ),
    "PatchTSTModel": (
        {"context_length": 64, "patch_length": 8, "patch_stride": 8, "num_input_channels": 4},
        lambda: [{"past_values": torch.randn(8, 64, 4)} for _ in "ab"],
    ),
    "PatchTSMixerModel": (
        {"context_length": 64, "patch_length": 8, "patch_stride": 8, "num_input_channels": 4},
        lambda: [{"past_values": torch.randn(8, 64, 4)} for _ in "ab"],
    ),
}


def pairs_of_text_and_image(length: int = 16) -> list[Any]:
    return [{"input_ids": ids(4, length), "pixel_values": torch.randn(4, 3, 32, 32)} for _ in range(2)]


def images_in_text(images: int, token: int, rotary: bool = False, **more: Callable[[], Any]) -> list[Any]:
    """Text whose first tokens are replaced by an image's patches."""

    def batch() -> dict[str, Any]:
        tokens = ids(2, TOKENS)
        tokens[:, 1 : 1 + images] = token
        return {"input_ids": tokens, **({"mm_token_type_ids": (tokens == token).int()} if rotary else {})} | {
            name: make() for name, make in more.items()
        }

    return [batch() for _ in range(2)]


_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
IMAGE = VOCABULARY - 1
_TOWER = {"text_config": {"max_position_embeddings": 32}}
MODALITIES: dict[str, tuple[dict[str, Any], Inputs]] = {
    "CLIPModel": (_TOWER, pairs_of_text_and_image),
    "SiglipModel": (_TOWER, pairs_of_text_and_image),
    "ChineseCLIPModel": ({}, pairs_of_text_and_image),
    "AltCLIPModel": ({}, pairs_of_text_and_image),
    "CLIPSegModel": (_TOWER, pairs_of_text_and_image),
    "GroupViTModel": (
        {"vision_config": {"depths": [1, 1, 1], "num_group_tokens": [16, 8, 0], "num_output_groups": [16, 8, 8]}},
        pairs_of_text_and_image,
    ),
    "BlipModel": ({}, pairs_of_text_and_image),
    "FlavaModel": ({}, pairs_of_text_and_image),
    "ViltModel": ({}, pairs_of_text_and_image),
    "OwlViTModel": (_TOWER, pairs_of_text_and_image),
    "GitModel": ({}, pairs_of_text_and_image),
    "LlavaForConditionalGeneration": (
        {"vision_feature_layer": -1},
        partial(images_in_text, 16, IMAGE, pixel_values=lambda: torch.randn(2, 3, 32, 32)),
    ),
    "PaliGemmaForConditionalGeneration": (
        {"vision_config": {"vision_use_head": False}, "projection_dim": 64},
        partial(images_in_text, 16, IMAGE, pixel_values=lambda: torch.randn(2, 3, 32, 32)),
    ),
    "Idefics3ForConditionalGeneration": (
        {"scale_factor": 2},
        partial(images_in_text, 4, IMAGE, pixel_values=lambda: torch.randn(2, 1, 3, 32, 32)),
    ),
    "Qwen2VLForConditionalGeneration": (
        {
            "vision_config": {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 4},
            "text_config": {"rope_parameters": _MROPE},
        },
        partial(
            images_in_text,
            4,
            IMAGE,
            rotary=True,
            pixel_values=lambda: torch.randn(32, 3 * 2 * 4 * 4),
            image_grid_thw=lambda: torch.tensor([[1, 4, 4]] * 2),
        ),
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        {
            "vision_config": {"fullatt_block_indexes": [1], "window_size": 16, "patch_size": 4},
            "text_config": {"rope_parameters": _MROPE},
        },
        partial(
            images_in_text,
            4,
            IMAGE,
            rotary=True,
            pixel_values=lambda: torch.randn(32, 3 * 2 * 4 * 4),
            image_grid_thw=lambda: torch.tensor([[1, 4, 4]] * 2),
        ),
    ),
    "Qwen3VLForConditionalGeneration": (
        {"vision_config": {"deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 4}},
        partial(
            images_in_text,
            4,
            IMAGE,
            rotary=True,
            pixel_values=lambda: torch.randn(32, 3 * 2 * 4 * 4),
            image_grid_thw=lambda: torch.tensor([[1, 4, 4]] * 2),
        ),
    ),
    "InternVLForConditionalGeneration": (
        {"vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}},
        partial(images_in_text, 4, IMAGE, pixel_values=lambda: torch.randn(2, 3, 32, 32)),
    ),
    "Qwen2AudioForConditionalGeneration": (
        {"audio_config": {"max_source_positions": 32}},
        partial(
            images_in_text,
            16,
            VOCABULARY - 3,
            attention_mask=lambda: torch.ones(2, TOKENS, dtype=torch.long),
            input_features=lambda: torch.randn(2, 16, 64),
            feature_attention_mask=lambda: torch.ones(2, 64, dtype=torch.long),
        ),
    ),
    "PerceiverModel": (
        {
            "d_latents": 64,
            "num_latents": 16,
            "d_model": 64,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
        },
        lambda: [{"inputs": torch.randn(4, 32, 64)} for _ in range(2)],
    ),
    "DecisionTransformerModel": (
        {"state_dim": 8, "act_dim": 4, "max_ep_len": 64},
        lambda: [
            {
                "states": torch.randn(4, 8, 8),
                "actions": torch.randn(4, 8, 4),
                "rewards": torch.randn(4, 8, 1),
                "returns_to_go": torch.randn(4, 8, 1),
                "timesteps": torch.arange(8).expand(4, 8),
                "attention_mask": torch.ones(4, 8),
            }
            for _ in range(2)
        ],
    ),
    "SamModel": (
        {
            "vision_config": {"output_channels": 64, "num_pos_feats": 32, "global_attn_indexes": [1], "window_size": 2},
            "mask_decoder_config": {"mlp_dim": 128, "iou_head_hidden_dim": 64},
        },
        lambda: [{"pixel_values": torch.randn(1, 3, 32, 32), "input_points": torch.rand(1, 1, 1, 2)} for _ in "ab"],
    ),
}

MEDIA: tuple[Family, ...] = (
    *(
        Family(
            name, "vision", partial(transformers_model, name, settings), partial(pixels, 64 if name in _LARGER else 32)
        )
        for name, settings in VISION.items()
    ),
    *(
        Family(name, "audio and time series", partial(transformers_model, name, settings), inputs)
        for name, (settings, inputs) in AUDIO.items()
    ),
    *(
        Family(name, "several modalities", partial(transformers_model, name, settings), inputs)
        for name, (settings, inputs) in MODALITIES.items()
    ),
)
