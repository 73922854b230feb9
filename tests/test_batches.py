"""Calibration batches: read once, passed as their type suggests, hashed."""

import copy

import pytest
import torch
from calibration_cases import Chain, one_layer_statistics, vectors
from torch import nn

from secateur import StatisticsError, prune_
from secateur.calibration import hash_batches


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, a, b=None):
        return self.layer(a if b is None else a + b)


def batch_encoding(**tensors):
    return pytest.importorskip("transformers").BatchEncoding(tensors)


A, C = torch.randn(3, 4), torch.randn(3, 4)
BATCHES = {
    "tensors": (lambda: [A, C], [A, C]),
    "tuples": (lambda: [(A, C), (A,)], [A + C, A]),
    "lists": (lambda: [[A, C], [C]], [A + C, C]),
    "dicts": (lambda: [{"b": A, "a": C}, {"a": A}], [A + C, A]),
    "batch_encodings": (lambda: [batch_encoding(a=A, b=C)], [A + C]),
    "a_tuple_of_tensors": (lambda: (A, C), [A, C]),
    "mixed": (lambda: [A, (A, C), {"a": C}], [A, A + C, C]),
    "dict_values": ({"x": A, "y": C}.values, [A, C]),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_are_passed_as_their_type_suggests(kind):
    make, inputs = BATCHES[kind]
    rows = torch.cat(inputs)
    torch.testing.assert_close(one_layer_statistics(Sum(), make()).gram[0], rows.T @ rows)


def test_a_generator_is_read_once_though_every_block_needs_it():
    handed_out = []

    def generate():
        for x in vectors():
            handed_out.append(x)
            yield x

    report = prune_(Chain().double(), generate(), method="wanda", sparsity=0.5)
    assert len(handed_out) == 3
    assert {layer.tokens for layer in report.layers} == {12}


def test_a_shuffling_loader_is_read_once():
    data = torch.randn(10, 8)
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
    model = Chain()
    order = torch.get_rng_state()
    expected = list(loader)
    torch.set_rng_state(order)
    report = prune_(model, loader, method="wanda", sparsity=0.5)
    assert {layer.tokens for layer in report.layers} == {10}
    assert report.calibration_hash == hash_batches(expected)


def test_batches_may_be_part_of_a_graph():
    x = torch.randn(4, 8)
    own, plain = Chain(), Chain()
    plain.load_state_dict(own.state_dict())
    prune_(own, [2 * x.clone().requires_grad_()], method="wanda", sparsity=0.5)
    prune_(plain, [2 * x], method="wanda", sparsity=0.5)
    torch.testing.assert_close(own.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_torch_encoder_with_padding_is_calibrated_though_its_fast_path_packs_the_batch():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 3)
    mask = torch.tensor([[False] * 5, [False, False, True, True, True]])
    report = prune_(model, [{"src": torch.randn(2, 5, 8), "src_key_padding_mask": mask}], method="wanda", sparsity=0.5)
    assert {layer.tokens for layer in report.layers} <= {7, 10}  # only an attention_mask says what does not count


@pytest.mark.parametrize("empty", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_batches_at_all_are_an_error(empty):
    with pytest.raises(StatisticsError, match="empty"):
        prune_(Chain(), empty, method="wanda", sparsity=0.5)


@pytest.mark.parametrize("one", [A, {"a": A}, "text"], ids=["tensor", "dict", "str"])
def test_one_batch_instead_of_several_is_an_error(one):
    model = Sum()
    before = model.layer.weight.detach().clone()
    with pytest.raises(TypeError, match="iterable of batches"):
        prune_(model, one, method="wanda", sparsity=0.5)
    torch.testing.assert_close(model.layer.weight.detach(), before)


def test_a_batch_encoding_alone_is_one_batch():
    with pytest.raises(TypeError, match="BatchEncoding"):
        prune_(Sum(), batch_encoding(a=A), method="wanda", sparsity=0.5)


def test_a_forward_of_the_callers_own_runs_batches_of_any_type():
    class Odd:
        def __init__(self, x):
            self.x = x

    batches = vectors()
    own, plain = Chain().double(), Chain().double()
    plain.load_state_dict(own.state_dict())
    prune_(own, [Odd(x) for x in batches], method="wanda", sparsity=0.5, forward=lambda model, odd: model(odd.x))
    prune_(plain, batches, method="wanda", sparsity=0.5)
    torch.testing.assert_close(own.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "other",
    [
        [torch.zeros(2, 2)],
        [torch.zeros(2, 2), torch.zeros(1)],
        [torch.zeros(4)],
        [torch.zeros(4, dtype=torch.float64)],
        [torch.tensor([1.0, 0, 0, 0])],
        [{"a": torch.zeros(4), "b": torch.ones(4)}],
        [{"a": torch.ones(4), "b": torch.zeros(4)}],
        [torch.zeros(4, dtype=torch.bfloat16)],
        [torch.zeros(4, dtype=torch.bool)],
        [torch.zeros(0, 4)],
        [torch.tensor(0.0)],
        [(torch.zeros(4), 1)],
        [(torch.zeros(4), 2)],
    ],
)
def test_different_batches_have_different_hashes_and_equal_ones_the_same(other):
    assert hash_batches([torch.zeros(3)]) != hash_batches(other)
    assert hash_batches(other) == hash_batches(copy.deepcopy(other))


def test_hashes_depend_on_values_in_order_not_on_memory_layout():
    x = torch.randn(3, 4)
    assert hash_batches([x]) == hash_batches([x.T.contiguous().T])
    assert hash_batches([x, x + 1]) != hash_batches([x + 1, x])
    assert hash_batches([{"a": x, "b": x + 1}]) != hash_batches([{"b": x, "a": x + 1}])
