"""Padding stays out of statistics: which mask belongs to which layer, where rows come from, what the caller says."""

import copy
import json

import pytest
import torch
from calibration_cases import Block, Chain, halve_, llama, t5
from torch import nn
from torch.nn import functional

import secateur
from secateur import RecipeError, Report, StatisticsError, prune_
from secateur.calibration import Padding, gather, parameter_names, quiet, replayed
from secateur.calibration._labels import PADDED, REAL
from secateur.calibration._origins import Origins
from secateur.calibration._padding_masks import find_inputs
from secateur.layers import select_layers


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def ids(*shape, high=38):
    return torch.randint(3, high, shape)


def lengths(length, *real, left=False):
    """An attention mask."""
    places = torch.arange(length)[None]
    real = torch.tensor(real)[:, None]
    return (places >= length - real if left else places < real).long()


def statistics(model, batches, source=None, needs=("gram",), sequential=True, names=None):
    """Of all stages, each pruned before the next."""
    layers, _ = select_layers(model)
    names = parameter_names(model) if names is None else names
    paddings = [Padding.of(batch, names, source) for batch in batches]
    found = {}
    with quiet(model):
        staged = replayed(model, batches, layers, sequential=sequential)
        for index, stage in enumerate(staged.stages):
            found |= gather(staged, index, needs, paddings=paddings)
            for layer in stage.layers:
                halve_(layer)
    return found


def counts(report):
    return {layer.name: layer.tokens for layer in report.layers}


def of(report, part):
    return {layer.tokens for layer in report.layers if part in layer.name}


# Encoder-decoders.

READS_SOURCE = ("encoder.", "EncDecAttention.k", "EncDecAttention.v")


def t5_truth(source, target):
    model = t5()
    layers, _ = select_layers(model)
    return {layer.name: source if any(part in layer.name for part in READS_SOURCE) else target for layer in layers}


@pytest.mark.parametrize("length", [5, 6, 7], ids=["shorter", "equal", "longer"])
@pytest.mark.parametrize("given", ["labels", "mask", "labels_and_ids", "no_mask", "both_masks_and_labels"])
@pytest.mark.parametrize("sequential", [True, False], ids=["stages", "one_pass"])
def test_an_encoders_mask_is_not_applied_to_the_decoder(given, length, sequential):
    batch = {"input_ids": ids(2, 6), "attention_mask": lengths(6, 6, 3)}
    mask = lengths(length, 2, 4)
    if "labels" in given:
        batch["labels"] = ids(2, length).masked_fill(mask == 0, -100)
    if given != "labels":
        batch["decoder_input_ids"] = ids(2, length)
    if "mask" in given and given != "no_mask":
        batch["decoder_attention_mask"] = mask
    real = 2 * length if given == "no_mask" else 6
    got = statistics(t5(), [batch], sequential=sequential)
    assert {name: entry.tokens for name, entry in got.items()} == t5_truth(9, real)


@pytest.mark.parametrize("target", [5, 6], ids=["another_length", "the_same_length"])
def test_an_encoder_decoder_learns_the_same_from_padded_batches_and_from_single_sequences(target):
    sources, targets = [ids(1, 6), ids(1, 3)], [ids(1, 2), ids(1, 4)]
    single = [{"input_ids": a, "decoder_input_ids": b} for a, b in zip(sources, targets, strict=True)]
    padded = {
        "input_ids": torch.cat([functional.pad(x, (0, 6 - x.shape[1])) for x in sources]),
        "attention_mask": lengths(6, 6, 3),
        "decoder_input_ids": torch.cat([functional.pad(x, (0, target - x.shape[1])) for x in targets]),
        "decoder_attention_mask": lengths(target, 2, 4),
    }
    model = t5()
    expected, got = statistics(copy.deepcopy(model), single), statistics(model, [padded])
    for name, entry in expected.items():
        assert got[name].tokens == entry.tokens, name
        torch.testing.assert_close(got[name].gram, entry.gram, msg=name)


