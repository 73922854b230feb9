"""Models of torchvision, timm and diffusers, by their names and arguments; they are run where those packages are."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from families._family import Family, Inputs

HEADS = ("fc.*", "head.*", "heads.*", "classifier*", "*.classifier.*", "last_linear.*")


def import_torchvision() -> None:
    """Import it, also beside a torch without CUDA.

    Its wheel then finds no compiled operators. No model here needs one, but the import itself names two.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # declarations last as long as this object


def library_model(module: str, name: str, settings: dict[str, Any]) -> nn.Module:
    import_torchvision()
    model: nn.Module = getattr(importlib.import_module(module), name)(**settings)
    return model


def timm_model(name: str, settings: dict[str, Any]) -> nn.Module:
    """A model by its name or, for sizes that a name does not let us choose, by the module and class of timm."""
    import_torchvision()
    create_model = importlib.import_module("timm").create_model
    module, _, class_name = name.rpartition(".")
    settings = {"num_classes": 8, **settings}
    made: nn.Module
    if not module:
        made = create_model(name, **settings)
    else:
        source = importlib.import_module(f"timm.models.{module}")
        parts = {key: getattr(source, value) for key, value in settings.items() if key.endswith("_layer")}
        made = getattr(source, class_name)(**settings | parts)
    return made


def images(size: int = 32, batch: int = 4) -> list[Any]:
    return [torch.randn(batch, 3, size, size) for _ in range(2)]


_VIT = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
_SWIN = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
TORCHVISION: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet18": ("torchvision.models", {}, 32),
    "squeezenet1_1": ("torchvision.models", {}, 32),
    "DenseNet": ("torchvision.models", {"growth_rate": 8, "block_config": (2, 2), "num_init_features": 16}, 32),
    "mobilenet_v2": ("torchvision.models", {"width_mult": 0.25}, 32),
    "mobilenet_v3_small": ("torchvision.models", {}, 32),
    "shufflenet_v2_x0_5": ("torchvision.models", {}, 32),
    "mnasnet0_5": ("torchvision.models", {}, 32),
    "efficientnet_b0": ("torchvision.models", {}, 32),
    "regnet_y_400mf": ("torchvision.models", {}, 32),
    "googlenet": ("torchvision.models", {"aux_logits": False, "init_weights": False}, 32),
    "VisionTransformer": ("torchvision.models", _VIT, 32),
    "SwinTransformer": ("torchvision.models", _SWIN, 32),
    "SwinTransformer V2": ("torchvision.models", _SWIN, 32),
    "MaxVit": (
        "torchvision.models",
        {
            **{"input_size": (32, 32), "stem_channels": 16, "partition_size": 4, "block_channels": [16, 32]},
            **{"block_layers": [1, 1], "head_dim": 16, "stochastic_depth_prob": 0.0},
        },
        32,
    ),
}

