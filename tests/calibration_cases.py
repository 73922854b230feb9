"""Models to calibrate, and the slow truth: full passes of the real, partly pruned model, and float64 sums."""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.calibration import call_model, gather, load_batches, observe, quiet, replayed
from secateur.layers import select_layers

# The slow truth.


def slow_rows(module, x):
    """[groups, tokens, in] float64, written apart from secateur.layers."""
    if not isinstance(module, nn.Conv2d):
        return x.detach().double().reshape(1, -1, x.shape[-1])
    columns = functional.unfold(x.detach().double(), module.kernel_size, module.dilation, module.padding, module.stride)
    batch, _, positions = columns.shape
    rows = columns.view(batch, module.groups, -1, positions).permute(1, 0, 3, 2)
    return rows.flatten(1, 2)


def run(model, batch):
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def slow_inputs(model, batches, layers):
    """{layer: [groups, tokens, in]} of a copy of the model, on copies of the batches."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False
    found = {layer.name: [] for layer in layers}

    def note(name):
        return lambda module, args, output: found[name].append(slow_rows(module, args[0]).clone())

    handles = []
    for layer in layers:
        for name in {id(model.get_submodule(name)): name for name in (layer.name, *layer.tied_to)}.values():
            handles.append(model.get_submodule(name).register_forward_hook(note(layer.name)))
    # A forward hook sees the input after the layer; no layer here writes to its input, so that is the input itself.
    with torch.no_grad():
        for batch in batches:
            run(model, copy.deepcopy(batch))
    return {name: torch.cat(rows, 1) if rows else None for name, rows in found.items()}


def halve_(layer):
    """Prune a layer in a way that shows: the smaller half of every row."""
    matrix = layer.matrix().clone()
    matrix[matrix.abs() < matrix.abs().median(1, keepdim=True).values] = 0
    layer.write_(matrix)


def assert_statistics(name, got, rows, exact):
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-9} if exact else {"rtol": 1e-3, "atol": 1e-4 * float(rows.square().sum(1).max())}
    )
    assert got.tokens == rows.shape[1], name
    limits = {"rtol": 1e-9, "atol": 1e-9} if exact else {"rtol": 1e-3, "atol": 1e-3 * float(rows.abs().max())}
    torch.testing.assert_close(got.require("input_mean"), rows.mean(1), **limits, msg=lambda text: f"{name}: {text}")
    torch.testing.assert_close(
        got.require("gram").double(), rows.transpose(1, 2) @ rows, **tolerance, msg=lambda text: f"{name}: {text}"
    )
    torch.testing.assert_close(
        got.require("input_norm").double(),
        rows.square().sum(1).sqrt(),
        rtol=1e-3,
        atol=1e-6,
        msg=lambda text: f"{name}: {text}",
    )


def assert_stages_equal_the_slow_truth(model, batches, sequential=True, forward=call_model):
    """Calibrate and prune stage by stage; every statistic must be that of the model as it is at that moment."""
    with quiet(model):
        called = observe(model, load_batches(batches, torch.device("cpu")), forward).called
    layers = [layer for layer in select_layers(model)[0] if layer.runs_by_call and id(layer.modules[0]) in called]
    exact = all(parameter.dtype == torch.float64 for parameter in model.parameters())
    originals = copy.deepcopy(batches)
    with quiet(model):
        source = replayed(model, load_batches(batches, torch.device("cpu")), layers, forward, sequential)
        for index, stage in enumerate(source.stages):
            truth = slow_inputs(model, originals, stage.layers)
            gathered = gather(source, index, {"input_norm", "input_mean", "gram"})
            assert gathered.keys() == truth.keys()
            for name, rows in truth.items():
                assert_statistics(name, gathered[name], rows, exact)
            for layer in stage.layers:
                halve_(layer)
    covered = [layer.name for stage in source.stages for layer in stage.layers]
    assert sorted(covered) == sorted(layer.name for layer in layers)


def one_layer_statistics(model, batches):
    """The Gram matrix of a model with one layer."""
    layers, _ = select_layers(model)
    with quiet(model):
        source = replayed(model, load_batches(batches, torch.device("cpu")), layers)
        return gather(source, 0, {"gram"})[layers[0].name]


# Models, each with the names of its stages in order.


def tokens(batch=2, length=5, count=3):
    return [{"input_ids": torch.randint(3, 40, (batch, length))} for _ in range(count)]


def llama(layers=3, **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def llama_case():
    return llama().double(), tokens(), [f"model.layers.{i}" for i in range(3)]


def bert_case():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    return (
        transformers.BertModel(config).double(),
        tokens(),
        [*(f"encoder.layer.{i}" for i in range(3)), "pooler.dense"],
    )


def gpt2_case():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).double(), tokens(), [f"transformer.h.{i}" for i in range(3)]


def t5(layers=2):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=layers, num_heads=2, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).double()


def t5_case():
    batches = [batch | {"decoder_input_ids": torch.randint(3, 40, (2, 4))} for batch in tokens()]
    return t5(), batches, [f"{part}.block.{i}" for part in ("encoder", "decoder") for i in range(2)]


def gemma4_case():
    """Its later layers read keys and values that earlier layers put into a dict that all blocks are passed."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this transformers has no Gemma 4")
    config = transformers.Gemma4TextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, global_head_dim=8, num_kv_shared_layers=3, hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=40, max_position_embeddings=32, pad_token_id=0, sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    names = ["model.per_layer_model_projection", *(f"model.layers.{i}" for i in range(6))]
    return transformers.Gemma4ForCausalLM(config).double(), tokens(), names