# Where masks are found.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["dict", "tuple", "list", "bool", "unnamed"])
def test_a_mask_is_found_in_every_form_of_a_batch(form, side):
    model, x, mask = llama().double(), ids(2, 6), lengths(6, 6, 3, left=side == "left")
    x = x * mask
    batch = {"input_ids": x, "attention_mask": mask}
    names = None
    if form in ("tuple", "list"):
        batch = (x, mask) if form == "tuple" else [x, mask]
    if form == "bool":
        batch["attention_mask"] = mask.bool()
    if form == "unnamed":
        batch, names = (x, mask), ()
    assert {entry.tokens for entry in statistics(model, [batch], names=names).values()} == {9}


class Nested(nn.Module):
    """Takes its inputs in dicts and tuples."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs):
        return self.first(inputs["left"]["x"]), self.second(inputs["right"][0])


def test_masks_are_found_in_nested_structures_and_belong_to_their_neighbours():
    inputs = {
        "left": {"x": torch.randn(2, 3, 4), "attention_mask": lengths(3, 3, 1)},
        "right": (torch.randn(2, 3, 4) * lengths(3, 1, 2)[..., None], lengths(3, 1, 2)),
    }
    report = prune_(Nested(), [{"inputs": inputs}], method="wanda", sparsity=0.5)
    assert counts(report) == {"first": 4, "second": 3}
    text = report.padding[""]
    assert "inputs.left.attention_mask" in text
    assert "inputs.right.1" in text


X = torch.randn(2, 3, 4)
FOUND = {
    "by_prefix": (
        {"text_ids": X, "text_mask": lengths(3, 3, 1), "audio_values": X, "audio_mask": lengths(3, 2, 3)},
        {"text_ids": "text_mask", "audio_values": "audio_mask"},
    ),
    "the_plain_one_for_all": (
        {"input_ids": X, "token_type_ids": X, "attention_mask": lengths(3, 3, 1)},
        {"input_ids": "attention_mask", "token_type_ids": "attention_mask"},
    ),
    "by_shape": (
        {"a": X, "b": torch.randn(2, 5), "attention_mask": lengths(3, 3, 1), "b_mask": lengths(5, 3, 1)},
        {"a": "attention_mask", "b": "b_mask"},
    ),
    "a_decoder_is_no_encoder": (
        {"input_ids": X, "decoder_input_ids": X, "attention_mask": lengths(3, 3, 1)},
        {"input_ids": "attention_mask", "decoder_input_ids": None},
    ),
    "an_encoder_is_no_decoder": (
        {"input_ids": X, "decoder_input_ids": X, "decoder_attention_mask": lengths(3, 3, 1)},
        {"input_ids": None, "decoder_input_ids": "decoder_attention_mask"},
    ),
    "labels_of_a_decoder": (
        {"input_ids": X, "labels": torch.tensor([[1, 2, -100]] * 2), "attention_mask": lengths(3, 3, 1)},
        {"input_ids": "attention_mask", "labels": "labels != -100"},
    ),
    "tokens_last": ({"input_features": X, "attention_mask": lengths(4, 4, 1)}, {"input_features": "attention_mask"}),
    "tokens_first": ({"x": X, "attention_mask": lengths(2, 2, 1, 1)}, {"x": "attention_mask"}),
    "no_masks": (
        {"x": X, "global_attention_mask": lengths(3, 1, 1), "head_mask": lengths(3, 2, 2), "pair_mask": X > 0},
        {"x": None, "global_attention_mask": None, "head_mask": None, "pair_mask": None},
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_each_input_gets_its_mask(name):
    batch, expected = FOUND[name]
    inputs, _ = find_inputs(batch)
    assert {entry.name: None if entry.mask is None else entry.mask.name for entry in inputs} == expected


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("attention_mask", lengths(3, 3, 1)),
        ("attention_mask", lengths(3, 3, 1).bool()),
        ("attention_mask", lengths(3, 3, 1).float()),
        ("attention_mask", (1.0 - lengths(3, 3, 1)) * -1e9),
        ("src_key_padding_mask", lengths(3, 3, 1) == 0),
        ("padding_mask", lengths(3, 3, 1) == 0),
        ("mask", lengths(3, 3, 1)),
    ],
    ids=["ints", "bools", "floats", "added", "key_padding", "padding", "mask"],
)
def test_every_kind_of_mask_says_the_same(name, mask):
    inputs, _ = find_inputs({"x": X, name: mask})
    assert torch.equal(inputs[0].mask.real, lengths(3, 3, 1).bool())


def test_a_padding_mask_that_calls_real_tokens_true_is_known_by_what_it_covers():
    """EnCodec's is such a one: where it is 0 the sound is 0."""
    mask = lengths(3, 3, 1)
    inputs, _ = find_inputs({"input_values": X * mask[..., None], "padding_mask": mask})
    assert torch.equal(inputs[0].mask.real, mask.bool())