_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
_MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_blocks": 2}
TIMM: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": (_SMALL, 32),
    "deit3_small_patch16_224": (_SMALL, 32),
    "beit_base_patch16_224": (_SMALL, 32),
    "eva02_tiny_patch14_224": (_SMALL, 32),
    "cait_xxs24_224": (_SMALL, 32),
    "xcit_nano_12_p16_224": ({"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}, 32),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
        32,
    ),
    "swinv2_tiny_window8_256": (
        {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
        32,
    ),
    "mlp_mixer.MlpMixer": (_MIXER, 32),
    "mlp_mixer.MlpMixer gMLP": (
        _MIXER | {"block_layer": "SpatialGatingBlock", "mlp_layer": "GatedMlp", "mlp_ratio": 2},
        32,
    ),
    "convmixer.ConvMixer": ({"dim": 64, "depth": 2, "kernel_size": 3, "patch_size": 4}, 32),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 64)}, 32),
    "resnet10t": ({"channels": (16, 32, 64, 128)}, 32),
    "resnetv2_50": ({"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128), "stem_chs": 16}, 32),
    "nf_resnet26": ({"depths": (1, 1, 1, 1), "channels": (16, 32, 64, 128), "stem_chs": 16}, 32),
    "regnetx_002": ({}, 32),
    "efficientnet_lite0": ({}, 32),
    "mobilenetv3_small_050": ({}, 32),
    "mobilenetv4_conv_small_050": ({}, 32),
    "fastvit_t8": ({"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64)}, 64),
    "levit_128s": ({"embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 3, 4), "key_dim": 16}, 224),
    "pvt_v2_b0": ({"depths": (1, 1, 1, 1)}, 32),
    "edgenext_xx_small": ({"depths": (1, 1, 2, 1), "dims": (16, 32, 32, 64)}, 64),
    "hiera_tiny_224": ({"img_size": (64, 64), "embed_dim": 16, "stages": (1, 1, 1, 1)}, 64),
    "tf_efficientnetv2_b0": ({"channel_multiplier": 0.25, "depth_multiplier": 0.3}, 32),
}


def diffusion(latent: tuple[int, ...], **more: Any) -> list[Any]:
    """Noisy latents, a time step, and what else conditions the model: shapes or values."""

    def batch() -> dict[str, Any]:
        given = {name: torch.randn(*value) if isinstance(value, tuple) else value for name, value in more.items()}
        return {"hidden_states": torch.randn(*latent), "timestep": torch.tensor([10.0] * latent[0])} | given

    return [batch() for _ in range(2)]


def noisy_images(**more: Any) -> list[Any]:
    batches = diffusion((4, 4, 16, 16), **more)
    return [{"sample": batch.pop("hidden_states"), **batch} for batch in batches]


def latents(channels: int = 3) -> list[Any]:
    return [torch.randn(4, channels, 32, 32) for _ in range(2)]


_UNET = {
    **{"sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64), "norm_num_groups": 8},
    "layers_per_block": 1,
}
_TEXT = {"encoder_hidden_states": (4, 8, 64)}
DIFFUSERS: dict[str, tuple[dict[str, Any], Inputs]] = {
    "UNet2DModel": (
        {
            **_UNET,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        noisy_images,
    ),
    "UNet2DConditionModel": (
        {
            **_UNET,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 64,
            "attention_head_dim": 4,
        },
        partial(noisy_images, **_TEXT),
    ),
    "AutoencoderKL": (
        {
            **{"block_out_channels": (16, 32), "norm_num_groups": 8, "sample_size": 32, "latent_channels": 4},
            **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        },
        latents,
    ),
    "AutoencoderTiny": ({"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}, latents),
    "VQModel": (
        {"block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4}
        | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        latents,
    ),
    "DiTTransformer2DModel": (
        {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 16},
        partial(diffusion, (4, 4, 16, 16), class_labels=torch.tensor([1, 2, 3, 4])),
    ),
    "PixArtTransformer2DModel": (
        {
            **{"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 16},
            **{"cross_attention_dim": 64, "caption_channels": 64, "use_additional_conditions": False},
        },
        partial(diffusion, (4, 4, 16, 16), **_TEXT),
    ),
    "SD3Transformer2DModel": (
        {
            **{"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16},
            **{"num_attention_heads": 4, "joint_attention_dim": 64, "caption_projection_dim": 64},
            **{"pooled_projection_dim": 64, "pos_embed_max_size": 16},
        },
        partial(diffusion, (4, 4, 16, 16), pooled_projections=(4, 64), **_TEXT),
    ),
    "FluxTransformer2DModel": (
        {
            **{"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16},
            **{"num_attention_heads": 4, "joint_attention_dim": 64, "pooled_projection_dim": 64},
            "axes_dims_rope": (4, 4, 8),
        },
        partial(
            diffusion,
            (4, 16, 16),
            pooled_projections=(4, 64),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
            **_TEXT,
        ),
    ),
    "SanaTransformer2DModel": (
        {
            **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 16},
            **{"num_layers": 2, "num_cross_attention_heads": 4, "cross_attention_head_dim": 16},
            **{"cross_attention_dim": 64, "caption_channels": 64, "sample_size": 16},
        },
        partial(diffusion, (4, 4, 16, 16), **_TEXT),
    ),
    "AuraFlowTransformer2DModel": (
        {
            **{"sample_size": 16, "num_mmdit_layers": 1, "num_single_dit_layers": 2, "attention_head_dim": 16},
            **{"num_attention_heads": 4, "joint_attention_dim": 64, "caption_projection_dim": 64},
            "pos_embed_max_size": 256,
        },
        partial(diffusion, (4, 4, 16, 16), **_TEXT),
    ),
    "WanTransformer3DModel": (
        {
            **{"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4},
            **{"text_dim": 64, "freq_dim": 32, "ffn_dim": 128, "num_layers": 2},
        },
        partial(diffusion, (2, 4, 2, 16, 16), encoder_hidden_states=(2, 8, 64)),
    ),
}


def returned(model: nn.Module, batch: Any) -> Any:
    """Outputs of diffusers are objects; as tuples they are tensors."""
    return model(**batch, return_dict=False) if isinstance(batch, dict) else model(batch, return_dict=False)


def _torchvision(name: str, module: str, settings: dict[str, Any], size: int) -> Family:
    settings = {"num_classes": 8, **settings}
    if name == "VisionTransformer":
        module = "torchvision.models.vision_transformer"
    elif name.startswith("SwinTransformer"):
        module = "torchvision.models.swin_transformer"
    make = partial(swin_v2, settings) if name.endswith("V2") else partial(library_model, module, name, settings)
    return Family(f"torchvision {name}", "torchvision", make, partial(images, size), HEADS, needs=("torchvision",))


def swin_v2(settings: dict[str, Any]) -> nn.Module:
    import_torchvision()
    swin = importlib.import_module("torchvision.models.swin_transformer")
    model: nn.Module = swin.SwinTransformer(
        **settings, block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2
    )
    return model


LIBRARIES: tuple[Family, ...] = (
    *(_torchvision(name, *entry) for name, entry in TORCHVISION.items()),
    *(
        Family(
            f"timm {name}",
            "timm",
            partial(timm_model, name.partition(" ")[0], settings),
            partial(images, size),
            HEADS,
            needs=("timm",),
        )
        for name, (settings, size) in TIMM.items()
    ),
    *(
        Family(
            f"diffusers {name}",
            "diffusers",
            partial(library_model, "diffusers", name, settings),
            inputs,
            forward=returned,
            needs=("diffusers",),
        )
        for name, (settings, inputs) in DIFFUSERS.items()
    ),
)
