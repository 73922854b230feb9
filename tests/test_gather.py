"""Gathering statistics: padding kept out, sums exact, mistakes named; sources and statistics of one's own."""

import copy

import pytest
import torch
from calibration_cases import (
    CASES,
    Chain,
    assert_stages_equal_the_slow_truth,
    halve_,
    llama,
    one_layer_statistics,
    t5,
    tokens,
    vectors,
)
from torch import nn

from secateur import StatisticsError, prune_
from secateur.calibration import _gather, gather, quiet, replayed
from secateur.calibration._accumulators import Hook
from secateur.calibration._inputs import Gram
from secateur.calibration._stages import Stage
from secateur.layers import select_layers


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Padding.


def pad(sequences, side, length):
    ids, mask = (
        torch.zeros(len(sequences), length, dtype=torch.long),
        torch.zeros(len(sequences), length, dtype=torch.long),
    )
    for row, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), length)
        ids[row, where], mask[row, where] = sequence, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("case", "side"),
    [("llama", "left"), ("llama", "right"), ("bert", "right"), ("gpt2", "right")],  # absolute positions count from left
)
def test_padded_batches_teach_the_same_as_sequences_one_by_one(case, side):
    model, _, _ = CASES[case]()
    sequences = [torch.randint(3, 40, (length,)) for length in (5, 2, 7, 1)]
    padded = [pad(sequences[:2], side, 6), pad(sequences[2:], side, 7)]
    single = [{"input_ids": sequence[None]} for sequence in sequences]
    layers, _ = select_layers(model)
    with quiet(model):
        together, alone = replayed(model, padded, layers), replayed(model, single, layers)
        for index, stage in enumerate(together.stages):
            got = gather(together, index, {"gram", "input_norm"})
            expected = gather(alone, index, {"gram", "input_norm"})
            for layer in stage.layers:
                assert got[layer.name].tokens == expected[layer.name].tokens
                assert got[layer.name].tokens == (4 if "pooler" in layer.name else 15)
                torch.testing.assert_close(got[layer.name].gram, expected[layer.name].gram)
                halve_(layer)


class Reshaped(nn.Module):
    """One layer, its input in the shape that the test asks for."""

    def __init__(self, reshape):
        super().__init__()
        self.reshape = reshape
        self.layer = nn.Linear(4, 4)

    def forward(self, x, **masks):
        return self.layer(self.reshape(x))


B, T, D = 2, 3, 4
MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])

ALIGNED = {
    "batch_tokens": lambda x: x,
    "flattened": lambda x: x.reshape(B * T, D),
    "tokens_first": lambda x: x.transpose(0, 1),
    "heads_after_tokens": lambda x: x[:, :, None].expand(B, T, 5, D),
    "heads_before_tokens": lambda x: x[:, None].expand(B, 5, T, D),
}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.long) for shape in ALIGNED), ("batch_tokens", torch.bool), ("batch_tokens", torch.float32)],
    ids=str,
)
def test_masked_tokens_do_not_count_whatever_shape_they_reach_the_layer_in(shape, dtype):
    x = torch.randn(B, T, D)
    model = Reshaped(ALIGNED[shape])
    got = one_layer_statistics(model, [{"x": x, "attention_mask": MASK.to(dtype)}])
    real = x[MASK.bool()].double()
    copies = 5 if "heads" in shape else 1
    assert got.tokens == copies * 4
    torch.testing.assert_close(got.gram[0].double(), copies * real.T @ real, rtol=1e-5, atol=1e-5)


def test_one_row_a_sequence_counts_whole():
    x = torch.randn(B, T, D)
    got = one_layer_statistics(Reshaped(lambda x: x[:, 0]), [{"x": x, "attention_mask": MASK}])
    assert got.tokens == B
    torch.testing.assert_close(got.gram[0], x[:, 0].T @ x[:, 0])


def test_the_right_mask_is_found_by_its_length():
    x = torch.randn(B, T, D)
    other = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    for masks in ({"attention_mask": MASK, "decoder_attention_mask": other},
                  {"attention_mask": other, "decoder_attention_mask": MASK}):  # fmt: skip
        assert one_layer_statistics(Reshaped(lambda x: x), [{"x": x} | masks]).tokens == 4


