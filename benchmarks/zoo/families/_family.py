"""What a family is, and the tiny models of transformers: from configuration classes, without a download."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[], nn.Module]
Inputs = Callable[[], list[Any]]

TOKENS, VOCABULARY = 32, 128
# Sizes by the names that configuration classes have for them. All are multiples of 8, so that 2:4 fits.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"), 128),
    **dict.fromkeys(("ffn_hidden_size", "d_inner", "encoder_intermediate_size", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "d_head"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_source_positions"), 128),
    **dict.fromkeys(("max_target_positions", "context_length"), 128),
    **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop", "layerdrop"), 0.0),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    "qk_rope_head_dim": 8,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "vocab_size": VOCABULARY,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
    "projection_dim": 64,
    "state_size": 16,
    "out_hidden_size": 64,
    "num_labels": 8,
    **dict.fromkeys(("image_token_id", "image_token_index"), VOCABULARY - 1),
    **dict.fromkeys(("video_token_id", "video_token_index"), VOCABULARY - 2),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), VOCABULARY - 3),
    "vision_start_token_id": VOCABULARY - 4,
    "vision_end_token_id": VOCABULARY - 5,
    "vision_token_id": VOCABULARY - 6,
}


@dataclass(frozen=True)
class Family:
    """One line of the table.

    Args:
        name: of the family.
        group: its table.
        make: returns the model in evaluation mode; called again for each stage, with the same seed.
        inputs: returns the batches.
        heads: globs on parameter names that are output heads, besides those that transformers names.
        forward: ``forward(model, batch)``, where a batch is more than the model's arguments.
        loss: from the model's output; by default the mean square of its floating tensors.
        needs: packages besides torch.
    """

    name: str
    group: str
    make: Make
    inputs: Inputs
    heads: tuple[str, ...] = ()
    forward: Callable[[nn.Module, Any], Any] | None = None
    needs: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode()) % 2**31

    def model(self) -> nn.Module:
        """The model. Every matrix counts in its output: classes begin with zeros, or with values that hardly matter."""
        torch.manual_seed(self.seed)
        model = self.make().float().eval()
        with torch.no_grad():
            for parameter in matrices(self, model).values():
                inputs = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
                parameter.normal_(std=inputs**-0.5)
                parameter[parameter == 0] = inputs**-0.5  # so that zeros are those that were made
        return model

    def batches(self) -> list[Any]:
        torch.manual_seed(self.seed + 1)
        return self.inputs()


def tiny_config(config_class: Any, settings: Mapping[str, Any] | None = None) -> Any:
    """A configuration with small sizes; ``settings`` win. A dict for a part gives settings of that part."""
    settings = dict(settings or {})
    names = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in SMALL.items() if name in names}
    default = None
    for part, part_class in config_class.sub_configs.items():
        own = settings.pop(part, {})
        if own is None or not isinstance(own, Mapping):
            values[part] = own
            continue
        default = default or (config_class() if part_class.__name__ == "AutoConfig" else None)
        own_class = part_class if part_class.__name__ != "AutoConfig" else type(getattr(default, part))
        if own_class is not type(None):
            values[part] = tiny_config(own_class, own)
    return config_class(**(values | settings))


def transformers_model(class_name: str, settings: Mapping[str, Any]) -> nn.Module:
    import transformers

    model_class = getattr(transformers, class_name)
    model: nn.Module = model_class(tiny_config(model_class.config_class, settings))
    return model


def ids(batch: int = 4, length: int = TOKENS, high: int = 100) -> Tensor:
    return torch.randint(3, high, (batch, length))


def text() -> list[Any]:
    return [{"input_ids": ids(), "attention_mask": torch.ones(4, TOKENS, dtype=torch.long)} for _ in range(2)]


def text_pairs() -> list[Any]:
    """For encoder-decoders."""
    return [batch | {"decoder_input_ids": ids(4, 16)} for batch in text()]


def pixels(size: int = 32, channels: int = 3) -> list[Any]:
    return [{"pixel_values": torch.randn(4, channels, size, size)} for _ in range(2)]


# Parameters of several dimensions that multiply nothing: positions, learned tokens, states, biases of experts.
_NO_MATRIX = re.compile(r"embed|position|token|relative|bias|A_log|quer|latent|codebook|scale|gamma|time_|table|mem")
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def matrices(family: Family, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that hold weight matrices, outside embeddings and output heads, found without secateur.

    Depthwise convolutions are no matrices: each of their outputs reads one channel.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    left = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _EMBEDDINGS)
        for parameter in module.parameters()
    }
    left |= set() if head is None else set(map(id, head.parameters()))
    found = {}
    for prefix, module in model.named_modules():
        depthwise = isinstance(module, _CONVOLUTIONS) and module.groups > 1 and module.groups == module.in_channels
        plain = isinstance(module, (nn.Linear, *_CONVOLUTIONS))
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{own}".lstrip(".")
            if (
                parameter.ndim < 2
                or sum(size > 1 for size in parameter.shape) < 2
                or id(parameter) in left
                or depthwise
            ):
                continue
            if (not plain and _NO_MATRIX.search(own)) or any(fnmatchcase(name, glob) for glob in family.heads):
                continue
            left.add(id(parameter))
            found[name] = parameter
    return found


def run(family: Family, model: nn.Module, batch: Any) -> Any:
    """The model's output on a batch."""
    if family.forward is not None:
        return family.forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def first_line(error: Exception) -> str:
    """What a user sees first of an error; an object's address is not the same in two runs."""
    line = str(error).partition("\n")[0]
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {line if len(line) < 300 else line[:297] + '...'}")