class Residual(nn.Module):
    def __init__(self, channels, out, groups=1):
        super().__init__()
        stride = 1 if channels == out else 2
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=2, dilation=2)
        self.shortcut = nn.Identity() if channels == out else nn.Sequential(nn.Conv2d(channels, out, 1, stride))

    def forward(self, x):
        return functional.relu(self.conv2(functional.relu(self.norm(self.conv1(x)))) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(Residual(4, 4, groups=2), Residual(4, 4))
        self.layer2 = nn.Sequential(Residual(4, 8), Residual(8, 8, groups=8))
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        return self.last(self.layer2(self.layer1(functional.relu(self.stem(x)))).mean((2, 3)))


def images(count=3):
    return [torch.randn(2, 3, 7, 6, dtype=torch.float64) for _ in range(count)]


def resnet_case():
    return ResNet().double(), images(), ["stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "last"]


def vectors(count=3, width=8):
    return [torch.randn(4, width, dtype=torch.float64) for _ in range(count)]


def mlp_case():
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    return model.double(), vectors(), [""]


class Block(nn.Module):
    def __init__(self, width=8, hidden=12):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(functional.relu(self.up(x)))


def blocks(count=4):
    return nn.ModuleList(Block() for _ in range(count))


class UNet(nn.Module):
    """The first blocks feed the last ones directly, and one of them as a plain number."""

    def __init__(self):
        super().__init__()
        self.downs = blocks(3)
        self.ups = blocks(3)

    def forward(self, x):
        skips = []
        for block in self.downs:
            x = block(x)
            skips.append(x)
        for block in self.ups:
            x = block(x + skips.pop())
        return x


def unet_case():
    return UNet().double(), vectors(), [*(f"downs.{i}" for i in range(3)), *(f"ups.{i}" for i in range(3))]


class Chain(nn.Module):
    """Blocks one after another; how, is up to the subclass."""

    def __init__(self, count=4, block=Block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def chain_case(kind, count=4, batches=None):
    return kind().double(), batches or vectors(), [f"blocks.{i}" for i in range(count)]


class InPlaceBlock(Block):
    def forward(self, x):
        x += self.down(functional.relu(self.up(x)))
        return x


class InPlace(Chain):
    def __init__(self):
        super().__init__(block=InPlaceBlock)

    def forward(self, x):
        return super().forward(x + 0)


class InPlaceOnTheBatch(Chain):
    """The first block writes to the very tensor that the caller passed."""

    def __init__(self):
        super().__init__(block=InPlaceBlock)


class InPlaceUnreturned(InPlace):
    """Nobody looks at what the blocks return; what they wrote counts."""

    def forward(self, x):
        x = x + 0
        for block in self.blocks:
            block(x)
        return x


class TwoStreamsBlock(Block):
    def forward(self, x, residual):
        residual += x
        return super().forward(x)


class InPlaceSecondStream(Chain):
    """As fused residual and norm kernels do it: one stream is returned, the other is written to."""

    def __init__(self):
        super().__init__(block=TwoStreamsBlock)

    def forward(self, x):
        residual = torch.zeros_like(x)
        for block in self.blocks:
            x = block(x, residual)
            x = x + 0.5 * residual
        return x


class NotingBlock(Block):
    def forward(self, x, notes):
        notes.setdefault("first", x * 2)
        return super().forward(x + notes["first"])


class DictOnTheSide(Chain):
    """The first block leaves a tensor in a dict that the others read."""

    def __init__(self):
        super().__init__(block=NotingBlock)

    def forward(self, x):
        notes = {}
        for block in self.blocks:
            x = block(x, notes)
        return x


class ReadingBlock(Block):
    def __init__(self, first=False):
        super().__init__()
        self.first = first

    def forward(self, x, notes):
        if self.first:
            notes["first"] = x * 2
        return super().forward(x + notes["first"])


class DictThatMustBeFilled(DictOnTheSide):
    """The same, but without the entry the others fail."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(ReadingBlock(first=i == 0) for i in range(4))


class AttributeBlock(Block):
    def __init__(self, shared):
        super().__init__()
        self.shared = shared

    def forward(self, x):
        self.shared.count += 1
        return super().forward(x * self.shared.count)


class Shared:
    count = 0


class AttributeOnTheSide(Chain):
    """Blocks count themselves on an object that all of them hold."""

    def __init__(self):
        super().__init__()
        self.shared = Shared()
        self.blocks = nn.ModuleList(AttributeBlock(self.shared) for _ in range(4))

    def forward(self, x):
        self.shared.count = 0
        return super().forward(x)


class IndexBlock(Block):
    def forward(self, x):
        return super().forward(x), x.argmax(-1)


class IntegersFromEarlier(Chain):
    """The last block's input depends on whole numbers that the first block returned: no NaN can say so."""

    def __init__(self):
        super().__init__(block=IndexBlock)

    def forward(self, x):
        chosen = []
        for block in self.blocks:
            if len(chosen) == 3:
                x = x * (1 + chosen[0][:, None])
            x, index = block(x)
            chosen.append(index)
        return x


class ComplexBlock(Block):
    def forward(self, x):
        return super().forward(x), torch.complex(x, x)


class ComplexFromEarlier(Chain):
    def __init__(self):
        super().__init__(block=ComplexBlock)

    def forward(self, x):
        kept = []
        for block in self.blocks:
            x, spectrum = block(x)
            kept.append(spectrum)
        # The real part of the first block's spectrum reaches a layer that is none of the blocks.
        return x + kept[0].real


class ComplexSkip(ComplexFromEarlier):
    def forward(self, x):
        kept = []
        for block in self.blocks:
            if len(kept) == 3:
                x = x + kept[0].real
            x, spectrum = block(x)
            kept.append(spectrum)
        return x


class SwallowedNaN(Chain):
    """A comparison turns the NaN of a skip connection into an ordinary number."""

    def forward(self, x):
        first = None
        for index, block in enumerate(self.blocks):
            if index == 3:
                x = x * (first > 0)
            x = block(x)
            first = x if first is None else first
        return x


class Pair:
    """A container that torch knows nothing of."""

    def __init__(self, x, skip):
        self.x, self.skip = x, skip


class PairBlock(Block):
    def forward(self, pair):
        return super().forward(pair.x + pair.skip)


class OpaqueInputs(Chain):
    """Skip connections over two blocks, in an object."""

    def __init__(self):
        super().__init__(block=PairBlock)

    def forward(self, x):
        outputs = [x]
        for index, block in enumerate(self.blocks):
            outputs.append(block(Pair(outputs[-1], outputs[max(0, index - 2)])))
        return outputs[-1]


class PairToPairBlock(Block):
    def forward(self, pair):
        return Pair(super().forward(pair.x + pair.skip), pair.x)


class OpaqueOutputs(Chain):
    def __init__(self):
        super().__init__(block=PairToPairBlock)

    def forward(self, x):
        return super().forward(Pair(x, x)).x


class Albert(nn.Module):
    """One block, several times, between two layers of their own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.group = nn.ModuleList([Block(), Block()])
        self.outer = nn.Linear(8, 4)

    def forward(self, x):
        x = self.inner(x)
        for block in (self.group[0], self.group[1], self.group[0], self.group[1], self.group[0]):
            x = block(x)
        return self.outer(x)


def albert_case():
    return Albert().double(), vectors(), ["inner", "group.0", "group.1", "outer"]


class ScaledBlock(Block):
    def forward(self, x, *, scale, bias=None, nested=None):
        x = super().forward(x * scale + nested["more"][0])
        return (x if bias is None else x + bias,)


class Keywords(Chain):
    """Each layer is called in another way, and returns a tuple."""

    def __init__(self):
        super().__init__(block=ScaledBlock)

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            bias = {"bias": torch.full((8,), index, dtype=x.dtype)} if index % 2 else {}
            (x,) = block(x, scale=index + 1, nested={"more": [x.mean()]}, **bias)
        return x


class Experts(nn.Module):
    """A mixture: each token goes to the expert that its router says."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            y[chosen == index] = expert(x[chosen == index])
        return x + y


class Mixture(Chain):
    def __init__(self):
        super().__init__(block=Experts)


def mixture_case():
    return chain_case(Mixture, batches=[torch.randn(40, 8, dtype=torch.float64) for _ in range(2)])


def tied_across_blocks_case():
    model = Chain()
    model.blocks[2].up.weight = model.blocks[0].up.weight
    return model.double(), vectors(), [*(f"blocks.{i}" for i in range(4)), ""]


def module_in_two_blocks_case():
    model = Chain()
    model.blocks[2].up = model.blocks[0].up
    return model.double(), vectors(), [*(f"blocks.{i}" for i in range(4)), ""]


class ChokesOnNaN(UNet):
    def forward(self, x):
        first = self.downs[0](x)
        x = self.downs[2](self.downs[1](first))
        if first.isnan().any():
            raise FloatingPointError("NaN")
        for block in self.ups:
            x = block(x + first)
        return x


def chokes_case():
    return ChokesOnNaN().double(), vectors(), unet_case()[2]


class GlueBetween(Chain):
    """Parameters and layers between the blocks that belong to none of them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.between = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            x = block(self.norm(x) * self.scale)
            if index == 1:
                x = self.between(x)
        return x


def between_case():
    return GlueBetween().double(), vectors(), ["blocks.0", "blocks.1", "between", "blocks.2", "blocks.3"]


def torch_encoder_case():
    """PyTorch's own encoder has a fast path that calls none of its layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double()
    return model, [torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(2)], [f"layers.{i}" for i in range(3)]


CASES = {
    "llama": llama_case,
    "bert": bert_case,
    "gpt2": gpt2_case,
    "t5": t5_case,
    "gemma4": gemma4_case,
    "resnet": resnet_case,
    "mlp": mlp_case,
    "unet": unet_case,
    "in_place": lambda: chain_case(InPlace),
    "in_place_on_the_batch": lambda: chain_case(InPlaceOnTheBatch),
    "in_place_unreturned": lambda: chain_case(InPlaceUnreturned),
    "in_place_second_stream": lambda: chain_case(InPlaceSecondStream),
    "dict_on_the_side": lambda: chain_case(DictOnTheSide),
    "dict_that_must_be_filled": lambda: chain_case(DictThatMustBeFilled),
    "attribute_on_the_side": lambda: chain_case(AttributeOnTheSide),
    "integers_from_earlier": lambda: chain_case(IntegersFromEarlier),
    "complex_unused": lambda: chain_case(ComplexFromEarlier),
    "complex_from_earlier": lambda: chain_case(ComplexSkip),
    "swallowed_nan": lambda: chain_case(SwallowedNaN),
    "opaque_inputs": lambda: chain_case(OpaqueInputs),
    "opaque_outputs": lambda: chain_case(OpaqueOutputs),
    "albert": albert_case,
    "keywords": lambda: chain_case(Keywords),
    "mixture": mixture_case,
    "tied_across_blocks": tied_across_blocks_case,
    "module_in_two_blocks": module_in_two_blocks_case,
    "chokes_on_nan": chokes_case,
    "glue_between": between_case,
    "torch_encoder": torch_encoder_case,
}