def test_labels_of_zeros_and_ones_without_a_name_are_no_mask():
    x, labels = ids(2, 4), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    inputs, masks = find_inputs((x, labels))
    assert masks == []
    assert len(inputs) == 2


# Several modalities. What is not padded counts; what is padded does not, at whatever rate a layer runs.

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TEXT, "image_size": 8, "patch_size": 4}


def clip(length):
    transformers = pytest.importorskip("transformers")
    text = {**TEXT, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 39, "bos_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 8}, projection_dim=8)
    x = ids(2, length)
    x[0, -1] = x[1, 2] = 39
    batch = {"input_ids": x, "attention_mask": lengths(length, length, 3), "pixel_values": torch.randn(2, 3, 8, 8)}
    expected = {"text_model.encoder": length + 3, "vision_model.encoder": 10, "_projection": 2}
    return transformers.CLIPModel(config), batch, expected


def llava():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=8),
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=40, num_key_value_heads=1),
        image_token_index=39,
    )
    x = ids(2, 9)
    x[:, 1:5] = 39
    batch = {"input_ids": x, "attention_mask": lengths(9, 9, 7), "pixel_values": torch.randn(2, 3, 8, 8)}
    expected = {"language_model": 16, "vision_tower.encoder": 10, "projector": 8}
    return transformers.LlavaForConditionalGeneration(config), batch, expected


def qwen_vl():
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = {**TEXT, "hidden_size": 32, "vocab_size": 60, "num_key_value_heads": 1, "rope_parameters": rope}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**text, "bos_token_id": 1, "eos_token_id": 2}, vision_config=vision,
        image_token_id=50, video_token_id=51, vision_start_token_id=52, vision_end_token_id=53,
    )  # fmt: skip
    x = ids(2, 9)
    x[:, 1], x[:, 2:6], x[:, 6] = 52, 50, 53
    batch = {
        "input_ids": x,
        "attention_mask": lengths(9, 9, 7),
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 16),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (x == 50).long(),
    }
    return transformers.Qwen2VLForConditionalGeneration(config), batch, {"language_model": 16, "visual.blocks": 32}


def wav2vec(norm):
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        **TEXT, conv_dim=(8, 8, 8), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer", vocab_size=32,
    )  # fmt: skip
    model = transformers.Wav2Vec2Model(config)
    frames = int(model._get_feat_extract_output_lengths(torch.tensor([1000, 613])).sum())
    mask = lengths(1000, 1000, 613)
    batch = {"input_values": torch.randn(2, 1000) * mask, "attention_mask": mask}
    expected = {"encoder.layers": frames, "feature_projection": frames, "conv_layers.0": 320}
    return model, batch, expected