def test_a_mask_without_padding_still_says_which_layers_it_belongs_to():
    """The decoder's tokens are all real, and the encoder's mask has another length."""
    x = torch.randn(B, T, D)
    masks = {"attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * B), "decoder_attention_mask": torch.ones(B, T)}
    assert one_layer_statistics(Reshaped(lambda x: x), [{"x": x} | masks]).tokens == B * T


def test_padding_of_an_encoder_and_a_decoder_is_kept_apart():
    """Sequences one by one are the truth, also where both sides are padded to one length."""
    model = t5()
    for decoder_length in (4, 6):
        sources = [torch.randint(3, 40, (length,)) for length in (6, 3)]
        targets = [torch.randint(3, 40, (length,)) for length in (2, 4)]
        encoder, decoder = pad(sources, "right", 6), pad(targets, "right", decoder_length)
        padded = [encoder | {f"decoder_{key}": value for key, value in decoder.items()}]
        layers, _ = select_layers(model)
        reads_source = ("encoder.", "EncDecAttention.k", "EncDecAttention.v")
        truth = {layer.name: 9 if any(part in layer.name for part in reads_source) else 6 for layer in layers}
        try:
            with quiet(model):
                gathered = gather(replayed(model, padded, layers, sequential=False), 0, {"input_norm"})
        except StatisticsError as error:
            assert decoder_length == 6, error  # noqa: PT017  saying that it cannot tell would be right as well
            continue
        assert {name: statistics.tokens for name, statistics in gathered.items()} == truth


@pytest.mark.parametrize("shape", [(B, T, T), (B, 1, T, T)], ids=str)
def test_masks_of_pairs_are_not_padding(shape):
    mask = torch.ones(shape)
    mask[..., 0] = 0
    x = torch.randn(B, T, D)
    assert one_layer_statistics(Reshaped(lambda x: x), [{"x": x, "attention_mask": mask}]).tokens == B * T


@pytest.mark.parametrize(
    ("reshape", "real"),
    [
        (lambda x: x[:, :1], 1),
        (lambda x: x[:, [0, 1, 2, 0]], 5),
        (lambda x: x.reshape(-1, D)[:5], 3),
        (lambda x: x[0, 0], 1),
    ],
    ids=["first_token", "longer", "some_rows", "one_row"],
)
def test_rows_that_no_mask_fits_are_known_by_where_they_come_from(reshape, real):
    x = torch.randn(B, T, D)
    assert one_layer_statistics(Reshaped(reshape), [{"x": x, "attention_mask": MASK}]).tokens == real
    whole = torch.ones_like(MASK)
    assert one_layer_statistics(Reshaped(reshape), [{"x": x, "attention_mask": whole}]).tokens >= real


def test_rows_of_unknown_origin_are_an_error_that_names_the_layer():
    x = torch.randn(B, T, D)
    with pytest.raises(StatisticsError, match=r"^layer: inputs of shape .* cannot be aligned with .*\(2, 3\)"):
        one_layer_statistics(Reshaped(lambda x: x.sort(1).values[:, :2]), [{"x": x, "attention_mask": MASK}])


def test_batches_without_padding_do_not_mind_those_with_it():
    x = torch.randn(B, T, D)
    batches = [{"x": x, "attention_mask": torch.ones(B, T)}, {"x": x, "attention_mask": MASK}, {"x": x}]
    assert one_layer_statistics(Reshaped(lambda x: x), batches).tokens == 6 + 4 + 6


def test_a_batch_of_nothing_but_padding_teaches_nothing():
    x = torch.randn(B, T, D)
    nothing = {"x": x, "attention_mask": torch.zeros(B, T)}
    assert one_layer_statistics(Reshaped(lambda x: x), [nothing, {"x": x, "attention_mask": MASK}]).tokens == 4
    with pytest.raises(StatisticsError, match="no calibration input ever reached it"):
        one_layer_statistics(Reshaped(lambda x: x), [nothing])


# Precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_kept_in_float32_for_a_model_in_half_precision(dtype):
    """In half precision 4096 ones plus one are 4096."""
    model = nn.Sequential(nn.Linear(2, 2, dtype=dtype))
    batches = [torch.ones(4096, 2, dtype=dtype), *(torch.ones(1, 2, dtype=dtype) for _ in range(50))]
    got = one_layer_statistics(model, batches)
    assert got.gram.dtype == torch.float32
    torch.testing.assert_close(got.gram, torch.full((1, 2, 2), 4146.0))


def test_squares_beyond_half_precision_are_finite():
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.float16))
    got = one_layer_statistics(model, [torch.full((3, 2), 300.0, dtype=torch.float16)])
    torch.testing.assert_close(got.gram, torch.full((1, 2, 2), 270000.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_language_model_in_half_precision_is_pruned_in_its_dtype(dtype):
    model = llama().to(dtype)
    batches = tokens()
    assert_stages_equal_the_slow_truth(model, batches)
    report = prune_(model, batches, pattern="2:4", method="sparsegpt")
    assert report.sparsity == 0.5
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


# Inputs that are missing or broken.


class Unused(Chain):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(8, 8)


class UnusedBlock(Chain):
    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


UNREACHED = pytest.mark.parametrize(
    ("kind", "names", "globs"),
    [
        (Unused, ["spare"], ["spare"]),
        # A glob with a star would match the blocks that run.
        (UnusedBlock, [f"blocks.{i}.{part}" for i in (2, 3) for part in ("up", "down")], None),
    ],
    ids=["layer", "block"],
)
SEQUENTIAL = pytest.mark.parametrize("sequential", [True, False], ids=["stages", "one_pass"])


@SEQUENTIAL
@UNREACHED
def test_layers_that_no_input_reaches_stay_dense_and_are_named_before(kind, names, globs, sequential):
    model = kind()
    before = copy.deepcopy(model.state_dict())
    told = []

    def progress(description, done, total):
        told.append(all(torch.equal(value, before[name]) for name, value in model.state_dict().items()))

    with pytest.warns(UserWarning, match="no calibration input reached") as warned:
        report = prune_(
            model, [torch.randn(4, 8)], method="wanda", sparsity=0.5, sequential=sequential, progress=progress
        )
    assert f"exclude={globs or names!r}" in str(warned[0].message)
    skipped = {skip.name: skip.reason for skip in report.skipped}
    assert skipped == dict.fromkeys(names, "no calibration input reached it")
    assert len(report.layers) == sum(isinstance(module, nn.Linear) for module in model.modules()) - len(names)
    for name in names:
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])