def whisper():
    transformers = pytest.importorskip("transformers")
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=20,
            max_target_positions=32, pad_token_id=1, bos_token_id=1, eos_token_id=1, decoder_start_token_id=2,
        )
    )  # fmt: skip
    labels = ids(2, 6).masked_fill(lengths(6, 6, 4) == 0, -100)
    batch = {"input_features": torch.randn(2, 8, 40), "attention_mask": lengths(40, 40, 23), "labels": labels}
    frames = 20 + 12  # of 40 and 23, at half the rate
    expected = {
        "encoder.layers": frames,
        "encoder_attn.k_proj": frames,
        "decoder.layers.1.fc1": 10,
    }
    return model, batch, expected


def vilt():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViltConfig(
        **VISION, vocab_size=40, max_position_embeddings=32, modality_type_vocab_size=2, max_image_length=-1
    )
    batch = {"input_ids": ids(2, 6), "attention_mask": lengths(6, 6, 3), "pixel_values": torch.randn(2, 3, 8, 8)}
    return transformers.ViltModel(config), batch, {"encoder.layer": 9 + 2 * 5}  # patches stand beside the text


def qwen_audio():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2AudioConfig(
        audio_config={"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
                      "num_mel_bins": 8, "max_source_positions": 20},
        text_config=transformers.Qwen2Config(**TEXT, vocab_size=60, num_key_value_heads=1, bos_token_id=1,
                                             eos_token_id=2).to_dict(),
        audio_token_index=50,
    )  # fmt: skip
    x = ids(2, 14)
    x[0, 1:11] = x[1, 1:7] = 50
    batch = {
        "input_ids": x, "attention_mask": lengths(14, 14, 9),
        "input_features": torch.randn(2, 8, 40), "feature_attention_mask": lengths(40, 40, 24),
    }  # fmt: skip
    return transformers.Qwen2AudioForConditionalGeneration(config), batch, {
        "language_model": 23, "audio_tower.layers": 20 + 12, "projector": 10 + 6,
    }  # fmt: skip


MODALITIES = {
    "clip": lambda: clip(6),
    "clip_with_as_many_patches_as_tokens": lambda: clip(5),
    "llava": llava,
    "qwen_vl": qwen_vl,
    "wav2vec2_layer_norm": lambda: wav2vec("layer"),
    "wav2vec2_group_norm": lambda: wav2vec("group"),
    "whisper": whisper,
    "vilt": vilt,
    "qwen_audio": qwen_audio,
}


@pytest.mark.parametrize("name", MODALITIES)
def test_models_of_several_modalities_are_calibrated_on_what_is_real(name):
    model, batch, expected = MODALITIES[name]()
    report = prune_(model, [batch], method="wanda", sparsity=0.5)
    for part, tokens in expected.items():
        assert of(report, part) == {tokens}, part
    assert all(report.padding.values())


def test_frames_of_sound_teach_the_same_as_sounds_one_by_one():
    model, batch, _ = wav2vec("layer")
    model.double()
    sounds = batch["input_values"].double()
    # As long as a whole number of frames, so that no frame is lost at the end of the shorter one.
    single = [{"input_values": sounds[:1]}, {"input_values": sounds[1:, :613]}]
    padded = [{"input_values": sounds, "attention_mask": batch["attention_mask"]}]
    expected, got = statistics(copy.deepcopy(model), single), statistics(model, padded)
    for name, entry in expected.items():
        assert got[name].tokens == entry.tokens, name
        torch.testing.assert_close(got[name].gram, entry.gram, msg=name)


# Rows that are gathered by index lose their position, and keep their origin.


class Experts(nn.Module):
    """Sends each token to one expert, in one of the ways in which models do it."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.register_buffer("router", torch.randn(4, 3))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(3))

    def forward(self, x, attention_mask):
        flat = x.reshape(-1, 4)
        chosen = (flat @ self.router).argmax(-1)
        y = torch.zeros_like(flat)
        if self.way == "sorted":
            order = chosen.argsort()
            sizes = torch.bincount(chosen, minlength=3).tolist()
            parts = flat[order].split(sizes)
            y[order] = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
            return y.view_as(x)
        for index, expert in enumerate(self.experts):
            if self.way == "bools":
                y[chosen == index] = expert(flat[chosen == index])
            elif self.way == "index_add":
                (places,) = torch.where(chosen == index)
                y.index_add_(0, places, expert(flat[places]))
            elif self.way == "index_select":
                places = (chosen == index).nonzero().squeeze(-1)
                y = y.index_copy(0, places, expert(flat.index_select(0, places)))
            else:
                places = (chosen == index).nonzero().expand(-1, 4)
                y = y.scatter(0, places, expert(flat.gather(0, places)))
        return y.view_as(x)


@pytest.mark.parametrize("way", ["bools", "index_add", "index_select", "gather", "sorted"])
def test_padding_that_a_router_sends_to_an_expert_does_not_count(way):
    model, x, mask = Experts(way).double(), torch.randn(5, 9, 4, dtype=torch.float64), lengths(9, 9, 3, 5, 1, 7)
    got = statistics(model, [{"x": x, "attention_mask": mask}], sequential=False)
    assert sum(got[f"experts.{i}.0"].tokens for i in range(3)) == 25
    real = x[mask.bool()]
    torch.testing.assert_close(sum(got[f"experts.{i}.0"].gram for i in range(3))[0], real.T @ real)
    assert all(got[f"experts.{i}.0"].tokens == got[f"experts.{i}.2"].tokens for i in range(3))


class Latents(nn.Module):
    """Learned queries read the tokens; they are no tokens, though there are as many."""

    def __init__(self, count):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(count, 8))
        self.key, self.query, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, attention_mask):
        queries = self.query(self.latents.expand(len(x), -1, -1))
        mask = attention_mask.bool()[:, None].expand(-1, queries.shape[1], -1)
        return self.out(functional.scaled_dot_product_attention(queries, self.key(x), x, mask))


def test_learned_queries_are_no_padding():
    got = statistics(Latents(4), [{"x": torch.randn(2, 6, 8), "attention_mask": lengths(6, 6, 3)}], sequential=False)
    assert {name: entry.tokens for name, entry in got.items()} == {"query": 8, "key": 9, "out": 8}


# What functions make of padding: the truth is what changes when only the padding changes.

MASK = lengths(6, 6, 3).bool()
W = torch.randn(5, 4)
FUNCTIONS = {
    "linear": lambda x: functional.linear(x, W),
    "linear_by_keyword": lambda x: functional.linear(input=x, weight=W),
    "matmul": lambda x: x @ W.T,
    "weight_first": lambda x: (nn.Parameter(W) @ x.mT).mT,
    "bmm": lambda x: torch.bmm(x, W.T.expand(2, -1, -1)),
    "addmm": lambda x: torch.addmm(torch.zeros(5), x.reshape(-1, 4), W.T),
    "einsum": lambda x: torch.einsum("btd,od->obt", x, W),
    "einsum_of_heads": lambda x: torch.einsum("bthd,od->bhto", x.unflatten(-1, (2, 2)), W[:, :2]),
    "add": lambda x: 1 + x,
    "in_place": lambda x: x.clone().add_(1).mul_(2),
    "residual": lambda x: x + functional.relu(x) * torch.sigmoid(x),
    "softmax": lambda x: x.softmax(-1),
    "layer_norm": lambda x: functional.layer_norm(x, (4,)),
    "by_hand": lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True),
    "glu": functional.glu,
    "top": lambda x: x.topk(2).values,
    "sorted_features": lambda x: x.sort(-1).values,
    "first_of_the_batch": lambda x: x.expand(3, 2, 6, 4).sort(0).values,
    "taken": lambda x: x.take(torch.arange(40, 8, -1)),
    "glu_of_channels": lambda x: functional.glu(x.mT, 1),
    "half": lambda x: x.to(torch.float16).float(),
    "where": lambda x: torch.where(x > 0, x, 2 * x),
    "masked_fill": lambda x: x.masked_fill(x > 1, 5.0),
    "heads": lambda x: x.view(2, 6, 2, 2).transpose(1, 2),
    "heads_of_queries": lambda x: functional.linear(x, W[:4]).view(2, 6, 2, 2).transpose(1, 2).reshape(2, 6, 4),
    "flat": lambda x: x.flatten(0, 1),
    "tokens_first": lambda x: x.transpose(0, 1).contiguous(),
    "seen_as_another": lambda x: x.transpose(0, 1).reshape(12, 4).view(3, 4, 4),
    "slices": lambda x: x[:, 1:-1, ::2],
    "one_token": lambda x: x[:, 4],
    "picked": lambda x: x[torch.tensor([1, 0, 1]), torch.tensor([4, 5, 0])],
    "by_bools": lambda x: x[MASK.flip(0)],
    "split": lambda x: torch.cat(x.split([2, 4], 1)[::-1], 1),
    "unbound": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "rolled": lambda x: x.roll(2, 1),
    "flipped": lambda x: x.flip(1),
    "windows": lambda x: x.unfold(1, 1, 2),
    "repeated": lambda x: x.repeat_interleave(2, 0),
    "grown": lambda x: functional.pad(x, (0, 0, 2, 1)),
    "written": lambda x: torch.zeros(2, 8, 4).slice_scatter(x, 1, 1, 7),
    "written_in_place": lambda x: _written(torch.zeros(2, 8, 4), x),
    "a_constant_is_written": lambda x: _cleared(x.clone()),
    "beside": lambda x: torch.cat([torch.ones(2, 1, 4), x], 1),
    "images_in_between": lambda x: x.masked_scatter(torch.arange(6)[None, :, None] == 1, torch.ones(2, 4)),
    "deep_copy": lambda x: copy.deepcopy({"x": x})["x"],
    "strided": lambda x: x.as_strided((2, 3, 4), (24, 8, 1)),
    "convolution": lambda x: functional.conv1d(x.mT, W[..., None][:, :, [0, 0]], stride=2).mT,
    "patches": lambda x: functional.conv2d(x[:, None], torch.ones(3, 1, 2, 4), stride=(2, 4)),
    "average": lambda x: functional.avg_pool1d(x.mT, 2).mT,
    "recurrent": lambda x: nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 3]), True).data,
}


def _written(y, x):
    y[:, 1:7] = x
    return y


def _cleared(x):
    x[..., :1] = 0
    return x


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_stands_at_padding_is_what_changes_with_it(name):
    torch.manual_seed(1)
    function, x = FUNCTIONS[name], torch.randn(2, 6, 4)
    other = torch.where(MASK[..., None], x, torch.randn(2, 6, 4) + 3)
    origins = Origins()
    origins.begin(x, 0, ~MASK[..., None])
    with origins, torch.no_grad():
        y = function(x)
    origin = origins.of(y)
    assert origin is not None
    assert origin.padded is not None, "the way was lost"
    assert origin.inputs == {0}
    with torch.no_grad():
        changes = (function(x) != function(other)).flatten(1 if y.ndim > 1 else 0)
    label = origin.padded.flatten(1 if y.ndim > 1 else 0)
    # A constant that is written into a padded row does not change, and a normed value may by chance stay what it is.
    assert not changes[label != PADDED].any()
    assert changes[label == PADDED].float().mean() > 0.7 or not (label == PADDED).any()
    assert ((label == PADDED).any() and (label != PADDED).any()) or name == "recurrent"


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (4, 2), (5, 2), (3, 0), (4, 3), (1, 0)], ids=str)
@pytest.mark.parametrize("length", [9, 10])
def test_frames_are_those_that_a_sound_has_without_padding(kernel, padding, stride, length):
    """Beyond them there is padding; only a convolution that looks back may be longer than its input."""
    x, weight = torch.randn(1, 2, 16), torch.randn(3, 2, kernel)
    padded = (torch.arange(16) >= length)[None, None]
    origins = Origins()
    origins.begin(x, 0, padded)
    with origins:
        y = functional.conv1d(x, weight, stride=stride, padding=padding)
    alone = functional.conv1d(x[..., :length], weight, stride=stride, padding=padding).shape[-1]
    real = int((origins.of(y).padded[0, 0] == REAL).sum())
    assert real == (length if stride == 1 and padding else alone)


# What the caller says.

AMBIGUOUS = {"a": X, "one_mask": lengths(3, 3, 1), "two_mask": lengths(3, 2, 2)}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)

    def forward(self, a, **masks):
        return self.outer(self.inner(a))


def test_two_explanations_are_a_question():
    with pytest.raises(StatisticsError, match=r"(?s)one_mask and two_mask .* in a\.\n.*padding=lambda batch: batch"):
        prune_(Two(), [AMBIGUOUS], method="wanda", sparsity=0.5)


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        (lambda batch: batch["one_mask"] != 0, {"inner": 4, "outer": 4}),
        (lambda batch: None, {"inner": 6, "outer": 6}),
        (
            {"inner": lambda batch: batch["one_mask"] != 0, "out*": lambda batch: batch["two_mask"] == 0},
            {"inner": 4, "outer": 2},
        ),
        ({"inner": lambda batch: None, "*": lambda batch: batch["two_mask"] != 0}, {"inner": 6, "outer": 4}),
    ],
    ids=["all", "none", "by_glob", "first_glob"],
)  # fmt: skip
def test_the_caller_may_say_what_is_padding(padding, expected):
    report = prune_(Two(), [AMBIGUOUS], method="wanda", sparsity=0.5, padding=padding)
    assert counts(report) == expected
    assert "padding" in report.padding[""]


def test_what_the_caller_says_reaches_gathered_rows_too():
    x, mask = torch.randn(5, 9, 4), lengths(9, 9, 3, 5, 1, 7)
    model = Experts("bools")
    report = prune_(
        model, [{"x": x, "attention_mask": None}], method="wanda", sparsity=0.5, padding=lambda batch: mask.bool(),
        sequential=False,
    )  # fmt: skip
    assert sum(count for name, count in counts(report).items() if name.endswith(".0")) == 25


def test_of_a_model_with_images_only_the_text_is_what_the_caller_says():
    model, batch, expected = clip(6)
    mask = batch.pop("attention_mask")
    report = prune_(model, [batch], method="wanda", sparsity=0.5, padding=lambda batch: mask.bool())
    assert of(report, "text_model.encoder") == {expected["text_model.encoder"]}
    assert of(report, "vision_model.encoder") == {10}


@pytest.mark.parametrize(
    ("padding", "error", "text"),
    [
        (lambda batch: 1, TypeError, "padding= must return a bool tensor"),
        (lambda batch: batch["one_mask"], StatisticsError, "torch.int64 of shape .* it must return a bool tensor"),
        (lambda batch: X > 0, StatisticsError, "must return a bool tensor"),
        ("attention_mask", TypeError, "padding must be a function of a batch"),
        ({"inner": "mask"}, TypeError, "padding must be a function of a batch"),
        ({"nothing": lambda batch: None}, RecipeError, "'nothing' matches none of the 2 layers"),
        ({"inner": lambda batch: torch.ones(2, 9, dtype=torch.bool)}, StatisticsError,
         r"^inner: inputs of shape \(2, 3, 4\) cannot be aligned with what padding\['inner'\] returned"),
    ],
)  # fmt: skip
def test_what_the_caller_says_is_checked(padding, error, text):
    model = Two()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        prune_(model, [AMBIGUOUS], method="wanda", sparsity=0.5, padding=padding)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# What is told, and what it costs.


def test_the_report_says_for_each_stage_what_was_left_out_and_why():
    model = t5()
    batch = {"input_ids": ids(2, 6), "attention_mask": lengths(6, 6, 3), "decoder_input_ids": ids(2, 4)}
    report = prune_(model, [batch, batch], method="wanda", sparsity=0.5)
    assert report.padding["encoder.block.0"] == "6 of 24 rows left out by attention_mask"
    assert "nothing left out: decoder_input_ids: no mask" in report.padding["decoder.block.1"]
    again = Report.from_json(report.to_json())
    assert again.padding == report.padding
    assert "Padding: 2 stages: 6 of 24 rows left out by attention_mask." in report.to_markdown()


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"x": X}, "nothing left out: the batches have no mask"),
        ({"x": X, "attention_mask": lengths(3, 3, 3)}, "nothing left out: attention_mask has no zeros"),
    ],
    ids=["no_mask", "no_zeros"],
)
def test_the_report_says_why_nothing_was_left_out(batch, text):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, attention_mask=None):
            return self.layer(x)

    assert prune_(Plain(), [batch], method="wanda", sparsity=0.5).padding == {"": text}


def test_reports_of_earlier_versions_have_no_padding():
    table = prune_(Two(), [{"a": X}], method="wanda", sparsity=0.5).to_dict()
    del table["padding"]
    report = Report.from_json(json.dumps(table))
    assert report.padding == {}
    assert "Padding" not in report.to_markdown()
    assert prune_(Two(), pattern="2:4", method="magnitude").padding == {}


class CountedBlock(Block):
    runs = 0

    def forward(self, x):
        CountedBlock.runs += 1
        return super().forward(x)


class Masked(Chain):
    def __init__(self):
        super().__init__(6, CountedBlock)

    def forward(self, x, attention_mask=None):
        return super().forward(x)


@pytest.mark.parametrize("real", [(5, 5), (5, 2)], ids=["whole", "padded"])
def test_padding_costs_no_forward_pass_and_without_it_nothing_is_followed(real, monkeypatch):
    monkeypatch.setattr(CountedBlock, "runs", 0)
    batches = [{"x": torch.randn(2, 5, 8), "attention_mask": lengths(5, *real)} for _ in range(5)]
    if real == (5, 5):
        monkeypatch.setattr(Origins, "__enter__", None)  # following would fail
    prune_(Masked(), batches, method="wanda", sparsity=0.5)
    assert CountedBlock.runs <= 6 * (2 * 5 + 4)


def test_replayed_stages_still_know_where_their_inputs_come_from():
    """Two masks of one shape: only the trace can tell, through inputs that were kept from the stage before."""

    class Streams(nn.Module):
        def __init__(self):
            super().__init__()
            self.texts = nn.ModuleList(Block(4) for _ in range(3))
            self.sounds = nn.ModuleList(Block(4) for _ in range(3))

        def forward(self, text, sound, text_mask, sound_mask):
            for block in self.texts:
                text = block(text)
            for block in self.sounds:
                sound = block(sound)
            return text, sound

    batch = {"text": X, "sound": X + 1, "text_mask": lengths(3, 3, 1), "sound_mask": lengths(3, 1, 1)}
    report = prune_(Streams(), [batch], method="wanda", sparsity=0.5)
    assert of(report, "texts") == {4}
    assert of(report, "sounds") == {2}


def test_a_way_that_cannot_be_followed_is_a_question():
    class Away(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, attention_mask):
            return self.layer(torch.cumsum(x, 1).sort(1).values.reshape(-1, 2).mT.reshape(-1, 4)[:5].sort(0).values)

    with pytest.raises(StatisticsError, match=r"(?s)^layer: inputs of shape .*padding=lambda batch"):
        prune_(Away(), [{"x": X, "attention_mask": lengths(3, 3, 1)}], method="wanda", sparsity=0.5)


def test_padding_is_documented():
    assert "padding:" in secateur.prune_.__doc__