@SEQUENTIAL
@UNREACHED
def test_under_strict_a_layer_that_no_input_reaches_is_an_error_and_nothing_changes(kind, names, globs, sequential):
    model = kind()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StatisticsError, match="no calibration input reached") as raised:
        prune_(model, [torch.randn(4, 8)], method="wanda", sparsity=0.5, sequential=sequential, strict=True)
    assert f"exclude={globs or names!r}" in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class OnlyEven(Chain):
    """Its last block runs only where an input says so."""

    def forward(self, x):
        for block in self.blocks[: 4 if x[0, 0] > 0 else 3]:
            x = block(x)
        return x


def test_a_layer_that_a_later_batch_reaches_is_pruned():
    batches = [-torch.rand(4, 8), -torch.rand(4, 8), torch.rand(4, 8)]
    report = prune_(OnlyEven(), batches, method="wanda", sparsity=0.5, strict=True)
    assert not report.skipped
    assert {layer.name: layer.tokens for layer in report.layers}["blocks.3.up"] == 4


def test_a_layer_that_no_input_reaches_can_be_excluded():
    report = prune_(Unused(), [torch.randn(4, 8)], method="wanda", sparsity=0.5, exclude=["spare"])
    assert len(report.layers) == 8
    assert [(skip.name, skip.reason) for skip in report.skipped] == [("spare", "excluded")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_inputs_that_are_not_finite_are_named(value):
    bad = torch.randn(4, 8)
    bad[1, 2] = bad[3, 3] = value
    with pytest.raises(StatisticsError, match=r"^blocks\.0\.up: 2 of 32 input values are NaN or infinite"):
        prune_(Chain(), [torch.randn(4, 8), bad], method="wanda", sparsity=0.5)


class Divides(Chain):
    def forward(self, x):
        x = self.blocks[1](self.blocks[0](x))
        return self.blocks[2](x / 0.0)


def test_numbers_that_the_model_itself_spoils_are_named_where_they_first_arrive():
    with pytest.raises(StatisticsError, match=r"^blocks\.2\.up: "):
        prune_(Divides(3), [torch.randn(4, 8)], method="wanda", sparsity=0.5)


def test_inputs_too_large_for_the_sums_are_an_error_that_does_not_blame_nan():
    with pytest.raises(StatisticsError) as raised:
        one_layer_statistics(nn.Sequential(nn.Linear(2, 2)), [torch.full((3, 2), 3e38)])
    assert "0 of" not in str(raised.value)


def test_nan_at_padding_does_not_matter():
    x = torch.randn(B, T, D)
    x[~MASK.bool()] = float("nan")
    assert one_layer_statistics(Reshaped(lambda x: x), [{"x": x, "attention_mask": MASK}]).tokens == 4


def test_nan_at_padding_costs_time_but_changes_nothing():
    """A row of nothing but padding makes some attentions return NaN; that must not be taken for poison."""

    class Masked(Chain):
        def forward(self, x, attention_mask):
            for block in self.blocks:
                x = block(x).masked_fill(attention_mask[..., None] == 0, float("nan"))
            return x

    model = Masked().double()
    x = torch.randn(B, T, 8, dtype=torch.float64)
    batches = [{"x": x, "attention_mask": MASK}]
    layers, _ = select_layers(model)
    with quiet(model):
        source = replayed(model, batches, layers)
        for index, stage in enumerate(source.stages):
            expected = x[MASK.bool()]
            for block in model.blocks[:index]:
                expected = block(expected)
            got = gather(source, index, {"gram"})[f"blocks.{index}.up"]
            torch.testing.assert_close(got.gram[0], expected.T @ expected)
            for layer in stage.layers:
                halve_(layer)


@pytest.mark.parametrize(
    "needs", [set(), {"input_norm"}, {"gram"}, {"gram", "input_norm"}], ids=lambda needs: " ".join(sorted(needs))
)
def test_exactly_what_is_needed_is_gathered(needs):
    model = nn.Sequential(nn.Linear(4, 4))
    layers, _ = select_layers(model)
    with quiet(model):
        got = gather(replayed(model, [torch.randn(3, 4)], layers), 0, needs)["0"]
    assert got.tokens == 3
    assert {name for name in ("gram", "input_norm") if getattr(got, name) is not None} == needs


def test_batches_are_counted_as_they_are_done():
    model = Chain()
    layers, _ = select_layers(model)
    batches = [torch.randn(4, 8) for _ in range(3)]
    with quiet(model):
        source = replayed(model, batches, layers)
        for index in range(4):
            done = []
            gather(source, index, {"gram"}, done.append)
            assert done == [1, 2, 3]


# Other sources and other statistics fit in.


class Streamed:
    """Blocks one after the other, each on the stored outputs of the one before: the model never runs as a whole."""

    def __init__(self, model, batches, layers):
        self.stages = tuple(
            Stage(f"blocks.{i}", block, tuple(layer for layer in layers if layer.name.startswith(f"blocks.{i}.")))
            for i, block in enumerate(model.blocks)
        )
        self.batches = batches
        self.inputs = list(batches)

    def run(self, stage_index, batch_index):
        x = self.inputs[batch_index]
        if stage_index:
            x = self.stages[stage_index - 1].module(x)
        self.inputs[batch_index] = x
        return self.stages[stage_index].module(x)


def test_a_source_may_bring_its_blocks_itself():
    model, batches = Chain().double(), vectors()
    layers, _ = select_layers(model)
    with quiet(model):
        whole, streamed = replayed(model, batches, layers), Streamed(model, batches, layers)
        for index, stage in enumerate(streamed.stages):
            expected, got = gather(whole, index, {"gram"}), gather(streamed, index, {"gram"})
            assert expected.keys() == got.keys()
            for layer in stage.layers:
                torch.testing.assert_close(got[layer.name].gram, expected[layer.name].gram, rtol=0, atol=0)
                halve_(layer)


def attach_to_gradients(layer, module, report):
    def see(module, inputs, outputs):
        report(outputs[0], outputs[0].reshape(1, -1, outputs[0].shape[-1]))

    return module.register_full_backward_hook(see)


class GramOfGradients(Gram):
    """Stands in the table for the Gram matrix of the inputs, so that it needs no field of its own."""

    hook = Hook(attach_to_gradients)


class Backward:
    """A source that runs the loss backward."""

    def __init__(self, model, batches, layers):
        self.model, self.stages, self.batches = model, (Stage("", model, tuple(layers)),), batches

    def run(self, stage_index, batch_index):
        with torch.enable_grad():
            self.model(self.batches[batch_index]).square().sum().backward()


def test_a_statistic_of_gradients_is_another_hook(monkeypatch):
    monkeypatch.setitem(_gather.STATISTICS, "gram", GramOfGradients)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    batches = [torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    layers, _ = select_layers(model)
    got = gather(Backward(model, batches, layers), 0, {"gram", "input_norm"})
    x = torch.cat(batches).detach()
    hidden = model[0](x)
    last = 2 * model[1](hidden)
    first = last @ model[1].weight
    for name, gradient, rows in (("0", first, x), ("1", last, hidden)):
        torch.testing.assert_close(got[name].gram[0], (gradient.T @ gradient).detach())
        torch.testing.assert_close(got[name].input_norm[0], rows.norm(dim=0).float().detach())
        assert got[name].tokens == 10
    assert not any(module._backward_hooks or module._forward_pre_hooks for module in model)


def test_a_statistic_that_needs_a_loss_is_refused():
    model, batches, _ = CASES["mlp"]()
    with quiet(model):
        source = replayed(model, batches, select_layers(model)[0])
        with pytest.raises(StatisticsError, match="input_gradients cannot be gathered from inputs alone"):
            gather(source, 0, {"gram", "input_gradients"})
